"""Training for compression steps: the same losses, the same teacher, the same Lightning module as the student's."""

import copy
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from omegaconf import DictConfig, open_dict
from pytorch_lightning.callbacks import Callback
from torch import distributed, fx, nn

from distill import build, export
from distill.checkpoints import read_state, save_weights
from distill.data.base import Data
from distill.errors import UserError
from distill.export.artifact import Artifact
from distill.files import content_key
from distill.fit import fit
from distill.network import Network
from distill.progress import say
from distill.sources import describe, layers, own_sources
from distill.teachers import Teacher, tensors_hash

DECIDES = ("data", "teacher", "optimizer", "schedule", "trainer", "seed", "select")


def finetuner(
    cfg: DictConfig, teacher: Teacher | None, data: Data, folder: Path, identity: Mapping | None = None
) -> Callable:
    """The callable that compression steps train with.

        finetune(net, name, *, epochs, lr, on_epoch=None) -> nn.Module

    trains a copy of `net` (images in [0, 1] to logits) under those losses of `cfg` that read logits only, in
    folder/compress/NAME-KEY, and returns its best epoch. A killed fine-tuning is continued; a finished one of the same
    weights and configuration is read from its file.
    `on_epoch(net, epoch, epochs, training)` is called where an epoch (from 0) or its validation begins.

    Besides, of the run: `finetune.folder`; `finetune.exports`, its exporters' configuration; and

        finetune.ship(net, flow, folder) -> list[Artifact]

    writes the files that this run's exporters of a flow make of a network, as they ship.

    Args:
        cfg: the run's.
        teacher, data: as for the student; the teacher of a run that has none is None.
        folder: the run's.
        identity: what the run writes into each file.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # from here on this process is alone: it trains on all rows
    losses = logit_losses(cfg.loss, taught=teacher is not None)
    terms = describe(build.losses(losses)[0])
    cfg = copy.deepcopy(cfg)
    with open_dict(cfg):  # on one device, as captured, without an average of observers, to the end
        cfg.trainer.devices, cfg.trainer.strategy = 1, "auto"
        cfg.ema, cfg.early_stopping, cfg.compile = None, None, False

    def finetune(net: nn.Module, name: str, *, epochs: int, lr: float, on_epoch: Callable | None = None) -> nn.Module:
        net = copy.deepcopy(net)
        decides = {key: build.plain(cfg[key]) for key in DECIDES} | {
            "start": tensors_hash(net.named_parameters()),  # what observers saw may differ in the last bit
            "images": data.fingerprint,
            "loss": losses,
            "epochs": epochs,
            "lr": lr,
            "step": _options(cfg.compress, name),
        }
        own = own_sources([layers(net), layers(teacher) if teacher else None, describe(data.train.transform), terms])
        graphs = [module.code for module in net.modules() if isinstance(module, fx.GraphModule)]
        decides |= ({"source": own} if own else {}) | ({"graphs": graphs} if graphs else {})
        decides["data"].pop("num_workers", None)
        key = content_key(decides)
        place = Path(folder) / "compress" / f"{name}-{key}"
        weights = place / "weights.safetensors"
        if weights.exists():
            say(f"  {name}: fine-tuned before, read from {weights}")
            net.load_state_dict(read_state(weights))
            return net.eval()
        say(f"  {name}: fine-tuning under {' + '.join(losses)} for {epochs} epochs → {weights}")
        place.mkdir(parents=True, exist_ok=True)
        network = Network(net, {}, [0.0] * 3, [1.0] * 3)
        callbacks = [] if on_epoch is None else [EachEpoch(on_epoch, epochs)]
        settings = copy.deepcopy(cfg)
        if any(hasattr(module, "enable_observer") for module in net.modules()):
            settings.trainer.precision = "32-true"  # fake quantization knows no other
        chosen = fit(settings, network, teacher, losses, data, place, epochs, lr, callbacks=callbacks)[cfg.select]
        say(f"  {name}: epoch {chosen['epoch']}, validation {chosen['accuracy']:.1%}")
        save_weights(net, weights, {"epoch": str(chosen["epoch"]), "accuracy": str(chosen["accuracy"])})
        shutil.rmtree(place / "checkpoints", ignore_errors=True)
        return net.eval()

    exporters, file = build.steps(cfg.export), "-".join(["student", *cfg.compress])

    def ship(net: nn.Module, flow: str, folder: Path) -> list[Artifact]:
        files, failures = export.export({file: {flow: net}}, exporters, folder, data, identity or {})
        if failures:
            raise UserError("; ".join(failures))
        return files[file]

    finetune.folder, finetune.ship, finetune.exports = Path(folder), ship, build.plain(cfg.export)
    return finetune


def _options(steps: Mapping, name: str) -> dict | None:
    """What the configuration says of the step that trains as `name`, such as "prune", "auto-0.5-qat_int8-fx"."""
    first, *rest = name.split("-")
    return _options(steps[first], "-".join(rest[1:])) if first == "auto" else build.plain(steps.get(first))


def logit_losses(cfg: Mapping, taught: bool = True) -> dict:
    """The terms of a loss configuration that read no taps, which graph capture does not keep, and no teacher where
    there is none; without any, the cross-entropy."""
    terms, _ = build.losses(cfg)
    plain = build.plain(cfg)
    usable = {name: loss for name, loss in terms.items() if taught or not loss.needs_teacher}
    chosen = {name: plain[name] for name, loss in usable.items() if not (*loss.student_taps, *loss.teacher_taps)}
    return chosen or {"ce": {"_target_": "distill.losses.ce.CE", "weight": 1.0}}


class EachEpoch(Callback):
    """Calls `on_epoch(net, epoch, epochs, training)` before the first batch of an epoch's training, of its
    validation, and of what follows: also where a killed run continues inside an epoch."""

    def __init__(self, on_epoch: Callable, epochs: int):
        self.on_epoch, self.epochs, self.told = on_epoch, epochs, None

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self._tell(trainer, module, True)

    def on_validation_start(self, trainer, module) -> None:
        self._tell(trainer, module, False)

    def _tell(self, trainer, module, training: bool) -> None:
        now = (trainer.current_epoch, training)
        if now != self.told:
            self.told = now
            self.on_epoch(module.student.net, trainer.current_epoch, self.epochs, training)
