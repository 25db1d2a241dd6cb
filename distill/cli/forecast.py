"""The stage "check": what a run is made of, what it would read from the store, and about how long the rest takes."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch
from omegaconf import DictConfig, OmegaConf

from distill.cli import roles
from distill.cli.disk import room
from distill.cli.options import Stage
from distill.cli.rehearsal import Tried, members, rehearse, stand_in, step
from distill.data.base import Data
from distill.data.findings import findings
from distill.errors import UserError
from distill.losses.terms import build_losses
from distill.networks.build import build_network
from distill.networks.weights import serialised_bytes
from distill.progress import few, leads, say
from distill.runtimes.measure import macs, parameters
from distill.training.connect import connect
from distill.training.precision import on_cpu

SHORT = 1.0  # seconds: of a step that takes less, SEVERAL are timed
SEVERAL = 4
UNITS = {"h": 3600, "min": 60, "s": 1}


def tell(cfg: DictConfig, data: Data, folder: Path) -> None:
    """What is to be said of the images; a rehearsal, of all stages where this is the only one; then a line for each
    network, each training, the cache and the disk. Only the run's record is written.

    Raises:
        UserError: images are damaged, and data.corrupt=stop; or what `rehearse` raises.
    """
    for line in findings(data) if leads() else ():
        say(f"  {line}")
    if data.left_out and cfg.data.get("corrupt") == "stop":
        count = f"{len(data.left_out):,} images can't be read" if len(data.left_out) > 1 else "an image can't be read"
        raise UserError(f"{count}: {few(data.left_out)}; mend or remove, or leave them out by data.corrupt=skip")
    if not leads():
        return
    if list(cfg.stages) == ["check"]:
        cfg = OmegaConf.merge(cfg, {"stages": get_args(Stage)})
    tried, writes = rehearse(cfg, data, folder)
    for line in (*_networks(cfg, data), *_trainings(cfg, data, tried), *_cache(cfg, data), room(writes)):
        say(f"  {line}")
    say("check: a step was trained, validated and kept; nothing else was done")


def _networks(cfg: DictConfig, data: Data) -> Iterator[str]:
    teachers = members(stand_in(cfg, data))
    names = ["teacher"] if len(teachers) == 1 else [f"teacher {number + 1}" for number in range(len(teachers))]
    student = build_network(cfg.student, data.num_classes, data.image_size, cfg.seed)
    example = data.train[torch.zeros(1, dtype=torch.int64), 0].images
    for name, network in zip(["student", *names], [student, *teachers], strict=True):
        net = network.eval().plain()
        yield (
            f"{name}: {type(network.net).__name__}, {parameters(net):,} parameters, {macs(net, example):,} "
            f"multiply-accumulates an image, {serialised_bytes(network.net) / 1000:,.0f} kB"
        )


def _trainings(cfg: DictConfig, data: Data, tried: Tried) -> Iterator[str]:
    """A line for each: read from the store, or about how long it takes."""
    batches = SEVERAL if tried.step < SHORT else 2

    def seconds(*training) -> float:
        """Of an epoch, without what only the first step of a process does."""
        with contextlib.redirect_stdout(io.StringIO()):
            return _epoch(cfg, data, step(*training, batches=batches))

    for one in roles.fitted_once(cfg, data):
        epochs, weights = one.recipe.epochs, one.kept(cfg, data)
        if epochs == 0:
            yield f"{one.name}: taken as it is, {one.described.checkpoint or 'with its own weights'}"
        elif weights.exists():
            yield f"{one.name}: fitted before, would be read from {weights}"
        else:
            yield f"{one.name}: {_about(epochs, seconds(one.network, None, one.losses, data, one.recipe))}"
    student = build_network(cfg.student, data.num_classes, data.image_size, cfg.seed)
    distil = seconds(student, stand_in(cfg, data), cfg.loss, data, roles.recipe(cfg))
    yield f"distill: {_about(cfg.trainer.max_epochs, distil)}"
    for name, options in cfg.compress.items():
        epochs = options.get("epochs", 0) * options.get("rounds", 1)
        if epochs:
            yield f"compress={name}: {_about(epochs, distil)} for each runtime that it trains for"


def _epoch(cfg: DictConfig, data: Data, tried: Tried) -> float:
    """Seconds, on one device."""
    steps, limit = len(data.train_loader(0)), cfg.trainer.get("limit_train_batches")
    if limit is not None:
        steps = min(steps, limit) if isinstance(limit, int) else max(1, int(steps * limit))
    return steps * tried.step + len(data.val_loader()) * tried.validation


def _about(epochs: int, seconds: float) -> str:
    whole = epochs * seconds
    unit, size = next((name, size) for name, size in UNITS.items() if whole >= size or size == 1)
    return f"about {whole / size:.2g} {unit} ({epochs} epochs of {seconds:.2g} s)"


def _cache(cfg: DictConfig, data: Data) -> Iterator[str]:
    """How many views of a teacher that has its weights were asked for before."""
    fixed = [*roles.teachers(cfg, data)]
    if cfg.cache.keep == "off" or not fixed:
        return
    if any(one.recipe.epochs > 0 and not one.kept(cfg, data).exists() for one in fixed):
        return
    with contextlib.redirect_stdout(io.StringIO()):
        teacher = roles.teacher(cfg, data)
        student = build_network(cfg.student, data.num_classes, data.image_size, cfg.seed)
        seen = connect(student, teacher, build_losses(cfg.loss)[0], data, cfg.seed + 1)
    device = "cpu" if on_cpu(cfg.trainer.accelerator) else torch.accelerator.current_accelerator().type
    present, wanted = roles.answers(cfg).present(teacher, data, seen, cfg.trainer.max_epochs, device)
    yield f"cache: {present} of {wanted} views of the teacher's answers are there"
