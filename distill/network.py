"""A plain network with named taps: `Network(images) -> Outputs`."""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.types import Outputs


class Normalize(nn.Module):
    """Images in [0, 1] to the input statistics a network was trained with: (x - mean) / std per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Network(nn.Module):
    """`net` with its normalisation in front and named taps on its inside.

    Args:
        net: images (N, C, H, W), normalised, to logits (N, K).
        taps: {name: module path in `net`}; "path" taps the module's output, "path:in" its first input.
            "pooled" is always a vector (N, D): a map there is averaged over its space.
        mean, std: the input statistics `net` expects, per channel, of images in [0, 1].

    Only the taps named by `keep` are recorded; any module path of `net` serves as a name too.
    """

    def __init__(self, net: nn.Module, taps: Mapping[str, str], mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.net = net
        self.taps = dict(taps)
        self._features: dict[str, Tensor] = {}
        self._hooks: list = []

    def keep(self, names: Iterable[str]) -> "Network":
        """Record exactly these taps from now on.

        Raises:
            UserError: a name is neither a tap nor a module path of the network.
        """
        for hook in self._hooks:
            hook.remove()
        modules = dict(self.net.named_modules())
        self._hooks = []
        for name in dict.fromkeys(names):
            path, _, side = self.taps.get(name, name).partition(":")
            if path not in modules or not path or side not in ("", "in"):
                nearby = [known for known in modules if known and known.count(".") == path.count(".")]
                raise UserError(
                    f"no tap or layer '{name}' in {type(self.net).__name__}: its taps are "
                    f"{', '.join(self.taps) or 'none'}; its layers include {', '.join(nearby[:12]) or 'none'}"
                )
            if side == "in":
                hook = modules[path].register_forward_pre_hook(partial(_record_input, self._features, name))
            else:
                hook = modules[path].register_forward_hook(partial(_record_output, self._features, name))
            self._hooks.append(hook)
        return self

    def forward(self, images: Tensor) -> Outputs:
        self._features.clear()
        logits = self.net(self.normalize(images))
        features = dict(self._features)
        self._features.clear()  # or the last batch's graph would stay alive
        if features.get("pooled") is not None and features["pooled"].dim() == 4:
            features["pooled"] = features["pooled"].mean((2, 3))
        return Outputs(logits, features)

    def plain(self) -> nn.Sequential:
        """A copy without taps, in eval mode on the CPU: images in [0, 1] to logits. This is what ships."""
        net = copy.deepcopy(self.net)
        for module in net.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        plain = nn.Sequential(OrderedDict(normalize=copy.deepcopy(self.normalize), net=net))
        return plain.to("cpu", memory_format=torch.contiguous_format).float().eval()


def _first_tensor(value) -> Tensor:
    return value if isinstance(value, Tensor) else _first_tensor(value[0])


def _record_input(features: dict[str, Tensor], name: str, module: nn.Module, inputs) -> None:
    features[name] = _first_tensor(inputs)


def _record_output(features: dict[str, Tensor], name: str, module: nn.Module, inputs, output) -> None:
    features[name] = _first_tensor(output)
