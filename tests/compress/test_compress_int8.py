"""Static int8 in the flows of three runtimes, half precision and weight-only int8: what they store, and how near."""

import copy

import pytest
import torch
from sets import from_arrays
from torch import nn

from distill import compress
from distill.compress import flows
from distill.compress.bias import correct
from distill.compress.calibrate import calibration
from distill.compress.cast import cast
from distill.compress.dynamic_int8 import dynamic_int8
from distill.compress.flows import FLOWS, layers, paths, prepare
from distill.compress.sensitivity import by_sensitivity
from distill.compress.static_int8 import static_int8
from distill.compress.weight_only_int8 import weight_only_int8
from distill.errors import UsageError, UserError
from distill.export import executorch
from distill.runtimes.coverage import coverage, describe, int8_share, stored, warning

SHARE = 0.96  # of this network's weights: the rest are biases


def network() -> nn.Sequential:
    """Conv, depthwise conv with channels of very different size, and Linear; batch norms that have seen data."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, groups=32, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU6(),
        nn.Conv2d(32, 64, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 4),
    )
    for _ in range(20):
        net(torch.rand(16, 3, 8, 8))
    return net.eval()


def images(split: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pixel of a split lies in its own range: 0-79, 80-159 or 160-239."""
    generator = torch.Generator().manual_seed(split)
    pixels = torch.randint(80 * split, 80 * split + 80, (96, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return pixels, torch.arange(96) % 4


@pytest.fixture(scope="module")
def data():
    return from_arrays(list("abcd"), images(0), images(1), images(2), None, 16, 0)


@pytest.fixture(scope="module", params=FLOWS)
def quantized(request, data):
    return static_int8(network(), data=data, flow=request.param)


def test_static_int8_answers_batches_of_1_and_7_and_rounds_the_weights(quantized):
    small = copy.deepcopy(quantized).train().eval()
    net, pixels = network(), images(0)[0][:7].float() / 255
    for batch in (pixels, pixels[:1]):
        wanted = net(batch)
        difference = (small(batch) - wanted).abs().max()
        assert 0 < difference < 0.05 * wanted.abs().max()
    assert int8_share(small) > SHARE
    parts = stored(small)
    assert parts["static int8"].weights == sum(net.get_submodule(name).weight.numel() for name in layers(net))
    assert sum(part.bytes for part in parts.values()) < 0.6 * stored(net)["float"].bytes  # scales are large here
    assert "static int8 9" in describe(small)


def test_calibration_reads_training_images_only(data):
    found = torch.cat(calibration(data, 64, "images"))
    assert found.shape == (64, 3, 8, 8)
    assert found.max() < 80 / 255  # what lies above is validation and test
    assert torch.equal(found, torch.cat(calibration(data, 64, "images")))
    assert not torch.equal(found, torch.cat(calibration(data, 64, "images", seed=1)))
    assert len({tuple(image.flatten().tolist()) for image in torch.cat(calibration(data, 999, "images"))}) == 96


def test_too_few_images_are_refused(data):
    with pytest.raises(UserError, match=r"compress.static_int8.images=8 .* at least 32"):
        static_int8(network(), data=data, images=8)


@pytest.mark.parametrize("flow", ["fx", "onnx"])
def test_what_is_skipped_stays_float(data, flow):
    net = network()
    small = static_int8(net, data=data, flow=flow, skip=["0", "10"])
    left = net.get_submodule("0").weight.numel() + net.get_submodule("10").weight.numel()
    whole = sum(net.get_submodule(name).weight.numel() for name in layers(net))
    assert stored(small)["static int8"].weights == whole - left


def test_skip_auto_leaves_the_most_sensitive_layers_float(data, capsys):
    net = network()
    net[10].weight.data[:, 0] *= 1e3  # one outlier costs the other 63 inputs their precision
    order = by_sensitivity(net, calibration(data, 96, "images"))
    assert order[0] == "10" and sorted(order) == sorted(layers(net))
    small = static_int8(net, data=data, skip="auto", drop=1.0)
    assert "left in float: none" in capsys.readouterr().out
    small = static_int8(net, data=data, skip="auto", drop=-1.0)  # can't be met
    assert int8_share(small) == 0
    assert "can't be met" in capsys.readouterr().out


def test_names_to_skip_are_the_students_own():
    plain = nn.Sequential()
    plain.add_module("net", nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU()))
    assert paths(plain, ["0"]) == {"net.0", "net.0.0"}
    with pytest.raises(UserError, match=r"no layer 'head' .* net.0.0"):
        paths(plain, ["head"])


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


@pytest.mark.parametrize("flow", ["fx", "xnnpack"])
def test_control_flow_is_told_with_its_layer(data, flow):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), Branching(), nn.Flatten(), nn.Linear(192, 4)).eval()
    with pytest.raises(UserError, match=r"can't be captured .* at layer 1 \(test_compress_int8.py:\d+\)") as told:
        static_int8(net, data=data, flow=flow)
    assert ("dynamic_int8" in str(told.value)) == (flow == "fx")  # elsewhere it would need the graph too
    if flow != "fx":
        with pytest.raises(UserError, match=r"can't be captured .* at layer 1"):
            dynamic_int8(net, data=data, flow=flow)


