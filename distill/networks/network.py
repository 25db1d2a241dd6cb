"""A plain network with named taps: `Network(images) -> Outputs`."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import attrgetter

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.networks.answers import first_tensor, logits_of
from distill.networks.fold import copied, folded
from distill.networks.taps import heads
from distill.types import ImageSize, Outputs, grid

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.ELU)
SIZE = 224  # px, of images that most networks take
EXTRA = 5  # tokens that are no part of the image: a class token and four registers
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)


class Normalize(nn.Module):
    """Images in [0, 1] to the input statistics a network was trained with: (x - mean) / std per channel.

    With one mean, colour images (N, 3, H, W) become grey ones (N, 1, H, W) first, by ITU-R BT.601 as in Pillow.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        if len(mean) == 1:
            self.register_buffer("luma", torch.tensor([0.299, 0.587, 0.114]).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if len(self.mean) == 1:
            images = (images * self.luma).sum(1, keepdim=True)
        return (images - self.mean) / self.std


class Plain(nn.Sequential):
    """`normalize` and `net`: images in [0, 1] to logits (N, K), a tensor whatever `net` answers with."""

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.net(self.normalize(images)))


class Network(nn.Module):
    """`net` with its normalisation in front and named taps on its inside.

    Args:
        net: images (N, C, H, W), normalised, to logits (N, K), or to what holds them (see distill.networks.answers).
        taps: {name: path of a module in `net`}; "path:in" is the module's first input instead of its output, and
            "path:nhwc" a map (N, H, W, C), such as Swin's, which is recorded as (N, C, H, W).
        mean, std: the input statistics `net` expects, per channel, of images in [0, 1]. One entry each: `net` takes
            grey images (N, 1, H, W), which are made of colour ones.
        image_size: px, of images that `net` takes; None: not known, 224 is tried where a dry run is needed.
        role: what errors call it, which is where its options lie: "student", "teacher.members.first" …

    What `keep` names is recorded, and nothing else. A name is a tap, "last" (its last stage), "head" (the
    classifier), or any module path:

        stage1               the module's output
        stage1:in            its first input
        stage1:pre           its output before its last activation, where it ends in one
        stage1:norm.weight   a tensor of its last normalisation layer
        head:weight          any tensor that the module holds: recorded as it is, not per image

    "pooled" is always a vector (N, D): a map there is averaged over its space. Tokens of images that are not square
    come as the map (N, D, H, W) that they are: their number alone would not tell its sides.
    """

    def __init__(
        self,
        net: nn.Module,
        taps: Mapping[str, str],
        mean: Sequence[float],
        std: Sequence[float],
        image_size: ImageSize | None = None,
        role: str | None = None,
    ):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.net = net
        self.taps = dict(taps)
        self.image_size, self.role = image_size, role
        self._features: dict[str, Tensor] = {}
        self._tensors: dict[str, str] = {}  # names of recorded parameters and buffers, and where they are
        self._hooks: list = []

    def record(self, names: Iterable[str]) -> "Network":
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
        if side == "nhwc":
            side, store = "", partial(_store_map, self._features, name)
        else:
            store = partial(self._features.__setitem__, name)
        part = part or side
        module = dict(self.net.named_modules(remove_duplicate=False)).get(path)
        if module is None or not path:
            raise self._unknown(name)
        if part == "":
            self._hooks.append(module.register_forward_hook(partial(_record_output, store)))
        elif part == "in":
            self._hooks.append(module.register_forward_pre_hook(partial(_record_input, store)))
        elif part == "pre":
            last: dict[str, tuple[Tensor, Tensor]] = {}  # input and output of the activation called last
            for layer in module.modules():
                if isinstance(layer, ACTIVATIONS):
                    self._hooks.append(layer.register_forward_hook(partial(_remember, last)))
            self._hooks.append(module.register_forward_hook(partial(_record_before, last, store)))
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
            return self._head()
        stages = sorted(tap for tap in self.taps if tap.startswith("stage"))
        return self.taps.get(stages[-1] if base == "last" and stages else base, base)

    def _head(self) -> str:
        path, _, side = self.taps.get("pooled", "").partition(":")
        if self.image_size is None and side == "in":
            return path
        found = heads(self.net, self.image_size or SIZE, len(self.normalize.mean))
        if not found:
            raise UserError(
                f"the logits of {type(self.net).__name__} come from no layer that could be its head, such as a "
                "Linear: make one, or choose losses that read no head"
            )
        return found[0]

    def _unknown(self, name: str) -> UserError:
        if name.startswith("stage") and not any(tap.startswith("stage") for tap in self.taps):
            return UserError(
                f"no stages were found that cover {type(self.net).__name__} from its first layers to its last: name "
                f"them with {self.role or 'student'}.taps={{stage1: LAYER, …}}, or choose losses that read no stages"
            )
        layers = [path for path, _ in self.net.named_modules() if path and path.count(".") <= name.count(".")]
        return UserError(
            f"no tap or layer '{name}' in {type(self.net).__name__}: its taps are "
            f"{', '.join(self.taps) or 'none'}; its layers include {', '.join(layers[:12]) or 'none'}"
        )

    def forward(self, images: Tensor) -> Outputs:
        self._features.clear()
        logits = logits_of(self.net(self.normalize(images)))
        features = self.tensors() | self._features
        self._features.clear()  # or the last batch's graph would stay alive
        high, wide = images.shape[2:]
        if high != wide:
            features |= {
                name: _tokens_as_map(value, (high, wide), name)
                for name, value in features.items()
                if value is not None and value.dim() == 3 and name != "pooled" and name not in self._tensors
            }
        if features.get("pooled") is not None and features["pooled"].dim() == 4:
            features["pooled"] = features["pooled"].mean((2, 3))
        return Outputs(logits, features)

    def tensors(self) -> dict[str, Tensor]:
        """What is recorded as it is, not per image: parameters and buffers, by the name they are kept under."""
        return {name: attrgetter(path)(self.net) for name, path in self._tensors.items()}

    def plain(self) -> Plain:
        """A copy without taps, in eval mode on the CPU: images in [0, 1] to logits. This is what ships.

        Hooks of the network's own stay, but what they and parametrizations compute of the weights is folded into them,
        and so are branches that the network offers to merge (distill.networks.fold).
        """
        net = copied(self.net)
        taps = {hook.id for hook in self._hooks}
        for module in net.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for number in taps & hooks.keys():
                    del hooks[number]
        plain = Plain(OrderedDict(normalize=copy.deepcopy(self.normalize), net=net))
        plain = plain.to("cpu", memory_format=torch.contiguous_format).float().eval()
        return folded(plain, self.image_size or SIZE)


