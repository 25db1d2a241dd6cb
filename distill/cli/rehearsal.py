"""A step of the run's own training before hours of it, so that what can be known is told at the start."""

import contextlib
import copy
import gc
import io
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

import torch
from hydra.utils import get_object
from omegaconf import DictConfig
from packaging.requirements import Requirement
from pytorch_lightning.callbacks import Callback

from distill import compress, export
from distill.cli import build, faults, roles
from distill.cli.disk import Write, refuse_unwritable, room
from distill.data.base import Data
from distill.errors import UserError
from distill.files import scratch
from distill.losses.terms import build_losses
from distill.networks.build import build_network
from distill.networks.network import Network
from distill.networks.weights import serialised_bytes
from distill.progress import leads, say
from distill.runs.records import STARTING_POINT
from distill.teachers.base import Teacher
from distill.teachers.committee import Committee
from distill.teachers.ema import Ema
from distill.teachers.frozen import Frozen
from distill.teachers.peer import Peer
from distill.training.connect import connect
from distill.training.fit import fit, without_gradient
from distill.training.lightning import waits_for_all
from distill.training.precision import teaching
from distill.training.recipe import Recipe
from distill.types import sides

PHOTO, FEW, STEPS = 128, 20_000, 50  # px of the shorter side; images that teach random weights little; too few steps
ALONE = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
ONE = {"limit_train_batches": 1, "limit_val_batches": 1, "accumulate_grad_batches": 1, **ALONE}


@dataclass(frozen=True)
class Tried:
    """What a training was found to take: seconds a step and a batch of validation, and bytes of its checkpoints; and
    which parameters got no gradient."""

    step: float
    validation: float
    checkpoints: int
    idle: tuple[str, ...] = ()


class Clock(Callback):
    """Times the batches: of training all but the first, where there are several; and what gets no gradient."""

    def __init__(self):
        self.idle: tuple[str, ...] = ()
        self.begun, self.ended, self.validation = [], 0.0, 0.0

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.begun.append(time.perf_counter())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.ended = time.perf_counter()

    def on_after_backward(self, trainer, module) -> None:
        learning = ((name, value) for name, value in module.named_parameters() if value.requires_grad)
        self.idle = tuple(name for name, value in learning if value.grad is None)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0) -> None:
        self.validation = -time.perf_counter()

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.validation += time.perf_counter()

    @property
    def step(self) -> float:
        counted = self.begun[1:] or self.begun
        return (self.ended - counted[0]) / len(counted)


def rehearse(cfg: DictConfig, data: Data, folder: Path) -> tuple[Tried, list[Write]] | None:
    """Train a student for one batch under a teacher of random weights, in a folder that goes: networks, taps, losses
    forward and backward, optimizer, schedule, precision and a checkpoint, as the run will have them; then let the
    compression capture it. What the run will write into `folder`, the store and the cache must be writable and fit.

    Raises:
        UserError: what the run would have ended with once its teacher had been trained.
    """
    if not leads():
        return None
    missing(cfg)
    if "export" in cfg.stages:
        export.refuse_resize(build.steps(cfg.export), data)
    for line in ill_prepared(cfg, data):
        say(f"  {line}")
    with contextlib.redirect_stdout(io.StringIO()):
        student, teacher = build_network(cfg.student, data.num_classes, data.image_size, cfg.seed), stand_in(cfg, data)
        kept = _kept(cfg, data, student, teacher)
        fits = any(one.recipe.epochs > 0 and not one.kept(cfg, data).exists() for one in roles.fitted_once(cfg, data))
        refuse_unwritable(_writes(cfg, folder, student, teacher, 0, kept, fits))
        tried = fitting(student, teacher, cfg.loss, data, roles.recipe(cfg))
        if tried.idle and waits_for_all(cfg.trainer):
            raise without_gradient(tried.idle)
        if "export" in cfg.stages and cfg.export:
            with scratch() as place:
                export.attempt(student.plain(), build.steps(cfg.export), place, data)
        if "compress" in cfg.stages and cfg.compress:
            flows = map(export.flow, build.steps(cfg.export).values())
            compress.attempt(build.steps(cfg.compress), student.plain(), data, flows)
    writes = _writes(cfg, folder, student, teacher, tried.checkpoints, kept, fits)
    room(writes)
    return tried, writes


