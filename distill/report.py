"""The report of a run: what each model is worth and costs, as JSON, Markdown, a plot and a terminal table."""

import io
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from distill import measure
from distill.errors import UserError
from distill.export.artifact import write as write_file
from distill.files import read_json

ORDER = ("teacher", "student alone", "student", "student (last epoch)")  # then the files, by name
MISSING = "–"
SLOWER = 1.5  # times that a file may take of its float one's time before that is remarked
PROTOCOL = {
    "latency": "one image, one thread, models in turn, after warm-up: median and 95th percentile; networks in eager "
    "PyTorch, files in their own runtime, each in a process of its own",
    "× eager, × float": "how many times faster than the float student in eager PyTorch, and than its float file in the "
    "same runtime",
    "ece": f"expected calibration error, {measure.ECE_BINS} equal bins",
    "macs": "multiply-accumulates for one image, in float or int8",
    "int8 %, computed in int8 %": "of the weights: stored in int8, and those that the runtime multiplies in int8; the "
    "others are dequantized first, so that the file is smaller and no faster",
    "max |Δlogit|, agreement with student": "against the float student on the test images",
}


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


def check(
    name: str,
    logits: Tensor,
    source: Tensor,
    student: Tensor,
    labels: Tensor,
    to_source: Mapping[str, float | None],
    to_student: Mapping[str, float | None],
) -> list[str]:
    """Why the file `name` may not ship, one line a reason; an empty list when it may.

    Args:
        logits: (N, K), answered by the reloaded file.
        source: (N, K), of the eager network that the file was exported from, asked in the same way.
        student: (N, K), of the float student.
        labels: (N,) int64.
        to_source, to_student: bounds against each, see `difference`.
    """
    bad = (~torch.isfinite(logits).all(1)).sum().item()
    if bad:
        return [f"{name}: answers NaN or infinity for {bad} of {len(logits)} images"]
    return [
        f"{name}: {line}"
        for other, reference, bounds in ((source, SOURCE, to_source), (student, "the float student", to_student))
        for line in difference(logits, other, reference, student, bounds, labels)
    ]


SOURCE = "the network it was exported from"


def difference(
    logits: Tensor,
    other: Tensor,
    reference: str,
    student: Tensor,
    bounds: Mapping[str, float | None],
    labels: Tensor | None = None,
) -> list[str]:
    """How logits (N, K) differ from those of the `reference` by more than the bounds allow, one line a reason.

    Args:
        bounds: what is missing or None is not asked for. "snr": least signal to noise in dB; "agreement": least share
            of equal top-1; "logit": largest |Δlogit|. With "beside", in dB, the first two are no stricter than what
            the reference itself keeps of the float student, its signal to noise lessened by `beside`: a depth that
            amplifies its roundings amplifies those of a file. But never laxer than "floor" (dB) and "least" (share).
            With "accuracy_drop", in [0, 1], logits that agree too seldom, but on "least" of the images, may still do
            if they are as accurate as the reference's but for that drop: fine-tuning may change answers.
        labels: (N,) int64; None: agreement is not asked for.
    """
    failures, limit = [], bounds.get("logit")
    # "not <=" and "not >=" also catch a reference that is NaN
    if limit is not None and not (delta := measure.logit_delta(logits, other)) <= limit:
        failures.append(f"logits differ by up to {delta:.3g} from {reference} (allowed: {limit:g})")
    snr, agreement, beside = bounds.get("snr"), bounds.get("agreement"), bounds.get("beside")
    if beside is not None:
        snr = max(bounds["floor"], min(snr, measure.signal_to_noise(other, student) - beside))
        agreement = max(bounds["least"], min(agreement, measure.agreement(other, student)))
    if snr is not None and not (found := measure.signal_to_noise(logits, other)) >= snr:
        failures.append(f"logits differ from those of {reference}: signal to noise {found:.1f} dB (needed: {snr:.1f})")
    if labels is not None and agreement is not None and not (same := measure.agreement(logits, other)) >= agreement:
        lost = measure.accuracy(other, labels) - measure.accuracy(logits, labels)
        allowed = bounds.get("accuracy_drop")
        if allowed is None or not lost <= allowed or same < bounds.get("least", 0):
            failures.append(
                f"top-1 agrees with {reference} on {same:.2%} of the images (needed: {agreement:.2%})"
                + ("" if allowed is None else f" and is {lost:.2%} less accurate (allowed: {allowed:.2%})")
            )
    return failures


def remarks(rows: Sequence[Row]) -> list[str]:
    """What a reader should know of files that may ship: one that is larger or much slower than the float student's of
    the same format."""
    floats = {row.format: row for row in rows if row.format != "eager" and Path(row.name).stem == "student"}
    told = []
    for row in rows:
        plain = floats.get(row.format)
        if plain is None or row.name == plain.name:
            continue
        if None not in (row.bytes, plain.bytes) and row.bytes > plain.bytes:
            told.append(f"{row.name} is larger than {plain.name}: {row.bytes:,} against {plain.bytes:,} bytes")
        if None not in (row.latency_ms, plain.latency_ms) and row.latency_ms > SLOWER * plain.latency_ms:
            told.append(f"{row.name} is {row.latency_ms / plain.latency_ms:.1f} times slower than {plain.name}")
    return told


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
        report = read_json(folder / "report.json")
        time, known = str(report["environment"]["time"]), {field.name for field in fields(Row)}
        found = [Row(**{key: value for key, value in row.items() if key in known}) for row in report["rows"]]
        failures = [str(line) for line in report.get("failures", [])]
    except (UserError, LookupError, TypeError, AttributeError):  # there is none, or it is of another kind
        return rows, []
    new = {row.name for row in rows}
    kept = [
        replace(row, measured=row.measured or time)
        for row in found
        if row.format != "eager" and row.name not in new and _is_still(folder / "export" / row.name, row.bytes)
    ]
    return rows + kept, [line for line in failures if any(line.startswith(f"{row.name}: ") for row in kept)]


