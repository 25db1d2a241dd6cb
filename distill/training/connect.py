"""Networks and losses find each other by a dry run of two images."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distill.data.base import Data
from distill.errors import UsageError, UserError
from distill.losses.base import Loss
from distill.networks.network import Network
from distill.types import Batch, Outputs


def connect(
    student: Network, teacher: nn.Module | None, terms: Mapping[str, Loss], data: Data, seed: int
) -> Outputs | None:
    """Tap what the losses read and make their layers, by one dry run of two training images.

    Returns:
        What the teacher answered to them, features included.

    Raises:
        UserError: a network that doesn't answer with one logit a class.
        UsageError: a loss that needs what these networks, or this run, don't have.
    """
    record(student, "student", terms)
    if teacher is not None:
        record(teacher.network, "teacher", terms)
    rows = torch.arange(2) % len(data.train)
    batch = data.train[rows, 0]
    student_outputs = _dry_run(student, batch, data)
    if min(data.batch_size, len(data.train)) == 1:
        _check_batch_norms(student, batch)
    teacher_outputs = None
    if teacher is not None:
        with torch.no_grad():
            teacher_outputs = teacher.eval()(batch)
        teacher.train()
        _check_logits(teacher_outputs.logits, getattr(teacher.network, "role", None) or "teacher", data)
    ours, theirs = student_outputs.float(), teacher_outputs and teacher_outputs.float()  # as in training
    for name, loss in terms.items():
        if loss.needs_teacher and teacher is None:
            raise UsageError(f"loss {name} needs a teacher, and this run has none")
        absent = [tap for tap in loss.teacher_taps if teacher is not None and tap not in teacher_outputs.features]
        if absent:
            raise UsageError(
                f"loss {name} reads the teacher's {', '.join(absent)}, and this teacher answers with "
                f"{', '.join(['logits', *teacher_outputs.features])} only"
            )
        torch.manual_seed(seed)
        try:
            loss.build(ours, theirs, data)
        except UserError as error:
            raise UsageError(str(error)) from error
    if teacher is not None and any(loss.survey_taps for loss in terms.values()):
        _survey(teacher, terms, data)
    return teacher_outputs


@torch.no_grad()
def _survey(teacher: nn.Module, terms: Mapping[str, Loss], data: Data) -> None:
    """Let the losses that want to look at training images through the teacher's eyes."""
    for name, loss in terms.items():
        if loss.survey_taps:
            try:
                teacher.network.record(loss.survey_taps)
            except UserError as error:
                raise UsageError(f"loss {name}, teacher: {error}") from error
            loss.survey(teacher.eval(), data)
    teacher.train()
    record(teacher.network, "teacher", terms)


def record(network: Network, role: str, terms: Mapping[str, Loss]) -> None:
    """Record what the losses read of the student or teacher. Raises UsageError where it has no such thing."""
    for name, loss in terms.items():
        try:
            network.record(getattr(loss, f"{role}_taps"))
        except UserError as error:
            raise UsageError(f"loss {name}, {role}: {error}") from error
    network.record(tap for loss in terms.values() for tap in getattr(loss, f"{role}_taps"))


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