@pytest.mark.parametrize("options", [{"flow": "tpu"}, {"observer": "guess"}, {"skip": "head"}], ids=str)
def test_unknown_options_are_refused(data, options):
    with pytest.raises(UsageError):
        static_int8(network(), data=data, **options)


def test_preparing_leaves_the_network_alone():
    net, example = network(), torch.rand(2, 3, 8, 8)
    before, wanted = copy.deepcopy(net.state_dict()), net(example)
    prepared = prepare(net, example, "fx", qat=True)
    prepared(example)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net(example), wanted)


@pytest.mark.parametrize("dtype, bound", [("float16", 2e-3), ("bfloat16", 2e-2)])
def test_a_cast_halves_the_bytes(dtype, bound):
    net, pixels = network(), torch.rand(7, 3, 8, 8)
    small = cast(net, dtype=dtype)
    wanted = net(pixels)
    assert small(pixels).dtype == torch.float32
    assert 0 < (small(pixels) - wanted).abs().max() < bound * wanted.abs().max()
    assert coverage(small)[dtype]["weights"] == 1 and int8_share(small) == 0
    assert small(pixels[:1]).shape == (1, 4)
    with pytest.raises(UsageError, match="float8"):
        cast(net, dtype="float8")


def test_weight_only_int8_rounds_every_layer_but_those_skipped():
    net, pixels = network(), torch.rand(7, 3, 8, 8)
    small, wanted = weight_only_int8(net), net(pixels)
    assert 0 < (small(pixels) - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert coverage(small)["weight-only int8"]["weights"] > SHARE
    part = weight_only_int8(net, skip=["10"])
    assert stored(small)["weight-only int8"].weights - stored(part)["weight-only int8"].weights == 4 * 64


def test_the_chain_hands_everything_to_each_step():
    given = []

    def step(net, finetune, data, flow):
        given.append((finetune, data, flow))
        return nn.Sequential(net)

    made = compress.chain({"a": step, "b": step}, nn.Identity(), 1, 2, "onnx")
    assert given == [(2, 1, "onnx")] * 2 and isinstance(made[0][0], nn.Identity)


class Halves(nn.Module):
    """Every second pixel, twice over: once more than it takes to be rounded in between."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, images):
        return self.second(self.first(images)[..., ::2, ::2]).mean((2, 3))


def test_for_xnnpack_slices_are_of_int8_numbers(data):
    torch.manual_seed(0)
    net = Halves().eval()
    batches = calibration(data, 32, "images")
    prepared = prepare(net, batches[0][:2], "xnnpack")
    for batch in batches:
        prepared(batch)
    small = flows.convert(prepared, "xnnpack")
    as_it_was = flows._convert_pt2e(copy.deepcopy(prepared).eval().graph)
    sliced = [node.args[0].target for node in small.graph.find_nodes(op="call_function", target=flows.SLICE)]
    assert len(sliced) == 2 and torch.ops.quantized_decomposed.dequantize_per_tensor.default not in sliced
    assert len(small.graph.nodes) < len(as_it_was.graph.nodes)
    torch.testing.assert_close(small(batches[0]), as_it_was(batches[0]), rtol=0, atol=0)


class Clamps(nn.Module):
    """ReLU6 as a module, as a function, and Hardtanh, each behind a layer that answers far beyond it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.relu6 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(inplace=True)
        self.second, self.tanh = nn.Conv2d(8, 8, 3, groups=8), nn.Hardtanh(-1, 2)
        self.third, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8 * 16, 4)
        self.norm.weight.data.fill_(20)
        for layer in (self.second, self.third):
            layer.weight.data.mul_(10)

    def forward(self, images):
        small = self.tanh(self.second(self.relu6(self.norm(self.first(images)))))
        return self.head(nn.functional.relu6(self.third(small)).flatten(1))