def _tokens_as_map(tokens: Tensor, image: tuple[int, int], name: str) -> Tensor:
    """(N, T, D) → (N, D, H, W), leading extra tokens (class token) left out."""
    high, wide = grid(tokens.shape[1], image)
    extra = tokens.shape[1] - high * wide
    if not high or extra > EXTRA:
        raise UserError(
            f"'{name}' answers with {tokens.shape[1]} tokens, in which no grid of the shape of images of "
            f"{image[0]} × {image[1]} px is found: choose another tap, or square images (data.image_size=N)"
        )
    return tokens[:, extra:].transpose(1, 2).unflatten(2, (high, wide))


def _record_input(store: Callable, module: nn.Module, inputs) -> None:
    store(first_tensor(inputs))


def _record_output(store: Callable, module: nn.Module, inputs, output) -> None:
    store(first_tensor(output))


def _store_map(features: dict[str, Tensor], name: str, value: Tensor) -> None:
    features[name] = value.permute(0, 3, 1, 2)


def _remember(last: dict, module: nn.Module, inputs, output) -> None:
    last["call"] = (first_tensor(inputs), output)


def _record_before(last: dict, store: Callable, module: nn.Module, inputs, output) -> None:
    before, after = last.pop("call", (None, None))
    store(before if after is output else first_tensor(output))
