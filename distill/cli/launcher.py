"""`hydra/launcher=processes`: every job of a sweep in a process of its own, several side by side. Never imports torch.

Needed where a job trains on several processes (each of which would begin a sweep of its own), and where one job leaves
cores idle: two that share two cores need a thread each, or they wait for each other.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from distill import signals
from distill.cli.words import quoted
from distill.errors import UsageError
from distill.files import PACKAGE
from distill.progress import say
from distill.runs.sweeps import is_done, job_name, note_error

HYDRAS = "hydra_plugins.distill"  # Hydra takes plugins from a package of this name only


class Processes(Launcher):
    """Runs jobs as commands of their own.

    Args:
        side_by_side: how many at a time; None: one.
    """

    def __init__(self, side_by_side: int | None = None):
        if side_by_side is not None and (type(side_by_side) is not int or side_by_side < 1):
            raise UsageError(f"hydra.launcher.side_by_side={side_by_side}: expected a whole number of at least 1")
        self.many = side_by_side or 1
        self.running: set[subprocess.Popen] = set()
        self.guard = threading.Lock()

    def setup(self, *, hydra_context, task_function, config: DictConfig) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Their returns: the exit code as value. Signals that end this process are handed on, and their jobs save."""
        root = Path(self.config.hydra.sweep.dir)
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        pool = ThreadPoolExecutor(self.many)
        try:
            waiting = [
                pool.submit(self._job, root, list(words), n) for words, n in zip(job_overrides, numbers, strict=True)
            ]
            return [each.result() for each in waiting]
        except BaseException:
            signals.leave()
            pool.shutdown(wait=False, cancel_futures=True)
            with self.guard:
                for process in self.running:
                    process.terminate()
            raise
        finally:
            pool.shutdown()

    def _job(self, root: Path, words: list[str], number: int) -> JobReturn:
        folder = root / job_name(str(root), words, number)
        folder.mkdir(parents=True, exist_ok=True)
        found = JobReturn(overrides=words, cfg=OmegaConf.create(), working_dir=str(folder))
        if is_done(folder, words):
            say(f"done before: {folder}")
            found.status, found.return_value = JobStatus.COMPLETED, 0
            return found
        say(f"job {number}: {folder}")
        code, last = self._run(folder, words, number)
        if code and not (folder / "run.json").exists():
            note_error(folder, last)
        said = "done" if code == 0 else last or f"exit code {code}"
        say(f"job {number}: {said}")
        found.status, found.return_value = JobStatus.COMPLETED, code  # the table tells what failed
        return found

    def _run(self, folder: Path, words: list[str], number: int) -> tuple[int, str]:
        """Exit code and last line of a job, all of whose lines are in its folder's output.txt."""
        command = [*program(), *words, f"hydra.run.dir={quoted(str(folder))}"]
        with open(folder / "output.txt", "a", encoding="utf-8") as lines:
            process = subprocess.Popen(
                command,
                env={**os.environ, **self._share(number)},
                stdin=subprocess.DEVNULL,
                stdout=lines,
                stderr=subprocess.STDOUT,
            )
            with self.guard:
                self.running.add(process)
            try:
                code = process.wait()
            finally:
                with self.guard:
                    self.running.discard(process)
        text = (folder / "output.txt").read_text(encoding="utf-8", errors="replace").strip()
        return code, text.rpartition("\n")[2].removeprefix("error: ")

    def _share(self, number: int) -> dict[str, str]:
        """The environment of a job: its part of the cores, and one GPU where there are several jobs."""
        paths = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH", ""))))
        plain = {"PYTHONPATH": paths, "HYDRA_FULL_ERROR": "0"}  # this process has it set, to tell errors itself
        if self.many == 1:
            return plain
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // self.many))
        given = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
        gpus = given or [str(each) for each in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
        return {**plain, "OMP_NUM_THREADS": threads, **gpu}


def program() -> list[str]:
    """The command that this one is."""
    path = Path(sys.argv[0])
    return [sys.executable, str(path.absolute())] if path.name == "train.py" else [sys.executable, "-m", "distill"]


def register(plugin: type, group: str, name: str, **options) -> None:
    """Offer a plugin to Hydra as GROUP=NAME with these options."""
    top, _, own = HYDRAS.partition(".")
    try:
        package = importlib.import_module(top)  # of other plugins that are installed
    except ImportError:
        package = sys.modules[top] = ModuleType(top)
        package.__path__ = []
    place = sys.modules.setdefault(HYDRAS, ModuleType(HYDRAS))
    setattr(package, own, place)
    setattr(place, plugin.__name__, plugin)
    plugin.__module__ = HYDRAS
    Plugins.instance().register(plugin)
    node = {"_target_": f"{HYDRAS}.{plugin.__name__}", **options}
    ConfigStore.instance().store(group=group, name=name, node=node)
