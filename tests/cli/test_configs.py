"""Every configuration file composes, is instantiated, and opens with how to use it."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from distill import files, types
from distill.cli import build, config
from distill.losses.terms import build_losses

FILES = sorted(
    path for file in Path(files.CONF).rglob("*.yaml") if (path := file.relative_to(files.CONF)).parts[0] != "sweep"
)  # conf/sweep has words of sweeps: tests/cli/test_sweep.py
MUST = {
    "data=imagefolder": ["data.root=nowhere"],
    "data=webdataset": ["data.train=nowhere"],
    "student=custom": ["student._target_=distill.networks.resnet_cifar.resnet", "+student.depth=8"],
    "student=timm": ["student.name=resnet18"],
    "student=torchvision": ["student.name=resnet18"],
}


def composed(*words: str):
    config.register(["train.py"])
    with initialize_config_dir(files.CONF, version_base="1.3"):
        return compose("train", [*words, "name=test"])


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_says_what_it_is_for(file):
    assert (Path(files.CONF) / file).read_text().startswith("#")


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.parent.name not in ("", "role", "recipe", "target")], ids=str
)
def test_every_choice_composes_and_builds(file):
    group, name = file.parent.name, file.stem
    if group == "network":
        for role in ("teacher", "student"):
            choice = f"{role}={name}"
            words = [word.replace("student", role) for word in MUST.get(f"student={name}", [])]
            cfg = composed(choice, *words)[role]
            assert cfg.checkpoint is None
        assert callable(build.get_object(cfg._target_))
        return
    choice = f"{group}=[{name}]" if group in ("loss", "augment", "logger", "compress", "export") else f"{group}={name}"
    cfg = composed(choice, *MUST.get(f"{group}={name}", []))
    if group == "loss":
        terms, weights = build_losses(cfg.loss)
        assert list(terms) == list(weights) == [name]
    elif group == "augment":
        assert list(instantiate(cfg.augment, _convert_="all")) == [name]
    elif group in ("compress", "export"):
        assert list(build.steps(cfg[group])) == [name]
        assert callable(build.steps(cfg[group])[name])
        if group == "export":
            assert callable(build.reloaders(cfg.export)[name])
    elif group in ("optimizer", "schedule", "logger"):
        node = cfg[group] if group != "logger" else cfg.logger[name]
        assert callable(instantiate(node, _partial_=True))
    elif group == "trainer":
        assert (
            instantiate(cfg.trainer, logger=False, precision="32-true", num_nodes=1).max_epochs
            == cfg.trainer.max_epochs
        )
    elif group == "data":
        assert callable(build.get_object(cfg.data._target_))  # instantiated in test_data.py
    else:
        assert group in ("cache", "experiment", "teacher")
        assert OmegaConf.to_container(cfg, resolve=True)


def test_no_key_can_be_misspelt_and_groups_can_be_emptied():
    assert composed("compress=[]", "export=[]").compress == {}
    with pytest.raises(Exception, match="sede"):
        composed("sede=1")


def test_the_same_network_serves_both_roles_with_its_own_values():
    cfg = composed("teacher=resnet56", "student=resnet20", "teacher.checkpoint=t.pt", "student.depth=14")
    assert (cfg.teacher.depth, cfg.student.depth) == (56, 14)
    assert (cfg.teacher.checkpoint, cfg.student.checkpoint) == ("t.pt", None)
    assert "fit" not in cfg.student


def test_a_network_of_the_users_own_serves_both_roles(tmp_path):
    (tmp_path / "network").mkdir()
    (tmp_path / "network" / "mine.yaml").write_text("_target_: a.b\ntaps: null\nmean: [0]\nstd: [1]\n")
    config.register(["train.py", "--config-dir", str(tmp_path)])
    # Hydra finds the file itself through --config-dir; here through the search path
    with initialize_config_dir(files.CONF, version_base="1.3"):
        cfg = compose("train", [f"hydra.searchpath=[file://{tmp_path}]", "student=mine", "name=test"])
    assert cfg.student._target_ == "a.b"
    assert cfg.student.checkpoint is None


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        ([], 0.1),
        (["loss.kd.weight=0.5"], 0.5),
        (["loss.kd.weight=1"], 0.1),  # the labels are never left out unsaid
        (["loss.kd.weight=9"], 0.1),
        (["loss.kd.weight=[[0,0],[5,0.8]]"], [[0, 1], [5, 0.2]]),
        (["loss=[ce]"], 1),
        (["loss=[ce,dkd]"], 1),
        (["loss=[ce,kd,at]"], 0.1),
        (["loss.ce.weight=1"], 1),
        (["student.checkpoint=x.pt"], 0.5),  # it starts from weights
        (["student=mobilenet", "student.weights=DEFAULT"], 0.5),
        (["student=timm", "student.name=resnet18", "student.pretrained=true"], 0.5),
        (["student=timm", "student.name=resnet18", "student.pretrained=false"], 0.1),
    ],
)
def test_labels_and_teacher_together_weigh_one(words, labels):
    cfg = composed(*words)
    assert types.plain_values(cfg.loss)["ce"]["weight"] == labels


def test_soft_targets_suit_how_the_student_starts():
    assert composed().loss.kd.temperature == 4
    assert composed("student.checkpoint=x.pt").loss.kd.temperature == 1
    assert composed("student.checkpoint=x.pt", "loss.kd.temperature=3").loss.kd.temperature == 3
