"""distill.train and what goes with it: the command line's bits, checks and errors; the process stays as it was."""

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from conftest import QUICK, ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import load_file

import distill
from distill import signals
from distill.cli import config, words
from distill.files import read_json
from distill.training.lines import Lines

SHORT = [*QUICK, "baseline=false", "stages=[teacher,distill]"]


def process_state() -> dict:
    """All that a run sets for itself."""
    loggers = ("pytorch_lightning", "lightning", "torch", "PIL")
    return {
        "handlers": [signal.getsignal(number) for number in (*signals.SAID, signal.SIGCHLD)],
        "hooks": (sys.excepthook, threading.excepthook),
        "warnings": list(warnings.filters),
        "levels": [logging.getLogger(name).level for name in loggers],
        "handlers of logs": [*logging.root.handlers],
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "engine": torch.backends.quantized.engine,
        "grad": torch.is_grad_enabled(),
        "hydra": (HydraConfig.initialized(), OmegaConf.has_resolver("run_dir")),
        "process": (os.getcwd(), [*sys.argv], dict(os.environ)),
    }


def test_a_run_has_the_command_lines_bits_and_leaves_the_process_as_it_was(train, tmp_path, monkeypatch):
    assert train(*SHORT, "name=cli", "deterministic=true", "store=cli", cwd=tmp_path) == 0
    hydra = process_state()["hydra"][0]  # other tests' in this process
    monkeypatch.chdir(tmp_path)
    for name in ("run_dir", "by_start", "rest_of", "program"):  # which the command line left
        OmegaConf.clear_resolver(name)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "conf.yaml").write_text("a: 1\n")
    with initialize_config_dir(str(tmp_path / "theirs"), version_base="1.3"):
        logging.getLogger("lightning")
        before = process_state()
        run = distill.train(*SHORT, name="here", deterministic=True)
        assert process_state() == before
        assert compose("conf") == {"a": 1} and GlobalHydra.instance().is_initialized()
    assert process_state()["hydra"] == (hydra, False)
    ours, theirs = (load_file(tmp_path / "outputs" / name / "student.safetensors") for name in ("here", "cli"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert run.folder == tmp_path / "outputs" / "here" and read_json(run.folder / "run.json")["status"] == "done"
    assert distill.load("outputs/here").student.classes[:2] == ("class0", "class1")
    with pytest.raises(distill.UserError, match=r"no report yet: distill\.train\('run=.*'\) goes on"):
        run.report  # noqa: B018


@pytest.mark.parametrize(
    ("said", "options", "told"),
    [
        (["student=resnt8"], {}, "no student 'resnt8'; did you mean resnet8?"),
        (["loss.kd.temprature=2"], {}, "did you mean loss.kd.temperature? distill --help lists them"),
        (["loss.kd.temperature=cold"], {}, "loss.kd.temperature=cold: expected a number greater than 0"),
        (["--epochs", "3"], {}, "no option '--epochs'"),
        (["-m", "seed=0,1"], {}, "a sweep is a loop in Python"),
        (["seeds=0,1"], {}, "a sweep is a loop in Python"),
        ([], {"student": 3}, "student=3: expected the name of a choice"),
        ([], {"loss__kd__temperature": object()}, "expected text, a number, True"),
        ([], {"trainer": {"max_epochs": 0}}, "trainer.max_epochs=0: expected a whole number"),
        ([], {"trainer__devices": 2}, "which only a command can start: distill trainer.devices=2"),
        ([], {"run": "nowhere"}, "run=nowhere is not the folder of a run"),
        ([3], {}, "3: expected words such as"),
    ],
)
def test_what_is_wrong_is_an_exception_with_the_same_line(tmp_path, monkeypatch, said, options, told):
    monkeypatch.chdir(tmp_path)
    hydra = HydraConfig.initialized(), GlobalHydra.instance().is_initialized()  # other tests' in this process
    with pytest.raises(distill.UsageError) as raised:
        distill.train(*said, **options)
    assert told in str(raised.value) and "\n" not in str(raised.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert hydra == (HydraConfig.initialized(), GlobalHydra.instance().is_initialized())


def test_two_runs_that_begin_in_one_second_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distill.asked.words", list)
    config.register()
    assert config.run_dir(None, "outputs/x") == config.run_dir(None, "outputs/x") == "outputs/x"  # Hydra asks twice
    config.register()
    assert config.run_dir(None, "outputs/x") == "outputs/x-2"


def test_a_missing_folder_of_photos_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(distill.UserError, match=r"no folder .*my 'photos' \(2\) = .1."):
        distill.train(data="my 'photos' (2) = [1]/")


def test_an_interrupt_saves_and_is_a_keyboard_interrupt(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    told = Lines.on_train_epoch_end

    def interrupted(self, trainer, module):
        told(self, trainer, module)
        if trainer.max_epochs == 2:  # not in the rehearsal
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Lines, "on_train_epoch_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distill.train(*SHORT, "teacher.fit.epochs=0", "teacher.untrained=true", name="x")
    assert signal.getsignal(signal.SIGINT) is before
    assert read_json(tmp_path / "outputs/x/run.json")["status"] == "interrupted"
    run = distill.train(run="outputs/x")
    assert "continuing after" in capsys.readouterr().out and run.student.image_size == 16


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1))
def test_any_text_is_a_value(text):
    override = OverridesParser.create().parse_override(f"key={words.quoted(text)}")
    assert OmegaConf.create({"key": override.value()}).key == text and not override.is_sweep_override()


@settings(max_examples=40)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("ab ,:'[]{}="),
        lambda each: st.lists(each) | st.dictionaries(st.text("abc", min_size=1), each),
    )
)
def test_pythons_values_are_hydras(value):
    [word] = words.written({"cache__folder_of": value})
    came = OverridesParser.create().parse_override(word).value()
    assert word.startswith("cache.folder_of=") and came == value


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({"loss": ["ce", "kd"]}, ["loss=[ce,kd]"]),
        ({"compress": []}, ["compress=[]"]),
        ({"student": "resnet8", "trainer__max_epochs": 3}, ["student=resnet8", "trainer.max_epochs=3"]),
        ({"trainer": {"max_epochs": 3}}, ["trainer.max_epochs=3"]),
        ({"teacher.mean": [0.5, 0.5]}, ["teacher.mean=[0.5,0.5]"]),
        ({"baseline": False, "ema": None}, ["baseline=false", "ema=null"]),
        ({"seed": np.int64(3)}, ["seed=3"]),
        ({"data__root": "~/a b"}, [f"data.root='{os.path.expanduser('~')}/a b'"]),
        ({"name": "3"}, ["name='3'"]),
    ],
)
def test_names_are_written_as_words(options, written):
    assert words.written(options) == written


