"""Networks from what configuration says of them."""

import inspect
from collections.abc import Mapping

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig

from distill.errors import UsageError
from distill.networks.network import Network
from distill.networks.taps import heads, infer_taps, out_of_place
from distill.networks.weights import load_weights
from distill.progress import say
from distill.types import ImageSize, plain_values, sides

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
