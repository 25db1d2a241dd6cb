"""Pruning: channels really go, and go together; sparsity and rank are what was asked for."""

import copy
from types import SimpleNamespace

import pytest
import torch
from sets import from_arrays
from torch import nn

from distill.compress.low_rank import low_rank
from distill.compress.prune import LAYERS, prune, unprunable
from distill.compress.sparsify import sparsify, zeros
from distill.compress.static_int8 import static_int8
from distill.errors import UsageError, UserError
from distill.networks.resnet_cifar import resnet
from distill.networks.torchvision_models import classifier
from distill.networks.vgg_cifar import vgg
from distill.networks.wrn_cifar import wrn
from distill.runtimes.measure import macs, parameters

DATA = SimpleNamespace(image_size=32)
EXAMPLE = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NETS = {
    "resnet8": lambda: resnet(8, 10),
    "resnet8 B": lambda: resnet(8, 10, shortcut="B"),
    "wrn": lambda: wrn(10, 2, 10),
    "vgg8": lambda: vgg(8, 10, 32),
    "mobilenet_v2": lambda: classifier("mobilenet_v2", 10, 32),
    "resnet18": lambda: classifier("resnet18", 10, 32),
    "squeezenet": lambda: classifier("squeezenet1_1", 10, 32),
}


def used(net: nn.Module) -> nn.Module:
    """`net` with the batch norms of a trained one."""
    torch.manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return net.eval()


@pytest.mark.parametrize("name", NETS)
def test_channels_go_from_every_family(name):
    net = used(NETS[name]())
    before = copy.deepcopy(net.state_dict())
    small = prune(net, data=DATA, epochs=0)
    assert small(EXAMPLE[:1]).shape == (1, 10) and small(EXAMPLE.repeat(4, 1, 1, 1)[:7]).shape == (7, 10)
    assert macs(small, EXAMPLE) < (0.6 if name == "resnet8" else 0.35) * macs(net, EXAMPLE)
    assert parameters(small) < 0.6 * parameters(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    narrower = [
        path
        for path, layer in net.named_modules()
        if isinstance(layer, LAYERS) and len(small.get_submodule(path).weight) < len(layer.weight)
    ]
    whole = unprunable(net, EXAMPLE)
    assert len(narrower) + len(whole) == len([layer for layer in net.modules() if isinstance(layer, LAYERS)])


def test_streams_with_padded_shortcuts_are_left_whole():
    streams = ["conv1", "layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2", "linear"]
    assert unprunable(used(resnet(8, 10)), EXAMPLE) == streams
    assert unprunable(used(resnet(8, 10, shortcut="B")), EXAMPLE) == ["linear"]


class Flipped(nn.Module):
    """Its channels in reverse order, which nothing but the answers tell."""

    def forward(self, x):
        return x.flip(1)


def test_channels_that_are_reordered_are_left_whole():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), Flipped(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 28)).eval()
    net.append(nn.Flatten())
    assert unprunable(net, EXAMPLE) == ["0", "4"]


def test_the_least_important_channels_go():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    weak = [1, 4, 5, 7, 8, 11, 12, 15]
    net[0].weight.data[weak] = net[0].bias.data[weak] = 0
    net[4].weight.data[:, weak] = 0
    small = prune(net, data=DATA, epochs=0)
    assert small[0].weight.shape == (8, 3, 3, 3) and small[4].weight.shape == (4, 8)
    torch.testing.assert_close(small(EXAMPLE), net(EXAMPLE))


@pytest.mark.parametrize("spread", ["uniform", "global"])
def test_a_budget_of_macs_is_met_closely(spread):
    net = used(wrn(10, 2, 10))
    share = macs(prune(net, data=DATA, epochs=0, macs=0.5, spread=spread, round_to=1), EXAMPLE) / macs(net, EXAMPLE)
    assert 0.45 < share <= 0.5
    with pytest.raises(UserError, match=r"macs=0\.001 can't be met"):
        prune(net, data=DATA, epochs=0, macs=0.001)


def test_a_pruned_network_is_quantized_like_any_other():
    pixels, labels = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8), torch.arange(64) % 10
    data = from_arrays(list("0123456789"), (pixels, labels), (pixels, labels), (pixels, labels), None, 16, 0)
    small = prune(used(resnet(8, 10)), data=data, epochs=0)
    assert static_int8(small, data=data)(EXAMPLE).shape == (2, 10)


def test_what_cannot_be_pruned_is_told():
    with pytest.raises(UserError, match="removes no channel"):
        prune(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), data=DATA, epochs=0)
    for options in ({"ratio": 1.0}, {"macs": 0.0}, {"spread": "x"}, {"norm": 3}):
        with pytest.raises(UsageError):
            prune(resnet(8, 10), data=DATA, epochs=0, **options)
    for step in (prune, sparsify, low_rank):
        with pytest.raises(UserError, match="needs a run"):
            step(resnet(8, 10), data=DATA)


def test_sparsity_rises_by_the_schedule_and_holds_in_training():
    seen = []

    def finetune(net, name, *, epochs, lr):
        net = copy.deepcopy(net).train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        for _ in range(2):
            net(EXAMPLE).square().sum().backward()
            optimizer.step()
        seen.append((name, zeros(net)))
        return net

    net = resnet(8, 10)
    small = sparsify(net, finetune, sparsity=0.8)
    wanted = [0.8 * (1 - (1 - number / 3) ** 3) for number in (1, 2, 3)]
    assert [name for name, _ in seen] == ["sparsify-1", "sparsify-2", "sparsify-3"]
    assert [share for _, share in seen] == pytest.approx(wanted, abs=1e-3)
    assert zeros(small) == pytest.approx(0.8, abs=1e-3) and zeros(net) == 0
    assert sorted(small.state_dict()) == sorted(net.state_dict())


def test_the_smallest_weights_become_zero():
    net = nn.Sequential(nn.Linear(4, 1), nn.Linear(4, 1))
    net[0].weight.data = torch.tensor([[1.0, -5.0, 2.0, -6.0]])
    net[1].weight.data = torch.tensor([[-3.0, 7.0, 8.0, 4.0]])
    small = sparsify(net, sparsity=0.5, rounds=1, epochs=0)
    assert small[0].weight.tolist() == [[0, -5, 0, -6]] and small[1].weight.tolist() == [[0, 7, 8, 0]]


def test_factors_keep_what_has_low_rank():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 64, 1, stride=2), nn.Flatten(), nn.Linear(256, 8)).eval()
    net[0].weight.data = (torch.randn(64, 3) @ torch.randn(3, 32)).view(64, 32, 1, 1)
    images = torch.rand(7, 32, 4, 4)
    small = low_rank(net, energy=0.999999, epochs=0)
    assert small[0][0].weight.shape == (3, 32, 1, 1) and isinstance(small[2], nn.Linear)
    torch.testing.assert_close(small(images), net(images), rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="makes no layer smaller"):
        low_rank(nn.Sequential(nn.Linear(8, 8)), epochs=0, energy=0.99)
