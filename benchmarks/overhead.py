"""What a job of a sweep costs besides its training, and jobs side by side beside jobs one after the other.

    python -m benchmarks.overhead --json benchmarks/overhead.json --against OTHER

A sweep of temperatures on the digits, an epoch a job, whose teacher and student alone are there: the seconds of its
first job until the first step, and of each later job, by part (benchmarks/parts.py). They are given by the clock and
as processors' work, which hardly depends on what else the machine does. `--against` names a folder with another version
of the toolkit; the two take turns.

Then two seeds in processes, one at a time and both at once, also in turns; and whether the logged losses are the same
to the last digit. All is computed on one thread a process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.paired import in_turns, record

TREE = Path(__file__).resolve().parents[1]
SWEEP = ["-m", "loss.kd.temperature=1,2", "trainer.max_epochs=1"]
SEEDS = ["seeds=0,1", "stages=[distill]", "baseline=false", "hydra/launcher=processes"]


def run(tree: Path, cwd: str, *command: str) -> str:
    """What a Python command prints, under the toolkit of `tree`."""
    env = {**os.environ, "PYTHONPATH": str(tree), "BEGAN": str(time.time()), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=env,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ).stdout


def parts(tree: Path, cwd: str, name: str) -> list[dict]:
    return json.loads(run(tree, cwd, str(TREE / "benchmarks" / "parts.py"), *SWEEP, f"sweep={name}").splitlines()[-1])


def medians(jobs: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """By part, over jobs."""
    names = [name for name in jobs[0] if not name.startswith("begin")]
    return {
        name: {
            kind: round(statistics.median(job[name][number] for job in jobs), 2)
            for number, kind in enumerate(("clock", "processor"))
        }
        for name in names
    }


def losses(folder: Path) -> dict[str, str]:
    """Each job's table of epochs."""
    return {path.parts[-4]: path.read_text() for path in sorted(folder.glob("*/metrics/version_0/metrics.csv"))}


def side_by_side(cwd: str, turns: int, epochs: int) -> dict:
    """Jobs a minute, one at a time and two, the ratio in each turn, and whether they log the same."""
    logged, count = [], {}

    def sweep(many: int) -> float:
        count[many] = count.get(many, -1) + 1
        name = f"{many}-{count[many]}-{os.getpid()}"
        words = [*SEEDS, f"trainer.max_epochs={epochs}", f"hydra.launcher.side_by_side={many}", f"sweep={name}"]
        start = time.perf_counter()
        run(TREE, cwd, "-m", "distill", *words)
        logged.append(losses(Path(cwd) / "outputs" / "sweeps" / name))
        return 60 * 2 / (time.perf_counter() - start)

    found = in_turns({"one at a time": lambda: sweep(1), "two side by side": lambda: sweep(2)}, turns)
    ratios = [two / one for one, two in zip(*found.values(), strict=True)]
    return {
        "epochs": epochs,
        "jobs a minute": {name: round(statistics.median(rates), 2) for name, rates in found.items()},
        "ratio": [round(ratio, 2) for ratio in sorted(ratios)],
        "same losses": bool(logged[0]) and all(each == logged[0] for each in logged),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, help="a folder with another version of the toolkit")
    parser.add_argument("--turns", type=int, default=2, help="measured turns")
    parser.add_argument("--folder", type=Path, help="where to run, with the teacher fitted before; none: it is fitted")
    parser.add_argument("--epochs", type=int, default=10, help="of the jobs side by side")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    trees = {"now": TREE} | ({"before": options.against.resolve()} if options.against else {})
    found: dict[str, list] = {name: [] for name in trees}
    with tempfile.TemporaryDirectory() as cwd:
        cwd = str(options.folder or cwd)
        for turn in range(options.folder is not None, options.turns + 1):
            for name in sorted(trees, reverse=turn % 2 == 0):
                jobs = parts(trees[name], cwd, f"{name}{turn}-{os.getpid()}")
                print(turn, name, *({part: each["job"] for part, each in enumerate(jobs)}.items()), flush=True)
                if turn:
                    found[name].append(jobs)
        sweeps = {
            name: {
                "first job": medians([jobs[0] for jobs in turns]),
                "a later job": medians([job for jobs in turns for job in jobs[1:]]),
            }
            for name, turns in found.items()
        }
        aside = side_by_side(cwd, options.turns, options.epochs)
    for name, sweep in sweeps.items():
        for job, each in sweep.items():
            print(
                name,
                job,
                *(f"{part} {value['clock']} s ({value['processor']})" for part, value in each.items()),
                sep="; ",
            )
    print(aside)
    record("benchmarks.overhead", options.json, turns=options.turns, sweep=SWEEP, seconds=sweeps, side_by_side=aside)


if __name__ == "__main__":
    main()