def test_paths_need_no_quoting_where_they_are_folders_or_no_grammar(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "a,b", "digits", "it's (1)"):
        (tmp_path / name).mkdir()
    root = lambda path: ["data=imagefolder", f"data.root={path}"]  # noqa: E731
    assert words.spelled(["data=photos"]) == root("photos")
    assert words.spelled(["data=photos/"]) == root("photos/")
    assert words.spelled(["data=a,b"]) == root("'a,b'")
    assert words.spelled(["data=digits", "data=imagefolder"]) == ["data=digits", "data=imagefolder"]
    assert words.spelled(["data=./digits"]) == root("./digits")
    assert words.spelled(["data=cifar10,digits"]) == ["data=cifar10,digits"]  # a sweep
    assert words.spelled(["data.root=it's (1)"]) == [r"data.root='it\'s (1)'"]
    assert words.spelled(["data.root=a=b", "data.root='a=b'"]) == ["data.root='a=b'", "data.root='a=b'"]
    assert words.spelled(["student.checkpoint=null", "store=x=y"])[0] == "student.checkpoint=null"
    assert words.spelled(["loss.kd.weight=[[0,0],[5,1]]", "-m"]) == ["loss.kd.weight=[[0,0],[5,1]]", "-m"]


def test_nothing_is_imported_before_it_is_needed(tmp_path):
    program = (
        "import sys, distill\n"
        "assert set(distill.__all__) <= set(dir(distill))\n"
        "print([name for name in ('torch', 'hydra', 'pandas', 'numpy') if name in sys.modules])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    ("program", "typed"),
    [([str(ROOT / "train.py")], "python train.py"), (["-m", "distill"], "python -m distill"), (["distill"], "distill")],
)
def test_messages_name_the_command_that_was_typed(tmp_path, program, typed):
    if program == ["distill"]:  # as pip writes the console script
        program = [str(tmp_path / "distill")]
        (tmp_path / "distill").write_text("from distill.__main__ import main\nmain()\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = [sys.executable, *program]
    done = subprocess.run([*said, "losses=ce"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stderr == f"error: no option 'losses'; did you mean loss? {typed} --help lists them\n"
    assert done.returncode == 2
    done = subprocess.run([*said, "--help"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.startswith(f"{typed} [GROUP=CHOICE]") and f"again:  {typed} run=outputs" in done.stdout