@pytest.mark.parametrize("flow", ["fx", "xnnpack", pytest.param("onnx", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("qat", [False, True], ids=["static", "qat"])
def test_between_a_layer_and_its_relu6_int8_spends_no_step_on_what_is_cut_off(flow, qat):
    net, pixels = Clamps().train(), images(0)[0][:64].float() / 255
    for _ in range(50):
        net(pixels)
    prepared = prepare(net.eval(), pixels[:2], flow, qat=qat, observer="minmax")
    prepared.eval()(pixels)
    small = flows.convert(prepared, flow)
    if flow == "fx":
        ranges = [255 * small.get_submodule(name).scale for name in ("first", "second", "third")]
        assert ranges == pytest.approx([6, 3, 6], rel=0.01)
    else:
        for clamp in (node for node in small.graph.nodes if node.target in flows.CLAMPS):
            assert "conv2d" in str(clamp.args[0].target) and all("quantize" in str(user.target) for user in clamp.users)
    assert signal_to_noise(small(pixels), net(pixels)) > (18 if flow == "fx" else 22)  # with the whole range 15, 20


def test_a_layer_that_stays_float_is_not_rounded_in_front_of_its_relu6():
    pixels = images(0)[0][:64].float() / 255
    prepared = prepare(Clamps().eval(), pixels[:2], "fx", skip=["first", "norm", "relu6"])
    prepared(pixels)
    small = flows.convert(prepared, "fx")
    (first,) = (node for node in small.graph.nodes if node.target == "first")
    assert [str(user.target) for user in first.users] == ["relu6"]


class Attention(nn.Module):
    """Convolution to four tokens, attention whose weights no Linear is called with, Linear."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)  # (N, 4, 32)
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("flow", ["xnnpack", "onnx"])
@pytest.mark.parametrize("build", [network, Attention])
def test_dynamic_int8_of_a_captured_flow_is_near_and_counted(data, build, flow):
    torch.manual_seed(0)
    net, pixels = build().eval(), images(0)[0][:7].float() / 255
    before = copy.deepcopy(net.state_dict())
    small = dynamic_int8(net, data=data, flow=flow).train().eval()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for batch in (pixels, pixels[:1]):
        wanted = net(batch)
        assert 0 < (small(batch) - wanted).abs().max() < 0.05 * wanted.abs().max()
    matrices = [each for name, each in net.named_parameters() if each.dim() == 2]
    convolutions = [each for name, each in net.named_parameters() if each.dim() == 4]
    kinds = {name: part.weights for name, part in stored(small).items()}
    assert kinds["dynamic int8"] == sum(each.numel() for each in matrices)
    kept = 0 if flow == "xnnpack" else sum(each.numel() for each in convolutions)
    assert kinds.get("weight-only int8", 0) == kept


def test_dynamic_int8_without_convolutions_says_what_would_reach_them(data):
    small = dynamic_int8(network(), data=data, flow="onnx", conv="float")
    assert stored(small)["dynamic int8"].weights == 4 * 64
    assert "compress.dynamic_int8.conv=weight_only" in warning(small)


def test_without_an_exporter_nothing_is_compressed_and_that_is_said(data, capsys):
    assert compress.compress({"a": None}, network(), data, None, []) == ({}, [])
    assert capsys.readouterr().out == "compress: nothing to compress for, export=[] names no file\n"


def signal_to_noise(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Decibels, of logits less their mean over the classes."""
    found, wanted = (each.detach().double() - each.detach().double().mean(1, keepdim=True) for each in (found, wanted))
    return (10 * torch.log10(wanted.square().sum() / (found - wanted).square().sum())).item()


def between(layer) -> nn.Sequential:
    """`layer()` behind a convolution, behind its batch norm and in front of the head; logits far apart."""
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
    depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
    net = nn.Sequential(convolution, norm, layer(), depthwise, layer(), nn.Flatten(), nn.Linear(16 * 64, 4))
    for _ in range(5):
        net(torch.rand(32, 3, 8, 8))
    return net.eval()


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("slopes", [1, 16])
def test_prelu_is_near_in_int8(data, slopes, flow):
    net, pixels = between(lambda: nn.PReLU(slopes, init=0.4)), images(0)[0][:32].float() / 255
    assert signal_to_noise(static_int8(net, data=data, flow=flow)(pixels), net(pixels)) > 20


@pytest.mark.matrix
@pytest.mark.parametrize("layer", [nn.Mish, lambda: nn.Softplus(2), nn.LogSigmoid], ids=["mish", "softplus", "log"])
def test_executorch_computes_softplus_and_what_is_made_of_it(data, tmp_path, layer):
    net, pixels = between(layer), images(0)[0][:19].float() / 255
    for each, bound in ((net, 80), (static_int8(net, data=data, flow="xnnpack"), 25)):
        (file,) = executorch.export(each, pixels[:2], tmp_path / "net", {})
        assert signal_to_noise(file.run(pixels), each(pixels)) > bound


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("dimensions", [1, 2])
def test_a_batch_norm_without_statistics_takes_those_of_the_batch(data, flow, dimensions):
    pixels = images(0)[0][:32].float() / 255
    if dimensions == 2:
        net = between(lambda: nn.BatchNorm2d(16, track_running_stats=False))
    else:
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(16, track_running_stats=False, affine=False)
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), norm, nn.ReLU(), nn.Linear(16, 4)).eval()
    small = static_int8(net, data=data, flow=flow)
    assert signal_to_noise(small(pixels), net(pixels)) > 15
    if flow == "onnx":
        assert signal_to_noise(dynamic_int8(net, data=data, flow=flow)(pixels), net(pixels)) > 15


@pytest.mark.parametrize("mode", ["circular", "replicate", "reflect"])
def test_convolutions_that_pad_otherwise_are_near(data, mode):
    torch.manual_seed(0)
    padded = nn.Conv2d(3, 16, 3, padding=1, padding_mode=mode)
    net = nn.Sequential(padded, nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 4)).eval()
    pixels = images(0)[0][:32].float() / 255
    small = static_int8(net, data=data)
    assert signal_to_noise(small(pixels), net(pixels)) > 20
    floats = 0 if mode == "reflect" else padded.weight.numel()
    assert (
        stored(small)["static int8"].weights == sum(net.get_submodule(n).weight.numel() for n in layers(net)) - floats
    )


