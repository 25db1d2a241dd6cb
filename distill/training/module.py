"""The one LightningModule: a student under weighted losses, beside a teacher or alone."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from distill.errors import UsageError
from distill.losses.base import Loss, terms_of
from distill.losses.weight import weight_at
from distill.networks.network import Network
from distill.processes import gather
from distill.progress import say
from distill.teachers.base import Teacher
from distill.training.divergence import Diverged
from distill.training.parameters import grouped, rate, scale
from distill.types import Batch, Outputs

CHECK_EVERY = 10  # steps between looks at the loss: each look waits for the device


class Distill(pl.LightningModule):
    """total = Σ_name weight[name] · losses[name](student, teacher, batch)

    Args:
        student: the network to train.
        teacher: see distill.teachers.base; None: the losses do without. One that learns adds the term "teacher".
        losses: terms by the name they are logged under, already built.
        weights: a number or [[epoch, value], …] for each.
        optimizer: parameters to optimizer.
        factor: epoch (float) to the factor of the learning rate.
        num_classes: K.
        ema: decay of the averaged student, which then is the one validated and shipped; None: no average.
        seed: with the step's number and the process's, it seeds what is random inside the networks (dropout).
        compile: the student's forward and backward pass by torch.compile; graph breaks are told after the first step.
        parameters: how the optimizer groups them, see distill.training.parameters.grouped; empty: one group of all.
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
        parameters: Mapping | None = None,
    ):
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.losses = nn.ModuleDict(losses)
        self.weights = dict(weights)
        self.optimizer = optimizer
        self.factor = factor
        self.grouping = dict(parameters or {})
        self.seed = seed
        self.compiled = compile
        if compile:
            torch.compiler.reset()  # a graph of another network's forward has none of this one's taps
        # a method, not a module: the checkpoint's keys stay
        self._answer = (torch.compile(student) if compile else student).__call__
        self.average = None
        if ema is not None:
            self.average = AveragedModel(student, multi_avg_fn=moving_average(ema), use_buffers=True)
            self.average.requires_grad_(False)
        self.terms = [*losses, "teacher"] if teacher is not None and teacher.learns else [*losses]
        self.asks = teacher is not None and (teacher.learns or any(loss.needs_teacher for loss in losses.values()))
        # running sums of the epoch: each term, the total, and the number of steps; a resume continues them. Float32
        # whatever the networks are, and no buffer: those of a process would become the first one's
        self.sums = torch.zeros(len(self.terms) + 2)
        self.metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
                "top5": MulticlassAccuracy(
                    num_classes, average="micro", top_k=min(5, num_classes), validate_args=False
                ),
            },
            prefix="val/",
        )
        self.calibration = MulticlassCalibrationError(num_classes, n_bins=15, validate_args=False)
        self.agreement = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        # how often the teacher is right and how sure it is, as sums: of an epoch's training images, of the validation's
        self.taught, self.examined = torch.zeros(3), torch.zeros(3)
        self._teacher_answers: dict[int, Tensor] = {}  # its probabilities for every validation batch: asked once

    @property
    def shipped(self) -> Network:
        """The student that is validated and shipped: the averaged one where there is one."""
        return self.student if self.average is None else self.average.module

    def configure_optimizers(self):
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in self.student.parameters()):
            self.losses.float()  # trainer.precision=bf16-true has converted all
        parts = [part for part in (self.student, self.losses, self.teacher) if part is not None]
        optimizer = self.optimizer(grouped(parts, **self.grouping))
        scale(optimizer)
        steps, epochs = self.trainer.estimated_stepping_batches, self.trainer.max_epochs

        def factor(step: int) -> float:
            """The larger one of a step's begin and end: a warm-up from 0 moves in its first step, a decay to 0 in its
            last."""
            return max(self.factor(step * epochs / steps), self.factor(min(step + 1, steps) * epochs / steps))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        self.sums = torch.zeros_like(self.sums, device=self.device)
        self.taught = torch.zeros_like(self.taught, device=self.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        step = self.current_epoch * 100_003 + batch_idx
        torch.manual_seed((self.seed * 1_000_003 + self.global_rank * 1_000_000_007 + step) % 2**63)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        student = self._answer(batch.images)
        teacher = self.teacher(batch) if self.asks else None
        total, terms = self.total(student, teacher, batch, batch_idx)
        if teacher is not None:
            self.taught = self.taught.to(total.device) + known(teacher.logits.float().softmax(1), batch.labels)
        values = torch.stack([*terms, total, torch.ones_like(total)]).detach().float()
        self.sums = self.sums.to(values.device) + values
        return total

    def total(self, student: Outputs, teacher: Outputs | None, batch: Batch, batch_idx: int):
        """The weighted sum and its unweighted terms, in float32 or, of networks in float64, in that."""
        epoch = self.current_epoch + batch_idx / self.trainer.num_training_batches
        with torch.autocast(batch.images.device.type, enabled=False), _full_precision(student.logits.dtype):
            student, teacher = student.float(), teacher and teacher.float()
            fixed = teacher and teacher.detach()
            for loss in self.losses.values():
                loss.epoch = epoch
            terms = [*terms_of(self.losses, student, fixed, batch).values()]
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
        if batch_idx % CHECK_EVERY == 0 or batch_idx + 1 == self.trainer.num_training_batches:
            self._check()

    def on_validation_start(self) -> None:
        self._check(weights=True)

    def _check(self, weights: bool = False) -> None:
        """Raises Diverged, in all processes alike, where a loss, or one of the `weights`, is not finite."""
        sums = self.trainer.strategy.reduce(self.sums.clone(), reduce_op="mean")
        if torch.isfinite(sums).all():
            if not weights or all(self._finite()):
                return
            culprits = ["a weight"]
        else:
            culprits = [name for name, value in zip(self.terms, sums, strict=False) if not value.isfinite()]
        raise Diverged(", ".join(culprits) or "total", self.current_epoch, self.trainer.global_step)

    def _finite(self) -> list[bool]:
        """Of what learns, whether each is."""
        learned = [value.detach() for value in self.parameters() if value.requires_grad and value.numel()]
        return torch.stack([norm.float() for norm in torch._foreach_norm(learned, torch.inf)]).isfinite().tolist()

    def means(self) -> dict[str, Tensor]:
        """The epoch's mean of each term, unweighted, and of the total ("loss"), so far."""
        return dict(zip([*self.terms, "loss"], self.sums[:-1] / self.sums[-1], strict=True))

    def on_train_epoch_end(self) -> None:
        self.log_dict({f"train/{name}": mean for name, mean in self.means().items()}, sync_dist=True)  # the processes'
        if self.asks:
            self._log_teacher("train", self.taught)
        self.log("lr", rate(self.trainer.optimizers[0]))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """The sums of each process, (processes, …). Raises Diverged instead of keeping weights that are not finite."""
        self._check(weights=True)
        checkpoint["sums"] = gather(self.sums[None]).cpu()
        checkpoint["taught"] = gather(self.taught[None]).cpu()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        earlier = checkpoint["state_dict"].pop("sums", None)  # of a run that began when they were a buffer
        self.sums = self._own(checkpoint.get("sums", earlier))
        self.taught = self._own(checkpoint.get("taught", self.taught))

    def _own(self, sums: Tensor) -> Tensor:
        """This process's; earlier versions kept the mean of all."""
        return sums[self.global_rank] if sums.dim() == 2 else sums

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        logits = self.shipped(batch.images).logits.float()
        self.metrics.update(logits, batch.labels)
        self.calibration.update(logits.softmax(1), batch.labels)  # logits within [0, 1] would pass for probabilities
        if self.teacher is not None:
            if batch_idx not in self._teacher_answers or not self.teacher.fixed:
                self._teacher_answers[batch_idx] = self.teacher(batch).logits.float().softmax(1)
            answers = self._teacher_answers[batch_idx]
            self.agreement.update(logits, answers.argmax(1))
            self.examined = self.examined.to(logits.device) + known(answers, batch.labels)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.metrics.compute(), prog_bar=False)
        self.metrics.reset()
        self.log("val/ece", self.calibration.compute())
        self.calibration.reset()
        if self.teacher is not None:
            self.log("val/agreement", self.agreement.compute())
            self.agreement.reset()
            self._log_teacher("val", self.examined)
            self.examined = torch.zeros_like(self.examined)

    def _log_teacher(self, images: str, sums: Tensor) -> None:
        right, sure, count = self.trainer.strategy.reduce(sums.clone(), reduce_op="sum")
        self.log(f"{images}/teacher_accuracy", right / count)
        self.log(f"{images}/teacher_confidence", sure / count)


