"""The data path beside torchvision's transforms, applied to each image in a DataLoader.

    python -m benchmarks.data --json benchmarks/data.json

Both give float batches in [0, 1] of the same uint8 images of 32×32 pixels, shuffled, and take turns in one process
(theirs, ours, theirs, ours …); a ratio is the median over the turns. Theirs has no worker processes or two, ours none,
which is its default for images in memory. What is timed is a share of an epoch, without the start of the processes.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.paired import record
from distill.data.augment import ShiftFlip
from distill.data.fake import fake
from distill.data.policies import RandAugment

SHIFTED = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
TO_FLOAT = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
CASES = {
    "shift and flip": (SHIFTED, {"shift_flip": ShiftFlip()}),
    "and RandAugment": ([*SHIFTED, v2.RandAugment()], {"shift_flip": ShiftFlip(), "randaugment": RandAugment()}),
}


class PerSample(Dataset):
    """An image at a time, as a torchvision data set with a transform."""

    def __init__(self, images: Tensor, labels: Tensor, transform: v2.Transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[row]), self.labels[row]


def endless(loader: DataLoader) -> Iterator:
    while True:
        yield from loader


def rate(batches: Iterator, count: int) -> float:
    """Images a second over `count` batches."""
    start = time.perf_counter()
    images = sum(len(next(batches)[0]) for _ in range(count))
    return images / (time.perf_counter() - start)


def measure(case: str, batch: int, workers: int, steps: int, turns: int) -> Mapping[str, float]:
    """Images a second of both, in medians, and the median of ours over theirs."""
    steps_of_theirs, augment = CASES[case]
    data = replace(fake(train_size=100 * batch, augment=augment), batch_size=batch)
    torch.manual_seed(0)
    theirs = PerSample(data.train.images, data.train.labels, v2.Compose([*steps_of_theirs, *TO_FLOAT]))
    options = {"shuffle": True, "drop_last": True, "num_workers": workers, "persistent_workers": workers > 0}
    theirs, ours = endless(DataLoader(theirs, batch, **options)), endless(data.train_loader(0))
    rates = []
    for turn in range(turns + 1):
        rate(theirs, 2 * workers)  # what was made ahead meanwhile would count as made in no time
        their = rate(theirs, steps)
        if workers:
            time.sleep(1)  # until they have made ahead what they may, and leave the processor to ours
        our = rate(ours, 5 * steps)
        if turn > 0:  # the first warms up
            rates.append((their, our))
    return {
        "theirs": statistics.median(their for their, _ in rates),
        "ours": statistics.median(our for _, our in rates),
        "ratio": statistics.median(our / their for their, our in rates),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=128, help="images in a batch")
    parser.add_argument("--steps", type=int, default=8, help="batches of theirs in a turn; five times as many of ours")
    parser.add_argument("--turns", type=int, default=7, help="measured turns")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    found = {}
    print(f"{'':<18} {'workers':>7} {'theirs':>10} {'ours':>10} {'ratio':>7}   (images/s)")
    for case in CASES:
        for workers in (0, 2):
            row = measure(case, options.batch, workers, options.steps, options.turns)
            found[f"{case}, theirs with {workers} workers"] = row
            print(f"{case:<18} {workers:>7} {row['theirs']:>10,.0f} {row['ours']:>10,.0f} {row['ratio']:>7.1f}")
    versions = {name: version(name) for name in ("torch", "torchvision")}
    record("benchmarks.data", options.json, batch=options.batch, turns=options.turns, versions=versions, cases=found)


if __name__ == "__main__":
    main()
