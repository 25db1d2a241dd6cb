"""How a network is trained."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from distill.training.parameters import DEFAULTS


@dataclass(frozen=True)
class Recipe:
    """All that decides a training besides the network, its teacher, the losses and the images.

    Args:
        epochs: at least 1.
        optimizer: `_target_` and its arguments, `lr` among them.
        schedule: `_target_` and arguments of the rate's factor, see distill/training/schedules.py.
        trainer: `_target_` and arguments of Lightning's Trainer but for max_epochs: precision, accelerator, clipping …
        seed: of the order of the images, dropout and masks.
        select: the epoch whose weights are taken, "best" (on validation images) or "last".
        ema: decay of a moving average of the weights, which is then what is taken; None: no average.
        early_stopping: epochs without a better validation accuracy before training stops; None: never.
        on_divergence: "stop", or "back": see distill.training.divergence.
        compile: torch.compile of the step.
        checkpoint_every: optimizer steps between checkpoints in an epoch; changes no bit.
        restart: train from the start where there are checkpoints and all are damaged; changes no bit.
        parameters: arguments of distill.training.parameters.grouped: weight decay of norms, rates of head and stages.
    """

    epochs: int
    optimizer: Mapping
    schedule: Mapping
    trainer: Mapping
    seed: int = 0
    select: str = "best"
    ema: float | None = None
    early_stopping: int | None = None
    on_divergence: str = "stop"
    compile: bool = False
    checkpoint_every: int = 500
    restart: bool = False
    parameters: Mapping = field(default_factory=dict)

    def changed(self, lr: float | None = None, trainer: Mapping | None = None, **others) -> "Recipe":
        """A copy with another rate, other arguments of the trainer beside those that it has, and `others` instead."""
        optimizer = self.optimizer if lr is None else {**self.optimizer, "lr": lr}
        return replace(self, optimizer=optimizer, trainer={**self.trainer, **(trainer or {})}, **others)

    def decides(self) -> dict:
        """What weights depend on, for a key, which is that of earlier versions where parameters aren't grouped and
        training doesn't go back."""
        grouped = {name: value for name, value in self.parameters.items() if value != DEFAULTS[name]}
        unasked = {"on_divergence"} if self.on_divergence == "stop" else set()
        left_out = {"checkpoint_every", "restart", *unasked, *([] if grouped else ["parameters"])}
        return {name: value for name, value in asdict(self).items() if name not in left_out}