def _is_still(path: Path, size: int | None) -> bool:
    return path.name == os.path.basename(path) and path.is_file() and path.stat().st_size == size


def write(rows: list[Row], folder: Path, context: Mapping, failures: Sequence[str] = ()) -> None:
    """Writes report.json, report.md and report.png into `folder`, each whole or not at all.

    Args:
        context: plain JSON values that belong to the figures, such as {"seed": 0, "data": "cifar10"}.
        failures: a line for each reason why a file may not ship.

    Raises:
        UserError: a file cannot be written.
    """
    rows, folder, machine = _ordered(rows), Path(folder), environment()
    content = {
        "rows": [asdict(row) for row in rows],
        "failures": list(failures),
        "context": dict(context),
        "environment": machine,
        "protocol": PROTOCOL,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_file(folder / "report.json", f"{text}\n".encode())
    write_file(folder / "report.md", _markdown(rows, context, failures, machine).encode())
    write_file(folder / "report.png", _plot(rows))


def log(logger, rows: list[Row], folder: Path) -> None:
    """Sends the figures and the plot that `write` made to a Lightning logger."""
    figures = {f"report/{row.name}/{key}": value for row in rows for key, value in asdict(row).items()}
    logger.log_metrics({key: value for key, value in figures.items() if isinstance(value, (int, float))})
    if hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image("report", [str(folder / "report.png")])
    else:  # TensorBoard
        from matplotlib.pyplot import imread

        logger.experiment.add_image("report", imread(folder / "report.png"), dataformats="HWC")


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
    columns = list(zip(*_cells(_ordered(rows), short=True), strict=True))
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


def environment() -> dict[str, str | int]:
    """The machine and the versions that the figures were measured with."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "quantized engine": torch.backends.quantized.engine,
        **{name: version(name) for name in ("torch", "torchvision", "torchmetrics")},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not x86
        return platform.processor() or platform.machine()


def _ordered(rows: list[Row]) -> list[Row]:
    def key(row: Row):
        return (ORDER.index(row.name), "") if row.name in ORDER else (len(ORDER), row.name)

    return sorted(rows, key=key)


def _cells(rows: list[Row], short: bool) -> list[list[str]]:
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


def _markdown(rows: list[Row], context: Mapping, failures: Sequence[str], machine: Mapping) -> str:
    headers, *body = _cells(rows, short=False)
    lines = ["# Report", "", "| " + " | ".join(cell.replace("|", "\\|") for cell in headers) + " |"]
    lines.append("| --- |" + " ---: |" * (len(headers) - 1))
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in body]
    images = f"{context['test images']:,}" if "test images" in context else "so many"
    lines += [
        "",
        f"Top-1 ± one standard error on {images} test images. Change: top-1 in points against the float student.",
        *(["Macro: the mean of the classes' own top-1."] if "macro %" in headers else []),
        "",
        "![accuracy and cost](report.png)",
    ]
    times = {
        row.measured: [each.name for each in rows if each.measured == row.measured] for row in rows if row.measured
    }
    for time, names in times.items():
        lines += ["", f"Measured before, at {time}: {', '.join(names)}."]
    if told := remarks(rows):
        lines += ["", "## Remarks", "", *(f"- {line}" for line in told)]
    if failures:
        lines += ["", "## May not ship", "", *(f"- {line}" for line in failures)]
    for title, values in (("Run", context), ("Protocol", PROTOCOL), ("Machine", machine)):
        if values:
            lines += ["", f"## {title}", "", *(f"- {key}: {value}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _plot(rows: list[Row]) -> bytes:
    """Accuracy against file size and against latency, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("bytes", "file size (kB)", 1e-3), ("latency_ms", "latency of one image on one thread (ms)", 1))
    for axes, (field, label, scale) in zip(figure.subplots(1, 2), panels, strict=True):
        shown = [row for row in rows if row.top1 is not None and getattr(row, field) is not None]
        axes.set(xscale="log", xlabel=label, ylabel="top-1 accuracy (%)")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        _label_points(axes, [(getattr(row, field) * scale, row.top1 * 100, row.name) for row in shown])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _label_points(axes, points: list[tuple[float, float, str]]) -> None:
    """Draws the points and, beside each, its name; names keep a line's distance from each other."""
    if not points:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="grey")
        return
    xs, ys, _ = zip(*points, strict=True)
    margin = max((max(ys) - min(ys)) * 0.25, 0.5)
    low, high = min(ys) - margin, max(ys) + margin
    axes.set(xlim=(min(xs) / 1.7, max(xs) * 1.7), ylim=(low, high))
    line = 0.055  # the height of a line of text, as a share of the axes' height
    height = -line
    for x, y, name in sorted(points, key=lambda point: point[1]):
        height = max((y - low) / (high - low), height + line)
        to_the_right = x * x <= min(xs) * max(xs)  # of the point, when it is in the left half
        (point,) = axes.plot(x, y, "o" if name in ORDER else "^", markersize=8)
        axes.annotate(
            name,
            (x, y),
            xytext=(x * 1.06 if to_the_right else x / 1.06, height),
            textcoords=axes.get_xaxis_transform(),
            ha="left" if to_the_right else "right",
            va="center",
            fontsize=9,
            color=point.get_color(),
            arrowprops={
                "arrowstyle": "-",
                "color": point.get_color(),
                "alpha": 0.5,
                "relpos": (0 if to_the_right else 1, 0.5),  # the line starts at the name's near end
            },
        )
