"""The report of a run: what each model is worth and costs, as JSON, Markdown, a plot and a terminal table."""

import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from distill.errors import UserError
from distill.files import size as bytes_of
from distill.progress import plain, say, screen_width
from distill.runs.tables import read_report

ORDER = ("teacher", "student alone", "student", "student (last epoch)")  # then the files, by name
SUFFIXES = (".pt", ".ptl", ".pte", ".tflite", ".onnx", ".openvino", ".mlpackage", ".pt2")  # of files that are exported
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
    command: str | None = None  # the one that made it
    student: str | None = None  # hash of the weights that it was made from, or of its own
    digest: str | None = None  # SHA-256 of the file, see distill.files.digest


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


@dataclass(frozen=True)
class Now:
    """What the present command has made."""

    command: str
    first: str  # the command that began the run: its networks are of that, if none is known to have made them again
    student: str  # hash of the student's weights
    made: Collection[str]  # names of rows; the others were made before


def with_earlier(rows: list[Row], folder: Path, now: Now | None = None) -> tuple[list[Row], list[str]]:
    """The rows with those of the report that is in `folder` already, for files that are still in its export/ and are
    not measured again: what other compressions and formats gave. With them their failures.

    Args:
        now: by which each row is told what made it; what was made before keeps what it was told.
    """
    try:
        report = read_report(folder)
        time, known = str(report["environment"]["time"]), {field.name for field in fields(Row)}
        found = [Row(**{key: value for key, value in row.items() if key in known}) for row in report["rows"]]
        failures = [str(line) for line in report.get("failures", [])]
    except (UserError, LookupError, TypeError, AttributeError) as error:
        if (folder / "report.json").exists():
            say(f"warning: the rows of an earlier report are left out: {error or type(error).__name__}")
        found, failures, time = [], [], None
    rows = rows if now is None else _attributed(rows, {row.name: row for row in found}, now)
    new = {row.name for row in rows}
    kept = [
        replace(row, measured=row.measured or time)
        for row in found
        if row.format != "eager" and row.name not in new and _is_still(row.name, folder / "export", row.bytes)
    ]
    return rows + kept, [line for line in failures if any(line.startswith(f"{row.name}: ") for row in kept)]


def _attributed(rows: list[Row], before: Mapping[str, Row], now: Now) -> list[Row]:
    """The rows with the command that made each, and the student it was made from, where these are known."""
    told = []
    for row in rows:
        if row.name in now.made:
            row = replace(row, command=now.command, student=now.student)
        else:
            known = before.get(row.name, row)
            first = now.first if row.format == "eager" else None
            row = replace(row, command=known.command or first, student=known.student)
        told.append(replace(row, student=now.student) if row.name == "student" else row)
    return told


def stale(rows: Sequence[Row]) -> list[str]:
    """The files that were made from another student than the present one."""
    present = next((row.student for row in rows if row.name == "student"), None)
    files = (row for row in rows if row.format != "eager")
    return [row.name for row in files if None not in (present, row.student) and row.student != present]


def unmeasured(rows: Sequence[Row], folder: Path) -> list[str]:
    """The exported files in the folder that no row is of: made by a command that did not report."""
    names = {row.name for row in rows}
    files = (path.name for path in folder.glob("student*") if path.suffix in SUFFIXES)
    return sorted(name for name in files if name not in names)


def _is_still(name: str, folder: Path, size: float | None) -> bool:
    """Whether a file of the report is in the folder: by a name without signs, which may stand in a program's text."""
    path = folder / name
    return bool(re.fullmatch(r"\w[\w.-]*", name)) and path.exists() and bytes_of(path) == size


# columns of the terminal's table, those first that go first where there is no room for all
DROPPED = (
    *("p95\nms", "int8\nmath %", "params\nM", "largest\nΔlogit", "as\nteacher %", "ECE", "MACs\nM"),
    *("int8\n%", "macro\n%", "as\nstudent %", "gain\npoints", "time\nms", "size\nkB"),
)
SAID = {  # below the table, of a column that is in it
    "top-1\n%": "±: one standard error",
    "gain\npoints": "gain: in top-1, over the {reference}",
    "macro\n%": "macro: mean of the classes' own top-1",
    "as\nstudent %": "as student, as teacher: images that are answered alike",
    "ECE": "ECE: expected calibration error",
    "int8\n%": "int8: share of the weights stored in it",
    "int8\nmath %": "int8 math: share computed in it",
}


def table(rows: list[Row], width: int | None = None) -> str:
    """The rows as plain text, with or without a terminal; long names are folded, and what the columns are is said.

    Args:
        width: columns of text at most; less important columns of the table are left out where it takes more. None:
            the terminal's, at most 120.
    """
    width = width or min(120, screen_width(120))
    columns = fitted(list(zip(*cells(ordered(rows), short=True), strict=True)), width, DROPPED)
    reference = reference_of(rows)
    said = "; ".join(SAID[head].format(reference=reference and reference.name) for head, *_ in columns if head in SAID)
    legend = textwrap.wrap(plain(said), width - 1, initial_indent=" ", subsequent_indent=" ")
    return "\n".join([drawn(columns, width), *legend])