def ill_prepared(cfg: DictConfig, data: Data) -> Iterator[str]:
    """A line on weights, and on steps, with which a few photos teach little; nothing elsewhere."""
    if min(sides(data.image_size)) < PHOTO or len(data.train) > FEW:
        return
    if not any(map(cfg.student.get, STARTING_POINT)):
        yield (
            f"the student starts from random weights, which {len(data.train):,} photos teach little; pretrained ones "
            "learn more from them: teacher=resnet50 teacher.weights=DEFAULT teacher.fit.epochs=3 student=mobilenet "
            "student.weights=DEFAULT optimizer=adamw optimizer.lr=3e-4"
        )
    epochs, batches = cfg.trainer.max_epochs, max(1, len(data.train) // data.batch_size)
    if epochs * batches < STEPS:
        yield (
            f"the student is trained for {epochs * batches} steps in all, {epochs} epochs of {batches}: smaller "
            "batches (data.batch_size=16) or more epochs (trainer.max_epochs=N) make more of them"
        )


def step(network: Network, teacher: Teacher | None, losses: Mapping, data: Data, recipe: Recipe, batches=1) -> Tried:
    """Train for so many batches and validate on one, in a folder that goes."""
    own, clock = copy.copy(data), Clock()
    own.num_workers = 0
    limits = {**ONE, "limit_train_batches": batches}
    short = recipe.changed(epochs=1, compile=False, early_stopping=None, trainer=limits)
    with scratch() as folder:
        fit(network, teacher, losses, own, short, folder, callbacks=[clock])
        checkpoints = sum(file.stat().st_size for file in (folder / "checkpoints").iterdir())
    return Tried(clock.step, clock.validation, checkpoints, clock.idle)


def fitting(network: Network, teacher: Teacher | None, losses: Mapping, data: Data, recipe: Recipe) -> Tried:
    """`step`.

    Raises:
        UserError: memory has run out; it names a batch that fits, which was tried.
    """
    asked, size = data.batch_size, data.batch_size
    while size:
        try:
            tried = step(network, teacher, losses, replace(data, batch_size=size), recipe)
        except Exception as error:
            if not faults.exhausted(error):
                raise
            said = faults.memory(error)
        else:
            if size == asked:
                return tried
            raise UserError(
                f"{said} with data.batch_size={asked}: data.batch_size={size} fits, which was tried "
                f"(trainer.accumulate_grad_batches={asked // size} beside it keeps the images of a step)"
            )
        size //= 2
        gc.collect()  # what the failed step made
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise UserError(f"{said} with one image: choose a smaller network, a smaller data.image_size, or fewer losses")


def missing(cfg: DictConfig) -> None:
    """Raises UserError where a package that an exporter of this run needs is not installed, or needs another version of
    one that is."""
    if not {"compress", "export"} & set(cfg.stages):
        return
    for name, options in cfg.export.items():
        module = import_module(options._target_.rpartition(".")[0])
        absent = [package for package in getattr(module, "PACKAGES", ()) if find_spec(package) is None]
        if absent:
            raise UserError(f"export={name} needs {' '.join(module.PACKAGES)}: pip install {' '.join(absent)}")
        for package in getattr(module, "PACKAGES", ()):
            _refuse_conflict(name, package)


def _refuse_conflict(exporter: str, package: str) -> None:
    """Such as litert-torch, which wants an older torch than others do."""
    with contextlib.suppress(PackageNotFoundError):  # found by its folder alone
        for requirement in map(Requirement, requires(package) or ()):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            with contextlib.suppress(PackageNotFoundError):
                found = version(requirement.name)
                if not requirement.specifier.contains(found, prereleases=True):
                    raise UserError(
                        f"export={exporter}: {package} {version(package)} needs {requirement.name}"
                        f"{requirement.specifier}, and {found} is installed: pip install "
                        f"'{requirement.name}{requirement.specifier}', or leave export={exporter} out"
                    )


def _kept(cfg: DictConfig, data: Data, student: Network, teacher: Teacher) -> int:
    """Bytes of the teacher's answers that the run will keep. Raises UsageError where its losses, or cache.budget, don't
    allow what cache= asks for."""
    terms, _ = build_losses(cfg.loss)
    seen = connect(student, teacher, terms, data, cfg.seed + 1)
    if not any(loss.needs_teacher for loss in terms.values()):
        return 0
    return roles.answers(cfg).size(teacher, data, seen, cfg.trainer.max_epochs)


def _writes(
    cfg: DictConfig, folder: Path, student: Network, teacher: Teacher, checkpoints: int, kept: int, fits: bool
) -> list[Write]:
    """What the run will write, about: a checkpoint is written beside the two that are kept, a teacher's is to the
    student's as its weights are, and an exported file is no larger than the student's weights. A store in which all is
    fitted is only read, and so can a cache be that is there."""
    weights = serialised_bytes(student.net)
    largest = max([weights, *(serialised_bytes(each.net) for each in members(teacher))]) / weights
    files = len(cfg.export) * (2 if cfg.compress else 1) * weights if "export" in cfg.stages else 0
    cache = Path(cfg.cache.folder)
    found = [
        Write("checkpoints", "name", folder, 3 * checkpoints),
        Write("exported files", "name", folder, files),
        Write("what is fitted once", "store", Path(cfg.store), int(3 * checkpoints * largest)) if fits else None,
        Write("the teacher's answers", "cache.folder", cache, kept, needed=not cache.is_dir()) if kept else None,
    ]
    return [one for one in found if one]


def stand_in(cfg: DictConfig, data: Data) -> Teacher:
    """A teacher of the run's kind and shapes, untrained."""
    torch.manual_seed(cfg.seed)
    kind, made = get_object(cfg.teacher._target_), (data.num_classes, data.image_size, cfg.seed)
    if kind is Peer:
        peers, another = cfg.teacher.get("peers", 1), lambda number: build_network(cfg.teacher.network, *made)
        return Peer(another(0), peers=peers, another=another)
    if kind is Ema:
        return Ema(build_network(cfg.student, *made), cfg.teacher.decay)
    if kind is Committee:
        network = Committee(
            [build_network(_bare(member), *made) for member in cfg.teacher.members.values()], cfg.teacher.weights
        )
    else:
        network = build_network(_bare(cfg.teacher), *made)
    numerics = teaching(cfg.teacher.precision, cfg.trainer, network)
    return Frozen(network, "32-true" if numerics == "int8" else numerics)  # int8 wants a trained one's activations


def _bare(described: DictConfig) -> DictConfig:
    described = described.copy()
    described.checkpoint = None
    return described


def members(teacher: Teacher) -> list[Network]:
    """Its networks."""
    return [*teacher.network.members] if isinstance(teacher.network, Committee) else [teacher.network]
