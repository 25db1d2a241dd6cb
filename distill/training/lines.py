"""What a person sees while a network is trained: a line an epoch."""

import sys
import time

from pytorch_lightning.callbacks import Callback

from distill.progress import say


class Lines(Callback):
    """A line per epoch, not more often than every two seconds, and every half minute inside a long epoch."""

    def __init__(self, epochs: int):
        self.epochs = epochs
        self.start = self.told = time.monotonic()

    @staticmethod
    def on_a_terminal() -> bool:
        return sys.stdout.isatty()

    def on_train_start(self, trainer, module) -> None:
        self.start = self.told = time.monotonic()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if not self.on_a_terminal() and trainer.is_global_zero and time.monotonic() - self.told > 30:
            self._tell(f"batch {batch_idx + 1}/{trainer.num_training_batches}", trainer)

    def on_train_epoch_end(self, trainer, module) -> None:
        last = trainer.current_epoch + 1 == self.epochs
        loss = trainer.strategy.reduce(module.means()["loss"], reduce_op="mean")  # asked by all processes alike
        if trainer.is_global_zero and (last or time.monotonic() - self.told > 2):
            metrics = trainer.callback_metrics
            words = [f"loss {loss:.3f}"]
            if "val/accuracy" in metrics:
                words.append(f"validation {metrics['val/accuracy']:.1%}")
            if "val/agreement" in metrics:
                words.append(f"agreement with the teacher {metrics['val/agreement']:.1%}")
            self._tell(", ".join(words), trainer)

    def _tell(self, text: str, trainer) -> None:
        self.told = time.monotonic()
        say(f"  epoch {trainer.current_epoch + 1}/{self.epochs}: {text} ({self.told - self.start:.0f} s)")
