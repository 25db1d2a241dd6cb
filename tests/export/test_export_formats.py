"""ExecuTorch, ONNX and torch.export files: they answer like their source, and what they can't hold is named."""

import errno
import re
import sys
from dataclasses import replace
from pathlib import Path

import loaders
import pytest
import torch
from photos import photos, program, says_what_the_toolkit_says
from sets import fake
from torch import nn

from distill import export as exporting
from distill.compress import flows
from distill.compress.dynamic_int8 import dynamic_int8
from distill.compress.weight_only_int8 import weight_only_int8
from distill.data.augment import CenterCrop
from distill.errors import UsageError, UserError
from distill.export import deploy, executorch, onnx, torch_export, torchscript
from distill.networks.network import Network
from distill.report import evaluate
from distill.report.tables import Row
from distill.runtimes import measure
from distill.runtimes.serve import Served, serve
from distill.schema.signatures import read
from distill.schema.values import mismatch

EXPORTERS = {"torchscript": torchscript, "executorch": executorch, "onnx": onnx, "torch_export": torch_export}
NEW = ["executorch", "onnx", "torch_export"]
SIZE = 16


@pytest.fixture(scope="module")
def data():
    return fake(image_size=SIZE, train_size=120, batch_size=16, num_workers=0)


@pytest.fixture(scope="module")
def network(data) -> Network:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, data.num_classes),
    )
    net(torch.rand(32, 3, SIZE, SIZE))
    net[7].weight.data *= 20  # logits far apart, as a trained network's
    return Network(net, {}, [0.5] * 3, [0.25] * 3)


@pytest.fixture(scope="module")
def nets(network, data) -> dict[str, dict[str, nn.Module]]:
    plain, small = network.plain(), {}
    images = data.train[torch.arange(64), 0].images
    for flow in flows.FLOWS:
        prepared = flows.prepare(plain, images[:2], flow)
        with torch.no_grad():
            prepared(images)
        small[flow] = flows.convert(prepared, flow)
    return {"student": dict.fromkeys(flows.FLOWS, plain), "student-int8": small}


@pytest.fixture(scope="module")
def exported(nets, data, tmp_path_factory):
    """(folder, {name: files})"""
    folder = tmp_path_factory.mktemp("export")
    exporters = {name: module.export for name, module in EXPORTERS.items()}
    files, failures = exporting.export(nets, exporters, folder, data, {"run": "r"})
    assert failures == []
    return folder, files


@pytest.fixture(scope="module")
def files(exported) -> dict:
    return {file.path.name: (name, file) for name, several in exported[1].items() for file in several}


FILES = [f"student{kind}.{suffix}" for kind in ("", "-int8") for suffix in ("pt", "ptl", "pte", "onnx", "pt2")]


@pytest.mark.parametrize("name", FILES)
def test_every_file_answers_like_its_source_in_every_batch_size(files, nets, name):
    net, file = files[name]
    source = nets[net][file.flow]
    for batch in (1, 7, 19):
        images = torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            wanted = source(images)
        tolerance = 0.05 * wanted.abs().max().item() if file.rounds and "int8" in name else 1e-4
        torch.testing.assert_close(file.run(images), wanted, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("name", NEW)
def test_metadata_is_read_back_from_the_file(exported, data, name):
    module = EXPORTERS[name]
    for net, classes in (("student", data.classes), ("student-int8", data.classes)):
        (file,) = module.reload(exported[0] / net)
        metadata = module.read_metadata(file.path)
        assert metadata["classes"] == classes
        assert metadata["run"] == "r"
        assert metadata["input"]["range"] == [0, 1]
        assert (metadata["input"]["channels"], metadata["input"]["height"]) == (3, SIZE)


def test_onnx_runtime_computes_convolutions_and_linear_in_int8(exported, tmp_path):
    import onnx as onnx_package
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(exported[0] / "student-int8.onnx"), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx_package.load(tmp_path / "optimized.onnx").graph.node]
    assert operators.count("QLinearConv") == 2
    assert not {"Conv", "FusedConv", "Gemm", "MatMul"} & set(operators)


