"""What can be known at the start is told at the start, and trying it changes nothing."""

import json
import re
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

from distill.cli import disk, rehearsal

TRAINS = [
    *("data=fake", "data.train_size=64", "data.image_size=16", "data.batch_size=16", "teacher=resnet8_tiny"),
    *("student=resnet8_tiny", "trainer.max_epochs=1", "baseline=false", "compress=[]", "export=[]", "name=one"),
    *("trainer.accelerator=cpu", "stages=[teacher,distill]"),
]
QUANTIZERS = "compress.auto.quantizers=[static_int8,qat_int8]"
OWN = """
from distill.losses.base import Loss

class Broken(Loss):
    def forward(self, student, teacher, batch):
        return (student.logits - teacher.logits[:, :3]).square().mean()

class Flat(Loss):
    def forward(self, student, teacher, batch):
        return (student.logits.detach() - teacher.logits).square().mean()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with losses of the user's that fail in the first step, forward and backward."""
    (tmp_path / "own_losses.py").write_text(OWN)
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    for name in ("Broken", "Flat"):
        text = f"{name.lower()}:\n  _target_: own_losses.{name}\n  weight: 1.0\n"
        (tmp_path / "conf" / "loss" / f"{name.lower()}.yaml").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return ["--config-dir", str(tmp_path / "conf")]


@pytest.mark.parametrize(("words", "said"), [("loss=[broken]", "size of tensor"), ("loss=[flat]", "grad")])
def test_a_mistake_in_ones_own_loss_is_told_before_the_teacher_is_trained(train, own, words, said, tmp_path, capfd):
    assert train(*TRAINS, words, *own, cwd=tmp_path) == 1
    told = capfd.readouterr()
    assert said in told.err.splitlines()[-1] and "Traceback" not in told.err
    assert "fitting" not in told.out and not (tmp_path / "outputs" / "fits").exists()


def test_losses_that_dont_fit_a_network_are_told_before_the_teacher_is_trained(train, tmp_path, capfd):
    assert train(*TRAINS, "loss=[ce,simkd]", cwd=tmp_path) != 0
    assert "loss simkd, student: no tap or layer" in capfd.readouterr().err
    assert not (tmp_path / "outputs" / "fits").exists()


WHEN = pytest.mark.parametrize("stages", [[], ["stages=[check]"]], ids=["run", "check"])


@WHEN
def test_an_exporters_missing_package_is_told_before_the_teacher_is_trained(
    train, tmp_path, capfd, monkeypatch, stages
):
    found = rehearsal.find_spec
    monkeypatch.setattr(rehearsal, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    words = [word for word in TRAINS if not word.startswith(("stages", "export"))]
    assert train(*words, "export=[onnx]", *stages, cwd=tmp_path) == 1
    told = capfd.readouterr()
    assert "export=onnx needs onnx onnxscript onnxruntime: pip install onnxscript" in told.err
    assert "fitting" not in told.out


def test_an_exporters_package_that_wants_an_older_torch_is_told_before_the_teacher_is_trained(
    train, tmp_path, capfd, monkeypatch
):
    wants = ["torch<2.1,>=1.9", 'numpy<1; extra == "more"', "numpy", "not-there<1"]
    monkeypatch.setattr(rehearsal, "requires", lambda package: wants if package == "onnxscript" else None)
    words = [word for word in TRAINS if not word.startswith(("stages", "export"))]
    assert train(*words, "export=[onnx]", cwd=tmp_path) == 1
    told = capfd.readouterr()
    assert re.search(r"export=onnx: onnxscript \S+ needs torch<2.1,>=1.9, and 2\S+ is installed: pip install", told.err)
    assert "fitting" not in told.out


@pytest.mark.parametrize(
    ("size", "images", "begins", "batch", "told"),
    [
        (224, 210, None, 64, ["random weights", "15 steps in all, 5 epochs of 3"]),
        (224, 210, "a.safetensors", 16, []),
        (224, 50_000, None, 64, []),
        (32, 210, None, 64, []),
    ],
)
def test_what_teaches_little_of_a_few_photos_is_told(size, images, begins, batch, told):
    cfg = OmegaConf.create({"student": {"checkpoint": begins}, "trainer": {"max_epochs": 5}})
    data = SimpleNamespace(image_size=size, train=range(images), batch_size=batch)
    lines = [*rehearsal.ill_prepared(cfg, data)]
    assert len(lines) == len(told) and all(part in line for part, line in zip(told, lines, strict=True))


def test_trying_changes_no_bit(train, tmp_path, monkeypatch):
    assert train(*TRAINS, "loss=[ce,kd,fitnet]", cwd=tmp_path) == 0
    monkeypatch.setattr(rehearsal, "rehearse", lambda *given: None)
    (tmp_path / "again").mkdir()
    assert train(*TRAINS, "loss=[ce,kd,fitnet]", cwd=tmp_path / "again") == 0
    first, second = (load_file(tmp_path / part / "outputs/one/student.safetensors") for part in (".", "again"))
    assert first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)


