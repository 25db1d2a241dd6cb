"""Kill it anywhere: continued, a run ends with the same bits."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import QUICK, ROOT
from safetensors.torch import load_file

from distill.runs import tables

KILLER = '''
import os, signal
import torch
from distill.losses.base import Loss

class Killer(Loss):
    """A loss of the user's own, which ends the process without warning at its KILL_AT-th step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.dropout = torch.nn.Dropout()

    def forward(self, student, teacher, batch):
        self.steps += 1
        if int(self.steps) == int(os.environ.get("KILL_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.dropout(student.logits).square().mean()  # uses the global generator
'''
YAML = "killer: {_target_: killer.Killer, weight: 0.01}\n"

WORDS = [
    *QUICK,
    "trainer.max_epochs=3",
    "loss=[ce,kd,fitnet,killer]",
    "ema=0.9",
    "stages=[teacher,distill]",
    "baseline=false",
    "checkpoint_every=2",
    "optimizer.lr=0.01",
    "teacher.fit.epochs=1",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    (folder / "conf" / "loss").mkdir(parents=True)
    (folder / "conf" / "loss" / "killer.yaml").write_text(YAML)
    (folder / "killer.py").write_text(KILLER)
    return folder


def run(folder: Path, *words: str, kill_at: int = -1) -> int:
    environment = {**os.environ, "PYTHONPATH": str(folder), "KILL_AT": str(kill_at), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), "--config-dir", str(folder / "conf"), *words]
    return subprocess.run(command, cwd=folder, env=environment, timeout=300).returncode


@pytest.fixture(scope="module")
def whole(folder):
    """The weights of a run that nobody disturbed."""
    assert run(folder, *WORDS, "name=whole") == 0
    rates = tables.curves(folder / "outputs" / "whole")["lr"].tolist()
    assert rates[0] > 0  # a run that learns nothing would be continued exactly by anything
    return folder / "outputs" / "whole"


def assert_same_bits(a: Path, b: Path) -> None:
    for name in ("student.safetensors", "student_last.safetensors"):
        one, other = load_file(a / name), load_file(b / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


# 120 images in batches of 16: 7 steps an epoch, a checkpoint after every 2nd and at every epoch's end
@pytest.mark.parametrize("kill_at", [1, 6, 8, 14, 21])
def test_killed_and_continued_a_run_ends_with_the_same_bits(folder, whole, kill_at):
    name = f"killed{kill_at}"
    assert run(folder, *WORDS, f"name={name}", kill_at=kill_at) == -signal.SIGKILL
    killed = folder / "outputs" / name
    assert not (killed / "student.safetensors").exists()
    assert run(folder, f"run=outputs/{name}") == 0
    assert_same_bits(whole, killed)


def test_killed_after_training_the_weights_are_taken_from_the_checkpoints(folder, whole):
    copy = folder / "outputs" / "copy"
    shutil.copytree(whole, copy)
    for name in ("student.safetensors", "student_last.safetensors"):
        (copy / name).unlink()
    assert run(folder, "run=outputs/copy") == 0
    assert_same_bits(whole, copy)


def test_the_order_and_the_seed_decide_the_bits(folder, whole):
    assert run(folder, *WORDS, "name=other", "seed=1") == 0
    one, other = (
        load_file(run_folder / "student_last.safetensors") for run_folder in (whole, folder / "outputs/other")
    )
    assert not torch.equal(one["linear.weight"], other["linear.weight"])