def test_executorch_leaves_no_layer_to_slow_kernels(exported):
    from executorch.exir._serialize import _deserialize_pte_binary

    for name in ("student.pte", "student-int8.pte"):
        program = _deserialize_pte_binary((exported[0] / name).read_bytes())
        operators = {operator.name for operator in getattr(program, "program", program).execution_plan[0].operators}
        assert not {name for name in operators if "conv" in name or "linear" in name or "addmm" in name}


@pytest.fixture(scope="module")
def dynamic(network, data, tmp_path_factory):
    """{exporter: (the dynamic int8 network, its file)}; the float files are another fixture's"""
    folder, found = tmp_path_factory.mktemp("dynamic"), {}
    for name in ("executorch", "onnx", "torch_export"):
        net = dynamic_int8(network.plain(), data=data, flow=EXPORTERS[name].FLOW)
        found[name] = net, EXPORTERS[name].export(net, torch.rand(2, 3, SIZE, SIZE), folder / "dynamic", {})[0]
    return found


@pytest.mark.parametrize("name", NEW)
def test_dynamic_int8_answers_like_its_source(dynamic, name):
    net, file = dynamic[name]
    for batch in (1, 7, 19):
        images = torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            wanted = net(images)
        tolerance = 0.05 * wanted.abs().max().item() if file.rounds else 1e-4
        torch.testing.assert_close(file.run(images), wanted, rtol=1e-4, atol=tolerance)


def test_dynamic_int8_runs_in_the_runtimes_own_kernels(dynamic, tmp_path):
    import onnx as onnx_package
    import onnxruntime
    from executorch.exir._serialize import _deserialize_pte_binary

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(dynamic["onnx"][1].path), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx_package.load(tmp_path / "optimized.onnx").graph.node]
    assert operators.count("QGemm") == 1  # on tokens (N, T, D) it would be DynamicQuantizeMatMul
    assert not {"Gemm", "MatMul", "DequantizeLinear"} & set(operators)

    program = _deserialize_pte_binary(dynamic["executorch"][1].path.read_bytes())
    operators = {operator.name for operator in getattr(program, "program", program).execution_plan[0].operators}
    assert not {name for name in operators if "quant" in name or "conv" in name or "linear" in name or "addmm" in name}


# Processes of their own


@pytest.fixture(autouse=True)
def _loaders_for_other_processes(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(loaders.__file__).parent))