@pytest.mark.parametrize(
    "teacher",
    [
        ["teacher=ensemble", "teacher@teacher.members.second=resnet8_tiny"],
        ["teacher=peer", "loss.kd.temperature=1"],
        ["teacher=ema"],
        ["loss=[ce,crd]"],
    ],
)
def test_the_stage_check_says_what_there_is_and_does_no_more(train, tmp_path, capfd, teacher):
    words = [word for word in TRAINS if not word.startswith("stages") and not (teacher[0][:7] == word[:7] == "teacher")]
    assert train(*words, *teacher, "stages=[check]", cwd=tmp_path) == 0
    out = capfd.readouterr().out
    assert "student: ResNet, 5,006 parameters, 212,128 multiply-accumulates an image, 24 kB" in out
    assert ("teacher 2: " in out) == (teacher[0] == "teacher=ensemble") and "epoch 1" not in out
    folder = tmp_path / "outputs" / "one"
    assert {path.name for path in folder.iterdir()} <= {"run.json", "config.yaml", ".lock"}
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    assert {path.name for path in folder.parent.iterdir()} == {"one"}


NETS = """
from torch import nn

class Odd(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Linear(3, num_classes)

    def forward(self, images):
        pooled = images.mean((2, 3))
        return self.layer(pooled if pooled.sum() > 0 else -pooled)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["compress=[static_int8]"],
        ["compress=[prune,qat_int8]"],
        ["compress=auto", QUANTIZERS],
        ["compress=[static_int8]", "stages=[check]"],
    ],
)
def test_a_network_that_compression_cant_capture_is_told_before_the_teacher_is_trained(
    train, tmp_path, capfd, monkeypatch, words
):
    (tmp_path / "odd_nets.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    given = [word for word in TRAINS if not word.startswith(("stages", "export", "compress", "student"))]
    own = ["student=custom", "student._target_=odd_nets.Odd", "loss=[ce,kd]"]
    assert train(*given, *own, *words, "export=[torchscript]", cwd=tmp_path) == 1
    told = capfd.readouterr()
    assert "compress for fx: " in told.err and "Odd can't be captured as a graph" in told.err
    assert "fitting" not in told.out and not (tmp_path / "outputs" / "fits").exists()


@WHEN
def test_too_few_images_to_calibrate_are_told_before_the_teacher_is_trained(train, tmp_path, capfd, stages):
    given = [word for word in TRAINS if not word.startswith(("stages", "export", "compress", "data.train_size"))]
    few = ["data.train_size=20", "compress=[static_int8]", "export=[torchscript]"]
    assert train(*given, *few, *stages, cwd=tmp_path) == 1
    told = capfd.readouterr()
    assert "compress.static_int8.images=512 with 20 training images" in told.err and "fitting" not in told.out


@pytest.mark.parametrize("option", ["store", "cache.folder"])
def test_a_folder_that_cant_be_written_is_told_before_the_teacher_is_trained(train, tmp_path, capfd, option):
    (tmp_path / "file").touch()
    assert train(*TRAINS, f"{option}=file/inside", cwd=tmp_path) == 1
    told = capfd.readouterr()
    assert f"{option}=file/inside: " in told.err and "Not a directory" in told.err and "fitting" not in told.out


def test_a_disk_too_small_is_told_before_the_teacher_is_trained(train, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert train(*TRAINS, cwd=tmp_path) == 1
    told = capfd.readouterr()
    assert re.search(r"disk: about [\d.]+ kB to be written \(checkpoints [\d.]+ kB, .*1.0 kB free: make room", told.err)
    assert "fitting" not in told.out


def test_a_cache_beyond_its_budget_is_told_before_the_teacher_is_trained(train, tmp_path, capfd):
    assert train(*TRAINS, "cache=logits", "cache.budget=1kB", cwd=tmp_path) == 2
    told = capfd.readouterr()
    assert "cache.views: 1 views of 64 rows take" in told.err and "fitting" not in told.out


def test_the_stage_check_says_how_long_it_takes_and_what_is_there(train, tmp_path, capfd):
    words = [word for word in TRAINS if not word.startswith(("stages", "name", "baseline"))]
    assert train(*words, "name=one", "stages=[check]", cwd=tmp_path) == 0
    out = capfd.readouterr().out
    for name in ("teacher", "student alone", "distill"):
        assert re.search(rf"  {name}: about [\d.]+ (s|min) \(1 epochs of [\d.e-]+ s\)", out)
    assert re.search(r"  disk: about [\d.]+ [kM]B to be written \(.*free", out) and "fitted before" not in out
    assert train(*words, "name=one", "stages=[teacher,distill]", cwd=tmp_path) == 0
    capfd.readouterr()
    assert train(*words, "name=two", "stages=[check]", "trainer.max_epochs=1", cwd=tmp_path) == 0
    out = capfd.readouterr().out
    for name in ("teacher", "student"):
        weights = next((tmp_path / "outputs" / "fits").glob(f"{name}-*/weights.safetensors"))
        assert f"fitted before, would be read from {weights.relative_to(tmp_path)}" in out
    assert "cache: 1 of 1 views of the teacher's answers are there" in out
