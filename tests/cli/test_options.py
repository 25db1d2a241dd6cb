"""The same command gives what it says: each option reaches what it is for, and nothing else."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf
from safetensors.torch import load_file

from benchmarks.losses import NAMES, OTHER_STUDENTS
from distill import progress
from distill.cli import config

TINY = [
    *("data=fake", "data.train_size=64", "data.image_size=16", "data.batch_size=16", "trainer.accelerator=cpu"),
    *("teacher=resnet8_tiny", "student=resnet8_tiny", "export=[]", "compress=[]", "baseline=false", "cache=off"),
    *("trainer.max_epochs=1", "stages=[teacher,distill]"),
]


def fits(cwd) -> dict[str, dict]:
    return {file.parent.name: json.loads(file.read_text()) for file in sorted(cwd.glob("outputs/fits/*/fit.json"))}


MEMBERS = [f"{plus}teacher@teacher.members.{name}" for plus, name in (("", "first"), ("", "second"), ("+", "third"))]


def test_members_of_one_architecture_are_not_one_network(train, tmp_path):
    words = [
        "teacher=ensemble",
        *(f"{name}=resnet8_tiny" for name in MEMBERS),
    ]
    assert train(*[word for word in TINY if not word.startswith("teacher=")], *words, cwd=tmp_path) == 0
    found = fits(tmp_path)
    weights = [load_file(tmp_path / "outputs/fits" / name / "weights.safetensors")["conv1.weight"] for name in found]
    assert len(found) == 3
    assert not any(torch.allclose(a, b, atol=1e-2) for n, a in enumerate(weights) for b in weights[:n])
    seeds = sorted(each["recipe"]["seed"] for each in found.values())
    assert len(set(seeds)) == 3 and seeds[0] == 0  # the first is what it would be alone


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "32-true"])
def test_gradients_are_clipped_in_every_precision(train, tmp_path, optimizer, precision):
    """To next to nothing: the weights stay where they began."""
    words = [
        f"optimizer={optimizer}",
        f"trainer.precision={precision}",
        "optimizer.weight_decay=0",
        "optimizer.lr=1e-3",
    ]
    for name, clip in (("clipped", "1e-6" if optimizer == "sgd" else "1e-20"), ("free", "null")):
        assert (
            train(
                *TINY,
                *words,
                f"trainer.gradient_clip_val={clip}",
                f"name={name}",
                "teacher.fit.epochs=0",
                "teacher.untrained=true",
                cwd=tmp_path,
            )
            == 0
        )
    clipped, free = (
        load_file(tmp_path / f"outputs/{name}/student.safetensors")["linear.weight"] for name in ("clipped", "free")
    )
    start = start_of(tmp_path)
    assert (clipped - start).norm() < 0.01 * (free - start).norm()


def start_of(tmp_path):
    from distill.networks.resnet_cifar import resnet

    torch.manual_seed(0)
    record = OmegaConf.load(tmp_path / "outputs/free/config.yaml").student
    return resnet(record.depth, 10, record.widths, record.stem).linear.weight.detach()


GO_TOGETHER = [name for name in NAMES if name not in OTHER_STUDENTS]


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_every_loss_in_every_number_format(train, tmp_path, capfd, precision):
    """With a teacher that was fitted in the same process; sums are float32: 300 steps are counted, not 256."""
    losses = f"loss=[{','.join(GO_TOGETHER)}]"
    words = [f"trainer.precision={precision}", losses, "loss.crd.negatives=16", "optimizer.lr=1e-6", "name=x"]
    assert train(*TINY, *words, cwd=tmp_path) == 0, capfd.readouterr().err
    table = (tmp_path / "outputs/x/metrics/version_0/metrics.csv").read_text()
    assert all(f"train/{name}" in table for name in GO_TOGETHER)
    assert all(
        value.dtype == torch.float32
        for value in load_file(tmp_path / "outputs/x/student.safetensors").values()
        if value.is_floating_point()
    )


def test_means_in_bfloat16_are_those_of_float32(train, tmp_path):
    means = {}
    for precision in ("bf16-true", "32-true"):
        words = [
            "data.train_size=600",
            "data.batch_size=2",
            "loss=ce",
            "optimizer.lr=1e-8",
            f"trainer.precision={precision}",
        ]
        assert (
            train(*TINY, *words, f"name={precision}", "teacher.fit.epochs=0", "teacher.untrained=true", cwd=tmp_path)
            == 0
        )
        rows = (tmp_path / f"outputs/{precision}/metrics/version_0/metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("train/loss")
        means[precision] = next(float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column])
    assert means["bf16-true"] == pytest.approx(means["32-true"], rel=0.02)


def test_the_students_options_do_not_change_the_teacher(train, tmp_path):
    for name, words in {
        "plain": [],
        "smooth": ["loss.ce.label_smoothing=0.1"],
        "average": ["ema=0.9"],
        "early": ["early_stopping=5"],
        "last": ["select=last"],
        "kd": ["loss=kd"],
    }.items():
        assert train(*TINY, *words, f"name={name}", cwd=tmp_path) == 0
    assert len(fits(tmp_path)) == 1


def test_a_given_teacher_at_chance_is_refused_unless_it_is_asked_for(train, tmp_path, capfd):
    assert train(*TINY, "teacher.fit.epochs=0", cwd=tmp_path) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert "which is chance" in error and "teacher.untrained=true" in error
    assert train(*TINY, "teacher.fit.epochs=0", "teacher.untrained=true", cwd=tmp_path) == 0


def test_the_views_are_those_asked_for_where_the_cache_keeps_none(train, tmp_path, monkeypatch):
    from distill.data.batches import EpochBatches

    seen, iterate = [], EpochBatches.__iter__
    monkeypatch.setattr(EpochBatches, "__iter__", lambda self: seen.append((self.views, self.epoch)) or iterate(self))
    words = [word for word in TINY if not word.startswith(("cache=", "trainer.max_epochs"))]
    assert (
        train(*words, "trainer.max_epochs=3", "teacher.fit.epochs=1", "loss=[ce,fitnet]", "cache.views=2", cwd=tmp_path)
        == 0
    )
    assert {views for views, _ in seen if views} == {2}


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("+trainer.callbacks=[]", "killed anywhere"),
        ("+trainer.logger=true", "logger="),
        ("+trainer.plugins=[]", "killed anywhere"),
        ("+trainer.fast_dev_run=true", "limit_train_batches"),
        ("+trainer.max_steps=3", "trainer.max_epochs"),
        ("+trainer.max_time=00:01:00:00", "trainer.max_epochs"),
        ("+trainer.overfit_batches=2", "limit_train_batches"),
        ("+trainer.check_val_every_n_epoch=2", "validation follows every epoch"),
        ("+trainer.val_check_interval=0.5", "validation follows every epoch"),
        ("+trainer.limit_val_batches=0", "validation images"),
        ("+trainer.nonsense=1", "none of those"),
        ("trainer.max_epochs=0", "at least 1"),
        ("trainer.max_epochs=-1", "at least 1"),
        ("teacher.fit.epochs=-1", "at least 0"),
        ("trainer.precision=bf8", "expected one of auto"),
    ],
)
def test_trainer_options_that_cannot_be_honoured_are_refused_by_name(train, tmp_path, capfd, word, reason):
    assert train(*TINY, word, cwd=tmp_path) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert word.lstrip("+").partition("=")[0] in error and reason in error
    assert not (tmp_path / "outputs/fits").exists()


@pytest.mark.parametrize("words", [["ema=0.99"], ["teacher=ema"]])
def test_an_average_of_half_precision_is_refused(train, tmp_path, capfd, words):
    assert train(*TINY, *words, "trainer.precision=bf16-true", cwd=tmp_path) == 2
    assert "too few digits for a moving average" in capfd.readouterr().err


@pytest.mark.parametrize(
    "word",
    [
        "+trainer.limit_train_batches=2",
        "+trainer.limit_val_batches=1",
        "+trainer.deterministic=true",
        "+trainer.detect_anomaly=true",
        "+trainer.gradient_clip_algorithm=value",
        "+trainer.min_epochs=1",
    ],
)
def test_other_trainer_options_work(train, tmp_path, word, request):
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    request.addfinalizer(lambda: torch.autograd.set_detect_anomaly(False))
    extra = ["trainer.gradient_clip_val=1"] if "clip" in word else []
    assert train(*TINY, word, *extra, "teacher.fit.epochs=0", "teacher.untrained=true", cwd=tmp_path) == 0
    assert not torch.are_deterministic_algorithms_enabled()  # int8 networks have operations without such a form


@pytest.mark.parametrize(
    "file", sorted((ROOT / "conf").glob("*/*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}"
)
def test_every_file_has_values_on_its_own(file):
    """Where it is read without the rest of the configuration, as by a notebook: data's augment and cache's seed, which
    are named as what they stand for, apart, and what sets options of others, or W&B reads."""
    config.register(["train.py"])  # resolvers
    described = OmegaConf.load(file)
    if file.parent.name in ("data", "cache"):
        described = OmegaConf.masked_copy(described, [key for key in described if key not in ("augment", "seed")])
    if file.parent.name not in ("experiment", "recipe") and (file.parent.name, file.stem) != ("sweep", "wandb"):
        OmegaConf.to_container(described, resolve=True)


# names and folders


def test_what_was_refused_before_anything_was_made_can_be_corrected(train, tmp_path):
    assert train(*TINY, "name=x", "loss=[ce,fitnet]", "loss.fitnet.student_tap=stage9", cwd=tmp_path) == 2
    assert (tmp_path / "outputs/x/run.json").is_file()
    assert train(*TINY, "name=x", "loss=[ce,kd]", "loss.kd.temperature=2", cwd=tmp_path) == 0
    record = json.loads((tmp_path / "outputs/x/run.json").read_text())
    assert record["status"] == "done" and "loss.kd.temperature=2" in record["overrides"]
    assert train(*TINY, "name=x", "loss=[ce,kd]", "loss.kd.temperature=3", cwd=tmp_path) == 2  # now it is a run


@pytest.mark.parametrize("name", ["a/../../escaped", "../x", "..", "a//b", "/tmp/x", "a/.", "''"])
def test_a_name_leads_nowhere_but_into_outputs(train, tmp_path, capfd, name):
    (tmp_path / "cwd").mkdir()
    assert train(*TINY, f"name={name}", cwd=tmp_path / "cwd") == 2
    assert "expected the name of a folder in outputs/" in capfd.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["cwd"]


def test_two_runs_of_one_second_have_two_folders(tmp_path):
    """Each gets its own, and both do their work."""
    words = ["stages=[teacher]", "teacher.fit.epochs=0", "teacher.untrained=true"]
    program = [sys.executable, str(ROOT / "train.py"), *TINY, *words]
    runs = [
        subprocess.Popen(
            program,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(3)
    ]
    told = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], told
    assert len({line for text in told for line in text.splitlines() if line.startswith("run: ")}) == 3


def test_a_folder_that_is_there_gets_a_number_behind_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for wanted in ("outputs/a-b-now", "outputs/a-b-now-2", "outputs/a-b-now-3"):
        config._unused.cache_clear()
        assert config.run_dir(None, "outputs/a-b-now") == wanted
        assert config.run_dir(None, "outputs/a-b-now") == wanted  # asked again in the same process
    monkeypatch.setenv("SLURM_PROCID", "1")  # the others of a run don't make folders
    config._unused.cache_clear()
    assert config.run_dir(None, "outputs/a-b-now") == "outputs/a-b-now"


@pytest.mark.parametrize("name", progress.RANKS)
def test_one_process_of_a_run_leads(monkeypatch, name):
    for each in progress.RANKS:
        monkeypatch.delenv(each, raising=False)
    assert progress.leads()
    monkeypatch.setenv(name, "1")
    assert not progress.leads()
    monkeypatch.setenv(name, "0")
    assert progress.leads()
