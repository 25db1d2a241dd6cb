"""From configuration to objects: the only file, with train.py and fit.py, that reads `cfg`."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.checkpoints import load_weights
from distill.data.base import Data
from distill.errors import UsageError, UserError
from distill.losses.base import Loss
from distill.models.taps import heads, infer_taps, out_of_place
from distill.network import Network
from distill.progress import leads, say
from distill.schedules import check_weight
from distill.types import Batch, ImageSize, Outputs, in_px, sides

ROLE_KEYS = ("checkpoint", "fit", "precision", "untrained", "taps", "mean", "std")


def data(cfg: DictConfig) -> Data:
    """The image set that a conf/data file describes."""
    found = instantiate(cfg, _convert_="all")
    say(
        f"data: {cfg._target_.rpartition('.')[2]}, {len(found.train):,} training, {len(found.val):,} validation and "
        f"{len(found.test):,} test images, {found.num_classes} classes, {in_px(found.image_size)}"
    )
    return found


def network(cfg: DictConfig, classes: int, image_size: ImageSize, seed: int, fresh_head: bool = True) -> Network:
    """The network that a conf/network file describes, with its checkpoint where one is given.

    Args:
        cfg: `_target_` and its arguments, `taps`, `mean`, `std`, and the role's `checkpoint`.
        classes, image_size: given to the target where it takes `num_classes`, `image_size`.
        seed: of the initial weights, which depend on nothing else.
        fresh_head: a checkpoint of another number of classes keeps all but its head; else that is an error.
    """
    described = plain(cfg)
    arguments = {key: value for key, value in described.items() if key not in ROLE_KEYS}
    accepted = _parameters(cfg._target_)
    for key, value in {"num_classes": classes, "image_size": image_size}.items():
        if key in accepted:
            arguments[key] = value
    torch.manual_seed(seed)
    net = out_of_place(instantiate(arguments, _convert_="all"))
    channels = len(described["mean"])
    if cfg.checkpoint:
        left = load_weights(net, cfg.checkpoint, fresh_head, heads(net, image_size, channels), sides(image_size))
        if left:
            say(f"  {cfg.checkpoint} does not hold this network whole: {', '.join(left)} start anew")
    taps = described["taps"] if described["taps"] is not None else infer_taps(net, image_size, channels)
    role = cfg._get_full_key(None) or None  # where it lies in the configuration
    wrapped = Network(net, taps, described["mean"], described["std"], image_size, role)
    return wrapped.to(memory_format=torch.channels_last)


def _parameters(target: str) -> Mapping:
    try:
        return inspect.signature(get_object(target)).parameters
    except Exception as error:
        raise UsageError(f"_target_={target} can't be imported: {error}") from error


def steps(cfg: DictConfig) -> dict[str, Callable]:
    """Compression steps or exporters by name, in the order given."""
    return {name: instantiate(options, _convert_="all") for name, options in cfg.items()}


def tolerance(cfg: DictConfig) -> dict:
    """What the files' answers may differ by. With compress=auto the budget says how much accuracy they may lose."""
    bounds = plain(cfg.tolerance)
    if "auto" in cfg.compress:
        bounds["compressed"]["accuracy_drop"] = cfg.compress.auto.accuracy_drop
    return bounds


def reloaders(cfg: DictConfig) -> dict[str, Callable]:
    """The `reload` that stands beside each exporter's `export`."""
    return {name: get_object(f"{options._target_.rpartition('.')[0]}.reload") for name, options in cfg.items()}


@contextmanager
def loggers(cfg: DictConfig, folder: Path) -> Iterator[list]:
    """The loggers besides the CSV files, of the process that leads; closed at the end."""
    recorded, opened = plain(cfg), []
    try:
        for options in cfg.logger.values() if leads() else ():
            opened.append(instantiate(options, _partial_=True)(folder=folder, name=cfg.name, cfg=recorded))
        yield opened
    finally:
        for logger in opened:
            (logger.experiment.finish if hasattr(logger.experiment, "finish") else logger.experiment.close)()


