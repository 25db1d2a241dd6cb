"""One run on one process and on two (trainer=ddp, gloo), with the same cores: images a second, and the losses.

    python -m benchmarks.processes --json benchmarks/processes.json

Both see the same images in batches of 128 in all, one process with as many threads as there are cores, each of two
with half of them. Seconds are from the end of the first epoch to that of the last, with validation. Losses differ by
float32's rounding, and by batch norm, whose statistics are those of a process's own images.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.paired import in_turns, ratio, record
from distill.runs.tables import curves

ROWS, EPOCHS, BATCH = 3840, 4, 128
WORDS = [
    "name=run",
    "data=fake",
    f"data.train_size={ROWS}",
    "teacher=resnet8",
    "teacher.fit.epochs=1",
    "baseline=false",
]
WORDS += ["student=resnet20", f"trainer.max_epochs={EPOCHS}", "trainer.accelerator=cpu", "stages=[teacher,distill]"]
WAYS = {
    "one process": [f"data.batch_size={BATCH}"],
    "two processes": [f"data.batch_size={BATCH // 2}", "trainer=ddp", "trainer.devices=2"],
}
TRAIN = Path(__file__).parent.parent / "train.py"


def run(way: str, losses: dict[str, list[float]]) -> float:
    """Images a second of a run from an empty folder."""
    threads = max(1, (os.cpu_count() or 1) // (2 if way == "two processes" else 1))
    ends = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(TRAIN), *WORDS, *WAYS[way]]
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True) as process:
            student = False
            for line in process.stdout:
                student = student or line.startswith("distill:")
                if student and (found := re.match(r" *epoch (\d+)/", line)):
                    ends[int(found[1])] = time.perf_counter()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
        losses[way] = curves(Path(folder) / "outputs" / "run")["train/loss"].tolist()
    first, last = min(ends), max(ends)
    return ROWS * (last - first) / (ends[last] - ends[first])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="measured runs of each, after one that warms up")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    losses: dict[str, list[float]] = {}
    found = in_turns({way: lambda way=way: run(way, losses) for way in WAYS}, options.rounds)
    times = ratio(found, "two processes", "one process")
    print(f"images a second: {', '.join(f'{way} {statistics.median(each):,.0f}' for way, each in found.items())}")
    record("benchmarks.processes", options.json, images_per_second=found, ratio=times, losses=losses)


if __name__ == "__main__":
    main()
