"""A recipe is a published setting in one word: the authors' numbers, checked as a command line is."""

import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from test_configs import composed

from distill.cli import config
from distill.errors import UsageError
from distill.files import CONF
from distill.losses.weight import weight_at

FILES = sorted({*Path(CONF, "recipe").glob("*.yaml")} - {Path(CONF, "recipe", "auto.yaml")})  # which has its own tests
BASES = ("cifar", "cifar200", "imagenet")  # protocols, for losses of the user's choice
HERE = str(Path(__file__))  # a file and a folder that are there
MUST = {"simkd": [f"teacher.checkpoint={HERE}"], "patient": ["data.root=here"]}


def words(name: str) -> list[str]:
    return [f"recipe={name}", *MUST.get(name, ["data.root=here"] if "imagenet" in name else [])]


@cache
def recipe(name: str, *more: str):
    return composed(*words(name), *more)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_recipe_is_a_right_configuration(file):
    """By the program's own check; it opens with its command, and says each of its losses' weights itself."""
    text = file.read_text(encoding="utf-8")
    package, command, *_ = text.splitlines()
    assert package == "# @package _global_" and f"recipe={file.stem}" in command
    assert re.search(r"^#.*\bOurs\b", text, re.M)
    cfg = recipe(file.stem)
    config.check(cfg, words(file.stem))
    if file.stem not in BASES:
        assert yaml.safe_load(text)["loss"].keys() == cfg.loss.keys()
        assert all("weight" in options for options in yaml.safe_load(text)["loss"].values())


def test_every_method_that_was_published_on_cifar_has_one():
    named = [name for name in AUTHORS if not name.endswith("_imagenet")]
    others = ["cc", "dist", "logit_mse", "ofa", "reviewkd", "simkd", "wsld"]
    for name in [*named, *others]:
        assert list(recipe(name).loss)[-1] == name


TIAN = {
    "optimizer.lr": 0.05,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 5e-4,
    "optimizer.nesterov": False,
    "data.batch_size": 64,
    "trainer.max_epochs": 240,
    "schedule.milestones": [150, 180, 210],
    "schedule.gamma": 0.1,
    "loss.ce.weight": 1.0,
}
SHORT = TIAN | {
    "optimizer.lr": 0.1,
    "data.batch_size": 128,
    "trainer.max_epochs": 200,
    "schedule.milestones": [60, 120, 160],
    "schedule.gamma": 0.2,
}
TWO = TIAN | {
    "loss.ce.weight": [[0, 0], [30, 0], [30, 1]],
    "trainer.max_epochs": 270,
    "schedule.milestones": [180, 210, 240],
}
IMAGENET = TIAN | {
    "optimizer.lr": 0.1,
    "optimizer.weight_decay": 1e-4,
    "data.batch_size": 256,
    "trainer.max_epochs": 100,
    "schedule.milestones": [30, 60, 90],
}
LARGE = {"optimizer.lr": 0.2, "data.batch_size": 512}
AUTHORS = {  # read off the authors' (or, for ImageNet and OFD, mdistiller's) configuration files and scripts
    "kd": TIAN | {"loss.ce.weight": 0.1, "loss.kd.weight": 0.9, "loss.kd.temperature": 4},
    "fitnet": TIAN | {"loss.fitnet.weight": 100, "loss.fitnet.student_tap": "stage2"},
    "at": TIAN | {"loss.at.weight": 1000},
    "sp": TIAN | {"loss.sp.weight": 3000},
    "vid": TIAN | {"loss.vid.weight": 1},
    "rkd": TIAN | {"loss.rkd.weight": 1, "loss.rkd.distance_weight": 25, "loss.rkd.angle_weight": 50},
    "pkt": TIAN | {"loss.pkt.weight": 30000},
    "nst": TIAN | {"loss.nst.weight": 50},
    "crd": TIAN | {"loss.crd.weight": 0.8, "loss.crd.negatives": 16384, "loss.crd.temperature": 0.07},
    "ab": TWO | {"loss.ab.weight": [[0, 0.003], [30, 0.003], [30, 0]]},
    "fsp": TWO | {"loss.fsp.weight": [[0, 50], [30, 50], [30, 0]]},
    "ft": TWO | {"loss.ft.weight": 500},
    "dkd": TIAN | {"loss.dkd.beta": 2, "loss.dkd.alpha": 1, "loss.dkd.temperature": 4},
    "ctkd": TIAN | {"loss.ce.weight": 0.1, "loss.ctkd.weight": 0.9, "loss.ctkd.epochs": 10},
    "logit_standardization": TIAN
    | {"loss.ce.weight": 0.1, "loss.logit_standardization.weight": 9, "loss.logit_standardization.temperature": 2},
    "mlkd": TIAN | {"loss.ce.weight": 2 * 0.1, "loss.mlkd.weight": 0.9, "optimizer.lr": 0.025},
    "sdd": TIAN | {"loss.ce.weight": 0.1, "loss.sdd.weight": 0.9, "loss.sdd.scales": [1, 2]},
    "cat_kd": TIAN | {"loss.cat_kd.weight": 0.7, "loss.cat_kd.resolution": 2, "loss.cat_kd.normalize": False},
    "ickd": TIAN | {"loss.ickd.weight": 2.5},
    "ofd": TIAN | {"loss.ofd.weight": 0.001},
    "mgd": SHORT | {"loss.mgd.weight": 0.0012, "loss.mgd.masked": 0.15},
    "nkd": SHORT | {"loss.nkd.gamma": 3.5, "loss.nkd.temperature": 3},
    "tfkd": SHORT | {"loss.ce.weight": 0.9, "loss.tfkd.weight": 0.1, "loss.tfkd.temperature": 20, "schedule.warmup": 1},
    "uskd": SHORT | {"loss.uskd.alpha": 0.1, "loss.uskd.tap": "stage3"},
    "srrl": SHORT | {"loss.srrl.alpha": 1, "loss.srrl.beta": 5},
    "wkd_logit": TIAN
    | {
        "loss.wkd_logit.weight": 1,
        "loss.wkd_logit.gamma": [[150, 600], [240, 0, "cosine"]],
        "loss.wkd_logit.temperature": 8,
        "loss.wkd_logit.cost": "cka",
    },
    "kd_imagenet": IMAGENET
    | LARGE
    | {"loss.ce.weight": 0.5, "loss.kd.weight": 0.5, "loss.kd.temperature": 1, "teacher.weights": "DEFAULT"},
    "dkd_imagenet": IMAGENET | LARGE | {"loss.dkd.beta": 0.5, "loss.dkd.temperature": 1},
    "crd_imagenet": IMAGENET | {"loss.crd.weight": 0.8},
    "ctkd_imagenet": IMAGENET | {"trainer.max_epochs": 120, "loss.ctkd.weight": 1, "loss.ctkd.epochs": 5},
    "wsld_imagenet": IMAGENET | {"optimizer.nesterov": True, "loss.wsld.weight": 2.5, "loss.wsld.temperature": 2},
}


