"""From a network to a smaller one. A step is a function that returns a new network:

step(net, finetune=None, data=None, **options) -> nn.Module
"""

from collections.abc import Callable, Mapping

from torch import nn

from distill.data.base import Data


def chain(steps: Mapping[str, Callable], net: nn.Module, data: Data) -> nn.Module:
    """The steps one after the other, each on what the one before returned."""
    for step in steps.values():
        net = step(net, data=data)
    return net
