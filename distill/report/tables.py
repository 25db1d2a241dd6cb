"""The report of a run: what each model is worth and costs, as JSON, Markdown, a plot and a terminal table."""

import io
import re
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path

from distill.errors import UserError
from distill.files import size as bytes_of
from distill.progress import say
from distill.runs.tables import read_report

ORDER = ("teacher", "student alone", "student", "student (last epoch)")  # then the files, by name
MISSING = "–"


@dataclass(frozen=True)
class Row:
    """One model's figures; None where one was not measured. Shares are in [0, 1]."""

    name: str  # one of ORDER, or an artifact's file name
    top1: float | None = None
    top5: float | None = None
    ece: float | None = None
    teacher_agreement: float | None = None  # top-1, with the teacher
    student_agreement: float | None = None  # top-1, with the float student
    student_delta: float | None = None  # max |Δlogit| to the float student
    parameters: int | None = None
    macs: int | None = None
    bytes: int | None = None
    latency_ms: float | None = None  # median
    latency_p95_ms: float | None = None
    int8_share: float | None = None  # of the weights: stored in int8
    format: str = "eager"  # or an artifact's format
    times_eager: float | None = None  # how many times faster than the float student in eager PyTorch
    times_float: float | None = None  # and than the float student's file of the same format
    top1_error: float | None = None  # one standard error of top1 on so many images
    macro: float | None = None  # the mean of the classes' own top-1
    int8_computed: float | None = None  # of the weights: those with which the arithmetic is int8's
    measured: str | None = None  # when, where that was before the report's other rows


def compare(rows: list[Row]) -> list[Row]:
    """The rows with `times_eager` and `times_float`, where there is something to compare with."""
    latency = {row.name: row.latency_ms for row in rows}
    floats = {row.format: row.latency_ms for row in rows if row.format != "eager" and Path(row.name).stem == "student"}

    def times(reference: float | None, row: Row) -> float | None:
        return None if None in (reference, row.latency_ms) else reference / row.latency_ms

    return [
        replace(row, times_eager=times(latency.get("student"), row), times_float=times(floats.get(row.format), row))
        for row in rows
    ]


def with_earlier(rows: list[Row], folder: Path) -> tuple[list[Row], list[str]]:
    """The rows with those of the report that is in `folder` already, for files that are still in its export/ and are
    not measured again: what other compressions and formats gave. With them their failures."""
    try:
        report = read_report(folder)
        time, known = str(report["environment"]["time"]), {field.name for field in fields(Row)}
        found = [Row(**{key: value for key, value in row.items() if key in known}) for row in report["rows"]]
        failures = [str(line) for line in report.get("failures", [])]
    except (UserError, LookupError, TypeError, AttributeError) as error:
        if (folder / "report.json").exists():
            say(f"warning: the rows of an earlier report are left out: {error or type(error).__name__}")
        return rows, []
    new = {row.name for row in rows}
    kept = [
        replace(row, measured=row.measured or time)
        for row in found
        if row.format != "eager" and row.name not in new and _is_still(row.name, folder / "export", row.bytes)
    ]
    return rows + kept, [line for line in failures if any(line.startswith(f"{row.name}: ") for row in kept)]


def _is_still(name: str, folder: Path, size: float | None) -> bool:
    """Whether a file of the report is in the folder: by a name without signs, which may stand in a program's text."""
    path = folder / name
    return bool(re.fullmatch(r"\w[\w.-]*", name)) and path.exists() and bytes_of(path) == size


# columns of the terminal's table, those first that go first where there is no room for all
DROPPED = (
    *("p95\nms", "comp.\n%", "params\nM", "max\n|Δlogit|", "teacher\nagr. %", "ECE", "MACs\nM", "int8\n%", "Δ"),
    *("student\nagr. %", "macro\n%"),
)


def table(rows: list[Row], width: int | None = None) -> str:
    """The rows as plain text, with or without a terminal; long names are folded.

    Args:
        width: columns of text at most; less important columns of the table are left out where it takes more. None:
            the terminal's, at most 120.
    """
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    width = width or min(120, shutil.get_terminal_size((120, 24)).columns)
    columns = list(zip(*cells(ordered(rows), short=True), strict=True))
    name = min(20, max(12, width // 4), max(map(len, columns[0])))

    def grid() -> Table:
        made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), collapse_padding=True)
        made.add_column(columns[0][0], overflow="fold", width=name)
        for header, *_ in columns[1:]:
            made.add_column(header, justify="right", no_wrap=True)
        for cells in list(zip(*columns, strict=True))[1:]:
            made.add_row(*cells)
        return made

    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    unbounded = console.options.update(max_width=10_000)
    for header in DROPPED:
        if Measurement.get(console, unbounded, grid()).maximum > width:
            columns = [column for column in columns if column[0] != header]
    console.print(grid())
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines() if line.strip())


def ordered(rows: list[Row]) -> list[Row]:
    def key(row: Row):
        return (ORDER.index(row.name), "") if row.name in ORDER else (len(ORDER), row.name)

    return sorted(rows, key=key)


def cells(rows: list[Row], short: bool) -> list[list[str]]:
    """Header, then one list of texts a row."""

    def show(value, spec: str, scale: float = 1) -> str:
        return MISSING if value is None else format(value * scale, spec)

    def top1(row: Row) -> str:
        error = "" if row.top1_error is None else f" ±{100 * row.top1_error:.{1 if short else 2}f}"
        return show(row.top1, ".2f", 100) + error

    student = next((row.top1 for row in rows if row.name == "student"), None)
    uneven = any(None not in (row.macro, row.top1) and abs(row.macro - row.top1) > 1e-6 for row in rows)
    headers = {
        "model": "model",
        "top-1 %": "top-1\n%",
        **({"macro %": "macro\n%"} if uneven else {}),
        "change": "Δ",
        "agreement with teacher %": "teacher\nagr. %",
        "ECE": "ECE",
        "max |Δlogit|": "max\n|Δlogit|",
        "agreement with student %": "student\nagr. %",
        "parameters": "params\nM",
        "MACs": "MACs\nM",
        "bytes": "kB",
        "latency ms": "ms",
        "p95 ms": "p95\nms",
        "int8 %": "int8\n%",
        "computed in int8 %": "comp.\n%",
    }
    if not short:
        headers |= {"× eager": "", "× float": ""}
    lines = [list(headers.values() if short else headers)]
    for row in rows:
        change = None if None in (row.top1, student) else row.top1 - student
        lines.append(
            [
                row.name,
                top1(row),
                *([show(row.macro, ".2f", 100)] if uneven else []),
                show(change, "+.2f", 100),
                show(row.teacher_agreement, ".2f", 100),
                show(row.ece, ".4f"),
                show(row.student_delta, ".2g"),
                show(row.student_agreement, ".2f", 100),
                show(row.parameters, ".3f", 1e-6) if short else show(row.parameters, ",d"),
                show(row.macs, ".1f", 1e-6) if short else show(row.macs, ",d"),
                show(row.bytes, ",.0f", 1e-3) if short else show(row.bytes, ",d"),
                show(row.latency_ms, ".2f"),
                show(row.latency_p95_ms, ".2f"),
                show(row.int8_share, ".0f", 100),
                show(row.int8_computed, ".0f", 100),
                *([] if short else [show(row.times_eager, ".2f"), show(row.times_float, ".2f")]),
            ]
        )
    return lines
