"""The command line answers fast, in one line, with the right exit code, and leaves nothing behind."""

import subprocess
import sys

import pytest
from conftest import QUICK, ROOT

from distill.cli import command, seeds


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["student=resnt8"], "no student 'resnt8'; did you mean resnet8?"),
        (["losses=ce"], "no option 'losses'; did you mean loss?"),
        (["loss.kd.temprature=2"], "no option 'loss.kd.temprature'; did you mean loss.kd.temperature?"),
        (["loss=[ce,hint]"], "no loss 'hint'"),
        (["loss.kd.temperature=cold"], "loss.kd.temperature=cold: expected a number greater than 0"),
        (["data.batch_size=1.5"], "data.batch_size=1.5: expected a whole number of at least 1"),
        (["baseline=maybe"], "baseline=maybe: expected true or false"),
        (
            ["stages=[train]"],
            "stages=[train]: expected a list, each entry one of check, teacher, cache, distill",
        ),
        (["select=first"], "select=first: expected one of best, last"),
        (["run=nowhere"], "run=nowhere is not the folder of a run"),
        (["data=imagefolder"], "data.root must be given"),
        (["loss=[ce"], "error: no viable alternative at input '[ce'"),
        (["teacher=nowhere"], "no teacher 'nowhere'. There are: convnext_tiny, custom, deit_tiny"),
        (["data=mnist"], "no data 'mnist'. There are: cifar10, cifar100, digits"),
        (["hydra/launcher=processes"], "hydra/launcher=processes is for several jobs, and this is one: add -m"),
        (["hydra/sweeper=search"], "hydra/sweeper=search is for several jobs"),
        (["-m", "seed=0,1", "hydra/launcher=x"], "no hydra/launcher 'x'. There are: basic, processes, ray, submitit_l"),
        (["-m", "seed=0,1", "hydra/sweeper=serch"], "did you mean search? There are: basic, search"),
        (["+loss.kd.weight=3"], "An item is already at 'loss.kd.weight'"),
    ],
)
def test_a_usage_error_is_one_line_and_exit_code_2(train, capfd, tmp_path, words, expected):
    assert train(*words, cwd=tmp_path) == 2
    told = capfd.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert expected in told.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("words", [["--help"], ["student=resnt8"], ["loss.kd.temperature=cold"], ["run=nowhere"]])
def test_help_and_config_errors_answer_without_importing_torch(tmp_path, words):
    program = (
        "import sys, runpy\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        "finally:\n"
        "    print('torch' in sys.modules, 'pandas' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "False False" in done.stderr
    assert done.returncode == (0 if words == ["--help"] else 2)
    if words == ["--help"]:
        assert "student: " in done.stdout
        assert "mobilenet" in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["student.checkpoint=missing.pt"], "no file missing.pt"),
        (["student.checkpoint=broken.pt"], "broken.pt is broken"),
        (["student.checkpoint=empty.safetensors"], "empty.safetensors is empty"),
        (["data=imagefolder", "data.root=missing"], "missing"),
        (["loss=[ce,at]", "loss.at.taps=[stage9]"], "loss at, student: no tap or layer 'stage9'"),
        (["teacher=resnet18", "teacher.weights=DEFAULT"], "checkpoint"),
        (["optimizer.lr=1e30", "optimizer.weight_decay=0"], "diverged"),
        (["teacher.fit.epochs=0", "loss.kd.weight=[[3,1],[1,0]]"], "loss.kd.weight"),
    ],
)
def test_bad_input_is_one_line_and_fails(train, capfd, tmp_path, monkeypatch, words, expected):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    (tmp_path / "broken.pt").write_bytes(b"PK\3\4 not a checkpoint")
    (tmp_path / "empty.safetensors").touch()
    words = [word for word in QUICK if word.partition("=")[0] not in {w.partition("=")[0] for w in words}] + words
    if "data=imagefolder" in words:
        words = [word for word in words if not word.startswith(("data.image_size", "data.train_size"))]
    assert train(*words, "baseline=false", cwd=tmp_path) in (1, 2)
    errors = [line for line in capfd.readouterr().err.splitlines() if "Warning" not in line]
    assert errors[-1].startswith("error: ")
    assert expected in errors[-1]
    assert "Traceback" not in "".join(errors)
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("student*.safetensors"))


def test_torchs_absence_is_a_line_with_the_command_that_brings_it(tmp_path):
    program = (
        "import sys, runpy, time\n"
        "start = time.process_time()\n"
        "sys.modules['torch'] = None\n"  # as if it weren't there
        "try:\n"
        f"    runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        "finally:\n"
        "    print(time.process_time() - start)\n"
    )
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stderr == "error: torch is not installed: pip install torch torchvision\n" and done.returncode == 1
    assert float(done.stdout) < 1
    assert not list(tmp_path.rglob("*.yaml"))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("operator torchvision::nms does not exist"), "belong together: pip install --upgrade torch"),
        (ModuleNotFoundError("No module named 'sklearn'", name="sklearn.base"), "not installed: pip install scikit-"),
    ],
)
def test_packages_that_are_missing_or_unlike_are_told_with_the_command(capsys, error, told):
    assert command._tell(error) == 1
    line = capsys.readouterr().err
    assert told in line and line.count("\n") == 1 and "HYDRA_FULL_ERROR" not in line


def test_a_traceback_comes_when_asked_for(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "stages=[train]"],
        cwd=tmp_path,
        env={"HYDRA_FULL_ERROR": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "UsageError" in done.stderr


def test_seeds_is_a_sweep_under_one_teacher():
    spread = seeds.spread(["student=resnet8", "seeds=3,5"])
    assert spread == ["-m", "student=resnet8", "seed=3,5", "cache.seed=3", "teacher.fit.seed=3"]
    kept = seeds.spread(["-m", "teacher=peer", "cache.seed=9", "seeds=[3,5]"])
    assert kept == ["-m", "teacher=peer", "cache.seed=9", "seed=3,5"]
    assert seeds.spread(["seed=4"]) == ["seed=4"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["seeds=1"], "at least two different whole numbers"),
        (["seeds=1,1"], "at least two different whole numbers"),
        (["seeds=1,1,2"], "at least two different whole numbers"),
        (["seeds=a,b"], "at least two different whole numbers"),
        (["seeds=-1,2"], "at least two different whole numbers"),
        (["seeds="], "at least two different whole numbers"),
        (["seeds=1,2", "seed=3"], "either seed= or seeds="),
        (["seeds=1,2", "run=outputs/x"], "trains no student"),
        (["seeds=1,2", "student.checkpoint=x.safetensors", "stages=[compress,export,report]"], "trains no student"),
    ],
)
def test_seeds_that_decide_nothing_are_refused(train, tmp_path, capfd, words, told):
    assert train(*words, cwd=tmp_path) == 2
    assert told in capfd.readouterr().err
    assert not any(tmp_path.iterdir())
