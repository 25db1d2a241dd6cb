"""Networks from what configuration says of them."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from distill.errors import UsageError, UserError
from distill.networks.network import Network
from distill.networks.taps import heads, infer_taps, out_of_place
from distill.networks.weights import load_weights
from distill.own import place_of, prefixed
from distill.progress import say
from distill.types import ImageSize, plain_values, sides

ROOM, MODULES = 64_000_000, 20_000  # of a network from a file, beyond what the file holds
ROLE_KEYS = ("checkpoint", "fit", "precision", "untrained", "taps", "mean", "std")


def build_network(cfg: DictConfig, classes: int, image_size: ImageSize, seed: int, fresh_head: bool = True) -> Network:
    """The network that a conf/network file describes, with its checkpoint where one is given.

    Args:
        cfg: `_target_` and its arguments, `taps`, `mean`, `std`, and the role's `checkpoint`.
        classes, image_size: given to the target where it takes `num_classes`, `image_size`.
        seed: of the initial weights, which depend on nothing else.
        fresh_head: a checkpoint of another number of classes keeps all but its head; else that is an error.
    """
    described = plain_values(cfg)
    arguments = {key: value for key, value in described.items() if key not in ROLE_KEYS}
    accepted = _parameters(cfg._target_)
    for key, value in {"num_classes": classes, "image_size": image_size}.items():
        if key in accepted:
            arguments[key] = value
    torch.manual_seed(seed)
    net = instantiate(arguments, _convert_="all")
    if not isinstance(net, nn.Module):
        line = f"{cfg._target_} returns {net!r:.60}: expected a torch.nn.Module"
        raise UsageError(prefixed(place_of(get_object(cfg._target_)), line))
    net = out_of_place(net)
    channels = len(described["mean"])
    if cfg.checkpoint:
        left = load_weights(net, cfg.checkpoint, fresh_head, heads(net, image_size, channels), sides(image_size))
        if left:
            say(f"  {cfg.checkpoint} does not hold this network whole: {', '.join(left)} start anew")
    taps = described["taps"] if described["taps"] is not None else infer_taps(net, image_size, channels)
    role = cfg._get_full_key(None) or None  # where it lies in the configuration
    wrapped = Network(net, taps, described["mean"], described["std"], image_size, role)
    return wrapped.to(memory_format=torch.channels_last)


@contextmanager
def built_from(file: Path) -> Iterator[None]:
    """Around building the network that a file, perhaps a stranger's, describes and holds the weights of: one that is a
    thousand times as large as the file is given up before its memory is touched.

    Raises:
        UserError: it is, or what is described can't be built.
    """
    size = file.stat().st_size
    left = {"bytes": 4 * size + ROOM, "modules": MODULES}  # a file may hold halves, and lack an auxiliary classifier

    def count(kind: str, amount: int) -> None:
        left[kind] -= amount
        if left[kind] < 0:
            raise UserError(f"a network of more {kind} than a file of {size:,} bytes holds")

    def tensors(module, name, value):
        count("bytes", 0 if value is None else value.numel() * value.element_size())

    hooks = [
        register_module_parameter_registration_hook(tensors),
        register_module_buffer_registration_hook(tensors),
        register_module_module_registration_hook(lambda module, name, inner: count("modules", 1)),
    ]
    try:
        yield
    except Exception as error:  # whatever a network's constructor, or its first images, make of odd arguments
        known = error if isinstance(error, UserError) else error.__cause__
        reason = str(known) if isinstance(known, UserError) else f"{type(known or error).__name__}: {known or error}"
        raise UserError(f"{file} describes what is not built: {' '.join(reason.split())[:200]}") from error
    finally:
        for hook in hooks:
            hook.remove()


def _parameters(target: str) -> Mapping:
    try:
        return inspect.signature(get_object(target)).parameters
    except Exception as error:
        raise UsageError(f"_target_={target} can't be imported: {error}") from error
