"""The runs of a sweep beside each other."""

import re
from pathlib import Path

import pandas as pd

from distill.errors import UserError
from distill.report.tables import MISSING, drawn, fitted
from distill.runs import verdict
from distill.runs.tables import summarised


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


# columns of the terminal's table, those first that go first where there is no room for all
DROPPED = ("file", "time\nms", "file\n%", "alone\n%", "size\nkB", "gain\npoints")


def terminal(table: pd.DataFrame, width: int) -> str:
    """The table in at most so many columns of text."""

    def texts(header: str, name: str, spec: str = "", scale: float = 1) -> tuple[str, ...]:
        values = table[name] if name in table else [None] * len(table)
        return (header, *(MISSING if each is None or each != each else _show(each, spec, scale) for each in values))

    runs = [f"{run} {words}".rstrip() for run, words in zip(table["run"], differing(table), strict=True)]
    columns = [
        ("run", *runs),
        texts("status", "status"),
        texts("alone\n%", "student alone top-1", ".2f", 100),
        texts("student\n%", "student top-1", ".2f", 100),
        texts("gain\npoints", "gain", "+.2f", 100),
        texts("file", "file"),
        texts("file\n%", "file top-1", ".2f", 100),
        texts("size\nkB", "bytes", ",.0f", 1e-3),
        texts("time\nms", "latency_ms", ".2f"),
    ]
    return drawn(fitted(columns, width, DROPPED), width)


def _show(value, spec: str, scale: float) -> str:
    return format(value * scale, spec) if spec else str(value)


def over_seeds(table: pd.DataFrame) -> list[str]:
    """A line for all runs of `distill.runs.summary` that differ in the seed alone: means, deviations, verdict."""
    lines = []
    if "gain" not in table:
        return lines
    shared = set.intersection(*(set(options.split()) for options in table["options"]))
    shared = shared if table["options"].nunique() > 1 else set()
    for options, runs in table[table["status"] == "done"].dropna(subset=["gain"]).groupby("options", sort=False):
        runs = runs.drop_duplicates("seed").sort_values("seed")
        if len(runs) < 2:
            continue
        found = verdict.over_seeds(runs["gain"].tolist(), int(runs["test images"].iloc[0]))
        scores = ", ".join(
            f"{name} {100 * runs[f'{name} top-1'].mean():.2f} ± {100 * runs[f'{name} top-1'].std():.2f} %"
            for name in ("student alone", "student")
        )
        seeds = ", ".join(str(int(seed)) for seed in runs["seed"])
        named = " ".join(word for word in options.split() if word not in shared) or "default"
        lines.append(f"{named}, seeds {seeds} (mean ± standard deviation): {scores}; {found}")
    return lines
