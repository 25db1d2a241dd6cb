"""What can be known at the start is told at the start, and trying it changes nothing."""

import json

import pytest
from safetensors.torch import load_file

from distill.cli import rehearsal

TRAINS = [
    *("data=fake", "data.train_size=64", "data.image_size=16", "data.batch_size=16", "teacher=resnet8_tiny"),
    *("student=resnet8_tiny", "trainer.max_epochs=1", "baseline=false", "compress=[]", "export=[]", "name=one"),
    *("trainer.accelerator=cpu", "stages=[teacher,distill]"),
]
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


def test_an_exporters_missing_package_is_told_before_the_teacher_is_trained(train, tmp_path, capfd, monkeypatch):
    found = rehearsal.find_spec
    monkeypatch.setattr(rehearsal, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    words = [word for word in TRAINS if not word.startswith(("stages", "export"))]
    assert train(*words, "export=[onnx]", cwd=tmp_path) == 1
    told = capfd.readouterr()
    assert "export=onnx needs onnx onnxscript onnxruntime: pip install onnxscript" in told.err
    assert "fitting" not in told.out


def test_trying_changes_no_bit(train, tmp_path, monkeypatch):
    assert train(*TRAINS, "loss=[ce,kd,fitnet]", cwd=tmp_path) == 0
    monkeypatch.setattr(rehearsal, "rehearse", lambda cfg, data: None)
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
    assert ("teacher 2: " in out) == (teacher[0] == "teacher=ensemble") and "epoch" not in out
    folder = tmp_path / "outputs" / "one"
    assert {path.name for path in folder.iterdir()} <= {"run.json", "config.yaml", ".lock"}
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    assert {path.name for path in folder.parent.iterdir()} == {"one"}
