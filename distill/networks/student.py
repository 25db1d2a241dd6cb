"""What ships, in Python: a network that knows its classes and how an image becomes its input."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.data.prepare import Preparation, several
from distill.errors import UsageError
from distill.networks.answers import logits_of
from distill.networks.network import Normalize, Plain
from distill.types import ImageSize, checked_size

AT_ONCE = 64  # images of a batch of `predict`


@dataclass(frozen=True)
class Compressed:
    """By which steps, for which runtime's quantization (distill/compress/flows.py), and from which network."""

    steps: tuple[str, ...]
    flow: str
    source: nn.Module


class Student(nn.Module):
    """Images (N, 3, H, W) in [0, 1] to logits (N, K), with all that a photo needs before and after.

    Args:
        net: images (N, C, H, W) to logits (N, K), or to what holds them (see distill.networks.answers).
        classes: K names, in the order of the logits.
        image_size: px, of what `net` takes: the side of squares, or (height, width).
        mean, std: the input statistics that `net` expects, per channel, of images in [0, 1]; one entry each: it takes
            grey images.
        preprocess: how an image becomes what `net` takes; None: resized and cropped as usual for this size.

    Attributes:
        net: images in [0, 1] to logits: what is compressed and exported.
        preprocess: `preprocess(image) -> (3, H, W)` in [0, 1], as the test images were made; see
            distill.data.prepare.Preparation.
        folder: of the run that it comes from, or None.
        compressed: how it was, where it was.
    """

    def __init__(
        self,
        net: nn.Module,
        classes: Sequence[str],
        image_size: ImageSize = 224,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        preprocess: Preparation | None = None,
    ):
        super().__init__()
        self.net = Plain(OrderedDict(normalize=Normalize(mean, std), net=net))
        self.classes = tuple(map(str, classes))
        self.image_size = checked_size(image_size, "image_size")
        self.preprocess = Preparation(self.image_size) if preprocess is None else preprocess
        self.folder: Path | None = None
        self.compressed: Compressed | None = None

    @classmethod
    def of(
        cls, plain: nn.Module, classes: Sequence[str], preprocess: Preparation, folder: Path | None = None
    ) -> Student:
        """`plain` takes images in [0, 1] already."""
        student = cls(plain, classes, preprocess.image_size, preprocess=preprocess)
        student.net, student.folder = plain, folder
        return student.eval()

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.net(images))

    @torch.no_grad()
    def predict(self, images, top: int | None = None) -> dict[str, float] | list[dict[str, float]]:
        """Class names and probabilities, the likeliest first: {"cat": 0.93, "dog": 0.07}; of several images a list of
        such.

        Args:
            images: a photo's path, a Pillow image, an array, a tensor, or several: see `preprocess`.
            top: only so many of the classes; None: all.

        Raises:
            UserError: an image can't be read.
            UsageError: the network doesn't answer with a logit for each class.
        """
        if not several(images):
            return self.predict([images], top)[0]
        place = next(iter(self.parameters()), torch.empty(0))
        before, found = self.training, []
        size = 1 if self.compressed else AT_ONCE  # what finds an activation's range anew rounds by the whole batch
        self.eval()
        try:
            for start in range(0, len(images), size):
                batch = self.preprocess(images[start : start + size]).to(place.device)
                found += self._named(self(batch).float().softmax(1), top)
        finally:
            self.train(before)
        return found

    def _named(self, probabilities: Tensor, top: int | None) -> list[dict[str, float]]:
        if probabilities.shape[1] != len(self.classes):
            raise UsageError(
                f"the network answers with {probabilities.shape[1]} logits for {len(self.classes)} classes"
            )
        values, places = probabilities.cpu().sort(dim=1, descending=True, stable=True)
        names = [[self.classes[place] for place in row[:top]] for row in places.tolist()]
        return [dict(zip(row, each[:top], strict=True)) for row, each in zip(names, values.tolist(), strict=True)]

    def extra_repr(self) -> str:
        return f"{len(self.classes)} classes, image_size={self.image_size}"
