"""Dynamic int8: its error bound, how much of a network it reaches, and that it leaves its input alone."""

import copy

import pytest
import torch
import torchvision
from test_compress_int8 import Branching
from torch import nn
from torch.ao.nn.quantized.dynamic import Linear as DynamicLinear

from distill.compress.dynamic_int8 import dynamic_int8
from distill.errors import UserError
from distill.networks.fold import fold_batch_norm
from distill.runtimes.coverage import coverage, describe, int8_share, stored, warning
from distill.runtimes.int8_layers import Int8Conv2d


def small_net() -> nn.Sequential:
    """Conv, depthwise conv and Linear, with BatchNorms that have seen data. 3·8·9 + 8·9 + 8·4 weights."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    for _ in range(3):
        net(torch.rand(16, 3, 12, 12))
    return net.eval()


@pytest.mark.parametrize("groups", [1, 4])
def test_int8_weights_are_within_half_a_step_of_each_channel(groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, stride=2, padding=2, dilation=2, groups=groups)
    conv.weight.data *= torch.logspace(-4, 2, 12).view(-1, 1, 1, 1)  # one scale for all would lose most channels
    conv.weight.data[3] = 0
    small = Int8Conv2d(conv)

    assert small.weight.dtype == torch.int8
    step = conv.weight.detach().abs().amax((1, 2, 3)) / 127
    error = (small.dequantized() - conv.weight.detach()).abs().amax((1, 2, 3))
    assert (error <= step / 2 * 1.0001).all()

    images = torch.rand(2, 8, 9, 9)
    conv.weight.data = small.dequantized()
    torch.testing.assert_close(small(images), conv(images))


def test_the_result_is_close_and_the_input_untouched():
    net = small_net()
    before = copy.deepcopy(net.state_dict())
    images = torch.rand(32, 3, 12, 12)
    wanted = net(images)
    small = dynamic_int8(net)

    assert [type(module) for module in net] == [type(module) for module in small_net()]
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    difference = (small(images) - wanted).abs().max()
    assert 0 < difference < 0.05 * wanted.abs().max()
    assert isinstance(small.get_submodule("7"), DynamicLinear)
    assert small.get_submodule("7").weight().qscheme() == torch.per_channel_affine


def test_coverage_is_counted_on_the_compressed_network():
    conv, linear, biases = 3 * 8 * 9 + 8 * 9, 8 * 4, 8 + 8 + 4  # the folded BatchNorms leave a bias each
    small = dynamic_int8(small_net())
    parts = stored(small)
    assert {name: part.weights for name, part in parts.items()} == {
        "dynamic int8": linear,
        "weight-only int8": conv,
        "float": biases,
    }
    assert parts["weight-only int8"].bytes == conv + 4 * 16
    assert parts["dynamic int8"].bytes == linear + 16 * 4
    assert parts["float"].bytes == 4 * biases
    assert int8_share(small) == pytest.approx((conv + linear) / (conv + linear + biases))
    assert sum(share["bytes"] for share in coverage(small).values()) == pytest.approx(1)
    assert int8_share(small_net()) == 0


def test_a_small_share_is_warned_of_with_the_better_option():
    linear_only = dynamic_int8(small_net(), conv="float")
    assert int8_share(linear_only) == pytest.approx(8 * 4 / (3 * 8 * 9 + 8 * 9 + 8 * 4 + 20))
    assert "compress.dynamic_int8.conv=weight_only" in warning(linear_only)
    assert warning(linear_only) in describe(linear_only)
    assert warning(dynamic_int8(small_net())) is None

    recurrent = dynamic_int8(nn.Sequential(nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(8, 1)))
    assert "does not know" in warning(recurrent)


def test_most_of_a_real_convnet_becomes_int8():
    net = torchvision.models.mobilenet_v2(num_classes=10).eval()
    small = dynamic_int8(net)
    assert int8_share(small) > 0.98
    assert sum(part.bytes for part in stored(small).values()) < 0.3 * stored(net)["float"].bytes


def test_batch_norms_are_folded_where_that_keeps_the_answers():
    net, images = small_net(), torch.rand(4, 3, 12, 12)
    folded = fold_batch_norm(net)
    assert not [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    torch.testing.assert_close(folded(images), net(images))


class Twice(nn.Module):
    """One convolution under two BatchNorms: folding one into it would change the other's answers."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.first.weight.data *= 3
        self.second.bias.data += 2

    def forward(self, images):
        return self.second(self.conv(self.first(self.conv(images))))


@pytest.mark.parametrize("net", [Twice(), Branching()], ids=["twice", "branching"])
def test_what_cannot_be_folded_is_compressed_all_the_same(net):
    net, images = net.eval(), torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(fold_batch_norm(net)(images), net(images))
    assert (dynamic_int8(net)(images) - net(images)).abs().max() < 0.1
    assert int8_share(dynamic_int8(net)) > 0.3


def test_a_convolution_with_other_padding_stays_float_and_right():
    net, images = (
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")).eval(),
        torch.rand(1, 3, 6, 6),
    )
    torch.testing.assert_close(dynamic_int8(net)(images), net(images))


def test_an_unknown_conv_is_refused():
    with pytest.raises(UserError, match=r"conv=int4 is unknown: choose one of weight_only, float"):
        dynamic_int8(small_net(), conv="int4")
