"""Several processes train as one: the same losses, one voice, one report, nothing seen twice."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, ROOT
from harness import run

from distill.data import batches
from distill.data.batches import InOrder
from distill.errors import UsageError, UserError
from distill.runs import trials
from distill.teachers.cache import HEADER
from distill.training.lightning import trainer, waits_for_all
from distill.training.recipe import Recipe
from distill.training.resume import TABLE, newest, read

OWN = '''
import json, os, time
import torch
from torch import nn
from distill.losses.base import Loss

def plain(num_classes):
    """No batch norm, whose statistics are those of one process's images."""
    convolution = nn.Conv2d(3, 8, 3, 2, 1)
    return nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))

class Idle(Loss):
    """Has a layer that nothing uses, or, where SOMETIMES is set, only the first step does."""

    def __init__(self):
        super().__init__()
        self.layer, self.steps = nn.Linear(2, 2), 0

    def forward(self, student, teacher, batch):
        self.steps += 1
        used = "SOMETIMES" in os.environ and self.steps == 1
        return self.layer.weight.sum() * 0 if used else 0 * student.logits.sum()

class Probe(Loss):
    """Says what its process sees and draws; its value is the process's number."""

    def forward(self, student, teacher, batch):
        rank = int(os.environ.get("SLURM_PROCID", 0))
        seen = {"rows": batch.index.tolist(), "drawn": torch.rand(4).tolist(), "time": time.time_ns()}
        with open(f"{os.environ['PROBE']}-{rank}", "a") as file:
            print(json.dumps(seen), file=file)
        return 0 * student.logits.sum() + rank
