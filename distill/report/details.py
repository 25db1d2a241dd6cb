"""What the models answered, image by image: by class, by confidence, which were confused, the worst mistakes, and what
a file has wrong that the float student had right."""

import base64
import io
from collections.abc import Mapping

import torch
from PIL import Image
from torch import Tensor

from distill.data.base import Data, Split
from distill.progress import printable
from distill.report import bill
from distill.runtimes.measure import ECE_BINS

CLASSES = 100  # that are listed: those that the student knows least
MATRIX = 20  # classes at most whose confusion is told as a matrix; of more, the most frequent confusions
PAIRS = 30
WORST = 12  # images
PIXELS = 128  # the longer side of their pictures at most
SMALL = 64  # px: a picture up to this size is kept without loss


def details(
    answers: Mapping[str, Tensor], labels: Tensor, data: Data, flipped: Mapping[str, Tensor] | None = None
) -> dict:
    """What report.html shows beyond the report's rows; plain values, whose number doesn't grow with the images.

    Args:
        answers: finite logits (N, K) on the test images by the names of the report's rows, among them "student".
        labels: (N,) int64.
        data: of whose test images the worst, and those that flipped, are read once more.
        flipped: by file the rows that it has wrong and the float student right, see distill.report.bill.
    """
    told = {name: logits.softmax(1).max(1) for name, logits in answers.items()}
    sure = {name: confidence.double() for name, (confidence, _) in told.items()}
    said = {name: chosen for name, (_, chosen) in told.items()}
    right = {name: chosen == labels for name, chosen in said.items()}
    return {
        "classes": _classes(right, labels, data.classes),
        "confused": _confused(said["student"], labels, data.classes),
        "calibration": {name: _bins(sure[name], right[name]) for name in answers},
        "worst": _cards(_worst(sure["student"], right["student"]), sure, said, labels, data, PIXELS),
        "flips": _cards(bill.shown(flipped or {}), sure, said, labels, data, SMALL),
    }


def _classes(right: Mapping[str, Tensor], labels: Tensor, names: list[str]) -> dict:
    """{"of": how many there are, "listed": [{"name", "images", "right": {model: images}}]}, the least known first."""
    counts = labels.bincount(minlength=len(names))
    hits = {name: labels[each].bincount(minlength=len(names)) for name, each in right.items()}
    known = torch.where(counts > 0, hits["student"] / counts.clamp(min=1), torch.inf)  # those without images last
    order = known.argsort(stable=True)[:CLASSES].tolist()
    listed = [
        {
            "name": names[row],
            "images": counts[row].item(),
            "right": {model: hits[model][row].item() for model in right},
        }
        for row in order
    ]
    return {"of": len(names), "listed": listed}


def _confused(said: Tensor, labels: Tensor, names: list[str]) -> dict:
    """Of the student: {"matrix": [[images]], by class and answer, "names"}, or {"pairs": [[class, answer, images]]}."""
    if len(names) <= MATRIX:
        cells = (labels * len(names) + said).bincount(minlength=len(names) ** 2)
        return {"names": names, "matrix": cells.view(len(names), -1).tolist()}
    wrong = said != labels
    pairs, counts = torch.stack([labels[wrong], said[wrong]], 1).unique(dim=0, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:PAIRS].tolist()
    return {"pairs": [[*(names[each] for each in pairs[row].tolist()), counts[row].item()] for row in order]}


def _bins(sure: Tensor, right: Tensor) -> list[list[float]]:
    """[images, mean confidence, accuracy] of each bin of the ECE that has images."""
    bins = (sure * ECE_BINS).ceil().long().clamp(1, ECE_BINS) - 1
    found = []
    for number in bins.unique().tolist():
        inside = bins == number
        found.append([inside.sum().item(), *(round(each[inside].double().mean().item(), 5) for each in (sure, right))])
    return found


def _worst(sure: Tensor, right: Tensor) -> list[int]:
    """The images that the student was most sure of and wrong."""
    wrong = (~right).nonzero()[:, 0]
    return wrong[sure[wrong].argsort(descending=True, stable=True)[:WORST]].tolist()


def _cards(
    rows: list[int], sure: Mapping[str, Tensor], said: Mapping[str, Tensor], labels: Tensor, data: Data, side: int
) -> list[dict]:
    """Test images with what every model said; their pictures' longer side is `side` px at most."""
    if not rows:
        return []
    return [
        {
            "image": _name(data.test, row),
            "label": data.classes[labels[row]],
            "said": {name: [data.classes[said[name][row]], round(sure[name][row].item(), 4)] for name in said},
            "picture": _picture(image, side),
        }
        for row, image in zip(rows, data.test[torch.tensor(rows), 0].images, strict=True)
    ]


def _name(split: Split, row: int) -> str:
    """A test image's file, or its number."""
    for holder in (split.images, split.source, getattr(split.images, "source", None)):
        if getattr(holder, "names", None) is not None:
            return printable(str(holder.names[row]))
    return f"test image {row}"


def _picture(image: Tensor, side: int) -> str:
    """(3, H, W) in [0, 1] as a data: URI, of `side` px at most."""
    pixels = Image.fromarray((255 * image).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())
    kind, options = ("png", {"optimize": True}) if max(pixels.size) <= SMALL else ("jpeg", {"quality": 80})
    pixels.thumbnail((side, side))
    buffer = io.BytesIO()
    pixels.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
