"""The one LightningModule: a student under weighted losses, beside a teacher or alone."""

from collections.abc import Callable, Mapping

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from distill.errors import UserError
from distill.losses.base import Loss
from distill.network import Network
from distill.progress import say
from distill.schedules import weight_at
from distill.teachers import Teacher
from distill.types import Batch, Outputs

CHECK_EVERY = 10  # steps between looks at the loss: each look waits for the device


class Distill(pl.LightningModule):
    """total = Σ_name weight[name] · losses[name](student, teacher, batch)

    Args:
        student: the network to train.
        teacher: see distill.teachers; None: the losses do without. One that learns adds the term "teacher".
        losses: terms by the name they are logged under, already built.
        weights: a number or [[epoch, value], …] for each.
        optimizer: parameters to optimizer.
        factor: epoch (float) to the factor of the learning rate.
        num_classes: K.
        ema: decay of the averaged student, which then is the one validated and shipped; None: no average.
        seed: with the step's number, it seeds what is random inside the networks (dropout).
        compile: the student's forward and backward pass by torch.compile; graph breaks are told after the first step.
    """

    def __init__(
        self,
        student: Network,
        teacher: Teacher | None,
        losses: Mapping[str, Loss],
        weights: Mapping[str, float | list],
        optimizer: Callable,
        factor: Callable[[float], float],
        num_classes: int,
        ema: float | None = None,
        seed: int = 0,
        compile: bool = False,
    ):
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.losses = nn.ModuleDict(losses)
        self.weights = dict(weights)
        self.optimizer = optimizer
        self.factor = factor
        self.seed = seed
        self.compiled = compile
        if compile:
            student.compile()  # in place: the checkpoint's keys stay
        self.average = None
        if ema is not None:
            self.average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True)
            self.average.requires_grad_(False)
        self.terms = [*losses, "teacher"] if teacher is not None and teacher.learns else [*losses]
        self.asks = teacher is not None and (teacher.learns or any(loss.needs_teacher for loss in losses.values()))
        # running sums of the epoch: each term, the total, and the number of steps; a resume continues them
        self.register_buffer("sums", torch.zeros(len(self.terms) + 2))
        self.metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
                "top5": MulticlassAccuracy(
                    num_classes, average="micro", top_k=min(5, num_classes), validate_args=False
                ),
                "ece": MulticlassCalibrationError(num_classes, n_bins=15, validate_args=False),
            },
            prefix="val/",
        )
        self.agreement = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self._teacher_answers: dict[int, Tensor] = {}  # its class for every validation batch: asked once

    @property
    def shipped(self) -> Network:
        """The student that is validated and shipped: the averaged one where there is one."""
        return self.student if self.average is None else self.average.module

    def configure_optimizers(self):
        parts = [part for part in (self.student, self.losses, self.teacher) if part is not None]
        learned = [p for part in parts for p in part.parameters() if p.requires_grad]
        optimizer = self.optimizer(learned)
        steps, epochs = self.trainer.estimated_stepping_batches, self.trainer.max_epochs
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step * epochs / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        self.sums.zero_()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(self.seed * 1_000_003 + self.current_epoch * 100_003 + batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        student = self.student(batch.images)
        teacher = self.teacher(batch) if self.asks else None
        total, terms = self.total(student, teacher, batch, batch_idx)
        self.sums += torch.stack([*terms, total, torch.ones_like(total)]).detach()
        return total

    def total(self, student: Outputs, teacher: Outputs | None, batch: Batch, batch_idx: int):
        """The weighted sum and its unweighted terms, in float32 whatever the networks' precision."""
        epoch = self.current_epoch + batch_idx / self.trainer.num_training_batches
        with torch.autocast(batch.images.device.type, enabled=False):
            student, teacher = student.float(), teacher and teacher.float()
            seen = teacher and teacher.detach()
            terms = [loss(student, seen, batch) for loss in self.losses.values()]
            weights = [weight_at(self.weights[name], epoch) for name in self.losses]
            if self.teacher is not None and self.teacher.learns:
                terms.append(self.teacher.loss(student.detach(), teacher, batch))
                weights.append(1.0)
            return sum(weight * term for weight, term in zip(weights, terms, strict=True)), terms

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.average is not None:
            self.average.update_parameters(self.student)
        if self.teacher is not None:
            self.teacher.after_step(self.student)

    def on_train_batch_end(self, outputs, batch: Batch, batch_idx: int) -> None:
        if self.compiled:
            self.compiled = False
            say(f"  compiled with {sum(counters['graph_break'].values())} graph breaks")
            for reason in counters["graph_break"]:
                say(f"    {' '.join(reason.split())[:200]}")
        last = batch_idx + 1 == self.trainer.num_training_batches
        if (batch_idx % CHECK_EVERY == 0 or last) and not torch.isfinite(self.sums).all():
            culprits = [name for name, value in zip(self.terms, self.sums, strict=False) if not value.isfinite()]
            raise UserError(
                f"the loss diverged in epoch {self.current_epoch} ({', '.join(culprits) or 'total'} is not finite): "
                "lower optimizer.lr, set trainer.gradient_clip_val=1, or lower the weight of that loss"
            )

    def means(self) -> dict[str, Tensor]:
        """The epoch's mean of each term, unweighted, and of the total ("loss"), so far."""
        return dict(zip([*self.terms, "loss"], self.sums[:-1] / self.sums[-1], strict=True))

    def on_train_epoch_end(self) -> None:
        self.log_dict({f"train/{name}": mean for name, mean in self.means().items()}, sync_dist=True)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self.shipped(batch.images).logits.float()
        self.metrics.update(logits, batch.labels)
        if self.teacher is not None:
            if batch_idx not in self._teacher_answers or not self.teacher.fixed:
                self._teacher_answers[batch_idx] = self.teacher(batch).logits.argmax(1)
            self.agreement.update(logits, self._teacher_answers[batch_idx])

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.metrics.compute(), prog_bar=False)
        self.metrics.reset()
        if self.teacher is not None:
            self.log("val/agreement", self.agreement.compute())
            self.agreement.reset()
