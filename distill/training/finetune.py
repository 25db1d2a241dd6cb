"""Training for compression steps: the same losses, the same teacher, the same Lightning module as the student's."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

from pytorch_lightning.callbacks import Callback
from torch import distributed, fx, nn

from distill import export, types
from distill.data.base import Data
from distill.errors import UserError
from distill.losses.terms import build_losses
from distill.networks.network import Network
from distill.networks.sources import describe, layers, own_sources
from distill.networks.weights import read_state, tensors_hash
from distill.progress import say
from distill.runtimes.artifact import Artifact
from distill.teachers.base import Teacher
from distill.training.answers import Answers
from distill.training.fit import fit
from distill.training.recipe import Recipe
from distill.training.store import once


def finetuner(
    recipe: Recipe,
    losses: Mapping,
    teacher: Teacher | None,
    data: Data,
    folder: Path,
    exporters: Mapping[str, Callable],
    configured: Mapping,
    answers: Answers | None = None,
    origin: Mapping | None = None,
) -> Callable:
    """The callable that compression steps train with.

        finetune(net, name, *, epochs, lr, on_epoch=None) -> nn.Module

    trains a copy of `net` (images in [0, 1] to logits) under those of the losses that read logits only, in
    folder/compress/NAME-KEY, and returns the epoch that the recipe selects. A killed fine-tuning is continued; a
    finished one of the same weights and configuration is read from its file.
    `on_epoch(net, epoch, epochs, training)` is called where an epoch (from 0) or its validation begins.

    Besides, of the run: `finetune.folder`; `finetune.exports`, its exporters' configuration; and

        finetune.ship(net, flow, folder) -> list[Artifact]

    writes the files that this run's exporters of a flow make of a network, as they ship.

    Args:
        recipe: the student's, of which a fine-tuning has its own: one device, no average of what observers see, no
            end before the last epoch.
        losses, teacher, data, answers: as for the student; the teacher of a run that has none is None.
        folder: the run's.
        exporters: the run's, by name.
        configured: what configuration says of "compress", "export", "teacher" and "data".
        origin: what the run writes into each file.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # from here on this process is alone: it trains on all rows
    losses = logit_losses(losses, taught=teacher is not None)
    terms, transform = describe(build_losses(losses)[0]), describe(data.train.transform)
    alone = {"devices": 1, "strategy": "auto"}
    recipe = recipe.changed(trainer=alone, ema=None, early_stopping=None, compile=False)

    def finetune(net: nn.Module, name: str, *, epochs: int, lr: float, on_epoch: Callable | None = None) -> nn.Module:
        net = copy.deepcopy(net)
        observed = any(hasattr(module, "enable_observer") for module in net.modules())
        precision = {"precision": "32-true"} if observed else {}  # fake quantization knows no other
        own = recipe.changed(lr=lr, epochs=epochs, trainer=precision)
        described = {
            "start": tensors_hash(net.named_parameters()),  # what observers saw may differ in the last bit
            "graphs": [module.code for module in net.modules() if isinstance(module, fx.GraphModule)],
            "images": data.fingerprint,
            "loss": losses,
            "recipe": own.decides(),
            "step": _options(configured["compress"], name),
            **{key: configured[key] for key in ("teacher", "data")},
            "source": own_sources([layers(net), layers(teacher) if teacher else None, transform, terms]),
        }

        def train(place: Path) -> dict:
            say(f"  {name}: fine-tuning under {' + '.join(losses)} for {epochs} epochs → {place}")
            network = Network(net, {}, [0.0] * 3, [1.0] * 3, data.image_size)
            callbacks = [] if on_epoch is None else [EachEpoch(on_epoch, epochs)]
            chosen = fit(network, teacher, losses, data, own, place, answers, callbacks=callbacks)[own.select]
            say(f"  {name}: epoch {chosen['epoch']}, validation {chosen['accuracy']:.1%}")
            return chosen

        said, place = f"  {name}: fine-tuned", Path(folder) / "compress" / name
        return once(net, place, described, train, _load, said, own.restart).eval()

    file = "-".join(["student", *configured["compress"]])

    def ship(net: nn.Module, flow: str, folder: Path) -> list[Artifact]:
        files, failures = export.export({file: {flow: net}}, exporters, folder, data, origin or {})
        if failures:
            raise UserError("; ".join(failures))
        return files[file]

    finetune.folder, finetune.ship, finetune.exports = Path(folder), ship, configured["export"]
    return finetune


def _load(net: nn.Module, weights: Path) -> None:
    net.load_state_dict(read_state(weights))  # observers' sizes are those of what they saw


def _options(steps: Mapping, name: str) -> dict | None:
    """What the configuration says of the step that trains as `name`, such as "prune", "auto-0.5-qat_int8-fx"."""
    first, *rest = name.split("-")
    return _options(steps[first], "-".join(rest[1:])) if first == "auto" else steps.get(first)


def logit_losses(cfg: Mapping, taught: bool = True) -> dict:
    """The terms of a loss configuration that read no taps, which graph capture does not keep, and no teacher where
    there is none; without any, the cross-entropy."""
    terms, _ = build_losses(cfg)
    plain = types.plain_values(cfg)
    usable = {name: loss for name, loss in terms.items() if taught or not loss.needs_teacher}
    chosen = {name: plain[name] for name, loss in usable.items() if not (*loss.student_taps, *loss.teacher_taps)}
    if not chosen.keys() - {"ce"}:  # its weight was one beside a teacher
        return {"ce": {"_target_": "distill.losses.ce.CE", **chosen.get("ce", {}), "weight": 1.0}}
    return chosen


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
