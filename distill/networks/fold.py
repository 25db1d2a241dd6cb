"""From the form in which a network is trained to the form in which it answers: what is computed of weights becomes
weights, so that every runtime and quantizer sees ordinary layers."""

import copy
import inspect
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from distill.progress import say
from distill.types import ImageSize, sides

MERGES = ("fuse", "reparameterize", "switch_to_deploy")  # in timm's order (timm.utils.reparameterize_model)
ALIKE = 1e-4  # of the largest logit: by how much merged branches may answer otherwise, in float32


def copied(net: nn.Module) -> nn.Module:
    """A deep copy, also of a network whose hooks have left weights that they computed, which torch refuses to copy."""
    computed = [
        value
        for module in net.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    return copy.deepcopy(net, {id(value): value.detach().clone() for value in computed})


def folded(net: nn.Module, image_size: ImageSize) -> nn.Module:
    """`net` in eval mode with plain weights: images (N, 3, H, W) in [0, 1] to logits, answering as before.

    - weight_norm, spectral_norm and pruning masks, as hooks or as parametrizations, become the weights they compute;
    - branches that the network offers to merge for deployment (RepVGG, MobileOne, FastViT, RepViT …) are merged, where
      it then answers alike;
    - a layer that other hooks change the input or output of becomes a `Hooked` one.

    Args:
        net: changed in place, unless it is merged.
        image_size: px, of images to compare on.
    """
    for module in [*net.modules()]:
        _fold_weights(module)
    if any(_offered(module) for module in net.modules()):
        net = _merged(net, image_size)
    hooked: dict[nn.Module, Hooked] = {}
    for path, module in [*net.named_modules(remove_duplicate=False)]:  # a layer may be called by several names
        if not any(module.children()) and (module._forward_hooks or module._forward_pre_hooks):
            hooked[module] = Hooked(module)
        if module in hooked:
            net.set_submodule(path, hooked[module])
    return net


class Hooked(nn.Module):
    """A layer between the hooks that were registered on it: ordinary code around an ordinary layer, which can be fused,
    quantized or exchanged without them."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.before = [
            (hook, key in layer._forward_pre_hooks_with_kwargs) for key, hook in layer._forward_pre_hooks.items()
        ]
        self.after = [(hook, key in layer._forward_hooks_with_kwargs) for key, hook in layer._forward_hooks.items()]
        layer._forward_pre_hooks.clear()
        layer._forward_hooks.clear()

    def __getattr__(self, name: str):
        """What is not its own is the layer's: others may read its weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *inputs, **named):
        for hook, takes_named in self.before:
            changed = hook(self.layer, inputs, named) if takes_named else hook(self.layer, inputs)
            if changed is not None and takes_named:
                inputs, named = changed
            elif changed is not None:
                inputs = changed if isinstance(changed, tuple) else (changed,)
        output = self.layer(*inputs, **named)
        for hook, takes_named in self.after:
            known = (inputs, named) if takes_named else (inputs,)
            changed = hook(self.layer, *known, output)
            output = output if changed is None else changed
        return output


def _merged(net: nn.Module, image_size: ImageSize) -> nn.Module:
    """A copy whose branches are merged; `net` itself where that fails or changes its answers."""
    images = torch.rand(2, 3, *sides(image_size), generator=torch.Generator().manual_seed(0))
    merged = copied(net)
    try:
        with torch.no_grad():
            before = net(images)
            _merge(merged)
            after = merged.eval()(images)
        alike = (after - before).abs().max() <= ALIKE * before.abs().max()
    except Exception as error:  # whatever the network's own code raises
        say(f"  the branches of {type(net.net).__name__} stay as they are: merging them failed ({_line(error)})")
        return net
    if not alike:
        say(f"  the branches of {type(net.net).__name__} stay as they are: merged, it answers otherwise")
        return net
    return merged


def _fold_weights(module: nn.Module) -> None:
    if parametrize.is_parametrized(module):
        _fold_parametrizations(module)
    for hook in reversed(list(module._forward_pre_hooks.values())):
        if isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)


@torch.no_grad()
def _fold_parametrizations(module: nn.Module) -> None:
    """As torch's remove_parametrizations, which changes the class that a module shares with its copies."""
    values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    originals = {
        name: next(iter(part.state_dict(keep_vars=True).values())) for name, part in module.parametrizations.items()
    }
    kind = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    module.__class__ = kind
    for name, value in values.items():
        if isinstance(originals[name], nn.Parameter):
            module.register_parameter(name, nn.Parameter(value, originals[name].requires_grad))
        else:
            module.register_buffer(name, value)


def _merge(module: nn.Module) -> None:
    """The modules inside of `module` by their own method, the outer ones first."""
    for name, child in list(module.named_children()):
        merge = _offered(child)
        if merge is not None:
            answer = merge()
            if isinstance(answer, nn.Module):
                child = answer
                setattr(module, name, child)
        _merge(child)


def _offered(module: nn.Module) -> Callable | None:
    """The method by which it merges its branches: one that needs no argument."""
    methods = [getattr(module, name, None) for name in MERGES]
    return next((method for method in methods if callable(method) and _needs_nothing(method)), None)


def _needs_nothing(method: Callable) -> bool:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(method).parameters.values()
    return all(parameter.default is not parameter.empty or parameter.kind in kinds for parameter in parameters)


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def fold_batch_norm(net: nn.Module) -> nn.Module:
    """A copy in eval mode whose BatchNorms are folded into their convolutions, where torch.fx can follow it.

    int8 weights must not be frozen, so TorchScript would not fold them later. With one scale per channel,
    folding leaves the int8 numbers as they are.
    """
    net = without_fast_paths(copy.deepcopy(net).eval())
    try:
        traced = fx.symbolic_trace(net)
    except Exception:  # whatever its forward raises on a symbolic value: control flow that depends on tensors
        return net
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    if any(calls[name] > 1 for name, layer in traced.named_modules() if isinstance(layer, nn.Conv2d)):
        return net  # a convolution that is called twice cannot absorb two BatchNorms
    return fuse(net)


def without_fast_paths(net: nn.Module) -> nn.Module:
    """`net`, changed in place, whose nn.TransformerEncoder calls its layers one by one, always: in eval mode it would
    hand their weights to one fused kernel, which asks of every layer to be a float Linear. It answers as before but
    for the last digits."""
    for module in net.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # of which that kernel computes neither
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return net
