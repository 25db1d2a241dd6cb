"""LiteRT: every shipped kind of network goes there and answers like its source, and what it can't hold is named."""

import json
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from test_export_architectures import BLOCKS, WHOLE, decibels, settled
from torch import nn

from distill.compress import flows
from distill.compress.dynamic_int8 import dynamic_int8
from distill.compress.weight_only_int8 import weight_only_int8
from distill.errors import UsageError, UserError
from distill.runtimes.coverage import computed_share, int8_share
from distill.runtimes.serve import serve


def needs(*packages: str):
    absent = [package for package in packages if find_spec(package) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {' '.join(absent)}")


litert = needs("litert_torch", "ai_edge_litert")
EXPORTERS = [pytest.param("litert", marks=litert)]
INT8 = EXPORTERS  # those that compute in int8
NETWORKS = {**BLOCKS, "mobilenet": WHOLE["mobilenet"]}
SIZE = 32


def exporter(name: str):
    return import_module(f"distill.export.{name}")


class Images:
    image_size = SIZE


@torch.no_grad()
def static(net: nn.Module, images, flow: str) -> nn.Module:
    prepared = flows.prepare(net, images[:2], flow)
    prepared(images)
    return flows.convert(prepared, flow)


@pytest.fixture(scope="module")
def small():
    """A trained network's stand-in, and images."""
    return settled(BLOCKS["resnet8"])


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("format", EXPORTERS)
def test_a_float_file_answers_like_its_network(tmp_path, format, name):
    net, images = settled(NETWORKS[name])
    (file,) = exporter(format).export(net, images[:2], tmp_path / "net", {})
    assert decibels(torch.cat([file.run(each[None]) for each in images[:3]]), net(images[:3])) > 80
    assert decibels(file.run(images[:11]), net(images[:11])) > 80
    assert file.shares(file.path) == (0, 0)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("format", INT8)
def test_a_static_int8_file_is_as_near_to_the_float_network_as_its_source(tmp_path, format, name):
    net, images = settled(NETWORKS[name])
    source = static(net, images, exporter(format).FLOW)
    (file,) = exporter(format).export(source, images[:2], tmp_path / "net", {})
    found, wanted = file.run(images), net(images)
    assert decibels(found, wanted) > decibels(source(images), wanted) - 2
    assert decibels(found, source(images)) > 10
    stored, computed = file.shares(file.path)
    assert stored == pytest.approx(int8_share(source), abs=0.03)
    assert computed == pytest.approx(computed_share(source), abs=0.03)


@torch.no_grad()
@pytest.mark.parametrize("format", EXPORTERS)
def test_a_file_says_how_much_of_it_is_int8(tmp_path, format, small):
    net, images = small
    module = exporter(format)
    for kind, source in {
        "dynamic": dynamic_int8(net, data=Images, flow=module.FLOW),
        "stored": weight_only_int8(net),
        "half": static(net, images, module.FLOW),
    }.items():
        (file,) = module.export(source, images[:2], tmp_path / kind, {})
        one_by_one = torch.cat([source(each[None]) for each in images])
        assert decibels(file.run(images), one_by_one) > (30 if kind == "half" else 80)
        assert file.shares(file.path) == pytest.approx((int8_share(source), computed_share(source)), abs=0.03)


@pytest.mark.parametrize("format", EXPORTERS)
def test_metadata_is_read_back_and_no_other_file_is(tmp_path, format, small):
    net, images = small
    module = exporter(format)
    (file,) = module.export(net, images[:2], tmp_path / "net", {"classes": ["a", "é"], "input": {"short_side": 36}})
    read = module.read_metadata(file.path)
    assert read["classes"] == ["a", "é"] and read["input"]["short_side"] == 36 and read["input"]["height"] == SIZE
    assert [each.path for each in module.reload(tmp_path / "net")] == [file.path]
    assert module.reload(tmp_path / "other") == []


@pytest.mark.parametrize("format", EXPORTERS)
def test_a_file_answers_in_a_process_of_its_own(tmp_path, format, small):
    net, images = small
    (file,) = exporter(format).export(net, images[:2], tmp_path / "net", {})
    with serve({"net": file}, 10) as served, torch.no_grad():
        assert decibels(served["net"](images[:3]), net(images[:3])) > 80
        assert 0 < served["net"].time(images[:1]) < 1000


class Unknown(nn.Module):
    def forward(self, images):
        return torch.special.bessel_j0(images).flatten(1)


class Branch(nn.Module):
    def forward(self, images):
        return images.flatten(1) if images.mean() > 0.5 else -images.flatten(1)


@pytest.mark.parametrize("format", EXPORTERS)
def test_what_a_runtime_lacks_is_named_with_its_layer(tmp_path, format, capfd):
    net = nn.Sequential(nn.Identity(), Unknown()).eval()
    with pytest.raises(UserError, match=r"does not know the operator .*bessel_j0.* \(layer 1, Unknown\): replace"):
        exporter(format).export(net, torch.rand(2, 3, 4, 4), tmp_path / "net", {})
    with pytest.raises(UserError, match=r"Branch cannot be exported to .*test_runtimes.py:\d+"):
        exporter(format).export(Branch().eval(), torch.rand(2, 3, 4, 4), tmp_path / "net", {})
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("format", EXPORTERS)
def test_a_file_that_answers_otherwise_does_not_replace_the_earlier_one(tmp_path, monkeypatch, format):
    module, net, images = exporter(format), nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval(), torch.rand(2, 3, 2, 2)
    module.export(net, images, tmp_path / "net", {})
    before = contents(tmp_path)
    monkeypatch.setattr(module, "load", lambda path: torch.no_grad()(lambda images: -net(images)))
    with pytest.raises(UserError, match=r"^net\.\w+ is not kept: on a batch of 1 it answers otherwise"):
        module.export(net, images, tmp_path / "net", {})
    assert contents(tmp_path) == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@litert
@torch.no_grad()
def test_a_litert_file_takes_and_gives_int8_where_asked_for(tmp_path, small):
    from ai_edge_litert.interpreter import Interpreter

    net, images = small
    images = (images * 255).round() / 255  # a photo's bytes
    source = static(net, images, "xnnpack")
    (file,) = exporter("litert").export(source, images[:2], tmp_path / "net", {}, io="int8")
    interpreter = Interpreter(str(file.path))
    (runner,) = interpreter.get_signature_list().values()
    assert runner == {"inputs": ["images"], "outputs": ["logits"]}
    (given,), (asked,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert given["dtype"].__name__ == asked["dtype"].__name__ == "int8"
    said = exporter("litert").read_metadata(file.path)["input"]
    assert (said["dtype"], said["zero_point"]) == ("int8", given["quantization"][1]) == ("int8", -128)
    assert said["scale"] == pytest.approx(given["quantization"][0]) == pytest.approx(1 / 255)
    run = interpreter.get_signature_runner()
    logits = run(images=((images[:1] * 255).round() - 128).to(torch.int8).numpy())["logits"]
    assert logits.dtype == "int8" and logits.argmax() == source(images[:1]).argmax()
    scale = asked["quantization"][0]
    assert (file.run(images) - source(images)).abs().max() < 6 * scale
    (float_file,) = exporter("litert").export(net, images[:2], tmp_path / "float", {}, io="int8")
    assert json.loads(json.dumps(exporter("litert").read_metadata(float_file.path)))["input"]["dtype"] == "float32"
    with pytest.raises(UsageError, match=r"export.litert.io=uint8 is unknown: choose one of float, int8"):
        exporter("litert").export(net, images[:2], tmp_path / "other", {}, io="uint8")


@litert
@torch.no_grad()
def test_weights_of_quantization_aware_training_keep_their_ranges_in_litert(tmp_path, small):
    from ai_edge_litert.tools.flatbuffer_utils import read_model

    net, images = small
    prepared = flows.prepare(net, images[:2], "xnnpack", qat=True)
    flows.calibrate(prepared, [images], 0)
    source = flows.convert(prepared, "xnnpack")
    (file,) = exporter("litert").export(source, images[:2], tmp_path / "net", {})
    assert decibels(file.run(images), source(images)) > 30
    scales = [value for name, value in source.named_buffers() if "scale" in name and value.numel() > 1]
    (part,) = read_model(file.path).subgraphs
    found = [
        list(each.quantization.scale) for each in part.tensors if getattr(each.quantization, "scale", None) is not None
    ]
    assert len(scales) == 8
    for wanted in scales:
        assert any(len(each) == len(wanted) and torch.tensor(each).allclose(wanted.float()) for each in found)


@litert
def test_a_broken_litert_file_is_named(tmp_path, small):
    net, images = small
    (file,) = exporter("litert").export(net, images[:2], tmp_path / "net", {})
    whole = file.path.read_bytes()
    for broken in (b"", b"no file of any kind", whole[:500], whole[:8] + bytes(len(whole) - 8)):
        file.path.write_bytes(broken)
        with pytest.raises(UserError, match=r"cannot load .*net.tflite: .*export it again"):
            exporter("litert").load(file.path)
        with pytest.raises(UserError, match=r"net.tflite"):
            exporter("litert").read_metadata(file.path)
