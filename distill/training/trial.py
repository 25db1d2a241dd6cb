"""A training that is one trial of a search."""

from collections.abc import Callable

from pytorch_lightning.callbacks import Callback

from distill.errors import Pruned
from distill.training.resume import MONITOR


class Judged(Callback):
    """Tells the validation accuracy of each epoch, and ends a training that isn't worth going on with.

    Args:
        judge: (epoch from 1, validation accuracy in [0, 1]) to whether to go on; asked by the process that leads.
    """

    def __init__(self, judge: Callable[[int, float], bool]):
        self.judge = judge

    def on_train_epoch_end(self, trainer, module) -> None:
        epoch, accuracy = trainer.current_epoch + 1, trainer.callback_metrics.get(MONITOR)
        goes_on = accuracy is None or not trainer.is_global_zero or self.judge(epoch, float(accuracy))
        if not trainer.strategy.broadcast(goes_on):
            raise Pruned(f"pruned after epoch {epoch}: {float(accuracy):.1%} of the validation images are too few")
