"""Distillation inside somebody else's training: a LightningModule, whose loss a plain loop can call too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from distill.api.session import configured
from distill.errors import UsageError
from distill.losses.base import Loss, terms_of
from distill.losses.terms import build_losses
from distill.losses.weight import check_weight, weight_at
from distill.networks.network import Network, Normalize
from distill.networks.taps import infer_taps
from distill.teachers.frozen import Frozen
from distill.training.connect import record
from distill.types import Batch, Outputs, checked_size

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
NAMES = (("images", "image", "pixel_values", "x"), ("labels", "label", "targets", "y"))  # of a batch that is a mapping


class DistillModule(pl.LightningModule):
    """total = Σ_name weight[name] · losses[name](student, teacher, batch), for a Trainer, or a loop, of your own.

        module = distill.DistillModule(student, teacher, ["ce", "kd"])
        pytorch_lightning.Trainer(max_epochs=3).fit(module, train_loader, val_loader)

    `student` is trained in place. A loader gives (images, labels), a mapping of them, or a distill.types.Batch; both
    networks see the images as they come, so they are normalised by the loader if at all.

    Args:
        student: images (N, C, H, W) to logits (N, K).
        teacher: the same; it is set to eval mode, gets no gradients, and is not in the checkpoint. None: the losses do
            without.
        losses: names of the group `loss`, with their published weights, or {name: Loss}, each of which weighs 1.
        weights: {name: number or [[epoch, value], …]}, instead of those.
        example: a few images as the loader gives them; needed by losses that read features or learn layers of their
            own, which are made here, so that the optimizer sees them.
        optimizer: parameters to optimizer; override `configure_optimizers` for schedules.

    Raises:
        UsageError: a loss needs a teacher, an example, or a training set, or a network has no such feature.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        losses: Sequence[str] | Mapping[str, Loss] = ("ce", "kd"),
        *,
        weights: Mapping[str, float | Sequence] | None = None,
        example: Tensor | None = None,
        optimizer: Callable = SGD,
    ):
        super().__init__()
        terms, published = _terms(losses)
        self.weights = {**published, **(weights or {})}
        for name, weight in self.weights.items():
            if name not in terms:
                raise UsageError(f"weights: there is no loss '{name}', but {', '.join(terms)}")
            check_weight(name, weight)
        _refuse(terms, teacher, example)
        self.network = _tapped(student, example)
        self.teacher = None if teacher is None else _Asked(_tapped(teacher, example))
        self.losses, self.optimizer = nn.ModuleDict(terms), optimizer
        if example is not None:
            self._build(example)

    @property
    def student(self) -> nn.Module:
        return self.network.net

    def forward(self, images: Tensor) -> Tensor:
        """The student's logits (N, K)."""
        return self.network(images).logits

    def loss(self, images: Tensor, labels: Tensor, epoch: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, a scalar, and each term, unweighted.

        Args:
            images: (N, C, H, W); labels: (N,) int64.
            epoch: of the training so far, for weights that change.
        """
        return self._loss(Batch(images, labels, torch.full((len(labels),), -1), 0), epoch)

    def _loss(self, batch: Batch, epoch: float) -> tuple[Tensor, dict[str, Tensor]]:
        student = self.network(batch.images)
        teacher = None if self.teacher is None else self.teacher(batch)
        with torch.autocast(batch.images.device.type, enabled=False):
            student, teacher = student.float(), teacher and teacher.float()
            for loss in self.losses.values():
                loss.epoch = epoch
            terms = terms_of(self.losses, student, teacher, batch)
            return sum(weight_at(self.weights[name], epoch) * term for name, term in terms.items()), terms

    def training_step(self, batch, batch_idx: int) -> Tensor:
        epoch = self.current_epoch + batch_idx / max(1, self.trainer.num_training_batches)
        total, terms = self._loss(_batch(batch), epoch)
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()})
        self.log("train/loss", total.detach(), prog_bar=True)
        return total

    def validation_step(self, batch, batch_idx: int) -> None:
        batch = _batch(batch)
        answers, size = self(batch.images).argmax(1), len(batch.labels)
        self.log(
            "val/accuracy", (answers == batch.labels).float().mean(), prog_bar=True, batch_size=size, sync_dist=True
        )
        if self.teacher is not None:
            same = (answers == self.teacher(batch).logits.argmax(1)).float().mean()
            self.log("val/agreement", same, batch_size=size, sync_dist=True)

    def configure_optimizers(self):
        return self.optimizer([value for value in self.parameters() if value.requires_grad])

    @torch.no_grad()
    def _build(self, example: Tensor) -> None:
        """The losses' layers, from what both networks answer to the example."""
        record(self.network, "student", self.losses)
        student = _answer(self.network, example[:2])
        teacher = None
        if self.teacher is not None:
            record(self.teacher.network, "teacher", self.losses)
            teacher = _answer(self.teacher.network, example[:2])
            if teacher.logits.shape != student.logits.shape:
                shapes = tuple(student.logits.shape), tuple(teacher.logits.shape)
                raise UsageError(
                    f"the student answers with {shapes[0]}, the teacher with {shapes[1]}: expected the same"
                )
        known = _Known(student.logits.shape[1], example)
        for loss in self.losses.values():
            with torch.enable_grad():
                loss.build(student.float(), teacher and teacher.float(), known)


class _AsGiven(Normalize):
    """Images as they come."""

    def __init__(self, channels: int):
        super().__init__([0.0] * channels, [1.0] * channels)

    def forward(self, images: Tensor) -> Tensor:
        return images


class _Asked(Frozen):
    """A teacher that is asked as it is."""

    @torch.no_grad()
    def forward(self, batch: Batch) -> Outputs:
        return self.network(batch.images)


class _Known:
    """What is known of the training set, for `Loss.build`."""

    def __init__(self, num_classes: int, example: Tensor):
        self.num_classes, self.image_size = num_classes, checked_size(tuple(example.shape[2:]))

    def __getattr__(self, name: str):
        raise UsageError(f"a loss asks for the training set's {name}, which only distill.train knows")


def _terms(losses) -> tuple[dict[str, Loss], dict[str, float | list]]:
    if isinstance(losses, Mapping):
        wrong = [name for name, loss in losses.items() if not isinstance(loss, Loss)]
        if wrong or not losses:
            raise UsageError(
                f"losses: expected {{name: Loss}}, such as {{'kd': distill.losses.KD()}}, not {losses!r:.99}"
            )
        return dict(losses), dict.fromkeys(losses, 1.0)
    names = [losses] if isinstance(losses, str) else [*losses]
    return build_losses(configured([f"loss=[{','.join(names)}]"])["loss"])


def _refuse(terms: Mapping[str, Loss], teacher: nn.Module | None, example: Tensor | None) -> None:
    for name, loss in terms.items():
        if loss.needs_teacher and teacher is None:
            raise UsageError(f"loss {name} needs a teacher")
        if loss.survey_taps:
            raise UsageError(f"loss {name} looks at the training set before it begins, which only distill.train knows")
        makes = type(loss).build is not Loss.build
        if example is None and (makes or loss.student_taps or loss.teacher_taps):
            raise UsageError(f"loss {name} reads features: give example=, a few images as the loader gives them")


def _tapped(net: nn.Module, example: Tensor | None) -> Network:
    """`net` with taps that are found in it; without an example, with none."""
    channels, size = (3, None) if example is None else (example.shape[1], checked_size(tuple(example.shape[2:])))
    taps = {} if example is None else infer_taps(net, size, channels)
    network = Network(net, taps, [0.0] * channels, [1.0] * channels, size)
    network.normalize = _AsGiven(channels)
    return network


def _answer(network: Network, images: Tensor) -> Outputs:
    before = network.training
    outputs = network.eval()(images)
    network.train(before)
    return outputs


def _batch(batch) -> Batch:
    """What a loader gives, with row numbers where it has them."""
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, Mapping):
        found = [next((batch[name] for name in names if name in batch), None) for names in NAMES]
    else:
        found = [*batch][:2]
    if len(found) < 2 or any(not isinstance(part, Tensor) for part in found):
        raise UsageError("a batch must be (images, labels), or a mapping with 'images' and 'labels'")
    return Batch(*found, torch.full((len(found[1]),), -1), 0)
