"""Structured pruning: whole channels are removed, so the network is smaller and faster everywhere.

Source: Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023 (arXiv:2301.12900), by its library
torch-pruning: layers that share channels form a group, and the importance of a channel is the mean L_p norm of its
weights over the group. What the library does not understand of a network (channels that are padded, as the option A
shortcuts of a CIFAR ResNet do) is found by trying and left whole.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from distill.compress.calibrate import noise
from distill.compress.tuning import tuning
from distill.errors import UsageError, UserError
from distill.networks.fold import without_fast_paths
from distill.progress import say
from distill.runtimes.graph import reason
from distill.runtimes.measure import macs as count_macs
from distill.runtimes.measure import parameters
from distill.schema.ranges import Count, Inside, Number, Positive

MOST = 0.9  # of a layer's channels: none is cut off entirely
TRIES = 8  # bisections of the ratio for a budget of MACs
SPREADS = ("uniform", "global")
LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def prune(
    net: nn.Module,
    finetune: Callable | None = None,
    data=None,
    flow: str = "fx",
    *,
    ratio: Inside = 0.5,
    macs: Inside | None = None,
    spread: Literal["uniform", "global"] = "uniform",
    norm: Literal[1, 2] = 2,
    round_to: Count = 8,
    epochs: Number = 5,
    lr: Positive = 5e-3,
) -> nn.Module:
    """A narrower copy of `net`, fine-tuned with the teacher.

    Args:
        net: float32 on the CPU, images (N, C, H, W) to logits (N, K).
        finetune: trains it, see distill/training/finetune.py; not needed with epochs=0.
        data: gives the size of the images.
        flow: part of every compression step's signature; not needed here.
        ratio: the share of channels to remove where channels can be removed, in (0, 1).
        macs: instead of `ratio`, the share of the multiply-accumulates that may remain, in (0, 1).
        spread: "uniform" takes `ratio` from each group of layers, "global" the least important ones wherever they are,
            at most MOST of a layer.
        norm: 1 or 2, of the importance.
        round_to: channels stay a multiple of it, which the kernels like.
        epochs, lr: of the fine-tuning.

    Raises:
        UsageError: options out of range.
        UserError: no channel can be removed, or a budget of MACs can't be met; nothing to fine-tune with.
    """
    share, option = (ratio, "ratio") if macs is None else (macs, "macs")
    if not 0 < share < 1:
        raise UsageError(f"compress.prune.{option}={share}: expected a share between 0 and 1")
    if spread not in SPREADS or norm not in (1, 2) or round_to < 1 or epochs < 0:
        raise UsageError(
            f"compress.prune: spread={spread} must be one of {', '.join(SPREADS)}, norm={norm} 1 or 2, "
            f"round_to={round_to} at least 1, epochs={epochs} at least 0"
        )
    import torch_pruning  # with timm, if that is there: a second

    train = tuning("prune", finetune, epochs, lr)
    example, start = noise(data), without_fast_paths(copy.deepcopy(net))
    with _following(net):
        whole = unprunable(start, example)

    def pruned(ratio: float) -> nn.Module:
        small = copy.deepcopy(start).requires_grad_(True)
        torch_pruning.pruner.BasePruner(
            small,
            example,
            torch_pruning.importance.GroupMagnitudeImportance(p=norm),
            global_pruning=spread == "global",
            pruning_ratio=ratio,
            max_pruning_ratio=MOST,
            ignored_layers=[small.get_submodule(name) for name in whole],
            round_to=round_to,
            root_module_types=list(LAYERS),
        ).step()
        return small.eval()

    before = count_macs(net, example)
    with _following(net):
        small = pruned(ratio) if macs is None else _within(pruned, lambda net: count_macs(net, example) / before, macs)
        small(example)
    if parameters(small) == parameters(net):
        raise UserError(
            f"compress.prune removes no channel of this network: with round_to={round_to} its prunable layers are too "
            "narrow, or none is prunable; try compress.prune.round_to=1 or a larger ratio"
        )
    say(
        f"  prune: {parameters(net):,} → {parameters(small):,} parameters, "
        f"{count_macs(small, example) / before:.0%} of the MACs; left whole: {len(whole)} layers"
    )
    return train(small, "prune")


@contextmanager
def _following(net: nn.Module) -> Iterator[None]:
    """Whatever the library stumbles over in a network (ShuffleNet's shuffled channels: a division by zero) is told."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"compress.prune can't follow which channels of {type(getattr(net, 'net', net)).__name__} belong together "
            f"({reason(error)}): leave prune out for it"
        ) from error


def _within(pruned: Callable, share_of: Callable, budget: float) -> nn.Module:
    """The least pruned network whose share of MACs is at most `budget`."""
    low, high = 0.0, MOST
    best = pruned(high)
    if share_of(best) > budget:
        raise UserError(
            f"compress.prune.macs={budget} can't be met: with {MOST:.0%} of the prunable channels removed, "
            f"{share_of(best):.2f} of the MACs remain"
        )
    for _ in range(TRIES):
        middle = (low + high) / 2
        small = pruned(middle)
        if share_of(small) <= budget:
            best, high = small, middle
        else:
            low = middle
    return best


def unprunable(net: nn.Module, example: Tensor) -> list[str]:
    """The layers, in order, whose output channels can't be removed: the head's, and those of every group where a
    network without one channel does not answer as with that channel at zero.

    Args:
        example: images (N, C, H, W).
    """
    import torch_pruning

    names = [name for name, module in net.named_modules() if isinstance(module, LAYERS)]
    found: list[str] = []
    tried: set[str] = set()
    trial = graph = None
    for name in names:
        if name in tried:
            continue
        if trial is None:  # anew after a failure, which leaves it in pieces
            trial = copy.deepcopy(net).requires_grad_(True).eval()
            graph = torch_pruning.DependencyGraph().build_dependency(trial, example, verbose=False)
            paths = {module: path for path, module in trial.named_modules()}
        layer = trial.get_submodule(name)
        together = [name]
        try:
            group = graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels, [0])
            members = [item.dep.target.module for item in group if graph.is_out_channel_pruning_fn(item.dep.handler)]
            together += [paths[member] for member in members if isinstance(member, LAYERS)]
            right = _answers_alike(trial, graph, group, example)
        except Exception:  # whatever the library or a forward of other shapes raises
            right = False
        tried.update(together)
        if not right:
            found += together
            trial = None
    return [name for name in names if name in found]


@torch.no_grad()
def _answers_alike(trial: nn.Module, graph, group, example: Tensor) -> bool:
    """Whether `trial`, pruned by `group`, answers as it does when the same channels are zero."""
    for dep, channels in group:
        if graph.is_out_channel_pruning_fn(dep.handler):
            for value in (getattr(dep.target.module, name, None) for name in ("weight", "bias", "running_mean")):
                if isinstance(value, Tensor):
                    value[channels] = 0
    wanted = trial(example)
    group.prune()
    came = trial(example)
    return came.shape == wanted.shape and torch.allclose(came, wanted, rtol=1e-3, atol=1e-4)
