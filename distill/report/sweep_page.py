"""sweep.html and sweep.png: the runs under a folder on one page, and what they reached at which cost."""

from __future__ import annotations

import math
from itertools import cycle, islice
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from distill.errors import UserError
from distill.files import read_yaml
from distill.report import parts, svg
from distill.report.jobs import differing, over_seeds, read
from distill.report.marks import colour
from distill.report.parts import Cell, Html, text
from distill.report.plot import plot
from distill.report.run_page import DASHES, plots, rows_of
from distill.report.tables import MISSING, Row
from distill.runs import tables
from distill.runs.records import command_line
from distill.runtimes.artifact import write

if TYPE_CHECKING:
    import pandas as pd

PLOTTED = 40  # runs whose models are points
CURVES = 12  # runs whose validation accuracy is a curve
COLUMNS = {  # of the table: what of the summary, how shown, times what
    "teacher %": ("teacher top-1", ".2f", 100),
    "student alone %": ("student alone top-1", ".2f", 100),
    "student %": ("student top-1", ".2f", 100),
    "gain": ("gain", "+.2f", 100),
    "test images": ("test images", ",.0f", 1),
    "smallest file": ("file", "", 1),
    "file %": ("file top-1", ".2f", 100),
    "bytes": ("bytes", ",.0f", 1),
    "latency ms": ("latency_ms", ".2f", 1),
}


def rebuild(root: Path, found: tuple[pd.DataFrame, list[str]] | None = None) -> Path:
    """Writes sweep.html of all runs under `root` into it, and sweep.png where one is reported.

    Args:
        found: what `distill.report.jobs.read` found there, where that is known.

    Raises:
        UserError: there are none, or it cannot be written.
    """
    found, file = found or _read(root), root / "sweep.html"
    write(file, page(root, found).encode())
    if named := _named(_reports(root, found[0])):
        write(root / "sweep.png", plot([row for _, row in named], [name for name, _ in named]))
    return file


def _read(root: Path) -> tuple[pd.DataFrame, list[str]]:
    if not root.is_dir():
        raise UserError(f"{root} is no folder: expected one with runs, such as outputs/sweeps/DATE")
    return read(root)


def page(root: Path, found: tuple[pd.DataFrame, list[str]] | None = None) -> str:
    """HTML. Runs whose records are damaged, or of an earlier version, are shown with a line.

    Raises:
        UserError: there are no runs under `root`.
    """
    table, damaged = found or _read(root)
    if table.empty:
        raise UserError(f"{root} holds no runs (no run.json below it): expected a folder such as outputs/sweeps/DATE")
    done = (table["status"] == "done").sum()
    counted = f"{len(table):,} runs, {done:,} of them done."
    reports = _reports(root, table)
    early = [place for place, report in reports.items() if "verdict" not in report]
    warned = damaged + [
        f"{place} was reported by an earlier version: figures that it lacks are empty" for place in early
    ]
    body = [
        f"<header><p class='quiet'>Distill: report of a sweep</p><h1>{text(root.resolve().name)}</h1></header><main>",
        *(f'<p class="verdict">{text(line)}.</p>' for line in over_seeds(table)),
        f"<p>{counted}</p>",
        *(f'<p class="warn">{text(line)}.</p>' for line in warned),
        parts.section("Runs", _runs(root, table), '<p class="quiet">Gain: points over the student alone.</p>'),
        parts.section("Accuracy and cost", *_points(reports)),
        parts.section("Validation accuracy", _curves(root, table)),
        parts.section("What made it", _command(root)),
        "</main>",
    ]
    return parts.document(f"{root.resolve().name}: sweep", body)


def _reports(root: Path, table: pd.DataFrame) -> dict[str, dict]:
    """The report.json of each run that has one, by its place."""
    return {place: found for place in table["place"] if (found := _report(root / place)) is not None}


def _report(folder: Path) -> dict | None:
    """Its report.json; None where there is none, or none that can be read: that is said by `read`."""
    try:
        return tables.read_report(folder)
    except UserError:
        return None


def _runs(root: Path, table: pd.DataFrame) -> str:
    lines = []
    for words, (_, run) in zip(differing(table), table.iterrows(), strict=True):
        name, link = str(run["run"]), parts.quoted(quote(f"{run['place']}/report.html"))
        reported = (root / run["place"] / "report.html").is_file()
        shown = Html(f"<a href={link}>{text(name)}</a>") if reported else name
        line = [Cell(shown, name), Cell(words, words, "text"), Cell(str(run["status"]), str(run["status"]))]
        line += [_figure(run.get(name), spec, scale) for name, spec, scale in COLUMNS.values()]
        lines.append(line)
    return parts.table(["run", "what differs", "status", *COLUMNS], lines)


def _figure(value, spec: str, scale: float) -> Cell:
    """A number as `spec` formats it, or a text where there is none; what is neither was not told."""
    if spec:
        known = isinstance(value, Real) and math.isfinite(value)
        return Cell(format(scale * value, spec), float(value)) if known else Cell(MISSING)
    return Cell(value, value) if isinstance(value, str) else Cell(MISSING)


def _named(reports: dict[str, dict]) -> list[tuple[str, Row]]:
    """Each run's student and smallest file, under the run's name."""
    named: list[tuple[str, Row]] = []
    for place, report in islice(reports.items(), PLOTTED):
        smallest = tables.smallest_file(report["rows"])
        names = {"student", smallest["name"] if smallest else "student"}
        named += [(place, row) for row in rows_of(report) if row.name in names]
    return named


def _points(reports: dict[str, dict]) -> list[str]:
    named = _named(reports)
    if not named:
        return []
    left = len(reports) - PLOTTED
    rest = f" The first {PLOTTED} runs; {left:,} more are in the table." if left > 0 else ""
    note = f"<p class=\"quiet\">Each run's student and its smallest file; a point's name is its run's.{rest}</p>"
    return [plots(named), note]


def _curves(root: Path, table: pd.DataFrame) -> str:
    lines, labels = [], differing(table)
    for (place, name), words, dash in zip(table[["place", "run"]].to_numpy(), labels, cycle(DASHES), strict=False):
        try:
            found = tables.curves(root / place)[["epoch", "val/accuracy"]].dropna()
        except (UserError, KeyError):
            continue
        if len(found) and len(lines) < CURVES:
            label = f"{name} {words}".strip()
            lines.append(svg.Curve(label, found["epoch"].tolist(), found["val/accuracy"].tolist(), colour(label), dash))
    if not lines:
        return ""
    keys = parts.legend((svg.key_line(line.colour, line.dash), line.label) for line in lines)
    return parts.side_by_side(parts.figure("Students by epoch", svg.curves(lines, "epoch", "accuracy"), keys))


def _command(root: Path) -> str:
    try:
        words = read_yaml(root / "multirun.yaml")["hydra"]["overrides"]["task"]
    except (UserError, LookupError, TypeError):
        return ""
    return f"<pre>{text(command_line(['-m', *map(str, words)]))}</pre>" if isinstance(words, list) else ""
