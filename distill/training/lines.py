"""What a person sees while a network is trained: a line an epoch."""

import sys
import time

from pytorch_lightning.callbacks import Callback

from distill.progress import on_a_terminal, say


class Lines(Callback):
    """A line per epoch, not more often than every two seconds. Inside an epoch: on a terminal a bar of its batches,
    elsewhere a line every half minute."""

    def __init__(self, epochs: int):
        self.epochs = epochs
        self.start = self.told = time.monotonic()
        self.bar = None

    def on_train_start(self, trainer, module) -> None:
        self.start = self.told = time.monotonic()

    def on_train_epoch_start(self, trainer, module) -> None:
        if trainer.is_global_zero and on_a_terminal():
            from tqdm import tqdm

            self.bar = tqdm(
                total=trainer.num_training_batches,
                desc=f"  epoch {trainer.current_epoch + 1}/{self.epochs}",
                bar_format="{desc}: batch {n_fmt}/{total_fmt} |{bar}| {remaining} left",
                leave=False,
                dynamic_ncols=True,
                file=sys.stdout,
            )

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self.bar is not None:
            self.bar.update(batch_idx + 1 - self.bar.n)
        elif trainer.is_global_zero and time.monotonic() - self.told > 30:
            self._tell(f"batch {batch_idx + 1}/{trainer.num_training_batches}", trainer)

    def on_train_epoch_end(self, trainer, module) -> None:
        self._close()
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

    def on_exception(self, trainer, module, exception) -> None:
        self._close()

    def teardown(self, trainer, module, stage) -> None:
        self._close()

    def _close(self) -> None:
        """The bar goes, and its line is free for what is said next."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _tell(self, text: str, trainer) -> None:
        self.told = time.monotonic()
        say(f"  epoch {trainer.current_epoch + 1}/{self.epochs}: {text} ({self.told - self.start:.0f} s)")
