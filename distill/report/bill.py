"""Where the accuracy went: for each file what every step from the teacher to the runtime's kernels costs, on the same
test images; in which classes; and the images that only the float student, or only the file, answers rightly."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from distill.errors import UserError
from distill.report.tables import Row
from distill.runs.tables import read_report
from distill.runs.verdict import on_images

Class = tuple[str, int, int, int]  # name, images, and how many are right by the float student, by the file
Ways = Mapping[str, Sequence[tuple[str, Tensor]]]  # by file: (station, logits (N, K)) from the teacher to the file

TEACHER, STUDENT, KERNELS = "teacher", "student", "kernels"  # stations; the others are compression steps
CLASSES = 5  # that lose most
FLIPS = 20  # images of a file that are shown
SHOWN = 60  # images that are shown of all files together


@dataclass(frozen=True)
class Change:
    """Of top-1 on the same images, shares in [-1, 1]; the 95 % interval is that of `distill.runs.verdict.on_images`."""

    gain: float
    low: float
    high: float
    won: int  # images that are right now and were not
    lost: int

    def __post_init__(self):
        if not (-1 <= self.low <= self.high <= 1 and abs(self.gain) <= 1 and min(self.won, self.lost) >= 0):
            raise ValueError("no difference of accuracies")

    @property
    def shown(self) -> bool:
        return not self.low <= 0 <= self.high


@dataclass(frozen=True)
class Step:
    name: str  # a station
    top1: float  # behind it, in [0, 1]
    change: Change | None  # from the one before; None: the first

    def __post_init__(self):
        if not 0 <= self.top1 <= 1:
            raise ValueError("no accuracy")


@dataclass(frozen=True)
class Item:
    """The bill of one file."""

    file: str
    format: str
    steps: tuple[Step, ...]  # those that changed an answer's numbers; "kernels" is missing where it was not executed
    whole: Change  # from the float student to the last step
    classes: tuple[Class, ...]  # that lose most

    @property
    def executed(self) -> bool:
        return self.steps[-1].name == KERNELS


def bill(ways: Ways, formats: Mapping[str, str], labels: Tensor, names: Sequence[str]) -> list[Item]:
    """Of each file in `ways`, in their order.

    Args:
        formats: of the files.
        labels: (N,) int64.
        names: of the classes.
    """
    return [_item(file, formats[file], _walked(way), labels, names) for file, way in ways.items()]


def flips(ways: Ways, labels: Tensor) -> dict[str, Tensor]:
    """By file that was executed: the rows, (n,) int64, that the float student answers rightly and the file doesn't,
    first those that the file is surest of."""
    flipped = {}
    for file, way in ways.items():
        student, (last, logits) = dict(way)[STUDENT], way[-1]
        if last == KERNELS:
            rows = (_right(student, labels) & ~_right(logits, labels)).nonzero()[:, 0]
            sure = logits[rows].double().softmax(1).amax(1)
            flipped[file] = rows[sure.argsort(descending=True, stable=True)]
    return flipped


def shown(flipped: Mapping[str, Tensor]) -> list[int]:
    """The first FLIPS rows of each file and no more than SHOWN in all, in the order of the test set."""
    first = [rows[:FLIPS].tolist() for rows in flipped.values()]
    turns = (rows[turn] for turn in range(FLIPS) for rows in first if turn < len(rows))
    return sorted([*dict.fromkeys(turns)][:SHOWN])


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(1) == labels


def _walked(way: Sequence[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Without the compression steps that left every logit as it was."""
    changed = [way[0]]
    for name, logits in way[1:]:
        if name in (STUDENT, KERNELS) or not torch.equal(logits, changed[-1][1]):
            changed.append((name, logits))
    return changed


def _item(file: str, format: str, way: Sequence[tuple[str, Tensor]], labels: Tensor, names: Sequence[str]) -> Item:
    right = [(name, _right(logits, labels)) for name, logits in way]
    changes = [None, *(_change(after, before) for (_, before), (_, after) in pairwise(right))]
    accuracy = [hits.double().mean().item() for _, hits in right]
    steps = tuple(map(Step, [name for name, _ in way], accuracy, changes))
    student, last = dict(right)[STUDENT], right[-1][1]
    return Item(file, format, steps, _change(last, student), _losers(student, last, labels, names))


