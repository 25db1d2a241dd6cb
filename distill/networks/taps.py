"""Where to tap a network that nobody has described: its stages, its pooled vector, the layers that give the logits."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.networks.answers import first_tensor, logits_of
from distill.own import place_in, place_of, prefixed
from distill.types import ImageSize, alike, in_px, sides

COVERED = 0.75  # of a network's layers: the last stage must lie behind as many, and no more lie between two stages
LOOKED_AT = 2  # images of a dry run: what answers with another number, such as Swin's windows, describes none of them


class Call(NamedTuple):
    """A module's answer in a dry run."""

    path: str
    shape: tuple[int, ...]
    depth: int  # layers called before it finished, itself included; those that answer with one position left out


class Seen(NamedTuple):
    """What a dry run shows of a network."""

    calls: list[Call]  # in the order in which modules finish
    heads: list[str]  # paths of the layers that give the logits, in the order in which they are called


def out_of_place(net: nn.Module) -> nn.Module:
    """Switch off in-place activations in `net`: they would overwrite the tensors that taps have recorded."""
    for module in net.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    return net


def heads(net: nn.Module, image_size: ImageSize, channels: int = 3) -> list[str]:
    """The paths of the classifying layers: those with a weight matrix from which the logits come through no other one.

    Found by running, so it does not matter how `net` names or orders its layers. Most have one; DeiT has two. None
    where the logits come from weights that no layer holds.

    Raises:
        UserError: the network cannot take images (N, channels, H, W).
    """
    return look(net, image_size, channels).heads


def infer_taps(net: nn.Module, image_size: ImageSize, channels: int = 3) -> dict[str, str]:
    """Taps by one dry run of images (N, channels, H, W): "stage1" … "stage4" and "pooled".

    Stages are what timm's `feature_info` names, where there is one. Else, in a network of maps a stage is the outermost
    last module of a resolution; maps (N, H, W, C), such as Swin's, are marked ":nhwc". In one of a single resolution,
    such as a transformer with tokens (N, T, D), the stages are blocks. Of blocks those at a quarter, half, three
    quarters and all of the depth are taken; of resolutions the four coarsest, but maps of one pixel. Where these do
    not cover the network's depth there are no stages. "pooled" is the head's input.

    Raises:
        UserError: the network cannot take such images.
    """
    seen = look(net, image_size, channels)
    taps = {f"stage{number}": path for number, path in enumerate(_stages(net, seen.calls, sides(image_size)), 1)}
    return {**taps, "pooled": f"{seen.heads[0]}:in"} if seen.heads else taps


def look(net: nn.Module, image_size: ImageSize, channels: int = 3) -> Seen:
    """Run `net` and watch; nothing of it is changed.

    Raises:
        UserError: the network cannot take such images.
    """
    calls: list[Call] = []
    made: dict = {}  # node of autograd's graph: the layer whose answer it is
    layers = {path: module for path, module in net.named_modules() if _is_layer(module)}
    depth = 0

    def record(path: str):
        def hook(module, inputs, output):
            nonlocal depth
            answer = first_tensor(output)
            if answer is None:
                return
            if path in layers:
                depth += _positions(answer.shape) > 1
                made.setdefault(answer.grad_fn, path)
            if path and answer.shape[:1] == (LOOKED_AT,):
                calls.append(Call(path, tuple(answer.shape), depth))

        return hook

    hooks = [module.register_forward_hook(record(path)) for path, module in net.named_modules()]
    try:
        with _all_learn(net), torch.enable_grad():
            logits = _answer(net, image_size, channels, LOOKED_AT)
    finally:
        for hook in hooks:
            hook.remove()
    found = _sources(logits, made)
    return Seen(calls, [path for path in dict.fromkeys(made.values()) if path in found])


@torch.no_grad()
def dry_run(net: nn.Module, image_size: ImageSize, channels: int = 3) -> Tensor:
    """The logits (1, K) of one black image, in eval mode; the mode of every module is left as it was.

    Raises:
        UserError: the network cannot take images (1, channels, H, W).
    """
    return _answer(net, image_size, channels, 1)


def _answer(net: nn.Module, image_size: ImageSize, channels: int, images: int) -> Tensor:
    training = {module: module.training for module in net.modules()}
    parameter = next(net.parameters(), torch.zeros(()))
    try:
        return logits_of(net.eval()(parameter.new_zeros(images, channels, *sides(image_size))))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        kind = "grey" if channels == 1 else "RGB"
        way_out = "choose another network or another data.image_size"
        if channels != 1 and "channel" in reason:
            way_out += (
                ", or, where it takes grey images, give one mean and one std: student.mean=[0.5] student.std=[0.25]"
            )
        line = f"{type(net).__name__} cannot take {kind} images of {in_px(image_size)} ({reason}): {way_out}"
        raise UserError(prefixed(place_in(error) or place_of(net), line)) from error
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _all_learn(net: nn.Module) -> Iterator[None]:
    """Also frozen weights appear in autograd's graph."""
    frozen = [parameter for parameter in net.parameters() if not parameter.requires_grad]
    floating = [parameter for parameter in frozen if parameter.is_floating_point()]
    for parameter in floating:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in floating:
            parameter.requires_grad_(False)


def _is_layer(module: nn.Module) -> bool:
    """Whether it is innermost and holds a weight matrix, also one that is computed from others (weight_norm)."""
    inside = [child for name, child in module.named_children() if name != "parametrizations"]
    own = [*module.parameters(recurse=False)]
    if hasattr(module, "parametrizations"):
        own += [*module.parametrizations.parameters()]
    return not inside and any(parameter.dim() > 1 for parameter in own)


