"""What may ship: files are compared with what they were made of by signal to noise, in the batches that phones ask."""

import time

import loaders
import pytest
import torch
from omegaconf import OmegaConf
from sets import fake
from test_configs import composed
from torch import nn
from torchvision.models.squeezenet import Fire

from distill import export as exporting
from distill import types
from distill.compress.cast import cast
from distill.compress.dynamic_int8 import dynamic_int8
from distill.compress.weight_only_int8 import weight_only_int8
from distill.errors import UserError
from distill.export import executorch, onnx, torch_export, torchscript
from distill.networks.deit import deit
from distill.networks.network import Network
from distill.networks.timm_models import classifier as timm
from distill.networks.torchvision_models import classifier
from distill.report import evaluate, parity
from distill.report.tables import Row
from distill.runtimes import measure, serve
from distill.runtimes.coverage import computed_share, int8_share

EXPORTERS = {"torchscript": torchscript, "executorch": executorch, "onnx": onnx, "torch_export": torch_export}


@pytest.fixture(scope="module")
def tolerance():
    return types.plain_values(composed().tolerance)


@pytest.fixture(scope="module")
def data():
    return fake(16, 0, image_size=32, train_size=96)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(loaders.__file__).rpartition("/")[0])
    monkeypatch.setattr(measure.latency, "__defaults__", (0.0,))


def settled(net: nn.Module, data) -> nn.Module:
    """With the batch norms' statistics of these images, in eval mode."""
    for module in net.train().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    with torch.no_grad():
        net(data.train[torch.arange(64), 0].images)
    return net.eval()


