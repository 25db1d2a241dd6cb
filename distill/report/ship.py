"""Which of a run's files to ship, by what was measured of them."""

from collections.abc import Collection, Sequence
from pathlib import Path

from torch import nn

from distill import asked
from distill.report.tables import Row, stale

POINT = 0.01  # of accuracy, that a file may lose against the float student where the test set can't tell less
OF_FLOAT = "a quarter to a third of the bytes and twice to four times as fast"  # static int8; see docs/results.md


def advice(rows: Sequence[Row], failures: Sequence[str], student: nn.Module, folder: Path) -> list[str]:
    """A line that names the file to ship, and one with the command where int8 arithmetic was not tried and would pay.

    Of the files that may ship and lose no more than a point, or one standard error if that is more, against the float
    student, the fastest; of those within a tenth of its time the smallest.
    """
    files = _may_ship(rows, failures)
    floating = next((row for row in rows if row.name == "student"), None)
    if not files or floating is None or floating.top1 is None:
        return []
    allowed = floating.top1 - max(POINT, floating.top1_error or 0)
    good = [row for row in files if row.top1 >= allowed]
    if not good:
        return [f"ship: none of the files comes within a point of the student's {floating.top1:.2%}"]
    fastest = min(row.latency_ms for row in good)
    best = min((row for row in good if row.latency_ms <= 1.1 * fastest), key=lambda row: row.bytes)
    lines = [f"ship {best.name}: {_figures(best)}{_beside(best, files)}"]
    tried = any((row.int8_computed or 0) > 0.5 for row in files)
    if not tried and convolutional(student):
        command = asked.again(f"run={folder}", "stages=[compress,export,report]", "compress=static_int8")
        lines.append(f"nothing computes in int8: for networks of convolutions static int8 was {OF_FLOAT}: {command}")
    return lines


def _may_ship(rows: Sequence[Row], failures: Sequence[str]) -> list[Row]:
    failed = {line.partition(": ")[0] for line in failures} | set(stale(rows))
    measured = (row for row in rows if row.format != "eager" and None not in (row.top1, row.latency_ms, row.bytes))
    return [row for row in measured if row.name not in failed]


def _figures(row: Row) -> str:
    error = f" ±{100 * row.top1_error:.2f}" if row.top1_error is not None else ""
    return f"{100 * row.top1:.2f}{error} %, {row.bytes / 1000:,.0f} kB, {row.latency_ms:.2f} ms"


def _beside(best: Row, files: Collection[Row]) -> str:
    """How it compares with the float file of its format."""
    plain = next((row for row in files if row.format == best.format and Path(row.name).stem == "student"), None)
    if plain is None or plain is best:
        return ""
    smaller, faster = plain.bytes / best.bytes, plain.latency_ms / best.latency_ms
    return f"; {smaller:.1f} times smaller and {faster:.1f} times as fast as {plain.name}"


def convolutional(net: nn.Module) -> bool:
    """Whether most weights are those of convolutions."""
    weights = {module: module.weight.numel() for module in net.modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    return 2 * sum(size for module, size in weights.items() if isinstance(module, nn.Conv2d)) > sum(weights.values())
