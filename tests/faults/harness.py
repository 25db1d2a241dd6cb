"""Runs of the command line in a process of their own, with a fault in it.

A fault is Python that the process runs before anything else, and so do the processes that it starts:

    done = run(folder, *WORDS, fault=full("new.ckpt"))
    done = run(folder, *WORDS, fault=killed("student.safetensors", "before"))
    process = started(folder, *WORDS); wait_for(process, "epoch 1/"); process.kill()

FAULTS are functions of the text `prelude`, which any fault can use besides its own Python.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

QUICK = [
    *("data=fake", "data.image_size=16", "data.train_size=120", "data.batch_size=16"),
    *("teacher=resnet8", "student=resnet8_tiny", "trainer.max_epochs=2", "trainer.accelerator=cpu"),
]

PRELUDE = '''
import errno, fnmatch, importlib.abc, importlib.util, os, resource, signal, sys, threading, time

def after_import(name, change):
    """Call `change(module)` as soon as the module `name` has been imported."""
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, wanted, path, target=None):
            if wanted != name:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (load(module), change(module))
            return spec
    sys.meta_path.insert(0, Finder())

def at_write(pattern, happen):
    """Call `happen("before")` before a file of such a name is written or opened for writing, of one that is written
    whole or not at all `happen("after")` as soon as it is in its place."""
    def matches(path):
        return fnmatch.fnmatch(os.path.basename(os.fspath(path)), pattern)
    def hook(event, arguments):
        if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            path, mode, flags = arguments
            writes = any(sign in mode for sign in "wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR)
            if writes and matches(path):
                happen("before")
    sys.addaudithook(hook)
    def change(files):
        from contextlib import contextmanager
        atomic = files.atomic
        @contextmanager
        def told(path):
            if matches(path):
                happen("before")
            with atomic(path) as temporary:
                yield temporary
            if matches(path):
                happen("after")
        files.atomic = told
    after_import("distill.files", change)
'''


def full(pattern: str, room: int = 0, times: int = 1) -> str:
    """The disk is full, but for `room` bytes a file, from the n-th time on that a file with a name like `pattern` is to
    be written."""
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))"
    return (
        f"opened = []\nat_write({pattern!r}, lambda when: when == 'before' and "
        f"(opened.append(0), len(opened) == {times} and {limit}))\n"
    )


def killed(pattern: str, when: str, times: int = 1) -> str:
    """SIGKILL before or after the n-th time that a file whose name is like `pattern` is written."""
    return (
        f"seen = []\nat_write({pattern!r}, lambda when: when == {when!r} and (seen.append(0), "
        f"len(seen) == {times} and os.kill(os.getpid(), signal.SIGKILL)))\n"
    )


class Done(NamedTuple):
    """How a process ended: the exit code (negative: the signal), and what it said."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line of stderr."""
        return (self.err.splitlines() or [""])[-1]


def started(folder: Path, *words: str, fault: str = "", env=None, **options) -> subprocess.Popen:
    """train.py at work in `folder` with these words, its output as text; the fault is kept in folder/.fault."""
    place = folder / ".fault"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(PRELUDE + fault, encoding="utf-8")
    path = os.pathsep.join([str(place), str(folder), str(ROOT)])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(env or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], cwd=folder, env=env, **pipes | options)


def finished(process: subprocess.Popen, timeout: float = 300) -> Done:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    return Done(process.returncode, out or "", err or "")


def run(folder: Path, *words: str, **options) -> Done:
    """`started` and waited for."""
    return finished(started(folder, *words, **options))


def wait_for(process: subprocess.Popen, line: str) -> str:
    """The first line of its output that has `line` in it."""
    for said in process.stdout:
        if line in said:
            return said
    raise AssertionError(f"it ended without saying {line!r}: {process.stderr.read()}")


def until(condition, seconds: float = 60) -> None:
    """Waits for `condition()`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def record(folder: Path) -> dict:
    """A run's run.json."""
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def assert_one_line(done: Done, *parts: str) -> None:
    """It failed in one line that has these parts, and without a traceback."""
    assert done.code == 1, (done.code, done.out, done.err)
    assert "Traceback" not in done.err, done.err
    assert done.error.startswith("error: "), done.err
    for part in parts:
        assert part in done.error, (part, done.err)


def leftovers(folder: Path) -> list[Path]:
    """Files that are not whole and were left behind."""
    return [path for path in folder.rglob("*") if ".tmp" in path.name]
