"""What training leaves on the disk so that it can be killed anywhere: the newest state, the best weights."""

from pathlib import Path

import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import CheckpointIO

from distill.errors import UserError
from distill.files import atomic
from distill.networks.weights import save_weights

MONITOR = "val/accuracy"
LAST, BEST = "last.ckpt", "best.safetensors"


class AtomicCheckpoints(CheckpointIO):
    """Lightning's checkpoints, whole or not there: written beside, flushed to the disk, then renamed."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic(path) as temporary:
                torch.save(checkpoint, temporary)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
            reason = getattr(error, "strerror", None) or f"is the disk full? {str(error).partition(chr(10))[0]}"
            raise UserError(f"{path} cannot be written ({reason}); the checkpoint before it is whole") from error

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return read(Path(path), map_location)

    def remove_checkpoint(self, path) -> None:
        Path(path).unlink(missing_ok=True)


def read(path: Path, map_location=None) -> dict:
    """A checkpoint of ours. Raises UserError where the file is damaged."""
    try:
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a broken file
        raise UserError(f"{path} is damaged ({type(error).__name__}): delete it to train from the start") from error


def position(checkpoint: dict) -> tuple[int, int]:
    """(epochs finished, batches finished in the present one) at a checkpoint that `Checkpoints` wrote."""
    progress = checkpoint["loops"]["fit_loop"]
    batches = progress["epoch_loop.batch_progress"]
    done = 0 if batches["is_last_batch"] else batches["current"]["ready"]
    return progress["epoch_progress"]["current"]["processed"], done


class Checkpoints(Checkpoint):
    """The newest state, at the end of every epoch and every so many optimizer steps inside one, and the weights of
    the epoch that validates best. Both files, and what is known of them, move with the run's folder."""

    def __init__(self, folder: Path, every: int):
        self.folder, self.every, self.saved = folder, every, 0
        self.last = {"epoch": 0, "accuracy": None}  # epochs counted from 1, accuracy in [0, 1]
        self.best = {"epoch": 0, "accuracy": None}

    def on_validation_end(self, trainer, module) -> None:
        self.last = {"epoch": trainer.current_epoch + 1, "accuracy": float(trainer.callback_metrics[MONITOR])}
        if self.best["accuracy"] is None or self.last["accuracy"] > self.best["accuracy"]:
            self.best = self.last
            if trainer.is_global_zero:
                save_weights(module.shipped.net, self.folder / BEST, {})

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        inside = batch_idx + 1 < trainer.num_training_batches
        if inside and step % self.every == 0 and step != self.saved:
            self._save(trainer)

    def on_train_epoch_end(self, trainer, module) -> None:
        self._save(trainer)

    def _save(self, trainer) -> None:
        self.saved = trainer.global_step
        trainer.save_checkpoint(self.folder / LAST)

    def state_dict(self) -> dict:
        return {"last": self.last, "best": self.best}

    def load_state_dict(self, state: dict) -> None:
        self.last, self.best = state["last"], state["best"]