def _positions(shape: torch.Size) -> float:
    """How many places of an image an answer (N, …) describes."""
    return shape[1:].numel() / max(shape[1:], default=1)


def _sources(logits: Tensor, made: dict) -> set[str]:
    """The layers that the logits come from directly; none where a matrix outside of layers is on the way."""
    found, waiting, known = set(), [getattr(logits, "grad_fn", None)], {None}
    while waiting:
        node = waiting.pop()
        if node in known:
            continue
        known.add(node)
        if node in made:
            found.add(made[node])
        elif hasattr(node, "variable") and node.variable.dim() > 1:
            return set()
        else:
            waiting += [source for source, _ in node.next_functions]
    return found


def _stages(net: nn.Module, calls: list[Call], image: tuple[int, int]) -> list[str]:
    """`image`: height and width; so in what follows."""
    described = _described_stages(net, calls, image)
    if described:
        return described
    maps = [_map_stages(calls, layout, image) for layout in (_nchw, _nhwc)]
    by_length = sorted(maps, key=len, reverse=True)  # a tie keeps the order
    candidates = [*by_length, _block_stages(net, calls, image)]
    for found in candidates:
        if len(found) > 1 and _cover([call.depth for call, _ in found], calls[-1].depth):
            return [f"{call.path}{suffix}" for call, suffix in found]
    return []


def _cover(depths: list[int], whole: int) -> bool:
    gaps = [after - before for before, after in pairwise([0, *depths])]
    return depths[-1] >= COVERED * whole and max(gaps) <= COVERED * whole and min(gaps) >= 0


def _described_stages(net: nn.Module, calls: list[Call], image: tuple[int, int]) -> list[str]:
    """By timm's `feature_info`, of which only modules that are called count."""
    info = getattr(net, "feature_info", None) or []
    last = {call.path: call for call in calls}
    wanted = dict.fromkeys(entry.get("module") for entry in getattr(info, "info", info) if isinstance(entry, dict))
    named = sorted((last[path] for path in wanted if path in last), key=lambda call: call.depth)
    suffix = ":nhwc" if getattr(net, "output_fmt", None) == "NHWC" else ""
    sides = [_side(call.shape, _nhwc if suffix else _nchw, image) for call in named]
    if len({*sides}) > 1:  # the last of every resolution
        stages = {side: call for side, call in zip(sides, named, strict=True) if side > 1}
        chosen = list(stages.values())[-4:]
    else:
        chosen = _quarters(named)
    found = [f"{call.path}{suffix if len(call.shape) == 4 else ''}" for call in chosen]
    return found if len(found) > 1 else []


def _nchw(shape: tuple[int, ...], image: tuple[int, int]) -> int:
    """The longer side of a map (N, C, H, W) of the image's shape, or 0."""
    return max(shape[2:]) if len(shape) == 4 and alike(*shape[2:], image) else 0


def _nhwc(shape: tuple[int, ...], image: tuple[int, int]) -> int:
    """The longer side of a map (N, H, W, C) of the image's shape, or 0."""
    return max(shape[1:3]) if len(shape) == 4 and alike(*shape[1:3], image) and not alike(*shape[2:], image) else 0


def _side(shape: tuple[int, ...], layout, image: tuple[int, int]) -> int:
    """The side of a map, or of the square of as many tokens (N, T, D), a class token left out; else 0."""
    return math.isqrt(shape[1]) if len(shape) == 3 else layout(shape, image)


def _map_stages(calls: list[Call], layout, image: tuple[int, int]) -> list[tuple[Call, str]]:
    stages: dict[int, tuple[int, Call]] = {}  # side of the map: its last module, and when that finished
    for number, call in enumerate(calls):
        side = layout(call.shape, image)
        if side > 1 and (side not in stages or call.path.count(".") <= stages[side][1].path.count(".")):
            stages[side] = number, call
    chain = _longest_rise([stages[side] for side in sorted(stages, reverse=True)])
    return [(call, ":nhwc" if layout is _nhwc else "") for _, call in chain[-4:]]


def _longest_rise(numbered: list[tuple[int, Call]]) -> list[tuple[int, Call]]:
    """The most stages from fine to coarse that are finished one after the other: a map that grows again, such as
    adaptive pooling's, or one in a side branch is left out."""
    chains: list[list] = []
    for item in numbered:
        before = [chain for chain in chains if chain[-1][0] < item[0]]
        chains.append([*max(before, key=len, default=[]), item])
    return max(chains, key=len, default=[])


def _block_stages(net: nn.Module, calls: list[Call], image: tuple[int, int]) -> list[tuple[Call, str]]:
    """The blocks are the largest group of siblings of one type that answer with tokens or maps of one shape."""
    siblings = {
        call: (call.path.rpartition(".")[0], type(net.get_submodule(call.path)), call.shape)
        for call in {call.path: call for call in calls}.values()
        if len(call.shape) in (3, 4) and _positions(torch.Size(call.shape)) > 1
    }
    if not siblings:
        return []
    counts = Counter(siblings.values())
    blocks_of = max(counts, key=lambda group: (counts[group], -group[0].count(".")))
    blocks = [call for call, group in siblings.items() if group == blocks_of]
    suffix = ":nhwc" if _nhwc(blocks[0].shape, image) else ""
    return [(call, suffix) for call in _quarters(blocks)]


def _quarters(blocks: list[Call]) -> list[Call]:
    ends = [len(blocks) * quarter // 4 for quarter in (1, 2, 3, 4)]
    return [blocks[end - 1] for end in dict.fromkeys(ends) if end]
