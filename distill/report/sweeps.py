"""The end of a sweep: a table on the terminal, sweep.csv, sweep.md, sweep.html and sweep.png, failed jobs apart."""

import sys
from pathlib import Path

from hydra.experimental.callback import Callback

from distill import asked
from distill.errors import UserError
from distill.progress import say, screen_width
from distill.runs import sweeps


class SweepTable(Callback):
    """Hydra's callback at the end of `-m`: what the jobs found, and exit code 1 if one of them failed."""

    def on_multirun_end(self, config, **kwargs) -> None:
        try:
            whole = finish(Path(config.hydra.sweep.dir))
        except (UserError, OSError) as error:  # Hydra would only warn of it
            raise SystemExit(f"error: {' '.join(str(error).split())}") from error
        if not whole:
            sys.exit(1)


def finish(root: Path) -> bool:
    """Print and write what the jobs of the sweep in `root` found; whether all are done."""
    from distill.report import jobs, sweep_page  # pandas, scipy, torch: Hydra imports this file before any work
    from distill.runs import trials

    found = table, _ = jobs.read(root)
    unstarted = sweeps.unstarted(root)
    if table.empty and not unstarted:
        say(f"no run in {root}: nothing to compare")
        return False
    done, broken = table[table["status"] == "done"], table[~table["status"].isin(["done", "pruned"])]
    errors = {
        run.place: run.error if isinstance(run.error, str) else f"it is {run.status}" for run in broken.itertuples()
    }
    at_work = [place for place in errors if sweeps.is_at_work(root / place) or trials.is_taken(root / place)]
    failed = unstarted | {place: error for place, error in errors.items() if place not in at_work}
    said = [*jobs.over_seeds(done), *trials.told(root), *(f"failed: {name}: {why}" for name, why in failed.items())]
    said += [f"another process is at work on it: {place}" for place in at_work]
    lines = [f"{len(done)} of {len(table) + len(unstarted)} jobs are done, in {root}"]
    lines += [jobs.terminal(done, min(160, screen_width(160)))] if len(done) else []
    again = failed and (root / sweeps.FILE).exists() and not sweeps.damaged_records([root / "job"])
    lines += [*said, *([f"{asked.again(*sweeps.again(root))} tries them again"] if again else [])]
    say("\n" + "\n".join(lines))
    jobs.write(root, done, said)
    if len(table):
        say(f"{sweep_page.rebuild(root, found)}, sweep.md and sweep.csv have all of them")
    return not failed