@pytest.mark.parametrize("name", AUTHORS)
def test_the_values_are_the_authors(name):
    cfg = recipe(name)
    found = {key: OmegaConf.select(cfg, key) for key in AUTHORS[name]}
    assert found == AUTHORS[name]


@pytest.mark.parametrize(("name", "full"), [("dkd", 1.0), ("reviewkd", 0.6)])
def test_a_warm_up_is_the_steps_of_mdistillers_on_average(name, full):
    """epoch / 20, the first epoch being 1, all the epoch long."""
    weight = OmegaConf.to_object(recipe(name).loss[name].weight)
    for epoch in range(1, 30):
        mean = sum(weight_at(weight, epoch - 1 + (batch + 0.5) / 100) for batch in range(100)) / 100
        assert mean == pytest.approx(full * min(epoch / 20, 1), abs=0.007 * full), epoch


def test_what_is_typed_beside_a_recipe_wins():
    typed = ["teacher=resnet110", "student=resnet32", "optimizer=adamw", "loss.dkd.beta=8", "trainer.max_epochs=3"]
    cfg = recipe("dkd", *typed)
    assert (cfg.teacher.depth, cfg.student.depth, cfg.loss.dkd.beta, cfg.trainer.max_epochs) == (110, 32, 8, 3)
    assert cfg.optimizer._target_ == "torch.optim.AdamW"
    config.check(cfg, ["recipe=dkd", *typed])
    with pytest.raises(UsageError, match=r"loss.dkd=.*is dkd among loss=\[…\]\?"):
        config.check(recipe("dkd", "loss=[ce,kd]"), ["recipe=dkd", "loss=[ce,kd]"])


def test_the_benchmarks_earlier_name_leads_on():
    assert composed("experiment=crd_benchmark") == recipe("cifar")


def test_a_recipe_chosen_beside_an_experiment_is_there_too():
    cfg = recipe("kd", "experiment=born_again")
    assert (cfg.teacher.depth, cfg.loss.kd.weight, cfg.loss.kd.temperature) == (20, 0.9, 1.0)


def test_a_loss_that_needs_what_the_pair_lacks_is_one_line_before_work(train, tmp_path, capfd):
    (tmp_path / "conf" / "network").mkdir(parents=True)
    flat = "# a network without stages\n_target_: distill.networks.resnet_cifar.resnet\ndepth: 8\n"
    flat += "taps: {pooled: 'linear:in'}\nmean: [0.5, 0.5, 0.5]\nstd: [0.25, 0.25, 0.25]\n"
    (tmp_path / "conf" / "network" / "flat.yaml").write_text(flat)
    pair = ["data=fake", "data.image_size=16", "data.train_size=64", "teacher=resnet8_tiny", "trainer.accelerator=cpu"]
    command = [*pair, "student=flat", "--config-dir", str(tmp_path / "conf")]
    assert train("recipe=fitnet", *command, cwd=tmp_path) == 2
    told = capfd.readouterr()
    assert told.err.count("\n") == 1 and "error: loss fitnet, student: no stages were found" in told.err
    assert "fitting" not in told.out and not (tmp_path / "outputs" / "fits").exists()
    assert train("recipe=simkd", *pair, cwd=tmp_path) == 2
    assert "loss simkd needs a student that reuses the teacher's classifier" in capfd.readouterr().err


def test_two_phases_train(train, tmp_path, capfd):
    """One epoch of the boundaries alone, one of the labels."""
    pair = ["data=fake", "data.image_size=16", "data.train_size=64", "data.batch_size=16", "teacher=resnet8_tiny"]
    short = ["student=resnet8_tiny", "trainer.max_epochs=2", "trainer.accelerator=cpu", "baseline=false"]
    phases = ["loss.ce.weight=[[0,0],[1,0],[1,1]]", "loss.ab.weight=[[0,0.003],[1,0.003],[1,0]]"]
    done = train("recipe=ab", *pair, *short, *phases, "stages=[teacher,distill]", cwd=tmp_path)
    assert done == 0 and "under 0→0→1 ce + 0.003→0.003→0 ab for 2 epochs" in capfd.readouterr().out
