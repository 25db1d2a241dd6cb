"""A step of the run's own training before hours of it, so that what can be known is told at the start."""

import contextlib
import copy
import io
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from hydra.utils import get_object
from omegaconf import DictConfig

from distill.cli import roles
from distill.data.base import Data
from distill.errors import UserError
from distill.networks.build import build_network
from distill.networks.weights import serialised_bytes
from distill.progress import leads, say
from distill.runtimes.measure import macs, parameters
from distill.teachers.base import Teacher
from distill.teachers.committee import Committee
from distill.teachers.ema import Ema
from distill.teachers.frozen import Frozen
from distill.teachers.peer import Peer
from distill.training.fit import fit

ALONE = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
ONE = {"limit_train_batches": 1, "limit_val_batches": 1, "accumulate_grad_batches": 1, **ALONE}


def rehearse(cfg: DictConfig, data: Data) -> None:
    """Train a student for one batch under a teacher of random weights, in a folder that goes: networks, taps, losses
    forward and backward, optimizer, schedule, precision and a checkpoint, as the run will have them.

    Raises:
        UserError: what the run would have ended with once its teacher had been trained.
    """
    if not leads():
        return
    missing(cfg)
    own = copy.copy(data)
    own.num_workers = 0
    recipe = roles.recipe(cfg).changed(epochs=1, compile=False, early_stopping=None, trainer=ONE)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        student = build_network(cfg.student, data.num_classes, data.image_size, cfg.seed)
        fit(student, stand_in(cfg, data), cfg.loss, own, recipe, Path(folder))


def missing(cfg: DictConfig) -> None:
    """Raises UserError where a package that an exporter of this run needs is not installed."""
    if not {"compress", "export"} & set(cfg.stages):
        return
    for name, options in cfg.export.items():
        module = import_module(options._target_.rpartition(".")[0])
        absent = [package for package in getattr(module, "PACKAGES", ()) if find_spec(package) is None]
        if absent:
            raise UserError(f"export={name} needs {' '.join(module.PACKAGES)}: pip install {' '.join(absent)}")


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
        members = [build_network(_bare(member), *made) for member in cfg.teacher.members.values()]
        return Frozen(Committee(members, cfg.teacher.weights), "32-true")
    return Frozen(build_network(_bare(cfg.teacher), *made), "32-true")


def _bare(described: DictConfig) -> DictConfig:
    described = described.copy()
    described.checkpoint = None
    return described


def tell(cfg: DictConfig, data: Data) -> None:
    """The stage "check": a rehearsal and a line for each network. Only the run's record is written."""
    rehearse(cfg, data)
    example = data.train[torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)].images
    networks = {"student": build_network(cfg.student, data.num_classes, data.image_size, cfg.seed)}
    taught_by = stand_in(cfg, data).network
    members = taught_by.members if isinstance(taught_by, Committee) else [taught_by]
    networks |= {"teacher" if len(members) == 1 else f"teacher {n + 1}": each for n, each in enumerate(members)}
    for name, network in networks.items():
        net = network.eval().plain()
        say(
            f"  {name}: {type(network.net).__name__}, {parameters(net):,} parameters, {macs(net, example):,} "
            f"multiply-accumulates an image, {serialised_bytes(network.net) / 1000:,.0f} kB"
        )
    say("check: a step was trained, validated and kept; nothing else was done")