class Padded(nn.Module):
    """A pad by nothing of int8 numbers, as Swin's patch merging has it for even sizes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, images):
        padded = nn.functional.pad(self.first(images), (0, 0, 0, 0))
        return self.second(torch.cat([padded[..., 0::2, :], padded[..., 1::2, :]], 3)).mean((2, 3))


def test_executorch_takes_a_pad_by_nothing(data, tmp_path):
    torch.manual_seed(0)
    net, pixels = Padded().eval(), images(0)[0][:3].float() / 255
    small = static_int8(net, data=data, flow="xnnpack")
    (file,) = executorch.export(small, pixels[:2], tmp_path / "net", {})
    assert (file.run(pixels) - small(pixels)).abs().max() < 0.05 * small(pixels).abs().max()


def rounded(weight: torch.Tensor) -> torch.Tensor:
    return weight.div(0.1).round().mul(0.1)


def test_bias_correction_makes_the_means_of_all_channels_equal():
    """Nagel et al. 2019, E[y] = E[ŷ], computed here by hand for a convolution, one without bias, and a Linear."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 4, 3, groups=4, padding=1)
    head, pixels = nn.Linear(4 * 36, 5), torch.rand(64, 3, 8, 8)
    net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), head)
    before = copy.deepcopy(net.state_dict())
    found = correct(net, [pixels], ["0", "2", "5"], rounded)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()) and first.bias is None
    conv, linear = nn.functional.conv2d, nn.functional.linear
    y, near = conv(pixels, first.weight), conv(pixels, rounded(first.weight))
    bias = (y - near).mean((0, 2, 3))
    torch.testing.assert_close(found[0].bias, bias)
    y, x = second(y.relu()), (near + bias[:, None, None]).relu()
    near = conv(x, rounded(second.weight), second.bias, padding=1, groups=4)
    bias = (y - near).mean((0, 2, 3))
    torch.testing.assert_close(found[2].bias, second.bias + bias)
    y, x = head(y.relu().flatten(1)), (near + bias[:, None, None]).relu().flatten(1)
    near = linear(x, rounded(head.weight), head.bias)
    torch.testing.assert_close(found[5].bias, head.bias + (y - near).mean(0))
    for path in (0, 2, 5):
        assert torch.equal(found[path].weight, net[path].weight)


