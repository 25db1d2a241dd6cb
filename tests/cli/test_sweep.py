"""Sweeps: where they live, what their jobs are called, that the same command goes on, what they leave."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import QUICK
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser

from distill.cli.command import _flags_first
from distill.cli.sweep import abandoned, placed
from distill.errors import UsageError
from distill.files import CONF, read_json
from distill.report.jobs import over_seeds
from distill.runs import tables
from distill.runs.sweeps import FILE, ROOT, job_name


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def folder_of(argv):
    return next(word.partition("=")[2].strip("'") for word in argv if word.startswith("hydra.sweep.dir="))


@pytest.mark.parametrize(
    "words",
    [
        ["seed=0,1", "-m", "student=resnet8"],
        ["seed=0,1", "student=resnet8", "--multirun"],
        ["seed=0,1", "--config-dir", "a=b", "student=resnet8"],
        ["seed=0,1", "--config-dir=cc", "student=resnet8", "-m"],
    ],
)
def test_flags_may_stand_anywhere(words):
    found = _flags_first(words)
    assert found[-2:] == ["seed=0,1", "student=resnet8"]
    assert sorted(found) == sorted(words)
    parsed, unknown = get_args_parser().parse_known_args(found)
    assert parsed.overrides == ["seed=0,1", "student=resnet8"] and not unknown
    assert parsed.config_dir == next((word for word in ("a=b", "cc") if word in " ".join(words)), None)


def test_two_sweeps_of_one_second_have_two_folders(monkeypatch):
    monkeypatch.setattr("distill.cli.sweep.time.strftime", lambda _: "2030-01-01_00-00-00")
    folders = [folder_of(placed(["-m", "seed=0,1"])) for _ in range(3)]
    assert folders == [f"{ROOT}/2030-01-01_00-00-00{end}" for end in ("", "-2", "-3")]


def test_a_name_goes_on_with_the_same_words_and_refuses_others():
    words = ["-m", "student=resnet8", "seed=0,1", "sweep=first"]
    first = placed(words)
    assert folder_of(first) == f"{ROOT}/first" and not any(word.startswith("sweep=") for word in first)
    more = ["-m", "sweep=first", "seed=0,1,2,3", "student=resnet8"]
    assert folder_of(placed(more)) == folder_of(first)
    assert read_json(Path(ROOT, "first", FILE))["command"][0] == "seed=0,1,2,3"
    with pytest.raises(UsageError, match=r"holds another sweep.*then student=resnet8, now student=resnet20"):
        placed(["-m", "sweep=first", "seed=0,1", "student=resnet20"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sweep=x"], "this is none: add -m"),
        (["-m", "seed=0,1", "sweep=a/b"], "expected the name of a folder"),
        (["-m", "seed=0,1", "sweep=.."], "expected the name of a folder"),
        (["-m", "seed=0,1", "sweep="], "expected the name of a folder"),
        (["-m", "seed=0,1", "sweep=x", "hydra.sweep.dir=y"], "give either"),
        (["-m", "seed=0,1", "run=outputs/x"], "continues one run"),
    ],
)
def test_what_is_no_sweep(words, told):
    with pytest.raises(UsageError, match=told):
        placed(words)


def test_the_folder_of_a_sweep_without_a_job_is_taken_back(tmp_path):
    argv = placed(["-m", "seed=0,1", "sweep=x"])
    abandoned(argv)
    assert not (tmp_path / ROOT / "x").exists()
    argv = placed(["-m", "seed=0,1", "sweep=x"])
    (tmp_path / ROOT / "x" / "seed=0").mkdir()
    abandoned(argv)
    assert (tmp_path / ROOT / "x" / FILE).exists()


@pytest.mark.parametrize(
    ("varied", "name"),
    [
        (["loss.kd.temperature=4", "seed=1"], "kd.temperature=4,seed=1"),
        (["loss=[ce,kd]"], "loss=ce+kd"),
        (["compress=[]"], "compress=none"),
        (["optimizer.lr=0.1", "teacher.fit.lr=0.2"], "optimizer.lr=0.1,fit.lr=0.2"),
        (["student.stem.lr=1", "teacher.stem.lr=2"], "student.stem.lr=1,teacher.stem.lr=2"),  # two words are not enough
        (["+trainer.limit_train_batches=2"], "trainer.limit_train_batches=2"),
        ([], "7"),
    ],
)
def test_a_job_is_named_by_what_it_varies(varied, name):
    folder = folder_of(placed(["-m", "student=resnet8", "sweep=x"]))
    assert job_name(folder, ["student=resnet8", *varied], 7) == name


def test_a_jobs_name_is_a_files_and_no_other_jobs():
    folder = folder_of(placed(["-m", "sweep=x"]))
    roots = ["/a b/c", "/a-b/c", "/a b/ç", "x" * 300, "x" * 301]
    names = [job_name(folder, [f"data.root={root}"], 0) for root in roots]
    assert len({*names}) == len(roots)
    assert all(len(name) <= 100 and re.fullmatch(r"[\w.,=+-]+", name, flags=re.ASCII) for name in names)


@pytest.mark.slow
def test_jobs_are_not_repeated_and_failed_ones_are_told_apart(train, tmp_path, capfd, monkeypatch):
    words = [word for word in QUICK if word != "trainer.max_epochs=2"]
    words += ["-m", "trainer.max_epochs=1", "loss.kd.temperature=2,1e39", "compress=[]", "seed=3", "sweep=two"]
    assert train(*words, cwd=tmp_path) == 1
    told = capfd.readouterr()
    assert "1 of 2 jobs are done, in outputs/sweeps/two" in told.out
    assert re.search(r"^failed: kd\.temperature=1e\+39: the loss diverged", told.out, re.MULTILINE)
    assert "sweep=two tries them again" in told.out
    root = tmp_path / "outputs/sweeps/two"
    table = tables.summary(root)
    assert sorted(table["run"]) == ["kd.temperature=1e+39", "kd.temperature=2"]
    assert sorted(table["loss.kd.temperature"]) == [2, 1e39]
    saved = pd.read_csv(root / "sweep.csv")
    assert saved["loss.kd.temperature"].tolist() == [2]  # what is done
    assert "| kd.temperature | student % |" in (root / "sweep.md").read_text()
    weights = (root / "kd.temperature=2/student.safetensors").stat().st_mtime_ns
    monkeypatch.setattr("distill.cli.command.TRACEBACK", False)
    assert train(*words, cwd=tmp_path) == 1
    again = capfd.readouterr().out
    assert again.count("done before: ") == 1 and "distill:" not in again.partition("failed:")[0].partition("#1")[0]
    assert (root / "kd.temperature=2/student.safetensors").stat().st_mtime_ns == weights


def test_only_runs_that_differ_in_the_seed_alone_are_pooled():
    rows = [
        {"options": option, "seed": seed, "status": "done", "gain": 0.01 * (seed + 1), "test images": 100}
        | {"student top-1": 0.9, "student alone top-1": 0.8}
        for option in ("loss.kd.temperature=2", "loss.kd.temperature=4")
        for seed in (0, 1)
    ]
    lines = over_seeds(pd.DataFrame([*rows, {**rows[0], "options": "seed of its own"}]))
    assert [line.partition(",")[0] for line in lines] == ["loss.kd.temperature=2", "loss.kd.temperature=4"]


def test_nothing_of_it_imports_torch():
    code = "import sys, distill.report.sweeps, distill.cli.sweep; sys.exit(bool({'torch', 'pandas'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


READY = sorted(file.stem for file in Path(CONF, "sweep").glob("*.yaml") if file.stem != "wandb")


@pytest.mark.parametrize("name", READY)
def test_a_ready_sweeps_first_job_composes(train, tmp_path, capfd, name):
    """What it searches or varies are options, each with a value of its space."""
    words = placed(["-m", f"sweep={name}"])
    parsed = OverridesParser.create().parse_overrides([word for word in words[1:] if not word.startswith("hydra")])
    assert parsed and all(each.is_sweep_override() for each in parsed)
    first = []
    for each in parsed:
        listed = each.is_discrete_sweep()
        first.append(f"{each.get_key_element()}={next(iter(each.sweep_string_iterator())) if listed else 0.5}")
    assert train(*first, "stages=[none]", cwd=tmp_path) == 2
    assert "error: stages=[none]: expected" in capfd.readouterr().err


def test_the_command_line_says_it_otherwise(tmp_path):
    words = placed(["-m", "sweep=temperature", "loss.kd.weight=0.5"])
    assert "loss.kd.weight=0.5" in words and not any("weight=interval" in word for word in words)
    (tmp_path / "mine" / "sweep").mkdir(parents=True)
    (tmp_path / "mine" / "sweep" / "own.yaml").write_text("words:\n  - seed=1,2\n")
    sys.argv, before = ["train.py", "--config-dir", "mine"], sys.argv
    try:
        assert "seed=1,2" in placed(["-m", "--config-dir", "mine", "sweep=own"])
        (tmp_path / "mine" / "sweep" / "bad.yaml").write_text("params: {}")
        with pytest.raises(UsageError, match="expected words: and a list"):
            placed(["-m", "--config-dir", "mine", "sweep=bad"])
    finally:
        sys.argv = before


def test_jobs_of_several_processes_are_commands_of_their_own():
    assert "hydra/launcher=processes" in placed(["-m", "seed=0,1", "trainer.devices=2"])
    assert "hydra/launcher=processes" not in placed(["-m", "seed=0,1", "trainer.devices=2", "hydra/launcher=basic"])
    assert "hydra/launcher=processes" not in placed(["-m", "seed=0,1"])


def test_where_jobs_run_makes_no_other_sweep():
    placed(["-m", "seed=0,1", "student=resnet8", "sweep=mine"])
    placed(["-m", "seed=0,1", "student=resnet8", "sweep=mine", "hydra/launcher=ray", "+hydra.launcher.ray.remote.x=1"])
