"""Photos at 224 px: our loaders beside torchvision's transforms (v2), which are applied to each image in a DataLoader.

    python -m benchmarks.large --json benchmarks/large.json

All give float batches in [0, 1], of as many worker processes, and take turns. The better of torchvision's two ways to
decode is what ours is compared with, in each turn. Beside images a second of the clock stand those of a second that
processors worked on it, in this process and the workers: it does not depend on what else the machine does. What is
timed is the middle of an epoch that does not end. Photos are made, of noise whose spectrum is that of natural images,
as large in pixels and bytes as ImageNet's; `--folder` has others, a folder a class.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.stats import quantile_test
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler
from torchvision.io import decode_image
from torchvision.transforms import v2

from benchmarks.paired import in_turns, record
from distill.data.augment import RandomResizedCrop
from distill.data.base import Data
from distill.data.batches import EpochBatches
from distill.data.color import ColorJitter
from distill.data.imagefolder import imagefolder

CROPPED = [v2.RandomResizedCrop(224, scale=(0.25, 1.0)), v2.RandomHorizontalFlip()]
COLORED = [*CROPPED, v2.ColorJitter(0.4, 0.4, 0.4)]
SEEN = [v2.Resize(256), v2.CenterCrop(224)]
CASES = {  # torchvision's steps, and ours; None: evaluation
    "resized crop and flip": (CROPPED, {"resized_crop": RandomResizedCrop()}),
    "and colours": (COLORED, {"resized_crop": RandomResizedCrop(), "color": ColorJitter()}),
    "evaluation": (SEEN, None),
}
DECODERS: Mapping[str, Callable] = {
    "torchvision, Pillow": lambda path: v2.functional.to_image(Image.open(path).convert("RGB")),
    "torchvision, decode_image": lambda path: decode_image(path, mode="RGB"),
}


def photo(seed: int, height: int, width: int) -> Image.Image:
    """Noise with a spectrum of 1/f, its channels nearly alike (Field, JOSA A 1987, eq. 2)."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    spectra = random.standard_normal((4, *frequency.shape)) + 1j * random.standard_normal((4, *frequency.shape))
    spectra = (0.9 * spectra[0] + 0.3 * spectra[1:]) / np.maximum(frequency, 1 / max(height, width))
    pixels = np.fft.irfft2(spectra, (height, width))
    pixels /= pixels.std((1, 2), keepdims=True)
    return Image.fromarray(np.clip(128 + 55 * pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0))


def make_photos(folder: Path, count: int, height: int = 375, width: int = 500) -> None:
    for number in range(count):
        path = folder / f"class{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(number, height, width).save(path, quality=90)


class PerSample(Dataset):
    """An image at a time, as a torchvision data set with a transform."""

    def __init__(self, names: list[str], decode: Callable, transform: v2.Transform):
        self.names, self.decode, self.transform = names, decode, transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.decode(self.names[row])), 0


class Endless(Sampler):
    """Our epochs, one after the other."""

    def __init__(self, size: int, batch: int):
        self.batches = EpochBatches(size, batch, seed=0)

    def __iter__(self) -> Iterator:
        for epoch in itertools.count():
            self.batches.set_epoch(epoch)
            yield from self.batches


class Contender:
    """One loader, whose workers live as long as it does."""

    def __init__(self, loader: DataLoader, steps: int):
        before = set(active_children())
        self.loader, self.steps, self.ahead = iter(loader), steps, 2 * loader.num_workers
        self.workers = [worker.pid for worker in set(active_children()) - before]
        self.worked: list[float] = []  # processor seconds an image, by turn

    def turn(self) -> float:
        """Images a second of the clock. Workers have made ahead what they may when it begins, and when it ends."""
        self._settle()
        before, images = self._processor(), sum(len(next(self.loader)[0]) for _ in range(self.ahead))
        start = time.perf_counter()
        timed = sum(len(next(self.loader)[0]) for _ in range(self.steps))
        seconds = time.perf_counter() - start
        self._settle()
        self.worked.append((self._processor() - before) / (images + timed))
        return timed / seconds

    def _settle(self) -> None:
        before = None
        while self.workers and before != (now := self._processor(own=False)):
            before = now
            time.sleep(0.1)

    def _processor(self, own: bool = True) -> float:
        """Seconds that processors worked for it, in this process and the workers (Linux)."""
        tasks = [task for pid in self.workers for task in Path(f"/proc/{pid}/task").iterdir()]
        workers = sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)
        return (time.process_time() if own else 0) + workers / 1e9


