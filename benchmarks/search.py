"""Trials an hour of a search: whole, with pruning, and side by side.

    OMP_NUM_THREADS=1 python -m benchmarks.search teacher=resnet8 student=resnet8_tiny --json benchmarks/search.json

The same trials of a random sampler, on handwritten digits: rate, weight and temperature. All searches share a teacher
that is fitted before, begin with an empty folder and take turns. What is timed is the whole command, its start and its
table included.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.paired import ratio, record
from distill.runs import trials

ROOT = Path(__file__).parents[1]
COMMON = ["baseline=false", "compress=[]", "export=[]"]
SPACE = ["optimizer.lr=tag(log,interval(0.0003,1.0))", "loss.kd.weight=interval(0.1,0.9)"]
SPACE += ["loss.kd.temperature=interval(1.0,8.0)", "hydra/sweeper=search", "hydra.sweeper.sampler=random"]
SEARCHES = {
    "whole": ["hydra.sweeper.pruner=none"],
    "pruned": ["hydra.sweeper.pruner=median"],
    "whole, two side by side": [
        *("hydra.sweeper.pruner=none", "hydra/launcher=processes", "hydra.launcher.side_by_side=2")
    ],
    "pruned, two side by side": [
        *("hydra.sweeper.pruner=median", "hydra/launcher=processes", "hydra.launcher.side_by_side=2")
    ],
}


def run(folder: Path, *words: str) -> float:
    """Seconds of the command."""
    begun = time.perf_counter()
    command = [sys.executable, str(ROOT / "train.py"), *COMMON, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="of train.py: student=resnet8 …")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2, help="searches of each kind")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    words = [*options.words, f"trainer.max_epochs={options.epochs}"]
    search = ["-m", *words, *SPACE, f"hydra.sweeper.trials={options.trials}"]
    hourly: dict[str, list[float]] = {name: [] for name in SEARCHES}
    ended: dict[str, list[dict]] = {name: [] for name in SEARCHES}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run(folder, *words, "stages=[teacher]")
        for number in range(options.rounds):
            for name in [*SEARCHES][:: 1 if number % 2 == 0 else -1]:
                sweep = re.sub(r"\W+", "-", f"{name}-{number}")
                hourly[name].append(3600 * options.trials / run(folder, *search, *SEARCHES[name], f"sweep={sweep}"))
                study = trials.study_of(folder / "outputs/sweeps" / sweep)
                states = [trial.state.name.lower() for trial in study.trials]
                counts = {state: states.count(state) for state in sorted({*states})}
                ended[name].append(counts | {"best accuracy": study.best_value})
                print(
                    f"round {number + 1}, {name}: {hourly[name][-1]:.0f} trials an hour, {ended[name][-1]}", flush=True
                )
    ratios = {name: ratio(hourly, name, "whole") for name in SEARCHES}
    record(
        "benchmarks.search",
        options.json,
        trials=options.trials,
        epochs=options.epochs,
        trials_per_hour=hourly,
        ended=ended,
        ratios=ratios,
    )


if __name__ == "__main__":
    main()
