"""A sweep's folder: its jobs, by what they vary. Never imports torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from distill import locks
from distill.errors import DamagedError, UserError
from distill.files import MOST, atomic, damaged, read_json

ROOT = "outputs/sweeps"
FILE = "sweep.json"  # what all jobs of a sweep have in common
LOCK = ".lock"  # in a run's folder, of the process that is at work there
ERROR = "error.txt"  # in the folder of a job that ended before it was a run
LIST = r"^\[(.*)\]$"
LONGEST = 100  # characters of a job's name


def read_sweep(folder: Path) -> dict:
    """A sweep's record: "fixed", the words that all its jobs have, and "command", those that began it.

    Raises:
        DamagedError: it is not one that a sweep wrote.
    """
    found = read_json(folder / FILE, MOST)
    for key in ("fixed", "command"):
        if not (isinstance(found.get(key), list) and all(isinstance(word, str) for word in found[key])):
            raise damaged(
                folder / FILE, f"it says nothing that makes sense of its {key}; start another sweep, sweep=NAME"
            )
    return found


def again(folder: Path) -> list[str]:
    """The words that make a sweep go on."""
    place = f"sweep={folder.name}" if folder.parent == Path(ROOT) else f"hydra.sweep.dir={folder}"
    return ["-m", *read_sweep(folder)["command"], place]


def varied(folder: Path, words: Sequence[str]) -> dict[str, str]:
    """What a job, with these words, has apart from other jobs of its sweep, as written: value by option. Nothing where
    the sweep's record is damaged, which is for `damaged_records` to tell."""
    fixed = words
    with suppress(DamagedError):
        fixed = read_sweep(folder)["fixed"] if (folder / FILE).is_file() else words
    apart = (word.lstrip("+~").partition("=") for word in words if word not in fixed)
    return {key: value for key, _, value in apart}


def damaged_records(runs: Iterable[Path]) -> list[str]:
    """A line for each sweep of these runs whose record is damaged: what it varies isn't known."""
    lines = []
    for folder in dict.fromkeys(run.parent for run in runs):
        try:
            if (folder / FILE).is_file():
                read_sweep(folder)
        except DamagedError as error:
            lines.append(f"{error}; until then its options have no columns")
    return lines


def job_name(folder: str, words: Sequence[str], number: int) -> str:
    """A job's folder in its sweep's: by what it varies (`kd.temperature=4,seed=1`), else by its number.

    What no file's name should hold becomes a dash, and then, or where it is longer than LONGEST, the end of the name is
    a hash of it all.
    """
    apart = varied(Path(folder), words)
    if not apart:
        return str(number)
    short = shortened(list(apart))
    parts = [f"{short[key]}={re.sub(LIST, _joined, value)}" for key, value in apart.items()]
    text = ",".join(parts)
    name = re.sub(r"[^\w.,=+-]", "-", text, flags=re.ASCII)[:LONGEST]
    if name == text:
        return name
    return f"{name[: LONGEST - 9]}-{hashlib.sha256(repr(apart).encode()).hexdigest()[:8]}"


def _joined(match: re.Match) -> str:
    return "+".join(part.strip() for part in match[1].split(",")) or "none"


def shortened(keys: Sequence[str]) -> dict[str, str]:
    """Each option's last two words, where that names it among `keys`: kd.temperature for loss.kd.temperature."""
    short = {key: ".".join(key.split(".")[-2:]) for key in keys}
    return {key: name if list(short.values()).count(name) == 1 else key for key, name in short.items()}


def unstarted(folder: Path) -> dict[str, str]:
    """Jobs of a sweep that ended before they were a run: their error by name."""
    files = sorted(file for file in folder.glob(f"*/{ERROR}") if not (file.parent / "run.json").exists())
    return {file.parent.name: file.read_text(encoding="utf-8").strip() for file in files}


def is_at_work(job: Path) -> bool:
    """Whether another process trains in the folder."""
    return (job / "run.json").is_file() and locks.held(job / LOCK)


def note_error(job: Path, text: str) -> None:
    """Say in a job's folder why it didn't become a run."""
    with suppress(OSError), atomic(job / ERROR) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def is_done(job: Path, words: Sequence[str]) -> bool:
    """Whether the folder holds a finished run of just these words."""
    with suppress(UserError):
        record = read_json(job / "run.json", MOST) if (job / "run.json").is_file() else {}
        return record.get("status") == "done" and record.get("overrides") == list(words)
    return False
