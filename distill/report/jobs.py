"""The runs of a sweep beside each other."""

import re
from pathlib import Path

import pandas as pd

from distill.errors import UserError
from distill.files import atomic
from distill.progress import markdown
from distill.report.tables import MISSING, drawn, fitted
from distill.runs import sweeps, tables
from distill.runs.tables import summarised

FIGURES = {  # columns under their short heads, and how they are written
    "student top-1": ("student %", lambda value: f"{100 * value:.2f}"),
    "gain": ("gain", lambda value: f"{100 * value:+.2f}"),
    "file top-1": ("file %", lambda value: f"{100 * value:.2f}"),
    "bytes": ("kB", lambda value: f"{value / 1000:,.0f}"),
    "latency_ms": ("ms", lambda value: f"{value:.2f}"),
    "student alone top-1": ("alone %", lambda value: f"{100 * value:.2f}"),
    "file": ("smallest file", str),
}


DROPPED = ("smallest file", "alone %", "ms", "file %", "kB", "gain")  # in this order, where there is no room for all


def read(root: Path) -> tuple[pd.DataFrame, list[str]]:
    """The rows of `distill.runs.summary` for all runs under `root`, by name, numbers as such; and a line for each whose
    records are damaged, which has a row of its name, status and error alone; and for a sweep whose record is."""
    folders = sorted((file.parent for file in root.rglob("run.json")), key=_natural)
    rows, damaged = [], sweeps.damaged_records(folders)
    for folder in folders:
        place = {"place": folder.relative_to(root).as_posix()}
        try:
            rows.append(summarised(folder) | place)
        except UserError as error:
            damaged.append(str(error))
            row = {"run": folder.name, "overrides": "", "options": "", "status": "damaged", "error": str(error)}
            rows.append(row | place)
    return pd.DataFrame(rows, columns=None if rows else ["run", "status", "error"]), damaged


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


def terminal(table: pd.DataFrame, width: int) -> str:
    """The table in at most so many columns of text."""
    return drawn(fitted(list(zip(*grid(table), strict=True)), width, DROPPED), width)


def grid(table: pd.DataFrame) -> list[list[str]]:
    """Heads, then a row of texts for each run: a column for each option that the sweep varies, or the run's name and
    what it has apart; its status where not all are done; then FIGURES, as far as any run has them."""
    folders = table["folder"].dropna() if "folder" in table else ()
    keys = dict.fromkeys(key for folder in folders for key in tables.swept(Path(folder)))
    short = sweeps.shortened([key for key in keys if key in table])
    heads = {key: [head, *map(_text, table[key])] for key, head in short.items()}
    if not heads:
        names = zip(table["run"], differing(table), strict=True)
        heads = {"run": ["run", *(f"{run} {words}".rstrip() for run, words in names)]}
    if (table["status"] != "done").any():
        heads["status"] = ["status", *map(str, table["status"])]
    for key, (head, write) in FIGURES.items():
        if key in table and table[key].notna().any():
            heads[key] = [head, *(MISSING if _absent(value) else write(value) for value in table[key])]
    return [list(row) for row in zip(*heads.values(), strict=True)]


def _text(value) -> str:
    return MISSING if _absent(value) else f"{value:g}" if isinstance(value, float) else str(value)


def _absent(value) -> bool:
    return value is None or value != value  # not a number


def write(root: Path, table: pd.DataFrame, said: list[str]) -> None:
    """sweep.csv, everything that `distill.runs.summary` knows, and sweep.md, what people read."""
    with atomic(root / "sweep.csv") as temporary:
        table.to_csv(temporary, index=False)
    lines = [f"# {root.name}", "", *(markdown(grid(table)) if len(table) else []), "", *(f"- {line}" for line in said)]
    with atomic(root / "sweep.md") as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
