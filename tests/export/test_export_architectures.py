"""Every shipped architecture goes to every format and answers there like its source: what one small network of a test
does not have (channel shuffles, squeeze and excitation, attention, layer norms) stands in these."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import EfficientNet, MobileNetV3, ResNet, ShuffleNetV2, VisionTransformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.resnet import Bottleneck
from torchvision.models.squeezenet import Fire
from torchvision.ops import StochasticDepth

from distill.compress import flows
from distill.export import executorch, onnx, torch_export, torchscript
from distill.networks.deit import deit
from distill.networks.network import Network
from distill.networks.resnet_cifar import resnet
from distill.networks.simkd import simkd
from distill.networks.stem import for_small_images
from distill.networks.torchvision_models import classifier
from distill.networks.vgg_cifar import vgg
from distill.networks.wrn_cifar import wrn

SIZE, CLASSES = 32, 10
FORMATS = {"torchscript": torchscript, "executorch": executorch, "onnx": onnx, "torch_export": torch_export}


def _torchvision(name: str) -> partial:
    return partial(classifier, name, CLASSES, SIZE)


def _shallow(kind: type[nn.Module], *options, **more) -> Callable[[], nn.Module]:
    """A network of torchvision in fewer blocks, which keeps the resolution of small images as `classifier` makes it."""
    return lambda: for_small_images(kind(*options, num_classes=CLASSES, **more))


def _inverted(channels: int, expanded: int, out: int, excited: bool, activation: str) -> InvertedResidualConfig:
    return InvertedResidualConfig(channels, 3, expanded, out, excited, activation, 2, 1, 1)


# every kind of block, in few layers: quantizing and lowering takes the time of the number of operators
BLOCKS = {
    "resnet8": partial(resnet, 8, CLASSES),
    "squeezenet": lambda: nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), Fire(32, 8, 32, 32), Fire(64, 8, 32, 32), *pooled(64)
    ),
    "shufflenet_v2": _shallow(ShuffleNetV2, [1, 2, 1], [24, 48, 96, 192, 256]),
    "mobilenet_v3_small": _shallow(
        MobileNetV3,
        [_inverted(16, 16, 16, True, "RE"), _inverted(16, 72, 24, False, "RE"), _inverted(24, 96, 40, True, "HS")],
        128,
    ),
    "efficientnet_b0": _shallow(
        EfficientNet,
        [MBConvConfig(1, 3, 1, 32, 16, 1), MBConvConfig(6, 3, 2, 16, 24, 2)],
        0.0,
    ),
    "deit_tiny": partial(deit, CLASSES, SIZE, depth=1),
    "convnext_tiny": _shallow(ConvNeXt, [CNBlockConfig(24, 48, 1), CNBlockConfig(48, None, 1)]),
}
# the other networks of conf/network, each code once
WHOLE = {
    "wrn_16_2": partial(wrn, 10, 1, CLASSES),
    "vgg8": partial(vgg, 8, CLASSES, SIZE),
    "simkd": partial(simkd, partial(resnet, 8), CLASSES, SIZE, width=32),
    "resnet50": _shallow(ResNet, Bottleneck, [1, 1, 1, 1]),
    "mobilenet": _torchvision("mobilenet_v2"),
    "mobilenet_v3_small": _torchvision("mobilenet_v3_small"),
    "shufflenet_v2": _torchvision("shufflenet_v2_x1_0"),
    "vit_b_16": partial(VisionTransformer, SIZE, 8, 2, 2, 32, 64, num_classes=CLASSES),
}


def cells(names, first=("resnet8", "mobilenet_v3_small")) -> list:
    """The networks, of which all but the first ones belong to the matrix that is tried weekly."""
    return [name if name in first else pytest.param(name, marks=pytest.mark.matrix) for name in names]


def pooled(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]


def settled(build) -> tuple[nn.Module, Tensor]:
    """A plain network with random weights, whose batch norms know the images; and these, 32 smooth ones."""
    torch.manual_seed(0)
    net = build()
    images = nn.functional.interpolate(torch.rand(32, 3, 4, 4), SIZE, mode="bilinear")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
        elif isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0
        elif isinstance(module, nn.Linear) and not module.weight.any():  # the head of a vision transformer
            nn.init.normal_(module.weight)
    with torch.no_grad():
        net.train()(images)
    return Network(net.eval(), {}, [0.5] * 3, [0.25] * 3).plain(), images


def decibels(found: Tensor, wanted: Tensor) -> float:
    """Signal to noise of logits (N, K), less their mean over the classes."""
    found, wanted = (each.double() - each.double().mean(1, keepdim=True) for each in (found, wanted))
    return (10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum().clamp(min=1e-30))).item()


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", cells([*BLOCKS, *(name for name in WHOLE if name not in BLOCKS)]))
@pytest.mark.parametrize("format", FORMATS)
def test_a_float_file_answers_like_its_network(tmp_path, format, name):
    net, images = settled((BLOCKS | WHOLE)[name])
    wanted = net(images[:11])
    for file in FORMATS[format].export(net, images[:2], tmp_path / "net", {}):
        assert decibels(torch.cat([file.run(each[None]) for each in images[:3]]), wanted[:3]) > 80
        assert decibels(file.run(images[:11]), wanted) > 80


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", cells(BLOCKS))
@pytest.mark.parametrize("flow", flows.FLOWS)
def test_a_static_int8_file_is_as_near_to_the_float_network_as_its_source(tmp_path, flow, name):
    """Not: as near to its source. The roundings of another kernel are other roundings, and many layers amplify them,
    as they do those of int8 itself."""
    net, images = settled(BLOCKS[name])
    prepared = flows.prepare(net, images[:2], flow)
    prepared(images)
    small = flows.convert(prepared, flow)
    wanted, source = net(images), small(images)
    assert decibels(source, wanted) > 15 or name == "deit_tiny"  # transformers want dynamic int8
    for exporter in (each for each in FORMATS.values() if flow == each.FLOW):
        for file in exporter.export(small, images[:2], tmp_path / "net", {}):
            for found in (torch.cat([file.run(each[None]) for each in images]), file.run(images)):
                assert decibels(found, wanted) > decibels(source, wanted) - 2
                assert decibels(found, source) > 20