'''
WORDS = [
    *("data=fake", "data.image_size=16", "data.train_size=120", "trainer.max_epochs=2", "trainer.accelerator=cpu"),
    *("teacher=resnet8", "teacher.fit.epochs=0", "teacher.untrained=true", "teacher.precision=32-true"),
    *("student=custom", "student._target_=own.plain", "trainer.precision=32-true", "baseline=false"),
    *("loss=[ce,kd,probe]", "optimizer.lr=0.01", "cache=logits", "stages=[teacher,cache,distill]"),
]
ONE, PAIR = "data.batch_size=16", "data.batch_size=8"  # 7 steps an epoch of 16 images


def start(folder: Path, *words: str, **more: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{folder}", "PROBE": "probe", **more}
    return subprocess.Popen(
        [sys.executable, *words], cwd=folder, env=environment, stdout=-1, stderr=-1, text=True, start_new_session=True
    )


def ended(process: subprocess.Popen) -> tuple[str, str]:
    said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def under_slurm(folder: Path, *words: str, tasks: int = 2) -> list[subprocess.Popen]:
    """As srun would start them on so many nodes."""
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "job", "SLURM_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0"}
    job |= {"SLURM_NTASKS": str(tasks), "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": str(tasks)}
    job |= {"MASTER_PORT": str(20000 + os.getpid() % 20000)}
    command = [str(ROOT / "train.py"), "--config-dir", str(folder / "conf"), *words]
    return [start(folder, *command, **job, SLURM_PROCID=str(n), SLURM_NODEID=str(n)) for n in range(tasks)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "conf" / "loss").mkdir(parents=True)
    (folder / "conf" / "loss" / "probe.yaml").write_text("probe: {_target_: own.Probe, weight: 0.0}\n")
    (folder / "conf" / "loss" / "idle.yaml").write_text("idle: {_target_: own.Idle, weight: 0.1}\n")
    (folder / "own.py").write_text(OWN)
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    """What two nodes said, of a process each, that first filled a cache and then trained."""
    words = [*WORDS, PAIR, "trainer=multinode", "name=pair"]
    return [ended(process) for process in under_slurm(folder, *words)]


def table(folder: Path) -> dict[str, list[float]]:
    rows = [*csv.DictReader((folder / TABLE).read_text().splitlines())]
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def seen(folder: Path) -> list[list[dict]]:
    """Of each process, its steps, without those of the rehearsal before."""
    return [[*map(json.loads, (folder / f"probe-{rank}").read_text().splitlines())][-14:] for rank in (0, 1)]


def test_two_processes_learn_what_one_learns_of_the_same_steps(folder, pair):
    """Up to the order in which float32 sums gradients: logits differed by 1e-7 in all 14 steps."""
    command = [str(ROOT / "train.py"), "--config-dir", str(folder / "conf"), *WORDS, ONE, "name=one"]
    ended(start(folder, *command, PROBE="alone"))
    one, two = (table(folder / "outputs" / name) for name in ("one", "pair"))
    assert one.keys() == two.keys() and one["train/loss"][1] < one["train/loss"][0] - 0.01
    for name in one:
        wanted = 0.5 if name == "train/probe" else one[name]  # the mean of the processes' numbers, 0 and 1
        np.testing.assert_allclose(two[name], wanted, rtol=1e-5, atol=1e-7, err_msg=name)


def test_each_process_has_its_own_rows_and_draws(folder, pair):
    first, second = seen(folder)
    assert len(first) == len(second) == 14
    for epoch in (slice(0, 7), slice(7, 14)):
        rows = [row for steps in (first, second) for step in steps[epoch] for row in step["rows"]]
        assert len(rows) == len({*rows}) == 112
    for one, other in zip(first, second, strict=True):
        assert one["drawn"] != other["drawn"]
    assert len({tuple(step["drawn"]) for step in (*first, *second)}) == 28


def test_the_first_process_speaks_and_the_cache_is_filled_once(folder, pair):
    (said, _), (silent, errors) = pair
    assert "2 processes of 8 images each: 16 a step" in said
    assert silent == "" and "error" not in errors.lower()
    [place] = {*re.findall("→ (.*)", said)}
    files = [*(folder / place).glob("logits-*.rows")]
    begun = min(step["time"] for steps in seen(folder) for step in steps)
    assert len(files) == 2 and max(file.stat().st_mtime_ns for file in files) < begun
    for file in files:
        records = np.frombuffer(file.read_bytes()[HEADER:], np.uint8).reshape(120, -1)
        assert records[:, :4].any(1).all()  # every row's checksum


def test_another_number_of_processes_is_refused(folder, pair, capsys):
    checkpoints = folder / "outputs" / "pair" / "checkpoints"
    with pytest.raises(UsageError, match=r"began with 2 processes, and there is 1 now.*restart=true") as raised:
        newest(checkpoints, False, 1)
    assert "\n" not in str(raised.value)
    assert newest(checkpoints, True, 1) is None
    assert "training from the start" in capsys.readouterr().out
    assert newest(checkpoints, False, 2)[1] == (2, 0)
    assert read(checkpoints / "last.ckpt")["sums"].shape[0] == 2


def failed(folder: Path, *words: str, **more: str) -> str:
    """The one line of a run that fails."""
    command = [str(ROOT / "train.py"), "--config-dir", str(folder / "conf"), *WORDS, ONE, *words]
    process = start(folder, *command, **more)
    said, errors = process.communicate(timeout=300)
    assert process.returncode in (1, 2) and "Traceback" not in errors, (said, errors)
    [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
    return line


def test_what_has_no_gradient_is_told_before_anything_is_trained(folder):
    words = ["loss=[ce,kd,idle]", "trainer.devices=2", "name=idle"]
    line = failed(folder, *words)
    assert "losses.idle.layer.weight, losses.idle.layer.bias: no part in the loss" in line
    assert "trainer.strategy=ddp_find_unused_parameters_true" in line
    assert not (folder / "outputs/idle/checkpoints").exists()


@pytest.mark.matrix
def test_what_has_a_gradient_only_sometimes_is_told_or_looked_for(folder):
    words = ["loss=[ce,kd,idle]", "trainer.devices=2", "optimizer.weight_decay=0"]
    line = failed(folder, *words, "name=sometimes", SOMETIMES="1")
    assert "losses.idle.layer.weight: no part in the loss in one step" in line or "losses.idle.layer.bias" in line
    command = [str(ROOT / "train.py"), "--config-dir", str(folder / "conf"), *WORDS, PAIR, *words, "name=looked"]
    ended(start(folder, *command, "trainer.strategy=ddp_find_unused_parameters_true"))


@pytest.mark.parametrize(
    ("options", "waits"),
    [
        ({"strategy": "ddp"}, True),
        ({"strategy": "ddp_find_unused_parameters_true"}, False),
        ({"strategy": "fsdp"}, False),
        ({"strategy": "auto"}, False),
        ({"strategy": "auto", "devices": 1}, False),
        ({"strategy": "auto", "devices": [3]}, False),
        ({"strategy": "auto", "devices": "0,"}, False),
        ({"strategy": "auto", "devices": 2}, True),
        ({"strategy": "auto", "devices": "0,1"}, True),
        ({"strategy": "auto", "num_nodes": 2}, True),
    ],
)
def test_who_waits_for_every_gradient(options, waits):
    assert waits_for_all({"accelerator": "cpu", "devices": "auto", **options}) is waits


def test_batch_norms_are_exchanged_between_gpus_only():
    with pytest.raises(UsageError, match=r"sync_batchnorm=true: .* leave it out, or choose trainer.accelerator=gpu"):
        trainer(recipe(sync_batchnorm=True), None, [], [])


@pytest.mark.matrix
def test_a_trial_of_a_search_is_one_for_all_its_processes(tmp_path):
    """None of them draws values of its own, and all end where one is pruned."""
    prune = """
def change(module):
    module.judge = lambda run: lambda epoch, accuracy: "weight=0.5" not in run.name
after_import("distill.runs.trials", change)
"""
    words = [*QUICK, "-m", "hydra/sweeper=search", "loss.kd.weight=0.5,0.9", "hydra.sweeper.trials=4", "sweep=x"]
    words += ["hydra.sweeper.sampler=random", "trainer.devices=2", "compress=[]", "export=[]", "baseline=false"]
    done = run(tmp_path, *words, fault=prune)
    assert done.code == 0, done
    root = tmp_path / "outputs/sweeps/x"
    found = trials.study_of(root).trials
    assert len(found) == 4 and {each.state.name for each in found} == {"PRUNED", "COMPLETE"}
    runs = {file.parent.name: json.loads(file.read_text())["status"] for file in root.glob("*/run.json")}
    assert runs == {"kd.weight=0.5": "pruned", "kd.weight=0.9": "done"}
    assert "2 processes of 16 images each" in (root / "kd.weight=0.9/output.txt").read_text()


@pytest.mark.matrix
def test_torchrun_starts_what_trains_and_one_process_reports(tmp_path):
    words = [*QUICK, "trainer=ddp", "loss=[ce,kd,crd]", "loss.crd.negatives=64", "name=ddp", "baseline=false"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "train.py")]
    said, errors = ended(start(tmp_path, *torchrun, *words))
    assert said.count("distill: ") == 1
    assert "error" not in errors.lower()
    folder = tmp_path / "outputs" / "ddp"
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    assert len(json.loads((folder / "report.json").read_text())["rows"]) == 7


@pytest.mark.parametrize(("size", "processes"), [(40, 2), (33, 2), (100, 3), (65, 4), (2, 3), (7, 1), (64, 2)])
def test_each_image_is_validated_once(monkeypatch, size, processes):
    def of(rank: int) -> list[list[int]]:
        monkeypatch.setattr(batches, "numbered", lambda: (rank, processes))
        found = InOrder(size, 16, shared=True)
        assert len(found) == len([*found])
        return [rows for rows, _ in found]

    parts = [of(rank) for rank in range(processes)]
    assert len({len(part) for part in parts}) == 1  # DDP waits for all in each batch
    assert all(0 < len(rows) <= 17 for part in parts for rows in part)
    rows = sorted(row for part in parts for rows in part for row in rows)
    assert rows == sorted([*range(size)] * (processes if size < processes else 1))
    if processes == 1:
        assert parts[0] == [rows.tolist() for rows in torch.arange(size).split(16)]


def recipe(**options) -> Recipe:
    plain = {"_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "precision": "32-true"}
    return Recipe(1, {}, {}, {**plain, "devices": "auto", "strategy": "ddp", **options})


def test_nodes_are_counted_by_what_starts_them(monkeypatch):
    with pytest.raises(UserError, match=r"neither torchrun nor srun.*trainer.num_nodes=2"):
        trainer(recipe(num_nodes="auto"), None, [], [])
    monkeypatch.setenv("SLURM_PROCID", "3")
    with pytest.raises(UserError, match=r"not the first of its run.*trainer=multinode"):
        trainer(recipe(strategy="auto"), None, [], [])


def test_a_process_ends_with_the_one_that_started_it():
    """Also where it waits in a call that handles no signals, such as a rendezvous with the dead."""
    waits = "s = socket.socket(); s.bind(('', 0)); s.listen(); print('up', flush=True); s.accept()"
    child = f"import socket; from distill import signals; signals.end_with_parent(); {waits}"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.kill()
    process.wait()
    started = time.monotonic()
    assert process.stdout.read() == ""  # until nobody holds it open any more
    assert time.monotonic() - started < 20