def test_the_report_holds_every_file_and_a_crash_is_one_files_failure(
    network, nets, exported, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(measure.latency, "__defaults__", (0.0,))
    folder, files = exported
    broken = tmp_path / "broken.onnx"
    broken.write_bytes((folder / "student.onnx").read_bytes()[:1000])
    crashing = exporting.Artifact("onnx", tmp_path / "crash.onnx", "onnx", loaders.crash)
    bad = exporting.Artifact("onnx", broken, "onnx", onnx.load)
    tolerance = {
        "file": {"logit": 1e-3, "agreement": 0.99},
        "rounding": {"logit": None, "agreement": 0.9},
        "float": {"logit": 1e-3, "agreement": 0.99},
        "compressed": {"logit": None, "agreement": 0.8},
    }
    files = {name: [file for file in several if file.rounds] for name, several in files.items()}
    files["student"] += [bad, crashing]
    asked, ask = {}, Served._ask

    def told(served, images):
        asked.setdefault(served.name, []).append(len(images))
        return ask(served, images)

    monkeypatch.setattr(Served, "_ask", told)
    rows, failures, *_ = evaluate.evaluate({"student": network}, nets, files, data, tolerance)
    named = {row.name: row for row in rows}
    assert set(named) == {"student", *(name for name in FILES if name.endswith(("pte", "onnx")))}
    assert sorted(line.partition(":")[0] for line in failures) == ["broken.onnx", "crash.onnx"]
    assert any(line == "crash.onnx: its process died (signal 9)" for line in failures)
    assert any(line.startswith("broken.onnx: cannot load") for line in failures)
    for row in rows:
        assert row.latency_ms > 0
        # timed as on a phone, before any batch: after one TorchScript's int8 files are slower for one image
        sizes = asked.get(row.name, [1] * 50 + [64])
        assert max(sizes) > 1 and set(sizes[:50]) == {1}
        assert row.times_eager == pytest.approx(named["student"].latency_ms / row.latency_ms)
    fast, slow = named["student-int8.onnx"], named["student.onnx"]
    assert fast.times_float == pytest.approx(slow.latency_ms / fast.latency_ms)


def test_a_process_answers_through_what_its_runtime_prints(tmp_path):
    files = {
        name: exporting.Artifact("x", tmp_path / name, "fx", load)
        for name, load in {"chatty": loaders.chatty, "failing": loaders.failing}.items()
    }
    with serve(files) as served:
        images = torch.rand(3, 3, 200, 200)
        assert torch.equal(served["chatty"](images), images.flatten(1)[:, :2])
        assert 0 < served["chatty"].time(images[:1]) < 1000
        with pytest.raises(UserError, match=r"^failing: cannot load it$"):
            served["failing"](images)
        processes = [each.process for each in served.values()]
    assert all(process.poll() is not None for process in processes)


# What can't be exported


class Branch(nn.Module):
    def forward(self, images):
        return images.flatten(1) if images.mean() > 0.5 else -images.flatten(1)


class Unknown(nn.Module):
    def forward(self, images):
        return torch.special.bessel_j0(images).flatten(1)


@pytest.mark.parametrize("name", NEW)
def test_control_flow_is_named_with_its_layer_and_line(tmp_path, name):
    net = nn.Sequential(nn.Identity(), Branch()).eval()
    with pytest.raises(UserError, match=r"Sequential cannot be exported to .* at layer 1 \(test_export_formats.py:\d+"):
        EXPORTERS[name].export(net, torch.rand(2, 3, 4, 4), tmp_path / "net", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["executorch", "onnx"])
def test_an_unknown_operator_is_named_with_its_layer(tmp_path, name):
    net = nn.Sequential(nn.Identity(), Unknown()).eval()
    with pytest.raises(UserError, match=r"does not know the operator .*bessel_j0.* \(layer 1, Unknown\)"):
        EXPORTERS[name].export(net, torch.rand(2, 3, 4, 4), tmp_path / "net", {})
    assert not list(tmp_path.iterdir())


class Volume(nn.Module):
    """A convolution that ExecuTorch's runtime has, but not in three dimensions."""

    def __init__(self):
        super().__init__()
        self.plane, self.volume = nn.Conv2d(3, 3, 1), nn.Conv3d(3, 4, (1, 3, 3))

    def forward(self, images):
        return self.volume(self.plane(images)[:, :, None]).mean((2, 3, 4))


@pytest.mark.parametrize("path", ["volume", "0.volume"])
def test_a_file_that_does_not_run_is_not_kept_and_its_layer_is_named(tmp_path, capsys, path):
    net = Volume().eval() if path == "volume" else nn.Sequential(Volume()).eval()
    said = rf"^net.pte is not kept: .* a batch of 1 at the operator .*convolution.* \(layer {path}, Conv3d\)"
    with pytest.raises(UserError, match=said):
        executorch.export(net, torch.rand(2, 3, 8, 8), tmp_path / "net", {})
    assert not list(tmp_path.iterdir())
    assert "KernelCall" not in capsys.readouterr().err


@pytest.mark.parametrize("name", EXPORTERS)
@pytest.mark.parametrize("broken", ["one batch only", "another answer", "another shape"])
def test_a_file_that_answers_otherwise_does_not_replace_the_earlier_one(tmp_path, monkeypatch, name, broken):
    module, net, images = EXPORTERS[name], nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval(), torch.rand(2, 3, 2, 2)
    before = {file.path: file.path.read_bytes() for file in module.export(net, images, tmp_path / "net", {})}
    load = "load_script" if module is torchscript else "load"

    def run(images):
        if broken == "one batch only" and len(images) != 1:
            raise RuntimeError("batch of one expected")
        answer = net(images)
        return -answer if broken == "another answer" else answer[:, :1] if broken == "another shape" else answer

    monkeypatch.setattr(module, load, lambda path: torch.no_grad()(run))
    with pytest.raises(UserError, match=r"^net\.\w+ is not kept: .*batch of [13]"):
        module.export(net, images, tmp_path / "net", {})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


class Shuffle(nn.Module):
    """Operators that return lists of tensors, as ShuffleNet's channel shuffle does."""

    def __init__(self, kind: str):
        super().__init__()
        self.first, self.second, self.kind = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), kind

    def forward(self, images):
        images = self.first(images)
        parts = {
            "chunk": lambda: images.chunk(2, 1)[::-1],
            "split": lambda: images.split(3, 1)[::-1],
            "tensor_split": lambda: images.tensor_split(3, 1)[::-1],
            "unbind": lambda: [part[:, None] for part in images.unbind(1)][::-1],
        }[self.kind]()
        count, channels, height, width = images.shape
        shuffled = torch.cat(parts, 1).view(count, 2, channels // 2, height, width).transpose(1, 2)
        return self.second(shuffled.reshape(count, channels, height, width)).mean((2, 3))


@pytest.mark.parametrize("kind", ["chunk", "split", "tensor_split", "unbind"])
def test_executorch_takes_every_batch_through_operators_that_return_lists(tmp_path, kind):
    torch.manual_seed(0)
    net, images = Shuffle(kind).eval(), torch.rand(19, 3, 8, 8)
    (file,) = executorch.export(net, images[:2], tmp_path / "net", {})
    for batch in (1, 2, 7, 8, 19):
        torch.testing.assert_close(file.run(images[:batch]), net(images[:batch]).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [18, 21, 23])
def test_onnx_is_written_in_the_opset_asked_for(network, nets, tmp_path, opset):
    import onnx as onnx_package

    images = torch.rand(7, 3, SIZE, SIZE)
    for name, net in (("float", network.plain()), ("int8", nets["student-int8"]["onnx"])):
        if name == "int8" and opset > onnx.INT8 and onnx._version() < onnx.RECENT:
            continue
        (file,) = onnx.export(net, images, tmp_path / name, {}, opset=opset)
        assert [each.version for each in onnx_package.load(file.path).opset_import if not each.domain] == [opset]
        bound = 0.05 * net(images).abs().max().item() if name == "int8" else 1e-4
        torch.testing.assert_close(file.run(images), net(images).detach(), rtol=1e-4, atol=bound)


def test_int8_of_an_opset_that_an_old_runtime_lacks_is_told(network, nets, tmp_path, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.23.2")  # Python 3.10's last
    images, int8 = torch.rand(2, 3, SIZE, SIZE), nets["student-int8"]["onnx"]
    with pytest.raises(UserError, match=r"opset=23: ONNX Runtime 1\.23\.2 computes int8 up to 22: choose .*=21"):
        onnx.export(int8, images, tmp_path / "net", {}, opset=23)
    assert onnx.export(int8, images, tmp_path / "net", {})


@pytest.mark.parametrize("opset", [9, 17, 24, "new", 20.5])
def test_another_opset_is_refused(tmp_path, opset):
    with pytest.raises(UsageError, match=rf"export.onnx.opset={opset} .*18 to 23"):
        onnx.export(nn.Flatten().eval(), torch.rand(2, 3, 4, 4), tmp_path / "net", {}, opset=opset)
    assert not list(tmp_path.iterdir())


def test_another_opset_is_refused_before_anything_is_trained(train, quick, tmp_path, capfd):
    kind = read("distill.export.onnx.export").types["opset"]
    assert [opset for opset in range(10, 30) if mismatch(kind, opset) is None] == [*onnx.OPSETS]
    assert train(*quick, "export=[onnx]", "export.onnx.opset=17", cwd=tmp_path) == 2
    assert "export.onnx.opset=17: expected a whole number from 18 to 23" in capfd.readouterr().err
    assert not (tmp_path / "outputs/fits").exists()


def test_onnx_runtime_is_quoted_with_the_layer_that_it_cannot_run(tmp_path):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, dtype=torch.bfloat16)

        def forward(self, images):
            return self.conv(images.bfloat16()).float().mean((2, 3))

    with pytest.raises(UserError, match=r"net.onnx is not kept: .* at the operator Conv \(layer conv, Conv2d\)"):
        onnx.export(Half().eval(), torch.rand(2, 3, 8, 8), tmp_path / "net", {})
    assert not list(tmp_path.iterdir())


def test_a_layer_of_another_flow_is_named_and_the_other_exporters_go_on(network, data, tmp_path):
    net = dynamic_int8(network.plain(), conv="float")
    exporters = {name: EXPORTERS[name].export for name in ("onnx", "executorch", "torchscript")}
    files, failures = exporting.export({"small": dict.fromkeys(flows.FLOWS, net)}, exporters, tmp_path, data, {})
    assert [file.format for file in files["small"]] == ["torchscript", "lite"]
    assert len(failures) == 2
    for line, name in zip(failures, ("ONNX", "ExecuTorch"), strict=True):
        assert line.startswith(f"small: {name} does not know torch.ao.nn.quantized.dynamic")
        assert "(layer net.7)" in line
        assert "static_int8" in line


def test_executorch_refuses_weights_that_it_would_dequantize_wrongly(network, tmp_path):
    with pytest.raises(UserError, match=r"ExecuTorch .*wrongly.*static_int8"):
        executorch.export(weight_only_int8(network.plain()), torch.rand(2, 3, SIZE, SIZE), tmp_path / "net", {})


def test_onnx_keeps_weight_only_int8_small_and_right(network, tmp_path):
    net, images = weight_only_int8(network.plain()), torch.rand(7, 3, SIZE, SIZE)
    (file,) = onnx.export(net, images, tmp_path / "net", {})
    torch.testing.assert_close(file.run(images), net(images).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "package"), [("executorch", "executorch"), ("onnx", "onnxscript")])
