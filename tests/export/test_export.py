"""The exported files: they answer like their source, hold what they should, and are whole or not there."""

import errno
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from distill.compress import flows
from distill.compress.dynamic_int8 import dynamic_int8
from distill.errors import UserError
from distill.export.torchscript import export, read_metadata, reload
from distill.networks.network import Network

SIZE = 32


@pytest.fixture(scope="module")
def plain() -> nn.Sequential:
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10)
    for _ in range(2):
        net(torch.rand(8, 3, SIZE, SIZE))  # BatchNorm statistics other than 0 and 1
    return Network(net, {}, [0.5] * 3, [0.25] * 3).plain()


@pytest.fixture(scope="module")
def nets(plain) -> dict[str, nn.Module]:
    return {"float": plain, "int8": dynamic_int8(plain), "linear": dynamic_int8(plain, conv="float")}


@pytest.fixture(scope="module")
def files(nets, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("export")
    example = torch.rand(2, 3, SIZE, SIZE)
    return {name: export(net, example, folder / name, {"classes": ["a", "é"]}) for name, net in nets.items()}


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("name", ["float", "int8", "linear"])
def test_both_files_answer_like_their_source(nets, files, name, batch):
    images = torch.rand(batch, 3, SIZE, SIZE)
    with torch.no_grad():
        wanted = nets[name](images)
    assert [file.format for file in files[name]] == ["torchscript", "lite"]
    for file in files[name]:
        torch.testing.assert_close(file.run(images), wanted, rtol=1e-4, atol=1e-4)
        assert not file.run(images).requires_grad


def test_int8_files_are_small(files):
    sizes = {name: [file.path.stat().st_size for file in both] for name, both in files.items()}
    for small, large in zip(sizes["int8"], sizes["float"], strict=True):
        assert small < 0.3 * large


@pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated")
def test_metadata_is_read_back_from_the_file(files):
    for file in files["int8"]:
        metadata = read_metadata(file.path)
        assert metadata["classes"] == ["a", "é"]
        assert metadata["input"] == {
            "layout": "NCHW",
            "dtype": "float32",
            "range": [0, 1],
            "channels": 3,
            "height": SIZE,
            "width": SIZE,
            "normalization": "in the graph",
        }
    extra = {"metadata.json": ""}  # as libtorch and torch.jit read it
    torch.jit.load(str(files["int8"][0].path), _extra_files=extra)
    assert json.loads(extra["metadata.json"])["classes"] == ["a", "é"]


def test_metadata_of_another_file_is_refused(tmp_path):
    (tmp_path / "other.pt").write_bytes(b"no zip")
    for name in ("other.pt", "missing.pt"):
        with pytest.raises(UserError, match=r"no readable metadata\.json"):
            read_metadata(tmp_path / name)


def test_run_answers_from_the_file_and_from_nothing_else(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    images = torch.rand(3, 3, 2, 2)
    artifacts = export(net, images, tmp_path / "net", {})
    wanted = net(images).detach()
    nn.init.zeros_(net[1].weight)
    for artifact in artifacts:
        torch.testing.assert_close(artifact.run(images), wanted)
    assert [file.path for file in reload(tmp_path / "net")] == [file.path for file in artifacts]
    (tmp_path / "net.ptl").unlink()
    assert [file.format for file in reload(tmp_path / "net")] == ["torchscript"]


def static(net, images):
    prepared = flows.prepare(net, images, "fx")
    prepared(images)
    return flows.convert(prepared, "fx")


@pytest.mark.parametrize("quantize", [static, lambda net, images: dynamic_int8(net)], ids=["static", "dynamic"])
def test_int8_weights_stand_in_a_file_once(tmp_path, quantize):
    net = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 49, 512)).eval()
    images = torch.rand(2, 3, 16, 16)
    weights = sum(layer.weight.numel() for layer in net if hasattr(layer, "weight"))
    for artifact in export(quantize(net, images), images, tmp_path / "net", {}):
        assert weights < artifact.path.stat().st_size < 1.2 * weights


@pytest.mark.parametrize("suffix", [".pt", ".ptl"])
def test_a_broken_file_is_named(tmp_path, suffix):
    artifacts = export(nn.Flatten().eval(), torch.rand(2, 3, 2, 2), tmp_path / "net", {})
    (file,) = (file for file in artifacts if file.path.suffix == suffix)
    file.path.write_bytes(file.path.read_bytes()[:500])
    with pytest.raises(UserError, match=f"cannot load .*net{suffix}: "):
        file.run(torch.rand(1, 3, 2, 2))


class Branch(nn.Module):
    def forward(self, images):
        if images.mean() > 0.2:
            return images.flatten(1)
        return -images.flatten(1) - 1


class FixedBatch(nn.Module):
    def forward(self, images):
        return images.reshape(int(images.shape[0]), 12) * torch.ones(len(images.tolist()), 1)


class Random(nn.Module):
    def forward(self, images):
        return images.flatten(1) + torch.rand(1)


class NoTensor(nn.Module):
    def forward(self, images):
        return object()


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Branch(), r"Branch cannot be traced.*`if images.mean\(\) > 0.2:` \(test_export.py:\d+\)"),
        (FixedBatch(), r"FixedBatch cannot be traced.*images.tolist\(\)"),
        (Random(), r"Random cannot be traced.*random numbers"),
        (NoTensor(), r"NoTensor cannot be traced to TorchScript: \w+Error: "),
    ],
    ids=["branch", "batch", "random", "no tensor"],
)
def test_what_a_trace_cannot_hold_is_named(net, message, tmp_path):
    with pytest.raises(UserError, match=message):
        export(net.eval(), torch.rand(2, 3, 2, 2), tmp_path / "net", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("full", ["write", "fsync"])
def test_a_full_disk_leaves_the_earlier_files(tmp_path, monkeypatch, full):
    images = torch.rand(2, 3, 2, 2)
    artifacts = export(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval(), images, tmp_path / "net", {})
    before = {file.path: file.path.read_bytes() for file in artifacts}

    def fail(*args):
        if full == "write":
            with open(args[0], "wb") as file:
                file.write(args[1][:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    if full == "write":
        monkeypatch.setattr(Path, "write_bytes", fail)
    else:
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"cannot write .*net\.pt \([\d,]+ bytes\): No space left on device"):
        export(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval(), images, tmp_path / "net", {})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_int8_weights_are_int8_in_the_file(files):
    """Freezing would write them out as float; the largest layer is 512 · 512 · 9 weights."""
    for file in files["int8"]:
        with zipfile.ZipFile(file.path) as archive:
            assert max(entry.file_size for entry in archive.infolist()) < 1.1 * 512 * 512 * 9
