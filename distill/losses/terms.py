"""Losses from what configuration says of them."""

from collections.abc import Mapping

from hydra.utils import instantiate

from distill.errors import UsageError
from distill.losses.base import Loss
from distill.losses.weight import check_weight
from distill.own import place_of, prefixed, refuse_other_arguments
from distill.types import plain_values


def build_losses(cfg: Mapping) -> tuple[dict[str, Loss], dict[str, float | list]]:
    """The terms of `cfg` by name, not yet built, and their weights."""
    if not cfg:
        raise UsageError("loss=[]: give at least one loss, e.g. 'loss=[ce,kd]'")
    terms, weights = {}, {}
    for name, options in plain_values(cfg).items():
        weights[name] = options.pop("weight")
        check_weight(name, weights[name])
        terms[name] = instantiate(options, _convert_="all")
        if not isinstance(terms[name], Loss):
            kind = type(terms[name])
            line = f"loss {name} is a {kind.__name__}: expected a subclass of distill.losses.base.Loss"
            raise UsageError(prefixed(place_of(kind), line))
        refuse_other_arguments(terms[name].build, "student", "teacher", "data")
        refuse_other_arguments(terms[name].forward, "student", "teacher", "batch")
    return terms, weights
