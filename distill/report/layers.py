"""By layer: what int8 adds in noise, and which option spares the layers that add most.

    signal to noise = 10 · log10(Σ float² / Σ (int8 - float)²)   in dB, over all values and images

of a layer's output where it is rounded (behind its activation, where both are one), everything before it being int8
too; and of the logits where that layer alone is. Float is the network that was quantized. One whose weights are not
the float ones rounded (fine-tuned in int8, or scaled anew before) is compared with itself, its activations not rounded.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from operator import attrgetter
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from distill import asked
from distill.compress import flows
from distill.compress.calibrate import answers, calibration
from distill.compress.layers import hooked
from distill.compress.sensitivity import one_by_one
from distill.data.base import Data
from distill.progress import say
from distill.runtimes import measure
from distill.runtimes.coverage import is_quantized, stored
from distill.runtimes.graph import CONV, LINEAR, module_of, reason

MACS = 1e11  # of all layers measured alone: seconds on one thread; it says on how many images
MOST, LEAST = 64, 8  # images
TOGETHER = 8  # of them, whose activations are held at once
LISTED = 10  # layers that are told, the worst
NAMED = 3  # of them at most, that the option spares: those that make HALF of the noise
HALF = 0.5
STATIC = "static int8"
BETWEEN = {torch.ops.aten.relu.default, torch.ops.aten.relu_.default, *flows.CLAMPS}  # a layer and its rounding
ROUNDING = 1.01  # steps by which a rounded weight may differ: up or down, not only to the nearest


def told(
    name: str,
    start: Mapping[str, nn.Module],
    made: Mapping[str, Mapping[str, nn.Module]],
    steps: Mapping[str, Callable],
    data: Data,
    folder: Path,
) -> dict | None:
    """The layers of the network `name` that suffer most from int8, and the option that spares them.

    Args:
        start: the float student, by flow.
        made: by flow, what each of the compression `steps` made of it, in order.
        data: of whose training images a few calibrate.
        folder: the run's, for the command.

    Returns:
        {"network": name, "step": that made it int8, "images": how many, "of": layers that are int8,
        "layers": [{"name", "alone": signal to noise of the logits in dB, "changed": share of the images whose class is
        then another, "together": {flow: signal to noise of its output in dB}}], the worst first,
        "spare": the option with the worst, "command": to type with it}.
        None where no step makes layers int8, or none of them can be found in what it took. A decibel is None where
        there is no noise, an option where the step has none.
    """
    pairs, by = {}, None
    for flow, nets in made.items():
        before = start.get(flow)
        for step, net in nets.items():
            if before is not None and STATIC in stored(net) and STATIC not in stored(before):
                pairs[flow], by = (before, net), step
            before = net
    if not pairs:
        return None
    try:
        measured = _measured(pairs, calibration(data, MOST, f"compress.{by}.images")[0])
    except Exception as error:  # whatever the network's own code raises: the report goes on
        say(f"warning: the layers of {name} are left out: {reason(error)}")
        return None
    if measured is None:
        return None
    images, found, floats = measured
    spare = _option(steps[by], by, floats, [each["name"] for each in found[: _most_of(found)]])
    chosen = f"compress=[{','.join(steps)}]"  # the run may have been compressed otherwise since
    return {
        "network": name,
        "step": by,
        "images": images,
        "of": len(found),
        "layers": found[:LISTED],
        "spare": spare,
        "command": spare and asked.again(f"run={folder}", "stages=[compress,export,report]", chosen, spare),
    }


def _measured(
    pairs: Mapping[str, tuple[nn.Module, nn.Module]], batch: Tensor
) -> tuple[int, list[dict], list[str]] | None:
    """On how many images of `batch`; the layers that are int8, the worst first; and the names of the others. None where
    none can be found.

    Args:
        pairs: by flow, a network and what it was quantized to.
    """
    net = next(iter(pairs.values()))[0]
    count = len(flows.layers(net)) * max(measure.macs(net, batch[:2]), 1)
    images = batch[: max(LEAST, min(MOST, int(MACS / count)))]
    together = {flow: noise(*pair, images) for flow, pair in pairs.items()}
    names = [layer for layer in flows.layers(net) if any(layer in found for found in together.values())]
    if not names:
        return None
    wanted, found = answers(net, [images]), []
    for layer, logits in one_by_one(net, [images], names):
        alone, changed = measure.signal_to_noise(logits, wanted), 1 - measure.agreement(logits, wanted)
        decibels = {flow: _decibel(heard[layer]) for flow, heard in together.items() if layer in heard}
        found.append({"name": _short(layer), "alone": _decibel(alone), "changed": changed, "together": decibels})
    found.sort(key=lambda each: inf if each["alone"] is None else each["alone"])
    return len(images), found, [_short(layer) for layer in flows.layers(net) if layer not in names]


def _option(step: Callable, name: str, floats: Sequence[str], layers: Sequence[str]) -> str | None:
    """With which a compression step leaves these layers in float, besides those that it leaves already: the named ones,
    or with skip=auto the `floats`."""
    given = getattr(step, "keywords", {})
    if "skip" not in given:
        return None
    skipped = floats if isinstance(given["skip"], str) else map(str, given["skip"])
    return f"compress.{name}.skip=[{','.join(dict.fromkeys([*skipped, *layers]))}]"


def _short(layer: str) -> str:
    return layer.removeprefix("net.")


def _most_of(found: Sequence[Mapping]) -> int:
    """How many of the layers, the noisiest first, make HALF of all noise in the logits; NAMED at most."""
    powers = [0 if each["alone"] is None else 10 ** (-each["alone"] / 10) for each in found]
    return next((count for count in range(1, NAMED) if sum(powers[:count]) >= HALF * sum(powers)), NAMED)


def _decibel(value: float) -> float | None:
    return round(value, 2) if isfinite(value) else None


@dataclass(frozen=True)
class Layer:
    """One that computes in int8: its weights as numbers, and how to hear what it answers."""

    weight: Tensor  # (O, …)
    step: Tensor  # (O, 1, …) between neighbouring weights
    bias: Tensor | None
    source: nn.Module | fx.Node  # whose output, dequantized, is the layer's
    between: tuple[Callable[[Tensor], Tensor], ...]  # activations that are in that output


@torch.no_grad()
def noise(net: nn.Module, small: nn.Module, images: Tensor) -> dict[str, float]:
    """{layer of `net`: signal to noise of its output in dB} for those that are int8 in `small`, which is `net`
    quantized; empty where they can't be told from each other.

    Args:
        images: (N, C, H, W).
    """
    layers, twin = _layers(small), folded(net, images[:2])
    modules = dict(twin.named_modules())
    layers = {path: each for path, each in layers.items() if isinstance(modules.get(path), (nn.Conv2d, nn.Linear))}
    if any(modules[path].weight.shape != each.weight.shape for path, each in layers.items()):
        return {}
    if not all(_is_rounded(each, modules[path].weight) for path, each in layers.items()):
        for path, each in layers.items():
            modules[path].weight = nn.Parameter(each.weight)
            modules[path].bias = None if each.bias is None else nn.Parameter(each.bias)
    signal, error = Counter(), Counter()
    for part in images.split(TOGETHER):
        wanted, came = _heard(twin, layers, part), _answered(small, layers, part)
        for path, each in layers.items():
            if len(wanted[path]) != len(came[path]):
                continue
            for expected, got in zip(wanted[path], came[path], strict=True):
                for activation in each.between:
                    expected = activation(expected)
                signal[path] += expected.double().square().sum().item()
                error[path] += (got.double() - expected.double()).square().sum().item()
    known = flows.layers(net)
    return {_own(path, known): 10 * torch.log10(torch.tensor(signal[path]) / error[path]).item() for path in signal}


def _own(path: str, known: Iterable[str]) -> str:
    """The layer of the network that became `path`: padding, and a layer beside it, were one."""
    return next((name for name in known if path == name or path.startswith(f"{name}.")), path)


def _is_rounded(layer: Layer, weight: Tensor) -> bool:
    return bool(((layer.weight - weight).abs() <= ROUNDING * layer.step).all())


def folded(net: nn.Module, images: Tensor) -> nn.Module:
    """A copy of `net` in the layers that the flows know, each BatchNorm in the convolution whose output it is shown."""
    twin = flows.apart(copy.deepcopy(net).eval())
    calls, outputs, norms = Counter(), [], {}

    def heard(path: str, module: nn.Module, given: Tensor, output: Tensor) -> None:
        calls[path] += 1
        if isinstance(module, nn.Conv2d):
            outputs.append((path, output))
        else:
            norms.update({conv: path for conv, tensor in outputs if tensor is given})

    hooks = {
        path: lambda module, given, output, path=path: heard(path, module, given[0], output)
        for path, module in twin.named_modules()
        if type(module) in (nn.Conv2d, nn.BatchNorm2d)
    }
    with hooked(twin, hooks):
        twin(images)
    for conv, norm in norms.items():
        if calls[conv] == calls[norm] == 1:
            twin.set_submodule(conv, fuse_conv_bn_eval(twin.get_submodule(conv), twin.get_submodule(norm)))
            twin.set_submodule(norm, nn.Identity())
    return twin


def _layers(small: nn.Module) -> dict[str, Layer]:
    """By path: modules of torch.ao's, or the convolutions and products of a graph whose weights are dequantized."""
    found = {}
    for path, module in small.named_modules():
        kind = type(module).__name__
        if is_quantized(module) and kind in ("Conv2d", "ConvReLU2d", "Linear", "LinearReLU"):
            weight = module.weight()
            per_channel = weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
            step = weight.q_per_channel_scales() if per_channel else torch.full((len(weight),), weight.q_scale())
            between = (torch.relu,) if "ReLU" in kind else _clamp_behind(small, path)
            whole = weight.dequantize()
            found[path] = Layer(whole, _beside(step, whole), module.bias(), module, between)
    for node in small.graph.nodes if isinstance(small, fx.GraphModule) else ():
        if node.target in (CONV, LINEAR) and _named(node.args[1], "dequantize_per_channel"):
            whole, scale = (attrgetter(each.target)(small) for each in node.args[1].args[:2])
            bias = node.args[2] if len(node.args) > 2 else None
            bias = attrgetter(bias.target)(small) if bias is not None and bias.op == "get_attr" else None
            source, between = _rounded(node)
            weight = whole.float() * _beside(scale, whole)
            found[module_of(node)[0]] = Layer(weight, _beside(scale, whole), bias, source, between)
    return found


