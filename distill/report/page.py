"""report.json, details.json, report.md, report.png, report.html and the loggers' summary."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from distill.files import damaged, sealed
from distill.progress import shown
from distill.report import bill_page, phones, run_page
from distill.report.diagnosis import Figures, findings
from distill.report.parity import remarks
from distill.report.plot import plot
from distill.report.tables import Row, cells, ordered, reference_of, unmeasured
from distill.runs.run import PACKAGES
from distill.runs.tables import read_report
from distill.runs.verdict import Verdict
from distill.runtimes import measure
from distill.runtimes.artifact import write as write_file

if TYPE_CHECKING:
    import pandas as pd

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


def write(
    rows: list[Row],
    folder: Path,
    context: Mapping,
    failures: Sequence[str] = (),
    verdict: Verdict | None = None,
    figures: Figures | None = None,
    details: Mapping | None = None,
    metrics: pd.DataFrame | None = None,
    shipping: Sequence[str] = (),
    bill: Mapping | None = None,
) -> None:
    """Writes report.json, report.md, report.png and report.html into `folder`, and details.json where there are
    details, each whole or not at all.

    Args:
        context: plain JSON values that belong to the figures, such as {"seed": 0, "data": "cifar10"}.
        failures: a line for each reason why a file may not ship.
        verdict: whether the student gained; None without a student alone.
        figures: of which the report tells what is remarkable.
        details: see distill.report.details.
        metrics: by epoch, see distill.runs.tables.curves.
        shipping: which file to ship, see distill.report.ship.
        bill: where the accuracy went, see distill.report.bill.told.

    Raises:
        UserError: a file cannot be written.
    """
    rows, folder, machine = ordered(rows), Path(folder), environment()
    found = findings(figures) if figures else []
    content = {
        "verdict": verdict and {"sentence": str(verdict), "shown": verdict.shown, **asdict(verdict)},
        "findings": found,
        "ship": list(shipping),
        "figures": figures and asdict(figures),
        "rows": [asdict(row) for row in rows],
        "bill": bill or {},
        "failures": list(failures),
        "unmeasured": _unmeasured(rows, failures, folder / "export"),
        "context": dict(context),
        "environment": machine,
        "protocol": PROTOCOL,
    }
    write_file(folder / "report.json", sealed(content).encode())
    measured_on = phones.read(folder, rows)
    write_file(folder / "report.md", markdown(content, measured_on).encode())
    write_file(folder / "report.png", plot(rows))
    if details is None:
        (folder / run_page.DETAILS).unlink(missing_ok=True)  # of an earlier report
    else:
        write_file(folder / run_page.DETAILS, sealed(details).encode())
    write_file(folder / "report.html", run_page.page(content, details, metrics, measured_on).encode())


def _unmeasured(rows: list[Row], failures: Sequence[str], folder: Path) -> list[str]:
    """A line for each exported file that no row and no failure is of."""
    names = [name for name in unmeasured(rows, folder) if not any(line.startswith(f"{name}: ") for line in failures)]
    return [f"{name} is in export/ and was not measured: the command that wrote it did not report" for name in names]


def environment() -> dict[str, str | int]:
    """The machine and the versions that the figures were measured with."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "quantized engine": torch.backends.quantized.engine,
        **{name: version(name) for name in PACKAGES},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or not x86
        return platform.processor() or platform.machine()


def rebuild(folder: Path) -> None:
    """Writes a finished run's report.md and report.html anew. Raises UserError as `run_page.read` does."""
    html, content = run_page.read(folder), read_report(folder)
    try:
        text = markdown(content, phones.read(folder, run_page.rows_of(content)))
    except (LookupError, TypeError, ValueError, AttributeError):
        raise damaged(folder / "report.json", "what it says besides its rows makes no sense") from None
    write_file(folder / "report.md", text.encode())
    write_file(folder / "report.html", html.encode())


def markdown(content: Mapping, measured_on: Sequence[phones.Phone] = ()) -> str:
    """report.md from what report.json says, and from `distill.report.phones.read`."""
    rows, context, machine = run_page.rows_of(content), content.get("context", {}), content.get("environment", {})
    failures, unmeasured, bill = content.get("failures", ()), content.get("unmeasured", ()), bill_page.markdown(content)
    verdict = content.get("verdict")
    told = [*([verdict["sentence"]] if verdict else []), *content.get("findings", ()), *content.get("ship", ())]
    headers, *body = cells(rows, short=False)
    lines = [
        "# Report",
        "",
        *(f"- {_text(str(line)[0].upper() + str(line)[1:])}." for line in told),
        *([""] if told else []),
    ]
    lines += _table(headers, body)
    images = f"{context['test images']:,}" if "test images" in context else "so many"
    reference = reference_of(rows)
    over = f" Gain: top-1 in points over the {reference.name}." if reference else ""
    lines += [
        "",
        f"Top-1 ± one standard error on {images} test images.{over}",
        *(["Macro: the mean of the classes' own top-1."] if "macro %" in headers else []),
        "",
        "![accuracy and cost](report.png)",
    ]
    times = {
        row.measured: [each.name for each in rows if each.measured == row.measured] for row in rows if row.measured
    }
    for time, names in times.items():
        lines += ["", f"Measured before, at {_text(time)}: {_text(', '.join(names))}."]
    if told := [*remarks(rows), *unmeasured]:
        lines += ["", "## Remarks", "", *(f"- {_text(line)}" for line in told)]
    if failures:
        lines += ["", "## May not ship", "", *(f"- {_text(line)}" for line in failures)]
    for phone in measured_on:
        headers, *body = phones.table(phone, rows)
        lines += ["", f"## On {_text(phone.name)}, {_text(phone.date)}", "", *_table(headers, body), "", phones.SAID]
    if bill.table:
        lines += ["", "## Where the accuracy went", "", *_table(bill.table[0], bill.table[1:]), "", _text(bill.said)]
        lines += [""] if bill.layers else []
        for line, command in bill.layers:
            way = f"; leaves the worst in float: {_value('command', command)}" if command else ""
            lines.append(f"- {_text(line)}{way}")
    if commands := dict.fromkeys(row.command for row in rows if row.command):
        lines += ["", "## Made by", ""]
        for command in commands:
            names = ", ".join(row.name for row in rows if row.command == command)
            lines.append(f"- {_text(names)}: {_value('command', command)}")
    for title, values in (("Run", context), ("Protocol", content.get("protocol", {})), ("Machine", machine)):
        if values:
            lines += [
                "",
                f"## {title}",
                "",
                *(f"- {_text(key)}: {_value(key, value)}" for key, value in values.items()),
            ]
    return "\n".join(lines) + "\n"


def _table(headers: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in headers) + " |"]
    lines.append("| --- |" + " ---: |" * (len(headers) - 1))
    return [*lines, *("| " + " | ".join(map(_text, cells)) + " |" for cells in body)]


def _value(key: str, value) -> str:
    """Commands are to be copied, so they are not escaped but quoted."""
    if key != "command":
        return _text(value)
    line = shown(" ".join(str(value).split("\n")))
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}"


def _text(value) -> str:
    """In Markdown, as it is: no HTML, no link, no picture, no end of a line or cell."""
    return re.sub(r"[\\`*\[\]<>|]", lambda sign: f"\\{sign[0]}", shown(" ".join(str(value).split())))