@pytest.fixture(scope="module")
def network(data) -> Network:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(
            nn.Conv2d(3, 16, 3, 2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        ),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    return Network(settled(net, data), {}, [0.5] * 3, [0.25] * 3)


def few(data, count: int = 6):
    return data.test[torch.arange(count), 0].images


def decibels(found, wanted) -> float:
    """By NumPy's own means."""
    found, wanted = (each.double().numpy() for each in (found, wanted))
    found, wanted = (each - each.mean(1, keepdims=True) for each in (found, wanted))
    return 10 * torch.tensor((wanted**2).sum() / ((found - wanted) ** 2).sum()).log10().item()


def test_signal_to_noise():
    torch.manual_seed(0)
    wanted = torch.randn(20, 10)
    noise = torch.randn(20, 10)
    noise -= noise.mean(1, keepdim=True)
    spread = wanted - wanted.mean(1, keepdim=True)
    found = wanted + 0.01 * noise * spread.norm() / noise.norm() + torch.randn(20, 1)  # what softmax doesn't see
    assert measure.signal_to_noise(found, wanted) == pytest.approx(40, abs=1e-3)
    assert measure.signal_to_noise(wanted, wanted) == float("inf")
    assert not measure.signal_to_noise(wanted * float("nan"), wanted) >= 0


# The rules


def logits_of(seed: int = 0, images: int = 400):
    torch.manual_seed(seed)
    return torch.randn(images, 10)


def test_a_file_may_be_a_little_noisier_than_its_own_rounding_and_no_more(tolerance):
    student, bounds = logits_of(), tolerance["rounding"]
    source = student + 0.02 * logits_of(1)  # 34 dB from the float student
    like_it, wrong = source + 0.02 * logits_of(2), source + 0.3 * logits_of(2)
    labels = student.argmax(1)
    assert parity.difference(like_it, source, "it", student, bounds, labels) == []
    first, second = parity.difference(wrong, source, "it", student, bounds, labels)
    assert "signal to noise 10." in first and "(needed: 2" in first and "top-1 agrees with it" in second
    # a source that is as good as float: its files are bound by `snr`; one that is ruined: by `floor`
    (line,) = parity.difference(student + 0.02 * logits_of(2), student, "it", student, bounds)
    assert "(needed: 40.0)" in line
    ruined = student + 3 * logits_of(1)
    (line,) = parity.difference(ruined + 2 * logits_of(2), ruined, "it", student, bounds)
    assert "(needed: 10.0)" in line


def test_two_standard_errors_of_the_shared_answers_are_chance(tolerance):
    """Of 400 images with 98 % expected: 13 others may be, 14 may not."""
    source = torch.eye(10)[torch.arange(400) % 9]
    source[:20, 9] = source[:20].amax(1) - 1e-4  # nearly as likely as the first
    for others, told in ((13, 0), (14, 1)):
        found = source.clone()
        found[:others, 9] += 2e-4
        lines = parity.difference(found, source, "it", source, tolerance["rounding"], source.argmax(1))
        assert len(lines) == told and all("(needed: 96.60%)" in line for line in lines)


def test_a_float_file_is_bound_by_a_thousandth(tolerance):
    student = logits_of()
    assert parity.difference(student + 5e-4 * logits_of(1), student, "it", student, tolerance["file"]) == []
    assert parity.difference(student + 5e-3 * logits_of(1), student, "it", student, tolerance["file"]) != []


def test_accuracy_does_not_excuse_answers_that_have_nothing_in_common(tolerance):
    """58 % agreement at equal accuracy: another network."""
    student = torch.eye(10)[torch.arange(1000) % 10] * 5
    labels, other = (torch.arange(1000) % 10).clone(), student.clone()
    labels[:420] = (labels[:420] + 1) % 10  # the student is wrong here
    other[:210] = torch.eye(10)[labels[:210]] * 5  # right where the student is wrong
    other[420:630] = torch.eye(10)[(labels[420:630] + 2) % 10] * 5  # and the reverse
    agreement, drop = (
        measure.agreement(other, student),
        measure.accuracy(student, labels) - measure.accuracy(other, labels),
    )
    assert agreement == pytest.approx(0.58) and drop == pytest.approx(0)
    (line,) = parity.difference(other, student, "the float student", student, tolerance["compressed"], labels)
    assert "58.00%" in line


# Files


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_passes_where_it_is_accurate(network, data, tmp_path, tolerance, dtype):
    small = cast(network.plain(), dtype=dtype)
    formats = [name for name in EXPORTERS if (name, dtype) != ("onnx", "bfloat16")]
    exporters = {name: EXPORTERS[name].export for name in formats}
    nets = {"student": network.plain(), "student-half": small}
    nets = {name: exporting.for_all(net, exporters) for name, net in nets.items()}
    files, failures = exporting.export(nets, exporters, tmp_path, data, {})
    assert failures == []
    rows, failures, *_ = evaluate.evaluate({"student": network}, nets, files, data, tolerance)
    assert failures == [] and len(rows) == 1 + 2 * (len(formats) + 1)


def test_a_format_that_cannot_hold_it_is_one_line_and_the_others_go_on(network, data, tmp_path):
    def raises(net, example, stem, metadata):
        raise ZeroDivisionError("integer division or modulo by zero\nat length")

    raises.__module__ = "distill.export.torchscript"
    exporters = {"bad": raises, "onnx": onnx.export, "torchscript": torchscript.export}
    nets = {"student": exporting.for_all(cast(network.plain(), dtype="bfloat16"), exporters)}
    files, failures = exporting.export(nets, exporters, tmp_path, data, {})
    assert [file.path.name for file in files["student"]] == ["student.pt", "student.ptl"]
    assert failures[0].endswith("student: ZeroDivisionError: integer division or modulo by zero")
    assert failures[1].startswith("student: ") and "onnx" in failures[1] and len(failures) == 2


def test_the_reference_is_computed_in_full_precision(network, data, tmp_path, tolerance, monkeypatch):
    """TF32 emulated: logits on the accelerator are off by 0.01, the files are right."""

    def on_device(net):
        return lambda images: net(images) + 0.01 * torch.randn(len(images), 10)

    monkeypatch.setattr(evaluate, "_on_device", on_device)
    exporters = {"torchscript": torchscript.export}
    nets = {"student": exporting.for_all(network.plain(), exporters)}
    files, _ = exporting.export(nets, exporters, tmp_path, data, {})
    assert evaluate.evaluate({"student": network}, nets, files, data, tolerance)[1] == []


def test_a_file_that_answers_one_batch_size_only_is_named(network, data, tmp_path, tolerance):
    (tmp_path / "student.x").write_bytes(b"x")
    file = exporting.Artifact("x", tmp_path / "student.x", "fx", loaders.two_only)
    nets = {"student": {"fx": network.plain()}}
    _, failures, *_ = evaluate.evaluate({"student": network}, nets, {"student": [file]}, data, tolerance)
    assert any(line.startswith("student.x: ") and "static tensor" in line for line in failures)


def test_a_runtime_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "LIMIT", 1)
    file = exporting.Artifact("x", tmp_path / "slow.x", "fx", loaders.hangs)
    start = time.monotonic()
    with serve.serve({"x": file}) as served, pytest.raises(UserError, match=r"slow\.x: no answer within 2 s"):
        served["x"](torch.rand(1, 3, 4, 4))
    assert time.monotonic() - start < 60


def test_dynamic_int8_is_scored_as_it_ships():
    """One image at a time: among others it would be rounded in their range."""
    torch.manual_seed(0)
    net = dynamic_int8(nn.Sequential(nn.Flatten(), nn.Linear(12, 10)))
    images = torch.rand(8, 3, 2, 2) * torch.logspace(0, 3, 8).view(-1, 1, 1, 1)
    alone = torch.cat([net(image) for image in images.split(1)])
    assert not torch.equal(net(images), alone)
    assert torch.equal(evaluate._as_shipped(net, net)(images), alone)
    plain = nn.Flatten()
    assert evaluate._as_shipped(plain, plain) is plain


# What is told


def test_what_is_stored_and_what_is_computed_in_int8_are_two_things(network):
    stored = weight_only_int8(network.plain())
    assert int8_share(stored) > 0.9 and computed_share(stored) == 0
    dynamic = dynamic_int8(network.plain())
    assert int8_share(dynamic) > 0.9
    assert 0 < computed_share(dynamic) < 0.1  # its Linear's 320 of 5,500


