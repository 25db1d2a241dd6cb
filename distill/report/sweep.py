"""What a sweep leaves: its table on the terminal, as CSV and Markdown, its failed jobs, means over seeds."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.experimental.callback import Callback

from distill import asked
from distill.errors import UserError
from distill.files import atomic
from distill.progress import say
from distill.runs import sweeps, tables, trials

if TYPE_CHECKING:
    import pandas as pd

FIGURES = {  # columns under their short heads, and how they are written: the last go first for want of room
    "student top-1": ("student %", lambda value: f"{100 * value:.2f}"),
    "gain": ("gain", lambda value: f"{100 * value:+.2f}"),
    "file top-1": ("file %", lambda value: f"{100 * value:.2f}"),
    "bytes": ("kB", lambda value: f"{value / 1000:,.0f}"),
    "latency_ms": ("ms", lambda value: f"{value:.2f}"),
    "student alone top-1": ("alone %", lambda value: f"{100 * value:.2f}"),
    "file": ("smallest file", str),
}
MISSING = "–"


class SweepTable(Callback):
    """Hydra's callback at the end of `-m`: a table of the jobs, and exit code 1 if one of them failed."""

    def on_multirun_end(self, config, **kwargs) -> None:
        try:
            whole = finish(Path(config.hydra.sweep.dir))
        except (UserError, OSError) as error:  # Hydra would only warn of it
            raise SystemExit(f"error: {' '.join(str(error).split())}") from error
        if not whole:
            sys.exit(1)


def finish(root: Path) -> bool:
    """Print and write what the jobs of the sweep in `root` found; whether all are done."""
    table, failed = tables.summary(root), sweeps.unstarted(root)
    if table.empty and not failed:
        return False  # it was told
    if not table.empty:
        broken = table[~table["status"].isin(["done", "pruned"])]
        failed |= {row["run"]: row["error"] or f"it is {row['status']}" for _, row in broken.iterrows()}
        table = table[table["status"] == "done"]
    width = shutil.get_terminal_size((10_000, 24)).columns
    lines = [f"{len(table)} of {len(table) + len(failed)} jobs are done, in {root}"]
    lines += text_of(grid(table), width) if len(table) else []
    lines += [*sweeps.over_seeds(table), *trials.told(root)]
    lines += [f"failed: {name}: {error}" for name, error in failed.items()]
    lines += [f"{asked.again(*sweeps.again(root))} tries them again"] if failed else []
    say("\n" + "\n".join(lines))
    write(root, table, failed)
    return not failed


def grid(table: pd.DataFrame) -> list[list[str]]:
    """Heads, then a row of texts for each run: what the sweep varies, then FIGURES, as far as any run has them."""
    keys = [key for key in dict.fromkeys(key for folder in table["folder"] for key in tables.swept(Path(folder)))]
    short = sweeps.shortened(keys)
    named = {key: (short[key], str) for key in keys if key in table} or {"run": ("run", str)}
    columns = {**named, **{key: value for key, value in FIGURES.items() if key in table and table[key].notna().any()}}
    rows = [
        [MISSING if _absent(row[key]) else write(row[key]) for key, (_, write) in columns.items()]
        for _, row in table.iterrows()
    ]
    return [[head for head, _ in columns.values()], *rows]


def _absent(value) -> bool:
    return value is None or value != value  # not a number


def text_of(grid: list[list[str]], width: int) -> list[str]:
    """The lines of a table of at most `width` columns: the last columns that don't fit are left out."""
    columns = list(zip(*grid, strict=True))
    widths = [max(map(len, column)) for column in columns]
    while len(columns) > 1 and sum(widths) + 2 * (len(widths) - 1) > width:
        columns, widths = columns[:-1], widths[:-1]
    rows = ([cell.rjust(size) for cell, size in zip(row, widths, strict=True)] for row in zip(*columns, strict=True))
    return ["  ".join(row) for row in rows]


def markdown(grid: list[list[str]]) -> list[str]:
    head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in grid)
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def write(root: Path, table: pd.DataFrame, failed: dict[str, str]) -> None:
    """sweep.csv, everything that `distill.runs.summary` knows, and sweep.md, what people read."""
    with atomic(root / "sweep.csv") as temporary:
        table.to_csv(temporary, index=False)
    lines = [f"# {root.name}", "", *(markdown(grid(table)) if len(table) else []), ""]
    lines += [f"- {line}" for line in [*sweeps.over_seeds(table), *trials.told(root)]]
    lines += [f"- failed: {name}: {error}" for name, error in failed.items()]
    with atomic(root / "sweep.md") as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