def _change(now: Tensor, before: Tensor) -> Change:
    found = on_images(now, before)
    return Change(found.gain, found.low, found.high, found.won, found.lost)


def _losers(student: Tensor, file: Tensor, labels: Tensor, names: Sequence[str]) -> tuple[Class, ...]:
    images, before, after = (
        labels[rows].bincount(minlength=len(names)) for rows in (torch.ones_like(student), student, file)
    )
    lost = (before - after) / images.clamp(min=1)
    order = lost.argsort(descending=True, stable=True)[:CLASSES].tolist()
    return tuple(
        (names[row], images[row].item(), before[row].item(), after[row].item()) for row in order if lost[row] > 0
    )


def remark(items: Iterable[Item], layers: Iterable[Mapping]) -> str | None:
    """A line on the file that loses most against the float student, where that is more than chance; where int8 costs it
    most, with the command that spares its worst layers."""
    losing = [item for item in items if item.executed and item.whole.shown and item.whole.gain < 0]
    if not losing:
        return None
    worst = min(losing, key=lambda item: item.whole.gain)
    after = worst.steps[[step.name for step in worst.steps].index(STUDENT) + 1 :]
    steps = ", ".join(f"{step.name} {100 * step.change.gain:+.2f}" for step in after)
    dearest = min(after, key=lambda step: step.change.gain).name
    known = (each for each in layers if (each["network"], each["step"]) == (Path(worst.file).stem, dearest))
    way = next((each["command"] for each in known), None)
    spare = f"; without its noisiest layers in int8: {way}" if way else ""
    return f"{worst.file} loses {in_points(worst.whole)} points against the float student: {steps}{spare}"


def in_points(change: Change) -> str:
    return f"{100 * change.gain:+.2f} ({100 * change.low:+.2f} to {100 * change.high:+.2f})"


def told(items: Iterable[Item], layers: Iterable[Mapping]) -> dict:
    """As report.json keeps them."""
    return {"files": [asdict(item) for item in items], "layers": [*layers]}


def read(content: Mapping) -> list[Item]:
    """The items in a report.json; none in one of an earlier version.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is none that a run wrote.
    """
    return [_item_of(each) for each in content.get("bill", {}).get("files", ())]


def _item_of(told: Mapping) -> Item:
    steps = tuple(
        Step(str(step["name"]), step["top1"], step["change"] and Change(**step["change"])) for step in told["steps"]
    )
    if any((step.change is None) != (number == 0) for number, step in enumerate(steps)):
        raise ValueError("every step but the first changes something")
    classes = tuple((str(name), *map(_count, counts)) for name, *counts in told["classes"])
    if any(len(each) != 4 or not each[1] for each in classes):
        raise ValueError("no counts of a class")
    return Item(str(told["file"]), str(told["format"]), steps, Change(**told["whole"]), classes)


def _count(value) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value} is no count")
    return value


def layers_of(content: Mapping) -> list[Mapping]:
    """What `distill.report.layers.worst` found, as a report.json has it, with the "network" each is of.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is none that a run wrote.
    """
    return [_checked(each) for each in content.get("bill", {}).get("layers", ())]


def _checked(told: Mapping) -> Mapping:
    figures = [value for layer in told["layers"] for value in (layer["alone"], *layer["together"].values())]
    figures += [layer["changed"] for layer in told["layers"]]
    if not all(value is None or (isinstance(value, (int, float)) and math.isfinite(value)) for value in figures):
        raise ValueError("a figure of a layer")
    names = {"network": str(told["network"]), "step": str(told["step"])}
    return {**told, **names, "images": _count(told["images"]), "of": _count(told["of"])}


def with_earlier(told: Mapping, rows: Sequence[Row], folder: Path) -> dict:
    """With what the report in `folder` says of files that are not measured again and are still among the `rows`."""
    try:
        before = read_report(folder)
        files = [asdict(item) for item in read(before)]
        layers = layers_of(before)
    except (UserError, LookupError, TypeError, ValueError, AttributeError):  # there is none, or `rows` said so
        files, layers = [], []
    names = {row.name for row in rows if row.measured}
    kept = [item for item in files if item["file"] in names]
    stems = {Path(name).stem for name in names} - {item["network"] for item in told["layers"]}
    return {
        "files": sorted([*told["files"], *kept], key=lambda item: item["file"]),
        "layers": [*told["layers"], *(item for item in layers if item["network"] in stems)],
    }
