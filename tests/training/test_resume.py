"""Kill it anywhere: continued, a run ends with the same bits."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import QUICK, ROOT
from safetensors.torch import load_file

from distill.errors import DamagedError
from distill.runs import tables
from distill.training.resume import TABLE, Checkpoints, read

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
            for _ in range(int(os.environ["TIMES"])):
                os.kill(os.getpid(), int(os.environ["SIGNAL"]))
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


def run(folder: Path, *words: str, kill_at: int = -1, by: int = signal.SIGKILL, times: int = 1, **more: str):
    """The exit code and what was printed; the loss sends itself the signal `by`, so many times, at the step kill_at."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    environment |= {"KILL_AT": str(kill_at), "SIGNAL": str(int(by)), "TIMES": str(times), **more}
    command = [sys.executable, str(ROOT / "train.py"), "--config-dir", str(folder / "conf"), *words]
    done = subprocess.run(command, cwd=folder, env=environment, timeout=300, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def status(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["status"]


@pytest.fixture(scope="module")
def whole(folder):
    """The weights of a run that nobody disturbed."""
    assert run(folder, *WORDS, "name=whole")[0] == 0
    rates = tables.curves(folder / "outputs" / "whole")["lr"].tolist()
    assert rates[0] > 0  # a run that learns nothing would be continued exactly by anything
    return folder / "outputs" / "whole"


def assert_same_bits(a: Path, b: Path) -> None:
    for name in ("student.safetensors", "student_last.safetensors"):
        one, other = load_file(a / name), load_file(b / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


# 120 images in batches of 16: 7 steps an epoch, a checkpoint after every 2nd and at every epoch's end
@pytest.mark.parametrize("kill_at", [8, pytest.param(6, marks=pytest.mark.faults), 21])
def test_killed_and_continued_a_run_ends_with_the_same_bits(folder, whole, kill_at):
    name = f"killed{kill_at}"
    assert run(folder, *WORDS, f"name={name}", kill_at=kill_at)[0] == -signal.SIGKILL
    killed = folder / "outputs" / name
    assert not (killed / "student.safetensors").exists()
    assert run(folder, f"run=outputs/{name}")[0] == 0
    assert_same_bits(whole, killed)
    assert (killed / TABLE).read_text() == (whole / TABLE).read_text()


def finished(whole: Path, name: str) -> Path:
    """A copy of the run as a kill leaves it between its last checkpoint and all that comes after."""
    copy = whole.with_name(name)
    shutil.copytree(whole, copy)
    for file in ("student.safetensors", "student_last.safetensors", TABLE):
        (copy / file).unlink()
    return copy


def test_killed_after_training_weights_and_metrics_are_taken_from_the_checkpoints(folder, whole):
    copy = finished(whole, "copy")
    assert run(folder, "run=outputs/copy")[0] == 0
    assert_same_bits(whole, copy)
    assert (copy / TABLE).read_text() == (whole / TABLE).read_text()
    for name in ("student.safetensors", "student_last.safetensors", "run.json", "config.yaml"):
        same = (copy / name).read_bytes() == (whole / name).read_bytes()
        assert same or not name.endswith("tensors"), name  # the same file, not only the same numbers


def test_metrics_that_an_earlier_version_logged_are_kept(tmp_path):
    """It wrote a file an attempt, validation and training in lines of their own, and nothing into the checkpoint."""
    for attempt, lines in enumerate([["epoch,step,val/ece,lr", "0,6,0.5,", "0,6,,0.1"], ["epoch,step,lr", "1,13,0.2"]]):
        place = tmp_path / "metrics" / f"version_{attempt}"
        place.mkdir(parents=True)
        (place / "metrics.csv").write_text("\n".join(lines))
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    checkpoints.load_state_dict({"last": {"epoch": 2, "accuracy": 0.5}, "best": {"epoch": 2, "accuracy": 0.5}})
    table = tables.curves(tmp_path)
    assert table["epoch"].tolist() == [1, 2]
    assert table["lr"].tolist() == [0.1, 0.2] and table["val/ece"].tolist()[0] == 0.5
    assert (tmp_path / TABLE).read_text().splitlines()[1:] == ["0,6,0.5,0.1", "1,13,,0.2"]


def test_a_student_without_its_checkpoints_is_not_trained_again(folder, whole):
    copy = whole.with_name("slim")
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoints")
    (copy / "student_last.safetensors").unlink()
    code, said = run(folder, "run=outputs/slim", "stages=[teacher,distill]")
    assert code == 0 and "done before" in said
    damaged(copy / "student.safetensors", "flipped")
    code, said = run(folder, "run=outputs/slim", "stages=[teacher,distill]")
    assert code == 1 and "student.safetensors is damaged" in said and "there are no checkpoints" in said


def test_early_stopping_belongs_to_the_checkpoint(folder):
    stop = ["early_stopping=1", "trainer.max_epochs=6", "optimizer.lr=1e-7"]  # which never gets better
    code, said = run(folder, *WORDS, *stop, "name=early")
    line = "stopped after epoch 2: no better validation accuracy for 1 epoch"
    assert code == 0 and line in said
    copy = finished(folder / "outputs" / "early", "early2")
    code, said = run(folder, "run=outputs/early2")
    assert code == 0 and line in said
    assert_same_bits(folder / "outputs" / "early", copy)
    assert len(tables.curves(copy)) == 2


def test_no_checkpoint_is_written_while_gradients_are_accumulated(folder):
    words = [*WORDS, "trainer.accumulate_grad_batches=4", "checkpoint_every=1", "trainer.max_epochs=2"]
    assert run(folder, *words, "name=accumulated")[0] == 0
    for again in (
        [*words, "name=twice"],
        ["run=outputs/twice"],
    ):  # a checkpoint after 4 of 7 batches, killed in the 6th
        assert run(folder, *again, kill_at=6)[0] == -signal.SIGKILL
    code, said = run(folder, "run=outputs/twice")
    assert code == 0 and "continuing after 0 epochs and 4 of 7 batches" in said
    assert_same_bits(folder / "outputs" / "accumulated", folder / "outputs" / "twice")


@pytest.mark.parametrize(
    ("by", "code", "word"),
    [
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGUSR1, 138, "out of time"),
        pytest.param(signal.SIGUSR2, 140, "out of time", marks=pytest.mark.faults),
    ],
)
def test_a_signal_saves_in_mid_epoch_and_says_what_goes_on(folder, whole, by, code, word):
    name = f"signal{int(by)}"
    (folder / "bin").mkdir(exist_ok=True)
    scontrol = folder / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "17", "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    ended, said = run(folder, *WORDS, "checkpoint_every=100", f"name={name}", kill_at=10, by=by, **slurm)
    left = folder / "outputs" / name
    assert (ended, status(left)) == (code, word)
    assert f"{word}; python train.py run={left} goes on" in said.splitlines()[-1]
    queued = (folder / "asked").read_text() if (folder / "asked").exists() else ""
    assert (queued == "requeue 17\n") == (by == signal.SIGUSR1)
    ended, said = run(folder, f"run=outputs/{name}")
    assert ended == 0 and "continuing after 1 epochs and 3 of 7 batches" in said
    assert_same_bits(whole, left)


def test_two_processes_that_are_terminated_save_and_go_on(folder):
    words = [*WORDS, "trainer.devices=2", "trainer.strategy=ddp", "checkpoint_every=100"]
    ended, said = run(folder, *words, "name=pair")
    assert ended == 0, said
    ended, said = run(folder, *words, "name=pair2", kill_at=5, by=signal.SIGTERM)
    left = folder / "outputs" / "pair2"
    assert (ended, status(left)) == (143, "terminated") and "Traceback" not in said
    ended, said = run(folder, "run=outputs/pair2")
    assert ended == 0 and re.search(r"continuing after 1 epochs and [1-9] of", said)
    assert_same_bits(folder / "outputs" / "pair", left)
    assert (left / TABLE).read_text() == (folder / "outputs" / "pair" / TABLE).read_text()


def test_a_second_interrupt_leaves_at_once_and_a_storm_of_terminations_does_not(folder, whole):
    words = [*WORDS, "checkpoint_every=100"]
    ended, said = run(folder, *words, "name=hasty", kill_at=10, by=signal.SIGINT, times=2)
    assert ended == 130 and "goes on" not in said  # nothing of the second epoch is saved
    assert "continuing after 1 epochs and 0 of 7" in run(folder, "run=outputs/hasty")[1]
    assert run(folder, *words, "name=storm", kill_at=10, times=50, by=signal.SIGTERM)[0] == 143
    assert "continuing after 1 epochs and 3 of 7" in run(folder, "run=outputs/storm")[1]
    for name in ("hasty", "storm"):
        assert_same_bits(whole, folder / "outputs" / name)


def damaged(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 3] ^= 4
    path.write_bytes({"cut": content[:-100], "empty": b"", "flipped": content}[how])


@pytest.mark.parametrize("how", ["flipped", *(pytest.param(how, marks=pytest.mark.faults) for how in ("cut", "empty"))])
def test_the_checkpoint_before_a_damaged_one_is_used(folder, whole, how):
    copy = finished(whole, f"damaged-{how}")
    damaged(copy / "checkpoints" / "last.ckpt", how)
    code, said = run(folder, f"run=outputs/{copy.name}")
    reason = {"flipped": "is damaged", "cut": "it is cut short", "empty": "last.ckpt is empty"}[how]
    assert code == 0 and reason in said and "continuing after 2 epochs and 6 of 7 batches" in said
    assert_same_bits(whole, copy)
    assert (copy / TABLE).read_text() == (whole / TABLE).read_text()


def test_every_flipped_bit_of_a_checkpoint_is_found_or_changes_nothing(whole, tmp_path):
    content = (whole / "checkpoints" / "last.ckpt").read_bytes()
    good = flattened(read(whole / "checkpoints" / "last.ckpt"))
    draw, path, found = random.Random(0), tmp_path / "last.ckpt", 0
    for _ in range(150):
        changed = bytearray(content)
        changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            assert flattened(read(path)) == good
        except DamagedError as error:
            assert str(path) in str(error)
            found += 1
    assert found > 75  # the rest are bytes between the tensors


def test_every_flipped_bit_of_a_checkpoints_directory_is_found_or_changes_nothing(tmp_path):
    path, found = tmp_path / "last.ckpt", 0
    torch.save({"state_dict": {"weight": torch.arange(6.0)}, "epoch": 3}, path)
    content, good = path.read_bytes(), flattened(read(path))
    of_the_weight = content.rindex(b"PK\1\2", 0, content.rindex(b"/data/0"))
    ending = content.rindex(b"PK\6\6")
    for place in [*range(of_the_weight, content.index(b"PK\1\2", of_the_weight + 4)), *range(ending, len(content))]:
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            try:
                assert flattened(read(path)) == good, (place, bit)
            except DamagedError as error:
                assert str(path) in str(error)
                found += 1
    assert found > 400  # the rest are dates and the like


def flattened(value) -> str:
    """Equal for equal states."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.tolist()}"
    if isinstance(value, dict):
        return str([(key, flattened(each)) for key, each in value.items()])
    return str([flattened(each) for each in value]) if isinstance(value, (list, tuple)) else str(value)


def test_without_a_whole_checkpoint_a_run_starts_anew_when_told_to(folder, whole):
    copy = finished(whole, "lost")
    for file in ("last.ckpt", "before.ckpt"):
        damaged(copy / "checkpoints" / file, "cut")
    before = (copy / "run.json").read_bytes()
    code, said = run(folder, "run=outputs/lost")
    assert code == 1 and "restart=true" in said.splitlines()[-1]
    assert (copy / "run.json").read_bytes() == before
    code, said = run(folder, "run=outputs/lost", "restart=true")
    assert code == 0 and "training from the start" in said
    assert_same_bits(whole, copy)


def test_damaged_best_weights_are_made_again_from_the_checkpoint_before(folder, whole):
    copy = finished(whole, "best")
    best = read(copy / "checkpoints" / "last.ckpt")["callbacks"]["Checkpoints"]["best"]["epoch"]
    damaged(copy / "checkpoints" / f"best-{best}.safetensors", "flipped")
    code, said = run(folder, "run=outputs/best", "restart=true")
    assert code == 0 and f"best-{best}.safetensors is damaged" in said
    assert_same_bits(whole, copy)


def test_a_damaged_student_is_taken_from_the_checkpoints_again(folder, whole):
    copy = whole.with_name("student")
    shutil.copytree(whole, copy)
    damaged(copy / "student.safetensors", "flipped")
    code, said = run(folder, "run=outputs/student", "stages=[report]")
    assert code == 1 and "student.safetensors is damaged" in said.splitlines()[-1]
    code, said = run(folder, "run=outputs/student")
    assert code == 0 and "taken from the checkpoints" in said
    assert_same_bits(whole, copy)


def test_damaged_weights_of_the_store_are_trained_again_when_told_to(folder, whole):
    fitted = (folder / "outputs" / "fits").glob("teacher-*/weights.safetensors")
    weights = min(fitted, key=lambda file: file.stat().st_mtime)  # that of `whole`
    good = weights.read_bytes()
    damaged(weights, "flipped")
    code, said = run(folder, *WORDS, "name=stored")
    assert code == 1 and "weights.safetensors is damaged" in said and "restart=true" in said
    code, said = run(folder, *WORDS, "name=stored", "restart=true")
    assert code == 0 and weights.read_bytes() == good
    assert_same_bits(whole, folder / "outputs" / "stored")


def test_the_order_and_the_seed_decide_the_bits(folder, whole):
    assert run(folder, *WORDS, "name=other", "seed=1")[0] == 0
    one, other = (
        load_file(run_folder / "student_last.safetensors") for run_folder in (whole, folder / "outputs/other")
    )
    assert not torch.equal(one["linear.weight"], other["linear.weight"])
