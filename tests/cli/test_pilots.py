"""recipe=auto: what it tries, what it costs, what it ships, and that a killed search goes on."""

import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from distill.cli import config
from distill.cli.pilots import Search, candidates, planned
from distill.errors import UsageError
from distill.training.halving import Plan

WORDS = [
    "recipe=auto",
    "teacher=resnet8_tiny",
    "student=resnet8_tiny",
    "trainer.max_epochs=4",
    "recipe.share=0.75",
    "trainer.accelerator=cpu",
    "compress=[]",
    "export=[]",
]


def tried(composed, *words):
    cfg = composed("recipe=auto", *words)
    return [(each.name, each.cfg.optimizer.lr, each.alone) for each in candidates(cfg, ["recipe=auto", *words])]


@pytest.fixture
def composed():
    from hydra import compose, initialize_config_dir

    from distill.files import CONF

    config.register(["train.py"])
    with initialize_config_dir(CONF, version_base="1.3"):
        yield lambda *words: compose("train", ["name=test", *words])


def test_what_the_user_says_is_not_tried_otherwise(composed):
    every = tried(composed)
    assert every[0] == ("loss=[ce]", 0.05, True)
    assert every[1] == ("as configured", 0.05, False)
    assert ("loss=[ce] optimizer.lr=0.1", 0.1, True) in every
    assert any("augment" in name for name, _, _ in every)
    fixed = tried(composed, "loss=[ce,dkd]", "loss.ce.label_smoothing=0.1", "augment=[cutout]", "optimizer.lr=0.2")
    assert {name for name, _, _ in fixed} == {
        *("loss=[ce]", "loss=[ce] optimizer.lr=0.4", "loss=[ce] optimizer.lr=0.1"),
        *("as configured", "optimizer.lr=0.4", "optimizer.lr=0.1"),
    }
    cfg = composed("recipe=auto", "loss=[ce,dkd]", "loss.ce.label_smoothing=0.1")
    alone, own, *_ = candidates(cfg, ["recipe=auto", "loss=[ce,dkd]", "loss.ce.label_smoothing=0.1"])
    assert (alone.cfg.loss.ce.label_smoothing, alone.cfg.loss.ce.weight, set(own.cfg.loss)) == (0.1, 1, {"ce", "dkd"})


@pytest.mark.parametrize(
    ("words", "validation", "told"),
    [
        (["trainer.max_epochs=5"], 1000, "two candidates take 2: recipe.share=0.4 or more"),
        (["recipe.share=0.1", "trainer.max_epochs=100"], 1000, "two candidates take 20: recipe.share=0.2 or more"),
        (["trainer.max_epochs=10"], 100, "197 are needed for 10"),
        (["trainer.max_epochs=10", "recipe.tell_apart=0.03"], 1000, "2181 are needed for 3"),
    ],
)
def test_a_budget_or_validation_images_that_are_too_few(composed, words, validation, told):
    with pytest.raises(UsageError, match=told):
        planned(composed("recipe=auto", *words), 12, validation)


def test_it_is_refused_before_any_training(train, tmp_path, capfd):
    assert train("recipe=auto", "trainer.max_epochs=3", cwd=tmp_path) == 2
    assert "recipe.share=0.67 or more" in capfd.readouterr().err
    assert not (tmp_path / "outputs" / "fits").exists()
    assert train("recipe=auto", "teacher=peer", cwd=tmp_path) == 2
    assert "learns along" in capfd.readouterr().err


def test_the_teacher_alone_needs_no_pilots(train, tmp_path):
    assert train(*WORDS, "stages=[teacher]", "name=fitted", cwd=tmp_path) == 0
    assert not (tmp_path / "outputs/fitted/pilots.json").exists()


@pytest.mark.slow
def test_a_killed_search_goes_on_to_the_same_end(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *WORDS]

    def finish(*words):
        return subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    whole = finish("name=whole")
    process = subprocess.Popen(
        [*command, "name=killed"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        if line.startswith("pilot as configured"):
            process.send_signal(signal.SIGKILL)
    process.wait()
    found = json.loads((tmp_path / "outputs/killed/pilots.json").read_text())
    assert len(found["pilots"]) == 1 and "chosen" not in found
    again = finish("name=killed")
    assert "pilot loss=[ce]:" not in again and "pilot as configured:" in again
    one, other = (json.loads((tmp_path / f"outputs/{name}/pilots.json").read_text()) for name in ("whole", "killed"))
    assert one["chosen"] == other["chosen"]
    assert [p["right"] for p in one["pilots"].values()] == [p["right"] for p in other["pilots"].values()]
    assert same_tensors(tmp_path)
    assert "of the full training's" in whole
    report = json.loads((tmp_path / "outputs/whole/report.json").read_text())
    assert "pilots: 3 epochs, 75% of the full training's" in report["context"]["recipe"]


def same_tensors(folder) -> bool:
    """Whether both runs' weights are equal bit by bit: a file's metadata keys have no order."""
    from safetensors.torch import load_file

    one, other = (load_file(folder / f"outputs/{name}/student_last.safetensors") for name in ("whole", "killed"))
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def search(right: dict[str, int], images: int = 200):
    """A search whose candidates answer so many of the validation images rightly: what it chooses and says."""
    names = list(right)
    tried = [SimpleNamespace(name=name, words=[name] * (name != "as configured"), alone="ce" in name) for name in names]
    found = Search.__new__(Search)
    found.tried, found.usual, found.plan = tried, names.index("as configured"), Plan(((len(names), 1),))
    found.pilot = lambda each, _: {"right": "1" * right[names[each]] + "0" * (images - right[names[each]])}
    alive = sorted(range(len(names)), key=lambda each: -right[names[each]])
    best, sentence = found.chosen(alive)
    return names[best], sentence


@pytest.mark.parametrize(
    ("right", "chosen", "told"),
    [
        ({"ce": 90, "as configured": 100, "dkd": 99}, "as configured", "which nothing is ahead of"),
        ({"ce": 90, "as configured": 100, "dkd": 103}, "as configured", "dkd is ahead, and not shown to be: +1.5"),
        ({"ce": 90, "as configured": 100, "dkd": 130}, "dkd", "better than as configured by +15.0 points"),
        ({"ce": 103, "as configured": 100, "dkd": 99}, "as configured", "ce is ahead, and not shown to be"),
        ({"ce": 130, "as configured": 100, "dkd": 120}, "ce", "nothing beats the student alone, so that is what"),
    ],
)
def test_what_is_shown_to_be_better_is_taken(right, chosen, told):
    best, sentence = search(right)
    assert best == chosen and told in sentence