def test_bias_correction_takes_the_mean_of_the_batches():
    torch.manual_seed(0)
    net, batches = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.rand(4, 16, 3, 2, 2).unbind()
    missing = [(net(images) - nn.functional.linear(images.flatten(1), rounded(net[1].weight), net[1].bias)).mean(0)
               for images in batches]  # fmt: skip
    found = correct(net, batches, ["1"], rounded)
    torch.testing.assert_close(found[1].bias, net[1].bias + torch.stack(missing).mean(0))


def test_bias_correction_leaves_alone_what_it_can_not_better():
    torch.manual_seed(0)
    again, pixels = nn.Conv2d(3, 3, 3, padding=1), torch.rand(8, 3, 8, 8)
    net = nn.Sequential(again, nn.ReLU(), again, nn.Flatten(), nn.Linear(192, 4))
    found = correct(net, [pixels], ["0", "4"], rounded)
    assert torch.equal(found[0].bias, again.bias) and not torch.equal(found[4].bias, net[4].bias)
    assert correct(net, [pixels], ["0", "4"], lambda weight: weight) is net


@pytest.mark.parametrize("flow", ["fx", "onnx", pytest.param("xnnpack", marks=pytest.mark.matrix)])
def test_static_int8_corrects_the_biases_of_what_it_rounds(data, flow):
    net, pixels = between(nn.ReLU), images(0)[0].float() / 255
    errors = []
    for corrects in (False, True):
        small = static_int8(net, data=data, flow=flow, bias_correction=corrects)
        errors.append((small(pixels) - net(pixels)).mean(0).abs().max().item())
    assert errors[1] < 0.5 * errors[0]
    assert set(flows.layers(net, flow, ["3"])) == {"0", "6"}


@pytest.mark.parametrize("qat", [False, True], ids=["static", "qat"])
def test_for_x86_two_products_of_static_int8_fit_into_16_bits(qat):
    pixels = images(0)[0][:64].float() / 255
    prepared = prepare(network(), pixels[:2], "fx", qat=qat)
    prepared.eval()(pixels)
    small = flows.convert(prepared, "fx")
    weights = [layer.weight().int_repr() for layer in small.modules() if callable(getattr(layer, "weight", None))]
    assert len(weights) == 4 and all(each.int().abs().max() == 63 for each in weights)
    assert 2 * 255 * 63 < 2**15


def test_bias_correction_of_a_network_in_half_precision():
    pixels = images(0)[0][:64].float() / 255
    half = cast(network())
    found = correct(half, [pixels], layers(half), lambda weight: flows.rounded(weight, "onnx"))
    assert found is not half
    for path in layers(half):
        bias, before = found.get_submodule(path).bias, half.get_submodule(path).bias
        assert bias.dtype == torch.float16 and (bias != (0 if before is None else before)).any()