def plain(cfg):
    """A copy of a part of the configuration in plain Python, interpolations resolved; other values just copied."""
    return OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else copy.deepcopy(cfg)


def losses(cfg: Mapping) -> tuple[dict[str, Loss], dict[str, float | list]]:
    """The terms of `cfg` by name, not yet built, and their weights."""
    if not cfg:
        raise UsageError("loss=[]: give at least one loss, e.g. 'loss=[ce,kd]'")
    terms, weights = {}, {}
    for name, options in plain(cfg).items():
        weights[name] = options.pop("weight")
        check_weight(name, weights[name])
        terms[name] = instantiate(options, _convert_="all")
    return terms, weights


def connect(
    student: Network, teacher: nn.Module | None, terms: Mapping[str, Loss], data: Data, seed: int
) -> Outputs | None:
    """Tap what the losses read and make their layers, by one dry run of two training images.

    Returns:
        What the teacher answered to them, features included.

    Raises:
        UserError: a network that doesn't answer with one logit a class, a tap that isn't there.
    """
    _keep(student, "student", terms)
    if teacher is not None:
        _keep(teacher.network, "teacher", terms)
    rows = torch.arange(2) % len(data.train)
    batch = data.train[rows, torch.zeros(2, dtype=torch.int64)]
    student_outputs = _dry_run(student, batch, data)
    if min(data.batch_size, len(data.train)) == 1:
        _check_batch_norms(student, batch)
    teacher_outputs = None
    if teacher is not None:
        with torch.no_grad():
            teacher_outputs = teacher.eval()(batch)
        teacher.train()
        _check_logits(teacher_outputs.logits, getattr(teacher.network, "role", None) or "teacher", data)
    for name, loss in terms.items():
        if loss.needs_teacher and teacher is None:
            raise UserError(f"loss {name} needs a teacher, and this run has none")
        absent = [tap for tap in loss.teacher_taps if teacher is not None and tap not in teacher_outputs.features]
        if absent:
            raise UserError(
                f"loss {name} reads the teacher's {', '.join(absent)}, and this teacher answers with "
                f"{', '.join(['logits', *teacher_outputs.features])} only"
            )
        torch.manual_seed(seed)
        loss.build(student_outputs, teacher_outputs, data)
    return teacher_outputs


def _keep(network: Network, role: str, terms: Mapping[str, Loss]) -> None:
    for name, loss in terms.items():
        try:
            network.keep(getattr(loss, f"{role}_taps"))
        except UserError as error:
            raise UserError(f"loss {name}, {role}: {error}") from error
    network.keep(tap for loss in terms.values() for tap in getattr(loss, f"{role}_taps"))


@torch.no_grad()
def _dry_run(network: Network, batch: Batch, data: Data):
    network.eval()
    outputs = network(batch.images)
    network.train()
    _check_logits(outputs.logits, network.role or "student", data)
    return outputs


@torch.no_grad()
def _check_batch_norms(network: Network, batch: Batch) -> None:
    """Refuse training on single images where a batch norm would see one number a channel."""

    def check(path: str, module: nn.Module, inputs) -> None:
        if inputs[0][0].numel() == module.num_features:
            raise UserError(
                f"{path} of {type(network.net).__name__} normalises over the images of a batch and cannot learn from a "
                "batch of one: set data.batch_size to 2 or more"
            )

    norms = [(path, module) for path, module in network.net.named_modules() if isinstance(module, _BatchNorm)]
    hooks = [module.register_forward_pre_hook(partial(check, path)) for path, module in norms]
    try:
        network.eval()(batch.images)
        network.train()
    finally:
        for hook in hooks:
            hook.remove()


def _check_logits(logits, role: str, data: Data) -> None:
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.shape[1] != data.num_classes:
        came = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise UserError(
            f"the {role} answers with {came}, expected (images, {data.num_classes}): the data has "
            f"{data.num_classes} classes; set {role}.num_classes or choose another network"
        )
