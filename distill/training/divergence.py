"""A training whose loss or weights are no longer finite: told, or taken back to where they were."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from distill.errors import UserError
from distill.progress import say
from distill.training.resume import LAST

FACTOR = 0.5  # of the rate, after each setback
MOST = 3  # setbacks


class Diverged(UserError):
    """A loss or a weight is not finite; `epoch`, counted from 0, and `step`, the optimizer's, say where."""

    def __init__(self, culprits: str, epoch: int, step: int):
        self.culprits, self.epoch, self.step = culprits, epoch, step
        super().__init__(
            f"the loss diverged in epoch {epoch} ({culprits} is not finite): lower optimizer.lr, set "
            "trainer.gradient_clip_val=1, or lower the weight of that loss; on_divergence=back does the first by itself"
        )


class Setbacks(Callback):
    """on_divergence=back: where training diverges it goes back to its last checkpoint with half the rate, at most three
    times. Checkpoints hold finite weights only and know how often that was; the first is written before any step.

    Args:
        back: false: a `Diverged` ends the training.
        folder: of the checkpoints.
    """

    def __init__(self, back: bool, folder: Path):
        self.back, self.folder = back, folder
        self.steps: list[int] = []  # the optimizer's, at which it was found to have diverged

    @property
    def factor(self) -> float:
        """Of the rate."""
        return FACTOR ** len(self.steps)

    def take(self, error: Diverged) -> None:
        """Count one. Raises `error` where it is one too many."""
        if not self.back or len(self.steps) == MOST:
            raise error
        self.steps.append(error.step)
        say(
            f"  diverged in epoch {error.epoch + 1} ({error.culprits} is not finite): back to the last checkpoint with "
            f"{self.factor:g} times the rate ({len(self.steps)} of at most {MOST} times)"
        )

    def on_train_start(self, trainer, module) -> None:
        if self.back and trainer.global_step == 0 and not (self.folder / LAST).exists():
            trainer.save_checkpoint(self.folder / LAST)
        for schedule in (config.scheduler for config in trainer.lr_scheduler_configs if self.steps):
            for group, first, factor in zip(
                schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
            ):
                group["lr"] = first * factor(schedule.last_epoch)  # the checkpoint has that of before the setback

    def state_dict(self) -> dict:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.steps = max(self.steps, list(state["steps"]), key=len)  # the checkpoint is from before the last setback


def restored(parts: Sequence[nn.Module], states: Sequence[Mapping[str, Tensor]]) -> None:
    """Put back what training made of its networks."""
    for part, state in zip(parts, states, strict=True):
        part.to("cpu").float().load_state_dict(state)


def told(steps: Sequence[int]) -> dict:
    """What the report says of the setbacks."""
    places = ", ".join(map(str, steps))
    return {"diverged": f"after {places} steps: each time back with half the rate"} if steps else {}