def known(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Of probabilities (N, K) and labels (N,): how many are right, the sum of the largest of each, and N."""
    sure, answered = probabilities.detach().max(1)
    return torch.stack([(answered == labels).sum(), sure.sum(), torch.full_like(sure[0], len(labels))]).float()


def moving_average(decay: float) -> Callable:
    """For AveragedModel: θ' ← α θ' + (1 - α) θ with α = min(decay, (1 + n) / (10 + n)) after n averages.

    The average so begins as that of about a tenth of the steps: with a constant α, 0.999^150 = 86 % of it would still
    be the initial weights after 150 steps. The warm-up is that of TensorFlow's ExponentialMovingAverage (num_updates).
    """
    if not 0 <= decay < 1:
        raise UsageError(f"ema={decay}: expected a number from 0 to below 1, such as 0.999, or null")

    @torch.no_grad()
    def update(averages: list[Tensor], values: list[Tensor], n: Tensor) -> None:
        share = 1 - min(decay, (1 + int(n)) / (10 + int(n)))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, values, share)
        else:  # batch norm's number of batches
            torch._foreach_copy_(averages, values)

    return update


@contextmanager
def _full_precision(dtype: torch.dtype) -> Iterator[None]:
    """New tensors in float32 where the networks' half precision is the default, as trainer.precision=bf16-true makes
    it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if dtype == torch.float64 else torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
