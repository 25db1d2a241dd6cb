"""What a sweep leaves."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.experimental.callback import Callback

from distill.progress import say
from distill.runs.tables import SHOWN, summary

if TYPE_CHECKING:
    import pandas as pd


class SweepTable(Callback):
    """Hydra's callback at the end of `-m`: a table of the jobs, and exit code 1 if one of them failed."""

    def on_multirun_end(self, config, **kwargs) -> None:
        root = Path(config.hydra.sweep.dir)
        table = summary(root)
        if table.empty:
            sys.exit(1)
        shown = [name for name in SHOWN if name in table]
        say(f"\n{len(table)} runs in {root}")
        width = shutil.get_terminal_size((10_000, 24)).columns  # of a terminal: wider tables go on below
        text = table[shown].to_string(index=False, float_format="{:.4g}".format, na_rep="–", line_width=width)
        say(text)
        for line in over_seeds(table):
            say(line)
        if (table["status"] != "done").any():
            sys.exit(1)


def over_seeds(table: pd.DataFrame) -> list[str]:
    """A line for all runs of `distill.runs.summary` that differ in the seed alone: means, deviations, verdict."""
    from distill.runs import verdict  # scipy and torch: Hydra imports this file before any work

    lines = []
    if "gain" not in table:
        return lines
    for options, runs in table[table["status"] == "done"].dropna(subset=["gain"]).groupby("options", sort=False):
        runs = runs.drop_duplicates("seed").sort_values("seed")
        if len(runs) < 2:
            continue
        found = verdict.over_seeds(runs["gain"].tolist(), int(runs["test images"].iloc[0]))
        scores = ", ".join(
            f"{name} {100 * runs[f'{name} top-1'].mean():.2f} ± {100 * runs[f'{name} top-1'].std():.2f} %"
            for name in ("student alone", "student")
        )
        seeds = ", ".join(map(str, runs["seed"]))
        lines.append(f"{options or 'default'}, seeds {seeds} (mean ± standard deviation): {scores}; {found}")
    return lines
