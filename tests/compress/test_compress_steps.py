"""Every step on networks of many makings: they answer sensibly, or one line says why they can't."""

import copy
import re

import pytest
import torch
from sets import fake
from torch import nn

from distill import compress
from distill.compress.dynamic_int8 import dynamic_int8
from distill.compress.layers import called
from distill.compress.low_rank import low_rank
from distill.compress.prune import prune
from distill.compress.qat_int8 import qat_int8
from distill.compress.sparsify import sparsify
from distill.compress.static_int8 import static_int8
from distill.compress.weight_only_int8 import weight_only_int8
from distill.errors import UsageError, UserError
from distill.networks.fold import without_fast_paths
from distill.networks.torchvision_models import classifier


class Recurrent(nn.Module):
    def __init__(self, kind: type):
        super().__init__()
        self.conv, self.cells, self.head = nn.Conv2d(3, 16, 3, 2), kind(16, 24, batch_first=True), nn.Linear(24, 10)

    def forward(self, images):
        return self.head(self.cells(self.conv(images).flatten(2).transpose(1, 2))[0][:, -1])


class Encoder(nn.Module):
    def __init__(self, norm_first: bool):
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 4, 4)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 10)

    def forward(self, images):
        return self.head(self.layers(self.conv(images).flatten(2).transpose(1, 2)).mean(1))


class Reads(nn.Module):
    """Computes with the weight of a layer that it never calls, as Swin does."""

    def __init__(self):
        super().__init__()
        self.first, self.read, self.head = nn.Linear(768, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        for layer in (self.first, self.read):
            layer.weight.data = torch.randn(64, 4) @ torch.randn(4, layer.in_features) * 0.05

    def forward(self, images):
        return self.head(nn.functional.linear(self.first(images.flatten(1)), self.read.weight))


def pooled(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


NETS = {
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "encoder": lambda: Encoder(False),
    "encoder, norm first": lambda: Encoder(True),
    "reads": Reads,
    "same": lambda: pooled(nn.Conv2d(3, 16, 3, padding="same"), nn.ReLU(), nn.Conv2d(16, 16, 4, padding="same")),
    "valid": lambda: pooled(nn.Conv2d(3, 16, (2, 3), padding="valid"), nn.Hardtanh(), nn.Conv2d(16, 16, 3)),
    "reflect": lambda: pooled(nn.Conv2d(3, 16, 3, padding="same", padding_mode="reflect"), nn.ReLU()),
    "groups": lambda: pooled(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4)),
}


def decibels(answer: torch.Tensor, wanted: torch.Tensor) -> float:
    """Signal to noise of logits (N, K) without their mean."""
    wanted, noise = wanted - wanted.mean(1, keepdim=True), answer - wanted
    noise = noise - noise.mean(1, keepdim=True)
    return (10 * torch.log10(wanted.square().sum() / noise.square().sum())).item()


@pytest.fixture(scope="module")
def data():
    return fake(16, 0, image_size=16, train_size=64)


@pytest.mark.matrix
@pytest.mark.parametrize("name", NETS)
def test_steps_that_round_are_near_on_every_network(name, data):
    torch.manual_seed(0)
    net = NETS[name]().eval()
    before, images = (
        copy.deepcopy(net.state_dict()),
        data.val[torch.arange(8), 0].images,
    )
    wanted = net(images).detach()

    def as_it_is(net, name, **options):
        return net

    near = {
        "static": (static_int8(net, None, data), 18),
        "static, captured": (static_int8(net, None, data, "onnx"), 18),
        "dynamic": (dynamic_int8(net, None, data), 25),
        "dynamic, captured": (dynamic_int8(net, None, data, "onnx"), 25),
        "QAT": (qat_int8(net, as_it_is, data, epochs=1), 18),
        "weight-only": (weight_only_int8(net, None, data), 30),
    }
    for step, (small, least) in near.items():
        assert decibels(small(images).detach(), wanted) > least, step
    for step, options in ((low_rank, {"energy": 0.8}), (prune, {"round_to": 1}), (sparsify, {"sparsity": 0.5})):
        try:
            assert step(net, None, data, epochs=0, **options)(images).shape == (8, 10)
        except UserError as error:  # with no channel that can go, or no layer of low rank
            assert "removes no channel" in str(error) or "no layer smaller" in str(error)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_a_layer_whose_weight_is_read_stays(data):
    torch.manual_seed(0)
    small = low_rank(Reads().eval(), None, data, energy=0.999, epochs=0)
    assert isinstance(small.first, nn.Sequential) and type(small.read) is nn.Linear
    assert "read" not in called(Reads(), torch.rand(2, 3, 16, 16))


@pytest.mark.parametrize("norm_first", [False, True])
def test_without_fast_paths_a_transformer_answers_the_same(norm_first):
    torch.manual_seed(0)
    net, images = Encoder(norm_first).eval(), torch.rand(4, 3, 16, 16)
    with torch.no_grad():
        wanted = net(images)
        torch.testing.assert_close(without_fast_paths(net)(images), wanted, rtol=1e-4, atol=1e-5)
        assert "layers.layers.0.linear1" in called(net, images)


def test_what_the_pruner_cannot_follow_is_told():
    net = classifier("shufflenet_v2_x0_5", 10, 32).eval()
    with pytest.raises(UserError, match=r"prune can't follow .* ShuffleNetV2 .*leave prune out"):
        prune(net, None, fake(16, 0, image_size=32, train_size=64), epochs=0)


class Breaks(nn.Module):
    def forward(self, images):
        raise LookupError("no such thing")


def test_a_step_that_fails_in_any_way_is_one_line_and_stops_no_other_runtime(data):
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 10)).eval()

    def fails(net, finetune=None, data=None, flow="fx"):
        if flow == "fx":
            Breaks()(None)
        return net

    nets, failures = compress.compress({"odd": fails}, net, data, None, ["fx", "onnx"])
    assert list(nets) == ["onnx"]
    (line,) = failures
    assert re.match(r"compress for fx: \S+\.py:\d+: compress=odd: LookupError: no such thing", line)
    assert "\n" not in line

    def wrong(net, **options):
        raise UsageError("compress.wrong=1")

    with pytest.raises(UsageError):
        compress.compress({"wrong": wrong}, net, data, None, ["fx"])