def endless(data: Data, workers: int, batch: int, training: bool) -> DataLoader:
    split = data.train if training else data.val
    data = replace(data, num_workers=workers, batch_size=batch)
    return data._loader(split, Endless(len(split), batch))


def compare(case: str, names: list[str], sets: Mapping[str, Data], workers: int, options) -> dict:
    """Of each contender: images a second of the clock and of a processor, and over the better torchvision's."""
    steps, augment = CASES[case]
    transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])
    shared = {"num_workers": workers, "drop_last": True, "batch_size": options.batch}
    loaders = {}
    for name, decode in DECODERS.items():
        samples = PerSample(names, decode, transform)
        loaders[name] = DataLoader(samples, sampler=RandomSampler(samples, True, 10**9), **shared)
    for name, data in sets.items():
        loaders[name] = endless(data, workers, options.batch, augment is not None)
    contenders = {name: Contender(loader, options.steps) for name, loader in loaders.items()}
    rates = in_turns({name: each.turn for name, each in contenders.items()}, options.turns)
    worked = {name: [1 / seconds for seconds in each.worked[1:]] for name, each in contenders.items()}
    return {name: {"clock": figures(rates, name), "processor": figures(worked, name)} for name in contenders}


def figures(rates: Mapping[str, list[float]], name: str) -> dict[str, float]:
    """The median of images a second and of its ratio to the better torchvision's, with the ratio's 95 % interval."""
    ratios = [own / max(theirs) for own, *theirs in zip(rates[name], *(rates[each] for each in DECODERS), strict=True)]
    low, high = quantile_test(ratios, p=0.5).confidence_interval(0.95)
    return {"images/s": statistics.median(rates[name]), "ratio": statistics.median(ratios), "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="photos, a folder a class; none: 640 are made")
    parser.add_argument("--batch", type=int, default=64, help="images in a batch")
    parser.add_argument("--steps", type=int, default=4, help="timed batches of a turn")
    parser.add_argument("--turns", type=int, default=9, help="measured turns")
    parser.add_argument("--pack", type=int, default=256, help="px of packed images")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in each of DataLoader's workers
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "photos"
        if options.folder is None:
            make_photos(folder, 640)
        store = f"{scratch}/store"
        for case, workers in itertools.product(CASES, (0, 2)):
            augment = CASES[case][1]
            sets = {
                "ours": imagefolder(str(folder), 224, augment=augment, store=store),
                f"ours, data.pack={options.pack}": imagefolder(
                    str(folder), 224, augment=augment, store=store, pack=options.pack
                ),
            }
            files = sets["ours"].train.images
            names = [str(files.root / name) for name in files.names]
            print(f"{case}, {workers} workers", flush=True)
            row = found[f"{case}, {workers} workers"] = compare(case, names, sets, workers, options)
            for name, each in row.items():
                clock, processor = each["clock"], each["processor"]
                print(
                    f"{name:<28} {clock['images/s']:>7,.0f} images/s, {clock['ratio']:.2f} × ({clock['low']:.2f} to "
                    f"{clock['high']:.2f}); of a processor {processor['images/s']:>7,.0f}, {processor['ratio']:.2f} × "
                    f"({processor['low']:.2f} to {processor['high']:.2f})",
                    flush=True,
                )
    versions = {name: version(name) for name in ("torchvision", "pillow", "simplejpeg")}
    photos = "made, 500 × 375 px" if options.folder is None else str(options.folder.name)
    record(
        "benchmarks.large",
        options.json,
        batch=options.batch,
        turns=options.turns,
        photos=photos,
        libraries=versions,
        cases=found,
    )


if __name__ == "__main__":
    main()
