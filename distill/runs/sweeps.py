"""What a sweep leaves."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from hydra.experimental.callback import Callback

from distill.runs.tables import SHOWN, summary


class SweepTable(Callback):
    """Hydra's callback at the end of `-m`: a table of the jobs, and exit code 1 if one of them failed."""

    def on_multirun_end(self, config, **kwargs) -> None:
        root = Path(config.hydra.sweep.dir)
        table = summary(root)
        if table.empty:
            sys.exit(1)
        shown = [name for name in SHOWN if name in table]
        print(f"\n{len(table)} runs in {root}")
        width = shutil.get_terminal_size((10_000, 24)).columns  # of a terminal: wider tables go on below
        text = table[shown].to_string(index=False, float_format="{:.4g}".format, na_rep="–", line_width=width)
        print(text, flush=True)
        if (table["status"] != "done").any():
            sys.exit(1)
