"""The world around a run: terminals, locales, memory, disks. One line, a place, and nothing lost."""

import errno
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_options import TINY

from distill import files
from distill.cli import command
from distill.errors import UserError
from distill.runs import run
from distill.training import resume
from distill.training.resume import AtomicCheckpoints


def started(cwd, *words, **options) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    program = [sys.executable, str(ROOT / "train.py"), *TINY, *words]
    return subprocess.run(program, cwd=cwd, env=env, capture_output=True, timeout=300, **options)


@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C", "PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["latin-1", "posix"],
)
def test_an_output_that_lacks_signs_does_not_end_a_run(tmp_path, env):
    done = started(tmp_path, "name=x", env=env)
    assert done.returncode == 0, done.stderr
    assert b"teacher: fitting" in done.stdout and b"-> outputs" in done.stdout
    assert json.loads((tmp_path / "outputs/x/run.json").read_text(encoding="utf-8"))["status"] == "done"
    failed = started(tmp_path, "loss=[ce,kd,nösuch]", env=env)
    assert failed.returncode == 2 and failed.stderr.startswith(b"error: ") and b"Traceback" not in failed.stderr


def test_a_first_fit_on_a_full_disk_says_where_and_that_it_failed(tmp_path):
    done = started(
        tmp_path,
        "name=x",
        "teacher=resnet8",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 1
    error = done.stderr.decode().splitlines()[-1]
    assert error.startswith("error: outputs/fits/teacher-") and "cannot be written" in error
    assert json.loads((tmp_path / "outputs/x/run.json").read_text())["status"] == "failed"
    assert not list(tmp_path.rglob("*.tmp"))


def test_torchs_own_error_on_a_full_disk_says_where(tmp_path, monkeypatch):
    def save(state, path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 54592 vs 54488")

    AtomicCheckpoints().save_checkpoint({"a": 1}, tmp_path / "last.ckpt")
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(UserError, match=r"last\.ckpt cannot be written \(is the disk full"):
        AtomicCheckpoints().save_checkpoint({"a": 2}, tmp_path / "last.ckpt")
    assert resume.read(tmp_path / "last.ckpt") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_an_atomic_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError) as raised, files.atomic(tmp_path / "a.json"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a stream raises it: without a name
    assert raised.value.filename == str(tmp_path / "a.json")


def test_how_a_run_ended_is_written_even_on_a_full_disk(tmp_path, monkeypatch):
    started = run.Run(tmp_path, None, {"status": "running", "error": None, "overrides": ["a=→"]})
    started.write()

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run, "atomic", full)
    started.failed(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert record == {"status": "failed", "error": None, "overrides": ["a=→"]}


@pytest.mark.parametrize(
    "exhaust",
    [lambda: torch.empty(10**15), lambda: np.empty(10**15), lambda: bytearray(10**17)],
    ids=["torch", "numpy", "python"],
)
def test_memory_that_runs_out_is_one_line(exhaust, capsys):
    try:
        exhaust()
    except Exception as error:
        assert command._tell(error) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: memory has run out") and "data.batch_size" in told and "enforce fail" not in told


def test_a_worker_that_was_killed_is_one_line(capsys):
    command._tell(RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed. "))
    assert "lower data.num_workers" in capsys.readouterr().err
