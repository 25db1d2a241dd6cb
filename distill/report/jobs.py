"""The runs of a sweep beside each other."""

import re
from pathlib import Path

import pandas as pd

from distill.errors import UserError
from distill.files import atomic
from distill.report.tables import MISSING
from distill.runs import sweeps, tables
from distill.runs.tables import summarised

FIGURES = {  # columns under their short heads, and how they are written: the last go first for want of room
    "student top-1": ("student %", lambda value: f"{100 * value:.2f}"),
    "gain": ("gain", lambda value: f"{100 * value:+.2f}"),
    "file top-1": ("file %", lambda value: f"{100 * value:.2f}"),
    "bytes": ("kB", lambda value: f"{value / 1000:,.0f}"),
    "latency_ms": ("ms", lambda value: f"{value:.2f}"),
    "student alone top-1": ("alone %", lambda value: f"{100 * value:.2f}"),
    "file": ("smallest file", str),
}


def read(root: Path) -> tuple[pd.DataFrame, list[str]]:
    """The rows of `distill.runs.summary` for all runs under `root`, by name, numbers as such; and a line for each whose
    records are damaged, which has a row of its name and status alone."""
    rows, damaged = [], []
    for folder in sorted((file.parent for file in root.rglob("run.json")), key=_natural):
        place = {"place": folder.relative_to(root).as_posix()}
        try:
            rows.append(summarised(folder) | place)
        except UserError as error:
            damaged.append(str(error))
            rows.append({"run": folder.name, "overrides": "", "options": "", "status": "damaged", **place})
    return pd.DataFrame(rows), damaged


def _natural(path: Path) -> list:
    return [(part.isdigit(), int(part) if part.isdecimal() else part) for part in re.split(r"(\d+)", str(path)) if part]


def differing(table: pd.DataFrame) -> list[str]:
    """Of each run, the words of its command line that not all runs have."""
    words = [str(line).split() for line in table["overrides"]]
    common = set.intersection(*map(set, words)) if words else set()
    return [" ".join(word for word in line if word not in common) for line in words]


def over_seeds(table: pd.DataFrame) -> list[str]:
    """A line for all runs of `distill.runs.summary` that differ in the seed alone: means, deviations, verdict."""
    pooled, lines = tables.over_seeds(table), []
    if pooled.empty:
        return lines
    shared = set.intersection(*(set(options.split()) for options in table["options"]))
    shared = shared if table["options"].nunique() > 1 else set()
    for _, row in pooled[pooled["runs"] > 1].iterrows():
        scores = ", ".join(
            f"{name} {100 * row[f'{name} top-1 mean']:.2f} ± {100 * row[f'{name} top-1 std']:.2f} %"
            for name in ("student alone", "student")
        )
        named = " ".join(word for word in row["options"].split() if word not in shared) or "default"
        lines.append(f"{named}, seeds {row['seeds']} (mean ± standard deviation): {scores}; {row['verdict']}")
    return lines


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


def write(root: Path, table: pd.DataFrame, said: list[str]) -> None:
    """sweep.csv, everything that `distill.runs.summary` knows, and sweep.md, what people read."""
    with atomic(root / "sweep.csv") as temporary:
        table.to_csv(temporary, index=False)
    lines = [f"# {root.name}", "", *(markdown(grid(table)) if len(table) else []), "", *(f"- {line}" for line in said)]
    with atomic(root / "sweep.md") as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
