"""Training: Lightning's Trainer, checkpoints that survive a kill, exact resume, the best weights."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from hydra.utils import instantiate
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import EarlyStopping
from torch import Tensor, nn

from distill import signals
from distill.data.base import Data
from distill.errors import UserError
from distill.losses.terms import build_losses
from distill.networks.network import Network
from distill.networks.weights import read_state
from distill.progress import say
from distill.teachers.base import Teacher
from distill.training.answers import Answers
from distill.training.connect import connect
from distill.training.divergence import Diverged, Setbacks, restored
from distill.training.lightning import optimizer as make_optimizer
from distill.training.lightning import trainer as make_trainer
from distill.training.lines import Lines
from distill.training.module import Distill
from distill.training.recipe import Recipe
from distill.training.resume import MONITOR, Checkpoints, best_file, newest


@contextmanager
def _determinism_of_its_own() -> Iterator[None]:
    """Lightning's deterministic=True is for good; what follows a training has operations without such a form."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@_determinism_of_its_own()
def fit(
    network: Network,
    teacher: Teacher | None,
    losses: Mapping,
    data: Data,
    recipe: Recipe,
    folder: Path,
    answers: Answers | None = None,
    loggers=(),
    callbacks=(),
) -> dict:
    """Train `network` in place, continuing from `folder`/checkpoints where a killed run left one.

    Args:
        losses: by name, what configuration says of each.
        folder: of checkpoints and metrics.
        answers: how the teacher's are kept; None: it is asked every time, about a new view in every epoch.

    Returns:
        {"best": {"epoch", "accuracy", "setbacks", "state"}, "last": {…}}: epoch counted from 1, validation accuracy in
        [0, 1], at which steps training had diverged and gone back, and the network's weights. `network` holds those of
        recipe.select.
    """
    setbacks = Setbacks(recipe.on_divergence == "back", folder / "checkpoints")
    learning = [network, *([teacher] if teacher is not None and not teacher.fixed else [])]
    began = [copied(part.state_dict()) for part in learning] if setbacks.back else []
    while True:
        try:
            return _fit(network, teacher, losses, data, recipe, folder, answers, loggers, callbacks, setbacks)
        except Diverged as error:
            setbacks.take(error)
        restored(learning, began)


def _fit(
    network: Network,
    teacher: Teacher | None,
    losses: Mapping,
    data: Data,
    recipe: Recipe,
    folder: Path,
    answers: Answers | None,
    loggers,
    callbacks,
    setbacks: Setbacks,
) -> dict:
    """`fit` up to the next setback, which raises Diverged."""
    terms, weights = build_losses(losses)
    seen = connect(network, teacher, terms, data, recipe.seed + 1)
    checkpoints = folder / "checkpoints"
    checkpointed = Checkpoints(checkpoints, recipe.checkpoint_every)
    callbacks = [setbacks, checkpointed, Lines(recipe.epochs), *callbacks]
    if recipe.early_stopping is not None:
        callbacks.append(EarlyStopping(MONITOR, mode="max", patience=recipe.early_stopping, check_finite=False))
    trainer = make_trainer(recipe, network, callbacks, [*loggers])
    views, device = {}, trainer.strategy.root_device
    if answers is not None and any(loss.needs_teacher for loss in terms.values()):
        teacher, views = answers.of(teacher, data, seen, recipe.epochs, device.type)
    factor = instantiate(recipe.schedule, _convert_="all")
    module = Distill(
        network,
        teacher,
        terms,
        weights,
        make_optimizer(recipe, trainer.precision),
        lambda epoch: setbacks.factor * factor(epoch, recipe.epochs),
        data.num_classes,
        ema=recipe.ema,
        seed=recipe.seed,
        compile=recipe.compile,
        parameters=recipe.parameters,
    )
    loader = data.resident(device).train_loader(recipe.seed, **views, answers=teacher and teacher.kept)
    if trainer.world_size > 1:
        say(f"  {trainer.world_size} processes of {data.batch_size} images each: {_step(data, trainer)} a step")
    resume = None
    if found := newest(checkpoints, recipe.restart, trainer.world_size):
        resume, (epoch, batch) = found
        loader.sampler.resume_at(epoch, batch)
        say(f"  continuing after {epoch} epochs and {batch} of {len(loader)} batches")
    try:
        with signals.held():
            trainer.fit(module, loader, data.val_loader(shared=True), ckpt_path=resume, weights_only=True)
    except RuntimeError as error:
        if (told := unwaited(error, module)) is None:
            raise
        raise told from error
    except SystemExit as end:  # Lightning's answer to Ctrl-C, where no command line handles it
        raise KeyboardInterrupt if trainer.interrupted else end from None
    except OSError as error:  # of a log, which does not say where
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; what was written before is whole"
        ) from error
    if trainer.should_stop and recipe.early_stopping and checkpointed.last["epoch"] < recipe.epochs:
        patience = "1 epoch" if recipe.early_stopping == 1 else f"{recipe.early_stopping} epochs"
        say(f"  stopped after epoch {checkpointed.last['epoch']}: no better validation accuracy for {patience}")
    best = checkpointed.best["epoch"]
    chosen = {
        "last": {**checkpointed.last, "setbacks": setbacks.steps, "state": copied(module.shipped.net.state_dict())},
        "best": {**checkpointed.best, "setbacks": setbacks.steps, "state": read_state(best_file(checkpoints, best))},
    }
    network.net.load_state_dict(chosen[recipe.select]["state"])
    network.record(()).eval().to("cpu", torch.float32)  # whatever number format it was trained in
    return chosen


def unwaited(error: RuntimeError, module: nn.Module) -> UserError | None:
    """What a user is told of DDP's error that a gradient never came; None of others."""
    if "Expected to have finished reduction" not in str(error):
        return None
    named = [name for name, value in module.named_parameters() if value.requires_grad]
    given = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
    return without_gradient([named[int(index)] for index in given[1].split()] if given else [])


def without_gradient(names: Sequence[str]) -> UserError:
    """What to do about parameters whose gradient other processes wait for."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return UserError(
        f"{shown or 'a parameter'}: no part in the loss in one step, and processes that train together wait for its "
        "gradient: take what nothing uses out or freeze it (requires_grad_(False)), or let them look for such in every "
        "step, trainer.strategy=ddp_find_unused_parameters_true"
    )


def _step(data: Data, trainer: Trainer) -> int:
    """Images of all processes in a step of the optimizer."""
    return data.batch_size * trainer.world_size * trainer.accumulate_grad_batches


def copied(state: Mapping) -> dict:
    return {key: value.detach().cpu().clone() if isinstance(value, Tensor) else value for key, value in state.items()}
