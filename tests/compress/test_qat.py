"""QAT trains the network that ships: what is converted, exported and reloaded answers as what was fake-quantized."""

import copy
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from sets import fake
from torch import nn
from torchvision.ops import StochasticDepth

from distill.compress import flows
from distill.compress.flows import FLOWS
from distill.compress.qat_int8 import qat_int8
from distill.errors import UserError

EXPORTER = {"fx": "torchscript", "xnnpack": "executorch", "onnx": "onnx"}


class Noisy(nn.Module):
    """In training it drops whole images' maps, adds noise and answers with more than one tensor's worth."""

    def __init__(self):
        super().__init__()
        self.first, self.depth, self.last = (
            nn.Conv2d(8, 8, 3, padding=1),
            StochasticDepth(0.5, "row"),
            nn.Conv2d(8, 8, 1),
        )

    def forward(self, maps):
        maps = maps + self.depth(self.first(maps))
        if self.training:
            maps = maps + torch.randn_like(maps)
        return F.dropout2d(self.last(maps), 0.2, self.training)


def network() -> nn.Sequential:
    """Batch norms with MobileNetV3's eps, on activations so small that it matters."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3, momentum=0.02), nn.Hardswish(),
        Noisy(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, eps=1e-3, momentum=0.02), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(8, 10),
    )  # fmt: skip
    net[0].weight.data *= 0.1
    net[4].weight.data *= 0.1
    net.train()
    net[3].eval()
    with torch.no_grad():
        for _ in range(200):
            net(torch.rand(16, 3, 8, 8))
    return net.eval()


@pytest.fixture(scope="module")
def data():
    return fake(16, 0, image_size=8, train_size=64)


def trained(seen: list):
    """`finetune` of a few steps; `seen` gets the network that it returns."""

    def finetune(net, name, *, epochs, lr, on_epoch):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        images, labels = torch.rand(32, 3, 8, 8), torch.arange(32) % 10
        for epoch in range(epochs):
            net.train()
            on_epoch(net, epoch, epochs, True)
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(net(images), labels).backward()
                optimizer.step()
            net.eval()
            on_epoch(net, epoch, epochs, False)
        seen.append(net)
        return net

    return finetune


def scale_of_logits(prepared: nn.Module) -> float:
    roundings = [module for module in prepared.modules() if hasattr(module, "fake_quant_enabled")]
    with torch.no_grad():
        logits = prepared(torch.rand(2, 3, 8, 8))
    steps = [each.scale.item() for each in roundings if each.scale.numel() == 1]
    return min(step for step in steps if ((logits / step) - (logits / step).round()).abs().max() < 1e-2)


@pytest.mark.parametrize("flow", FLOWS)
def test_from_preparing_to_the_reloaded_file_it_is_one_network(flow, data, tmp_path):
    net, seen = network(), []
    before = copy.deepcopy(net.state_dict())
    small = qat_int8(net, trained(seen), data, flow)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not torch.equal(seen[0].state_dict()[next(iter(dict(seen[0].named_parameters())))], next(net.parameters()))
    images = 2 * torch.rand(7, 3, 8, 8)  # beyond what was seen
    wanted = seen[0].eval()(images).detach()
    step = scale_of_logits(seen[0]) * (2 if flow == "fx" else 1)  # torch's hardswish and pooling round by themselves
    assert (small(images) - wanted).abs().max() <= 1.01 * step
    assert torch.equal(small(images[:1]), small(images)[:1])  # nothing random, nothing of the batch
    exporter = import_module(f"distill.export.{EXPORTER[flow]}")
    for file in exporter.export(small, images[:2], tmp_path / "student", {}):
        for batch in (images, images[:1]):
            assert (file.run(batch) - small(batch)).abs().max() <= 1.01 * step


@pytest.mark.parametrize("flow", FLOWS)
def test_it_starts_as_the_network_it_was_made_from_and_nothing_is_random(flow):
    net, images = network(), torch.rand(64, 3, 8, 8)
    prepared = flows.prepare(net, images[:2], flow, qat=True)
    statistics = {name: value.clone() for name, value in prepared.named_buffers() if "running" in name}
    flows.calibrate(prepared, [images], 0)
    assert statistics and all(
        torch.equal(dict(prepared.named_buffers())[name], statistics[name]) for name in statistics
    )
    flows.freeze(prepared.eval(), observers=True, statistics=True)
    with torch.no_grad():
        wanted, answer = net(images), prepared(images)
    assert 0 < (answer - wanted).abs().max() < 0.05 * wanted.abs().max()
    assert torch.equal(answer, prepared(images).detach())
    # in training too, but for dropout and what follows the batch
    for module in prepared.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if flow != "fx":
        for node in prepared.graph.graph.find_nodes(op="call_function", target=flows.DROPOUT):
            node.update_arg(1, 0.0)
        prepared._mode = None
    flows.freeze(prepared.train(), observers=True, statistics=True)
    assert torch.equal(prepared(images), prepared(images))


def test_what_lies_beyond_the_observed_range_is_rounded_as_the_x86_kernels_do():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Flatten()).eval()
    prepared = flows.prepare(net, torch.rand(2, 3, 2, 2), "fx", qat=True)
    flows.calibrate(prepared, [torch.rand(64, 3, 2, 2)], 0)
    flows.freeze(prepared.eval(), observers=True, statistics=True)
    small, images = flows.convert(prepared, "fx"), 1.4 * torch.rand(32, 3, 2, 2)
    with torch.no_grad():
        wanted, answer = small(images), prepared(images)
        assert (answer - wanted).abs().max() <= 1.01 * scale_of(small)


def scale_of(small: nn.Module) -> float:
    return [module.scale for module in small.modules() if hasattr(module, "scale")][-1]


@pytest.mark.parametrize("flow", FLOWS)
def test_what_is_trained_is_rounded_in_weights_and_activations(flow):
    """Fails for a fine-tuning of the float network."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    data, looked = fake(16, 0, image_size=8, train_size=64), []

    def finetune(net, name, *, epochs, lr, on_epoch):
        on_epoch(net.train(), 0, epochs, True)
        logits = net(torch.rand(32, 3, 8, 8))
        assert logits.unique().numel() <= 256
        logits.square().sum().backward()  # straight through
        assert all(parameter.grad.abs().sum() > 0 for parameter in net.parameters())
        roundings = [module for module in net.modules() if hasattr(module, "fake_quant_enabled")]
        assert all(bool(module.fake_quant_enabled) for module in roundings)
        assert sorted(module.scale.numel() for module in roundings if module.is_per_channel) == [8, 10]  # weights
        looked.append(name)
        return net.eval()

    qat_int8(net, finetune, data, flow)
    assert looked == [f"qat_int8-{flow}"]


