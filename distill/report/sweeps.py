"""What a sweep leaves: a table on the terminal and sweep.html."""

import sys
from pathlib import Path

from hydra.experimental.callback import Callback

from distill.errors import UserError
from distill.progress import say, screen_width


class SweepTable(Callback):
    """Hydra's callback at the end of `-m`: a table of the jobs, and exit code 1 if one of them failed."""

    def on_multirun_end(self, config, **kwargs) -> None:
        from distill.report import sweep_page  # pandas, scipy, torch: Hydra imports this file before any work
        from distill.report.jobs import over_seeds, read, terminal

        root = Path(config.hydra.sweep.dir)
        table, damaged = read(root)
        if table.empty:
            say(f"no run in {root}: nothing to compare")
            sys.exit(1)
        say(f"\n{len(table)} runs in {root}")
        say(terminal(table, min(160, screen_width(160))))
        for line in [*damaged, *over_seeds(table)]:
            say(line)
        try:
            say(f"{sweep_page.rebuild(root)}: all of them on a page")
        except UserError as error:  # the disk may be full
            say(f"warning: {error}")
        if (table["status"] != "done").any():
            sys.exit(1)