def _clamp_behind(small: nn.Module, path: str) -> tuple[Callable[[Tensor], Tensor], ...]:
    """The ReLU6 behind a module of torch.ao's, which is rounded in the range that is left."""
    nodes = small.graph.nodes if isinstance(small, fx.GraphModule) else ()
    for user in (user for node in nodes if node.target == path for user in node.users):
        if user.op == "call_module" and isinstance(clamp := small.get_submodule(user.target), nn.Hardtanh):
            return (lambda value: clamp(value.clone()),)
        if user.target in flows.CLAMPS:
            return (lambda value, node=user: node.target(value.clone(), *node.args[1:], **node.kwargs),)
    return ()


def _beside(scale: Tensor, weight: Tensor) -> Tensor:
    """(O,) as (O, 1, …), so that it multiplies the weights of each output."""
    return scale.float().view(-1, *[1] * (weight.dim() - 1))


def _named(node, name: str) -> bool:
    return isinstance(node, fx.Node) and str(node.target).startswith(f"quantized_decomposed.{name}")


def _rounded(node: fx.Node) -> tuple[fx.Node, tuple[Callable[[Tensor], Tensor], ...]]:
    """Where the output of a layer is rounded, dequantized again, and the activations between."""
    between = []
    while len(node.users) == 1 and (user := next(iter(node.users))).target in BETWEEN:
        between.append(lambda value, node=user: node.target(value.clone(), *node.args[1:]))
        node = user
    for user in node.users:
        if _named(user, "quantize_per_tensor"):
            node = next((each for each in user.users if _named(each, "dequantize_per_tensor")), node)
    return node, tuple(between)


def _heard(net: nn.Module, sources: Iterable[str], images: Tensor) -> dict[str, list[Tensor]]:
    """What the modules of `net` at these paths answer, a tensor a call."""
    heard = {path: [] for path in sources}
    hooks = {path: lambda module, given, output, path=path: heard[path].append(_plain(output)) for path in sources}
    with hooked(net, hooks):
        net(images)
    return heard


def _answered(small: nn.Module, layers: Mapping[str, Layer], images: Tensor) -> dict[str, list[Tensor]]:
    if all(isinstance(each.source, nn.Module) for each in layers.values()):
        return _heard(small, layers, images)
    nodes, heard = {each.source: path for path, each in layers.items()}, {path: [] for path in layers}

    class Listening(fx.Interpreter):
        def run_node(self, node: fx.Node):
            value = super().run_node(node)
            if node in nodes:
                heard[nodes[node]].append(_plain(value))
            return value

    Listening(small).run(images)
    return heard


def _plain(value: Tensor) -> Tensor:
    """A copy, which nothing behind it changes in place."""
    return value.dequantize() if value.is_quantized else value.clone()
