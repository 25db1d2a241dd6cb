"""A search: what is drawn, how it is judged, and that a killed study loses no trial and doubles none."""

import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import QUICK, ROOT
from hydra.core.override_parser.overrides_parser import OverridesParser

from distill import locks
from distill.cli import launcher
from distill.cli.search import OPTIONS, Search, _drawn
from distill.errors import UsageError
from distill.files import read_json, write_json
from distill.runs import trials

optuna = pytest.importorskip("optuna", reason="the search's extra is not installed: pip install -e '.[search]'")

STUDY = """
import json, os, sys, time
from pathlib import Path
from types import SimpleNamespace
from omegaconf import OmegaConf
from distill.cli.search import OPTIONS, Search
from distill.runs import trials
from distill.runs.sweeps import job_name

root = Path(sys.argv[1])
class Launcher:  # "trains": what it finds is a function of the words
    many = 2
    def launch(self, jobs, first):
        for number, words in enumerate(jobs):
            time.sleep(0.02)
            run = root / job_name(str(root), words, first + number)
            with open(run / "begun", "a") as file:
                file.write("x")
            (run / "run.json").write_text(json.dumps({"status": "done"}))
trials.figures = lambda run: {"accuracy": float(run.name.partition("=")[2]) / 10}
search = Search(**{**OPTIONS, "trials": int(sys.argv[2]), **json.loads(sys.argv[3])})
search.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(root)}}})
search.context = SimpleNamespace(config_loader=None)
search.launcher = Launcher()
search.sweep(["student=resnet8", "loss.kd.temperature=interval(1.0,8.0)"])
"""


def study(root, count, options="{}"):
    root.mkdir(exist_ok=True)
    if not (root / "sweep.json").exists():
        write_json(root / "sweep.json", {"fixed": ["student=resnet8"], "command": []})
    command = [sys.executable, "-c", STUDY, str(root), str(count), options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(root):
    return [(each.state.name, each.user_attrs["words"][0]) for each in trials.study_of(root).trials if each.user_attrs]


def test_a_study_killed_ten_times_loses_no_trial_and_doubles_none(tmp_path):
    whole, killed, draw = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    out = study(whole, 12).communicate()
    assert len(finished(whole)) == 12, out
    for _ in range(10):
        process = study(killed, 12)
        time.sleep(draw.uniform(0.3, 1.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    out = study(killed, 12).communicate()
    found = finished(killed)
    assert [state for state, _ in found] == ["COMPLETE"] * 12, out
    assert len({words for _, words in found}) == 12
    assert [words for _, words in found][:10] == [words for _, words in finished(whole)][:10]  # random at first


def test_two_processes_share_a_study(tmp_path):
    first, second = study(tmp_path / "x", 12), study(tmp_path / "x", 12)
    outs = first.communicate(), second.communicate()
    found = finished(tmp_path / "x")
    assert len(found) == 12 and {state for state, _ in found} == {"COMPLETE"}, outs
    begun = [len((run / "begun").read_text()) for run in (tmp_path / "x").glob("kd.temperature=*")]
    assert begun == [1] * 12


def test_a_trial_at_which_another_process_is_is_not_told(tmp_path):
    made = optuna.create_study(storage=trials.storage(tmp_path), study_name=trials.NAME, direction="maximize")
    number, run = made.ask().number, tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text('{"status": "running"}')
    search = Search(**OPTIONS)
    with locks.alone(run / ".lock", "the run's folder"):
        search._tell(made, number, run)
    assert made.trials[number].state.name == "RUNNING"
    search._tell(made, number, run)
    assert made.trials[number].state.name == "FAIL"


def test_another_study_in_the_folder_is_refused(tmp_path):
    study(tmp_path / "x", 2).communicate()
    process = study(tmp_path / "x", 2, '{"objectives": ["accuracy", "bytes"]}')
    assert "holds a study with another objectives" in process.communicate()[1]
    assert process.returncode != 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"trials": 0}, "hydra.sweeper.trials=0: expected a whole number"),
        ({"trials": "x"}, "hydra.sweeper.trials=x"),
        ({"sampler": "best"}, "hydra.sweeper.sampler=best: expected one of tpe, random, gp, nsgaii"),
        ({"pruner": "always"}, "hydra.sweeper.pruner=always: expected one of none, median"),
        ({"objectives": ["top1"]}, "expected some of accuracy, bytes, latency_ms"),
        ({"objectives": []}, "expected some of"),
        ({"seed": -1}, "hydra.sweeper.seed=-1"),
    ],
)
def test_a_wrong_option_is_told(options, told):
    with pytest.raises(UsageError, match=told.replace("[", r"\[")):
        Search(**{**OPTIONS, **options})