def fitted(columns: list[tuple[str, ...]], width: int, dropped: Sequence[str]) -> list[tuple[str, ...]]:
    """The columns, header first, without those `dropped` for which there is no room, the first of these first. The
    first column may be folded: to 10 cells on a narrow terminal, to at most 40 on a wide one."""
    least = max(10 if width >= 40 else 8, min(width // 2 - 16, 40))
    for header in ("", *dropped):
        columns = [column for column in columns if column[0] != header]
        first, *others = map(_breadth, columns)
        if min(first, least) + sum(others) + len(columns) <= width:
            break
    return columns


def drawn(columns: list[tuple[str, ...]], width: int) -> str:
    """Columns of texts, header first, as lines: the first at the left, folded where it must be; the others at the
    right."""
    first, *others = map(_breadth, columns)
    breadths = [min(first, max(8, width - sum(others) - len(columns))), *others]
    lines = []
    for number, cells in enumerate(zip(*columns, strict=True)):
        folded = [_folded(plain(text), breadth) for text, breadth in zip(cells, breadths, strict=True)]
        height = max(map(len, folded))
        gaps = [[""] * (height - len(texts)) for texts in folded]  # above headers, below names and numbers
        parts = [gap + texts if number == 0 else texts + gap for texts, gap in zip(folded, gaps, strict=True)]
        for first, *others in zip(*parts, strict=True):
            numbers = [_pad(text, breadth, right=True) for text, breadth in zip(others, breadths[1:], strict=True)]
            lines.append(" ".join(["", _pad(first, breadths[0]), *numbers]))
        if number == 0:
            lines.append(" " + plain("─") * (sum(breadths) + len(breadths) - 1))
    return "\n".join(line.rstrip() for line in lines)


def _breadth(column: tuple[str, ...]) -> int:
    """Of a column, in terminal cells."""
    from rich.cells import cell_len

    return max(cell_len(line) for text in column for line in plain(text).split("\n"))


def _folded(text: str, breadth: int) -> list[str]:
    """Lines of at most so many cells, ended at signs that part words where there are any."""
    from rich.cells import cell_len, chop_cells

    lines = []
    for whole in text.split("\n"):
        line = ""
        for piece in re.split(r"(?<=[-_ ])|(?=\.)", whole):
            if line and cell_len(line + piece.rstrip()) > breadth:
                lines.append(line.rstrip())
                line = ""
            *full, line = chop_cells(line + piece, breadth) or [""]
            lines += full
        lines.append(line.rstrip())
    return lines


def _pad(text: str, breadth: int, right: bool = False) -> str:
    from rich.cells import cell_len

    space = " " * (breadth - cell_len(text))
    return space + text if right else text + space


def ordered(rows: list[Row]) -> list[Row]:
    def key(row: Row):
        return (ORDER.index(row.name), "") if row.name in ORDER else (len(ORDER), row.name)

    return sorted(rows, key=key)


def reference_of(rows: Sequence[Row]) -> Row | None:
    """What gains are over: the student alone, where there is one, else the student."""
    found = {row.name: row for row in rows if row.top1 is not None}
    return found.get("student alone", found.get("student"))


def cells(rows: list[Row], short: bool) -> list[list[str]]:
    """Header, then one list of texts a row."""

    def show(value, spec: str, scale: float = 1) -> str:
        return MISSING if value is None else format(value * scale, spec)

    def top1(row: Row) -> str:
        error = "" if row.top1_error is None else f" ±{100 * row.top1_error:.{1 if short else 2}f}"
        return show(row.top1, ".2f", 100) + error

    reference = reference_of(rows)
    reference = reference and reference.top1
    uneven = any(None not in (row.macro, row.top1) and abs(row.macro - row.top1) > 1e-6 for row in rows)
    headers = {
        "model": "model",
        "top-1 %": "top-1\n%",
        **({"macro %": "macro\n%"} if uneven else {}),
        "gain": "gain\npoints",
        "agreement with teacher %": "as\nteacher %",
        "ECE": "ECE",
        "max |Δlogit|": "largest\nΔlogit",
        "agreement with student %": "as\nstudent %",
        "parameters": "params\nM",
        "MACs": "MACs\nM",
        "bytes": "size\nkB",
        "latency ms": "time\nms",
        "p95 ms": "p95\nms",
        "int8 %": "int8\n%",
        "computed in int8 %": "int8\nmath %",
    }
    if not short:
        headers |= {"× eager": "", "× float": ""}
    lines = [list(headers.values() if short else headers)]
    for row in rows:
        gain = None if None in (row.top1, reference) else row.top1 - reference
        lines.append(
            [
                row.name,
                top1(row),
                *([show(row.macro, ".2f", 100)] if uneven else []),
                show(gain, "+.2f", 100),
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