def test_a_file_that_is_larger_or_slower_than_its_float_one_is_remarked():
    rows = [
        Row("student", bytes=1, latency_ms=0.001),
        Row("student.ptl", bytes=32_000, latency_ms=1.0, format="lite"),
        Row("student-int8.ptl", bytes=78_000, latency_ms=1.4, format="lite"),
        Row("student.pte", bytes=32_000, latency_ms=0.1, format="executorch"),
        Row("student-bf16.pte", bytes=16_000, latency_ms=20.8, format="executorch"),
        Row("student-int8.onnx", bytes=1, latency_ms=9.0, format="onnx"),  # there is no float one
    ]
    assert parity.remarks(rows) == [
        "student-int8.ptl is larger than student.ptl: 78,000 against 32,000 bytes",
        "student-bf16.pte is 208.0 times slower than student.pte",
    ]


@pytest.mark.parametrize(
    "build_net",
    [
        lambda: classifier("vit_b_16", 10, 32),
        lambda: classifier("swin_t", 10, 32),
        lambda: classifier("convnext_tiny", 10, 32),
        lambda: deit(10, 32, depth=2),
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)),
    ],
    ids=["vit_b_16", "swin_t", "convnext_tiny", "deit", "transposed"],
)
def test_macs_of_int8_on_tokens_are_those_of_the_float_network(build_net, data):
    net, example = build_net().eval(), torch.rand(2, 3, 32, 32)
    small = dynamic_int8(net, data=data)
    assert computed_share(small) > 0
    assert measure.macs(small, example) == pytest.approx(measure.macs(net, example), rel=0.01)


# Dynamic int8


class Reads(nn.Module):
    """A block in which two convolutions read one tensor, as Inception's."""

    def __init__(self):
        super().__init__()
        self.first, self.one, self.three = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 16, 1), nn.Conv2d(32, 16, 3, 1, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, images):
        images = self.first(images).relu()
        return self.head(torch.cat([self.one(images).relu(), self.three(images).relu()], 1).mean((2, 3)))


BLOCKS = {
    "fire": lambda: nn.Sequential(
        *(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), Fire(32, 16, 64, 64), Fire(128, 16, 64, 64)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
    ),
    "inception": Reads,
    "squeezed": lambda: timm("regnety_002", 10, 32),
}


@pytest.mark.matrix
@pytest.mark.parametrize("name", BLOCKS)
def test_dynamic_int8_for_executorch_answers_like_its_source(name, data, tmp_path):
    torch.manual_seed(0)
    plain = Network(settled(BLOCKS[name](), data), {}, [0.5] * 3, [0.25] * 3).plain()
    small = dynamic_int8(plain, data=data, flow="xnnpack")
    (file,) = executorch.export(small, few(data)[:2], tmp_path / "net", {})
    wanted = torch.cat([small(image) for image in few(data).split(1)])
    assert decibels(torch.cat([file.run(image) for image in few(data).split(1)]), wanted.detach()) > 40


class Casts(nn.Module):
    """It reads the dtype of its convolution's weight, as XCiT's positions do, and the other's weight, as Swin's."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 16, 3, 2), nn.Conv2d(16, 32, 3), nn.Linear(32, 10)

    def forward(self, images):
        images = self.first(images.to(self.first.weight.dtype)).relu()
        return nn.functional.linear(self.second(images).mean((2, 3)), self.head.weight, self.head.bias)


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_lite0", "ghostnet_050", "own"])
def test_dynamic_int8_for_onnx_takes_networks_as_the_world_has_them(name, data, tmp_path):
    """timm's batch norms, with an activation in them, behind weights that are stored in int8; weights that are read."""
    torch.manual_seed(0)
    net = Casts() if name == "own" else timm(name, 10, 32)
    plain = Network(settled(net, data), {}, [0.5] * 3, [0.25] * 3).plain()
    small = dynamic_int8(plain, data=data, flow="onnx")
    assert int8_share(small) > 0.5
    (file,) = onnx.export(small, few(data)[:2], tmp_path / "net", {})
    wanted = torch.cat([small(image) for image in few(data).split(1)])
    assert decibels(torch.cat([file.run(image) for image in few(data).split(1)]), wanted.detach()) > 25


@pytest.mark.parametrize("step", [dynamic_int8, weight_only_int8])
def test_layers_whose_weights_are_read_stay(step, data):
    torch.manual_seed(0)
    plain = Network(Casts().eval(), {}, [0.5] * 3, [0.25] * 3).plain()
    assert decibels(step(plain, data=data)(few(data)).detach(), plain(few(data)).detach()) > 25


def test_every_bound_has_a_default():
    bounds = OmegaConf.to_container(composed().tolerance)
    assert set(bounds) == {"file", "float", "rounding", "compressed"}
