"""What training leaves on the disk so that it can be killed anywhere: the two newest states, the best weights, a table
of the epochs."""

import csv
import os
import zipfile
from collections import deque
from pathlib import Path

import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import CheckpointIO

from distill import archives, signals
from distill.errors import DamagedError, UsageError, UserError
from distill.files import atomic
from distill.networks.weights import read_state, save_weights
from distill.progress import leads, say

MONITOR = "val/accuracy"
NEW, LAST, BEFORE = "new.ckpt", "last.ckpt", "before.ckpt"  # the newest first; NEW only where a kill left it
TABLE = "metrics/version_0/metrics.csv"  # where Lightning's CSV logger has it


class AtomicCheckpoints(CheckpointIO):
    """Lightning's checkpoints, whole or not there: written beside, flushed to the disk, then renamed. LAST becomes
    BEFORE: were the newest one damaged later, the one before it is there."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(NEW)
        try:
            with atomic(new) as temporary:
                torch.save(checkpoint, temporary)
            if path.exists():
                os.replace(path, path.with_name(BEFORE))
            os.replace(new, path)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
            reason = getattr(error, "strerror", None) or f"is the disk full? {str(error).partition(chr(10))[0]}"
            raise UserError(f"{path} cannot be written ({reason}); the checkpoint before it is whole") from error

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path) -> None:
        Path(path).unlink(missing_ok=True)


def read(path: Path) -> dict:
    """A checkpoint of ours, on the CPU. Its archive's checksums are compared, which torch.load does not do.

    Raises:
        DamagedError: the file is not what was written.
    """
    try:
        if not path.stat().st_size:
            raise DamagedError(f"{path} is empty")
        if reason := archives.unlike_torch(path):
            raise DamagedError(f"{path} is damaged: {reason}")
        if (changed := archives.changed(path)) is not None:
            raise DamagedError(f"{path} is damaged: {Path(changed).name} in it is not what was written (its checksum)")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except zipfile.BadZipFile as error:
        raise DamagedError(f"{path} is damaged: it is cut short, or no checkpoint ({error})") from error
    except Exception as error:  # torch raises a dozen kinds for a broken file
        raise DamagedError(f"{path} is damaged ({type(error).__name__})") from error


def newest(folder: Path, restart: bool, processes: int = 1) -> tuple[Path, tuple[int, int]] | None:
    """The newest whole checkpoint in `folder` and its `position`; None where training begins. Damaged ones are said.

    Args:
        restart: begin anew where there are checkpoints and none is whole, or none of so many processes.
        processes: that train together now.

    Raises:
        DamagedError: none is whole, more than an epoch would be lost, and `restart` is false.
        UsageError: another number of processes trained, and `restart` is false: which images make up a step, and the
            rate's schedule, depend on it.
    """
    paths = [path for name in (NEW, LAST, BEFORE) if (path := folder / name).exists()]
    for path in paths:
        try:
            checkpoint = read(path)
            _check_best(folder, checkpoint)
            found, before = position(checkpoint), checkpoint.get("processes", processes)
        except (DamagedError, KeyError) as error:
            say(f"  warning: {error if isinstance(error, DamagedError) else f'{path} lacks {error}'}")
        else:
            if before != processes and not restart:
                raise UsageError(
                    f"{folder}: this training began with {_counted(before)}, and there {_are(processes)} now: go on "
                    f"with {before} (trainer.devices, trainer.num_nodes), or add restart=true to train from the start"
                )
            if before != processes:
                say(f"  it began with {_counted(before)}, and there {_are(processes)} now: training from the start")
                return None
            if path != paths[0]:
                say(f"  the checkpoint before it is whole: {path}")
            return path, found
    if paths and any(folder.glob("best*.safetensors")) and not restart:
        raise DamagedError(
            f"{folder}: no checkpoint is whole, and to train from the start would repeat more than an epoch: "
            "bring one back from a copy, or add restart=true"
        )
    if paths:
        say("  no checkpoint is whole: training from the start")
    return None


def _counted(processes: int) -> str:
    return f"{processes} process{'' if processes == 1 else 'es'}"


def _are(processes: int) -> str:
    return f"is {processes}" if processes == 1 else f"are {processes}"


def _check_best(folder: Path, checkpoint: dict) -> None:
    """Raises DamagedError where the weights that it calls the best so far are not there as they were written."""
    epoch = checkpoint["callbacks"]["Checkpoints"]["best"]["epoch"]
    if epoch:
        try:
            read_state(best_file(folder, epoch))
        except UserError as error:
            raise DamagedError(str(error)) from error


def best_file(folder: Path, epoch: int) -> Path:
    """Where the weights of the best epoch lie: under its number, so that they belong to one checkpoint."""
    path = folder / f"best-{epoch}.safetensors"
    return path if path.exists() else folder / "best.safetensors"  # as earlier versions wrote it


def position(checkpoint: dict) -> tuple[int, int]:
    """(epochs finished, batches finished in the present one) at a checkpoint that `Checkpoints` wrote."""
    progress = checkpoint["loops"]["fit_loop"]
    batches = progress["epoch_loop.batch_progress"]
    done = 0 if batches["is_last_batch"] else batches["current"]["ready"]
    return progress["epoch_progress"]["current"]["processed"], done


class Checkpoints(Checkpoint):
    """The newest state, at the end of every epoch and every so many optimizer steps inside one, the weights of the
    epoch that validates best, and the epochs' metrics. All are written by it, so that they agree whenever it is killed;
    the files, and what is known of them, move with the folder."""

    def __init__(self, folder: Path, every: int):
        self.folder, self.every, self.step = folder, every, 0
        self.last = {"epoch": 0, "accuracy": None}  # epochs counted from 1, accuracy in [0, 1]
        self.best = {"epoch": 0, "accuracy": None}
        self.rows = []  # an epoch's metrics each
        self.kept = deque(maxlen=2)  # best epochs that the two newest states name

    def on_train_start(self, trainer, module) -> None:
        signals.take_back()  # Lightning, which has just set its own, would leave between two steps, with nothing saved
        self.step = trainer.global_step

    def on_validation_end(self, trainer, module) -> None:
        self.last = {"epoch": trainer.current_epoch + 1, "accuracy": float(trainer.callback_metrics[MONITOR])}
        if self.best["accuracy"] is None or self.last["accuracy"] > self.best["accuracy"]:
            self.best = self.last
            if trainer.is_global_zero:
                save_weights(module.shipped.net, self.folder / f"best-{self.best['epoch']}.safetensors", {})

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        stepped, self.step = trainer.global_step != self.step, trainer.global_step
        if not stepped or batch_idx + 1 == trainer.num_training_batches:
            return  # gradients that are being accumulated are in no checkpoint; the epoch's end has its own
        if _asked(trainer):
            self._save(trainer)
            signals.end()
        if self.step % self.every == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer, module) -> None:
        row = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self.last["epoch"] != trainer.current_epoch + 1:  # not validated in this epoch
            row = {name: value for name, value in row.items() if not name.startswith("val/")}
        self.rows.append({"epoch": trainer.current_epoch, "step": trainer.global_step - 1, **row})
        self._save(trainer)
        self._write_table()
        if _asked(trainer):
            signals.end()

    def _save(self, trainer) -> None:
        trainer.save_checkpoint(self.folder / LAST)
        self.kept.append(self.best["epoch"])
        if trainer.is_global_zero and len(self.kept) == 2:
            for path in self.folder.glob("best-*.safetensors"):
                if path.name not in {f"best-{epoch}.safetensors" for epoch in self.kept}:
                    path.unlink(missing_ok=True)

    def _write_table(self) -> None:
        if not (self.rows and leads()):
            return
        path = self.folder.parent / TABLE
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            names = {name: None for row in self.rows for name in row}
            table = csv.DictWriter(file, [*names])
            table.writeheader()
            table.writerows(self.rows)

    def state_dict(self) -> dict:
        return {"last": self.last, "best": self.best, "rows": self.rows}

    def load_state_dict(self, state: dict) -> None:
        self.last, self.best = state["last"], state["best"]
        self.rows = state["rows"] if "rows" in state else _logged(self.folder.parent)
        self._write_table()

    def on_save_checkpoint(self, trainer, module, checkpoint: dict) -> None:
        checkpoint["stopped"], checkpoint["processes"] = trainer.should_stop, trainer.world_size

    def on_load_checkpoint(self, trainer, module, checkpoint: dict) -> None:
        trainer.should_stop = checkpoint.get("stopped", False)  # early stopping's decision


def _logged(folder: Path) -> list[dict]:
    """The epochs' metrics that an earlier version's logger wrote, a file an attempt and two lines an epoch."""
    rows: dict[str, dict] = {}
    for file in sorted(folder.glob("metrics/version_*/metrics.csv"), key=lambda file: (len(str(file)), file)):
        for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines()):
            rows.setdefault(row["epoch"], {}).update({name: value for name, value in row.items() if value})
    return list(rows.values())


def _asked(trainer) -> bool:
    """Whether a signal has asked one of the processes that train together to end."""
    if trainer.world_size == 1:
        return signals.asked() is not None
    return trainer.strategy.reduce_boolean_decision(signals.asked() is not None, all=False)