def test_a_missing_extra_is_named(monkeypatch, tmp_path, name, package):
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        EXPORTERS[name].export(nn.Flatten().eval(), torch.rand(2, 3, 4, 4), tmp_path / "net", {})


@pytest.mark.parametrize("name", NEW)
def test_a_full_disk_leaves_the_earlier_file(tmp_path, monkeypatch, name):
    net, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval(), torch.rand(2, 3, 2, 2)
    (file,) = EXPORTERS[name].export(net, images, tmp_path / "net", {})
    before = file.path.read_bytes()

    def full(path, data):
        with open(path, "wb") as stream:
            stream.write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"cannot write .*net\.\w+ \([\d,]+ bytes\): No space left on device"):
        EXPORTERS[name].export(net, images, tmp_path / "net", {})
    assert list(tmp_path.iterdir()) == [file.path]
    assert file.path.read_bytes() == before


# The README beside the files


def test_the_programs_of_the_readme_say_of_any_photo_what_the_toolkit_says(exported, data, tmp_path):
    folder, files = exported
    cropped = replace(data, test=replace(data.test, transform=CenterCrop()))
    rows = [Row(file.path.name, format=file.format) for several in files.values() for file in several]
    deploy.write_readme(rows, cropped, folder)
    text = (folder / "README.md").read_text()
    shown = photos(tmp_path)
    for title, suffix in {
        "ExecuTorch": "pte",
        "ONNX Runtime": "onnx",
        "TorchScript (libtorch, Python)": "pt",
        "PyTorch Mobile's lite interpreter": "ptl",
        "torch.export": "pt2",
    }.items():
        text_of_program = program(folder, title)
        name = re.search(rf'"(student\S*\.{suffix})"', text_of_program)[1]
        (file,) = (file for several in files.values() for file in several if file.path.name == name)
        says_what_the_toolkit_says(folder, text_of_program, shown, file.run, data.image_size, data.classes)
    assert "import torch" not in program(folder, "ONNX Runtime")
    assert "{" not in text.partition("\n## ExecuTorch")[2].partition("```python")[0]
    assert "SIZE" not in text
    assert "longArrayOf(1, 3, 16, 16)" in text