@pytest.mark.parametrize(
    ("word", "fits"),
    [
        ("x=int(interval(1,8))", lambda text: text in "12345678"),
        ("x=interval(1.0,8)", lambda text: 1 <= float(text) <= 8 and len(text) <= 6),
        ("x=tag(log,interval(0.001,0.1))", lambda text: 0.001 <= float(text) <= 0.1),
        ("x=range(0,10,3)", lambda text: text in ("0", "3", "6", "9")),
        ("x=a,b", lambda text: text in ("a", "b")),
        ("x=[ce,kd],[ce,dkd]", lambda text: text in ("[ce,kd]", "[ce,dkd]")),
        ("x=choice(0.1,0.2)", lambda text: text in ("0.1", "0.2")),
    ],
)
def test_what_is_drawn_is_of_the_space(word, fits):
    override = OverridesParser.create().parse_override(word)
    drawn = {_drawn(optuna.create_study().ask(), "x", override) for _ in range(20)}
    assert all(map(fits, drawn)) and len(drawn) > 1


@pytest.mark.parametrize("name", trials.PRUNERS)
def test_the_pruner_is_the_one_that_was_asked_for(tmp_path, name):
    """A study doesn't keep it: Optuna's own default would judge instead."""
    made = optuna.create_study(storage=trials.storage(tmp_path), study_name=trials.NAME, direction="maximize")
    made.set_user_attr("described", {"pruner": name})
    asked = []
    for _ in range(6):
        trial = made.ask()
        trial.report(0.9, 1)
        made.tell(trial, 0.9)
    number = made.ask().number
    trials.note(tmp_path / "run", number)
    with pytest.MonkeyPatch.context() as patch:
        kind = getattr(optuna.pruners, trials.PRUNERS[name])
        patch.setattr(kind, "prune", lambda self, study, trial: bool(asked.append(type(self).__name__)))
        assert trials.judge(tmp_path / "run")(1, 0.1) is True
    assert asked == [trials.PRUNERS[name]]


def test_a_trial_is_judged_by_the_others(tmp_path):
    made = optuna.create_study(storage=trials.storage(tmp_path), study_name=trials.NAME, direction="maximize")
    for _ in range(5):
        trial = made.ask()
        trial.report(0.9, 1)
        made.tell(trial, 0.9)
    good, bad = made.ask(), made.ask()
    for trial in (good, bad):
        trials.note(tmp_path / f"run{trial.number}", trial.number)
    assert trials.judge(tmp_path / "run5")(1, 0.95) is True
    assert trials.judge(tmp_path / "run6")(1, 0.1) is False
    made.tell(bad, state=optuna.trial.TrialState.PRUNED)
    assert trials.judge(tmp_path / "run6") is None  # continued by hand it is a run like any other
    assert trials.judge(tmp_path) is None


@pytest.mark.slow
def test_a_pruned_run_says_so_and_a_search_ends_with_its_best(train, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("distill.runs.trials.judge", lambda run: lambda epoch, _: "weight=0.5" not in run.name)
    words = ["-m", *QUICK, "sweep=x", "hydra/sweeper=search", "loss.kd.weight=0.5,0.9", "hydra.sweeper.trials=4"]
    assert (
        train(*words, "compress=[]", "export=[]", "baseline=false", "hydra.sweeper.sampler=random", cwd=tmp_path) == 0
    )
    out = capfd.readouterr().out
    assert "pruned after epoch 1: " in out and " pruned" in out.partition("trials: ")[2].partition("\n")[0]
    assert "best: loss.kd.weight=0.9: accuracy " in out
    runs = {file.parent.name: read_json(file)["status"] for file in tmp_path.glob("outputs/sweeps/x/*/run.json")}
    assert runs == {"kd.weight=0.5": "pruned", "kd.weight=0.9": "done"}


def test_jobs_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    assert launcher.Processes(4).environment(0)["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in launcher.Processes().environment(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [launcher.Processes(2).environment(number)["CUDA_VISIBLE_DEVICES"] for number in range(3)] == ["3", "5", "3"]
    with pytest.raises(UsageError, match="side_by_side=0: expected"):
        launcher.Processes(0)
