"""From a network to a smaller one. A step is a function that returns a new network:

step(net, finetune=None, data=None, flow="fx", **options) -> nn.Module

Beside one that captures the network as a graph may stand, in its module,

attempt(net, data, flow, **options)        raises what the step would before it trains, whatever the weights are
"""

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from distill.called import called_as
from distill.data.base import Data
from distill.errors import OverBudget, UsageError, UserError
from distill.own import is_placed, place_in, place_of, prefixed
from distill.progress import say
from distill.runtimes.coverage import describe
from distill.runtimes.graph import place, reason


def compress(
    steps: Mapping[str, Callable], net: nn.Module, data: Data, finetune: Callable, flows: Iterable[str]
) -> tuple[dict[str, dict[str, nn.Module]], list[str]]:
    """`net` through the `links` for each runtime: {flow: {step: net}}, and one line for each flow that failed; where
    one file within a budget is enough (OverBudget), the others are told and no failures.

    Raises:
        UsageError: a wrong option, which no runtime would take.
    """
    nets, failures, over, flows = {}, [], [], dict.fromkeys(flows)
    if not flows:
        say("compress: nothing to compress for, export=[] names no file")
    for flow in flows:
        say(f"compress: {', '.join(steps)} ({flow})")
        try:
            nets[flow] = dict(links(steps, net, data, finetune, flow))
        except UsageError:
            raise
        except OverBudget as error:
            over.append(f"compress for {flow}: {error}")
        except UserError as error:
            failures.append(f"compress for {flow}: {error}")
        else:
            say(describe(list(nets[flow].values())[-1]))
    if nets:  # another runtime's file is within the budget
        for line in over:
            say(f"  {line}")
    return nets, failures if nets else failures + over


def chain(
    steps: Mapping[str, Callable], net: nn.Module, data: Data, finetune: Callable | None = None, flow: str = "fx"
) -> nn.Module:
    """What the last of the `links` is."""
    for _, small in links(steps, net, data, finetune, flow):
        net = small
    return net


def links(
    steps: Mapping[str, Callable], net: nn.Module, data: Data, finetune: Callable | None = None, flow: str = "fx"
) -> Iterator[tuple[str, nn.Module]]:
    """The steps one after the other, each on what the one before returned: (step, what it returned).

    Args:
        steps: by name, in order.
        net: plain: images (N, C, H, W) in [0, 1] to logits (N, K), float32 on the CPU, eval mode.
        data: steps calibrate on its training images.
        finetune: `finetune(net, name, epochs=…, lr=…, on_epoch=None) -> nn.Module`, see distill/training/finetune.py;
            None: steps that train are refused.
        flow: for which runtime a step quantizes where that makes a difference, see distill/compress/flows.py.

    Raises:
        UserError: a step can't take the network, whatever it stumbled over: steps rewrite networks of any making.
    """
    for name, step in steps.items():
        with _told(name, step, net):
            net = step(net, finetune=finetune, data=data, flow=flow)
            if not isinstance(net, nn.Module):
                line = f"compress={name} returns {net!r:.60}: expected the new network, a torch.nn.Module"
                raise UsageError(prefixed(place_of(step), line))
        yield name, net


def attempt(steps: Mapping[str, Callable], net: nn.Module, data: Data, flows: Iterable[str]) -> None:
    """Every step's `attempt` on `net`, for each runtime: in seconds, without training, on noise. A step of the user's
    own that has none is done, with a `finetune` that gives back what it gets.

    Raises:
        UserError: a step could not take the network.
    """
    for flow in dict.fromkeys(flows):
        for name, step in steps.items():
            tries = beside(step)
            if tries is None and place_of(step) is None:
                continue
            try:
                if tries is None:  # one of the user's own, of which nothing is known
                    chain({name: step}, net, data, _untrained, flow)
                    continue
                with _told(name, step, net):
                    tries(net, data, flow, **getattr(step, "keywords", {}))
            except UserError as error:
                line = f"compress for {flow}: {error}"
                raise type(error)(str(error) if is_placed(str(error)) else line) from error


def _untrained(net: nn.Module, name: str, *, epochs: int, lr: float, on_epoch: Callable | None = None) -> nn.Module:
    return copy.deepcopy(net)


def beside(step: Callable) -> Callable | None:
    """The `attempt` in a step's module; None: it has none."""
    return getattr(sys.modules[getattr(step, "func", step).__module__], "attempt", None)


@contextmanager
def _told(name: str, step: Callable, net: nn.Module) -> Iterator[None]:
    """Whatever a step stumbles over in a network, in a line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kind = type(getattr(net, "net", net)).__name__
        if own := place_in(error) or place_of(step):
            raise UserError(f"{own}: compress={name}: {reason(error)}") from error
        raise UserError(
            f"{name} can't compress {kind}{place(error, net)}: {reason(error)}; leave compress={name} out for it"
        ) from error


called_as(sys.modules[__name__], "distill.api.model:compress")  # distill.compress(student, …), from Python
