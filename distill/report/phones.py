"""What phones measured of a run's files, beside the host: device.json of the run's folder, see distill.device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distill.errors import UserError
from distill.files import read_json, write_json
from distill.progress import say
from distill.report.tables import MISSING, Row

FILE = "device.json"
SAID = (
    "One image on one thread; on the phone by the runtime's own benchmark program: the median where that tells it, "
    "else the mean. Memory: the peak of its process."
)


@dataclass(frozen=True)
class Timing:
    """Of one file on one phone; None: the program does not tell it."""

    file: str
    digest: str  # of the file that was measured
    tool: str  # the program that ran it
    runs: int
    mean_ms: float
    median_ms: float | None = None
    std_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    p95_ms: float | None = None
    peak_mb: float | None = None  # 2^20 bytes

    def __post_init__(self):
        texts = (self.file, self.digest, self.tool)
        numbers = [value for value in asdict(self).values() if value not in texts]
        fine = all(value is None or (isinstance(value, (int, float)) and math.isfinite(value)) for value in numbers)
        if not fine or not all(isinstance(each, str) for each in texts) or None in (self.mean_ms, self.runs):
            raise ValueError("no timing")

    @property
    def latency_ms(self) -> float:
        return self.mean_ms if self.median_ms is None else self.median_ms


@dataclass(frozen=True)
class Phone:
    model: str
    sdk: str  # of Android
    abi: str
    date: str  # of the last measurement
    timings: tuple[Timing, ...]

    @property
    def name(self) -> str:
        return f"{self.model} (Android SDK {self.sdk})"


def read(folder: Path, rows: Iterable[Row] | None = None) -> list[Phone]:
    """What is in the folder's device.json; nothing where there is none, or where it is damaged, which is said.

    Args:
        rows: of the report; what was measured of other files than these is left out.
    """
    try:
        found = [_phone(each) for each in read_json(folder / FILE)["phones"]] if (folder / FILE).is_file() else []
    except (UserError, LookupError, TypeError, ValueError, AttributeError) as error:
        say(f"warning: {folder / FILE} is left out: {error if isinstance(error, UserError) else 'it is damaged'}")
        return []
    if rows is None:
        return found
    known = {(row.name, row.digest) for row in rows}
    kept = [(phone, [each for each in phone.timings if (each.file, each.digest) in known]) for phone in found]
    return [Phone(phone.model, phone.sdk, phone.abi, phone.date, tuple(timings)) for phone, timings in kept if timings]


def _phone(told: Mapping) -> Phone:
    texts = [str(told[name]) for name in ("model", "sdk", "abi", "date")]
    return Phone(*texts, tuple(Timing(**timing) for timing in told["timings"]))


def write(folder: Path, phone: Phone) -> None:
    """Adds to device.json what this phone measured; what it or others measured of other files stays."""
    before = read(folder)
    new = {timing.file for timing in phone.timings}
    same = [timing for each in before if each.name == phone.name for timing in each.timings if timing.file not in new]
    timings = tuple(sorted([*same, *phone.timings], key=lambda timing: timing.file))
    now = Phone(phone.model, phone.sdk, phone.abi, phone.date, timings)
    write_json(folder / FILE, {"phones": [asdict(each) for each in before if each.name != phone.name] + [asdict(now)]})


def table(phone: Phone, rows: Sequence[Row]) -> list[list[str]]:
    """Header, and a line for each file: the host's latency, and what the phone measured."""
    hosts = {row.name: row for row in rows}

    def shown(value: float | None, spec: str = ".2f") -> str:
        return MISSING if value is None else format(value, spec)

    lines = [["file", "host ms", "phone ms", "± ms", "p95 ms", "peak MB", "runs", "program"]]
    for each in phone.timings:
        host = hosts[each.file].latency_ms if each.file in hosts else None
        figures = (host, each.latency_ms, each.std_ms, each.p95_ms)
        lines.append([each.file, *map(shown, figures), shown(each.peak_mb, ".1f"), f"{each.runs:,}", each.tool])
    return lines
