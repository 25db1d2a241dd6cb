"""A plain network with named taps: `Network(images) -> Outputs`."""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.models.taps import head_path
from distill.types import Outputs

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.ELU)
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


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
        taps: {name: path of a module in `net`}; "path:in" is the module's first input instead of its output.
        mean, std: the input statistics `net` expects, per channel, of images in [0, 1].

    What `keep` names is recorded, and nothing else. A name is a tap, "last" (its last stage), "head" (the
    classifier), or any module path:

        stage1               the module's output
        stage1:in            its first input
        stage1:pre           its output before its last activation, where it ends in one
        stage1:norm.weight   a tensor of its last normalisation layer
        head:weight          any tensor that the module holds: recorded as it is, not per image

    "pooled" is always a vector (N, D): a map there is averaged over its space.
    """

    def __init__(self, net: nn.Module, taps: Mapping[str, str], mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.net = net
        self.taps = dict(taps)
        self._features: dict[str, Tensor] = {}
        self._tensors: dict[str, str] = {}  # names of recorded parameters and buffers, and where they are
        self._hooks: list = []

    def keep(self, names: Iterable[str]) -> "Network":
        """Record exactly these from now on.

        Raises:
            UserError: a name is neither a tap nor something of the network.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._tensors = [], {}
        for name in dict.fromkeys(names):
            self._record(name)
        return self

    def _record(self, name: str) -> None:
        base, _, part = name.partition(":")
        path, _, side = self._path(base).partition(":")
        part, features = part or side, self._features
        module = dict(self.net.named_modules()).get(path)
        if module is None or not path:
            raise self._unknown(name)
        if part == "":
            self._hooks.append(module.register_forward_hook(partial(_record_output, features, name)))
        elif part == "in":
            self._hooks.append(module.register_forward_pre_hook(partial(_record_input, features, name)))
        elif part == "pre":
            last: dict[str, tuple[Tensor, Tensor]] = {}  # input and output of the activation called last
            for layer in module.modules():
                if isinstance(layer, ACTIVATIONS):
                    self._hooks.append(layer.register_forward_hook(partial(_remember, last)))
            self._hooks.append(module.register_forward_hook(partial(_record_before, last, features, name)))
        else:
            first, _, rest = part.partition(".")
            if first == "norm":
                norms = [found for found, layer in module.named_modules() if isinstance(layer, NORMS)]
                part = f"{norms[-1]}.{rest}".lstrip(".") if norms else part
            try:
                found = attrgetter(f"{path}.{part}")(self.net)
            except AttributeError:
                raise self._unknown(name) from None
            if not isinstance(found, Tensor):  # a layer without a bias
                raise self._unknown(name)
            self._tensors[name] = f"{path}.{part}"

    @property
    def recording(self) -> bool:
        """Whether it is looked into: features are recorded while it answers."""
        return bool(self._hooks)

    def _path(self, base: str) -> str:
        if base == "head":
            return head_path(self.net)
        stages = sorted(tap for tap in self.taps if tap.startswith("stage"))
        return self.taps.get(stages[-1] if base == "last" and stages else base, base)

    def _unknown(self, name: str) -> UserError:
        layers = [path for path, _ in self.net.named_modules() if path and path.count(".") <= name.count(".")]
        return UserError(
            f"no tap or layer '{name}' in {type(self.net).__name__}: its taps are "
            f"{', '.join(self.taps) or 'none'}; its layers include {', '.join(layers[:12]) or 'none'}"
        )

    def forward(self, images: Tensor) -> Outputs:
        self._features.clear()
        logits = self.net(self.normalize(images))
        features = self.tensors() | self._features
        self._features.clear()  # or the last batch's graph would stay alive
        if features.get("pooled") is not None and features["pooled"].dim() == 4:
            features["pooled"] = features["pooled"].mean((2, 3))
        return Outputs(logits, features)

    def tensors(self) -> dict[str, Tensor]:
        """What is recorded as it is, not per image: parameters and buffers, by the name they are kept under."""
        return {name: attrgetter(path)(self.net) for name, path in self._tensors.items()}

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


def _remember(last: dict, module: nn.Module, inputs, output) -> None:
    last["call"] = (_first_tensor(inputs), output)


def _record_before(last: dict, features: dict[str, Tensor], name: str, module: nn.Module, inputs, output) -> None:
    before, after = last.pop("call", (None, None))
    features[name] = before if after is output else _first_tensor(output)