class Random(nn.Module):
    def forward(self, images):
        return images * torch.rand(1)


@pytest.mark.parametrize("flow", FLOWS)
def test_what_stays_random_is_refused_before_training(flow, data):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Random(), nn.Flatten(), nn.Linear(4 * 36, 10)).eval()
    with pytest.raises(UserError, match="differently each time"):
        qat_int8(net, _never, data, flow)


def _never(*args, **options):
    raise AssertionError("was trained")


def test_a_training_that_diverges_is_told(data):
    def finetune(net, name, *, epochs, lr, on_epoch):
        on_epoch(net.train(), 0, epochs, True)
        next(net.parameters()).data.fill_(float("nan"))
        net(torch.rand(4, 3, 8, 8))
        return net

    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10)).eval()
    with pytest.raises(UserError, match=r"diverged: lower compress\.qat_int8\.lr=0\.0005"):
        qat_int8(net, finetune, data, "xnnpack")


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_running_statistics_that_are_far_off_do_not_spoil_the_start(size):
    """Those of a network that was trained for a few steps: its first answers in training are as in float."""
    net, images = network(), torch.rand(32, 3, 8, 8)
    net[1].running_var *= size
    net[9].p = 0.0
    prepared = flows.prepare(net, images[:2], "fx", qat=True)
    flows.calibrate(prepared, [images], 0)
    for module in (net, net[1], net[5]):
        module.training = True
    with torch.no_grad():
        wanted, answer = net(images), prepared.train()(images)
    assert (answer - wanted).abs().max() < 0.1 * wanted.abs().max()
