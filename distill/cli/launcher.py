"""Launchers: every job of a sweep as a command of its own. Here, side by side (`hydra/launcher=processes`); on other
machines by what distill/cli/clusters.py knows. Never imports torch.

Needed where a job trains on several processes (each of which would begin a sweep of its own), and where one job leaves
cores idle: two that share two cores need a thread each, or they wait for each other.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

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
GRACE = 120  # seconds that SLURM may take to say what becomes of a job that it has terminated


@dataclass
class Job:
    """A job of a sweep, which runs where it is called.

    Attributes:
        number: in its sweep.
        words: of its command line.
        folder: of its run.
        command: what is run, in the folder `cwd`, with this `environment` besides what is there.
    """

    number: int
    words: list[str]
    folder: Path
    command: list[str]
    cwd: Path
    environment: dict[str, str]
    process: subprocess.Popen | None = field(default=None, repr=False)

    def __call__(self) -> tuple[int, str]:
        """Exit code and last line; all lines are in the folder's output.txt."""
        if is_done(self.folder, self.words):  # called again
            return 0, ""
        with open(self.folder / "output.txt", "a", encoding="utf-8") as lines:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.cwd,
                env={**os.environ, **self.environment, signals.PARENT: str(os.getpid())},
                stdin=subprocess.DEVNULL,
                stdout=lines,
                stderr=subprocess.STDOUT,
            )
        with self._handing_on():
            try:
                code = self.process.wait()
            except BaseException:
                self.end()
                raise
            if code == 128 + signal.SIGTERM and os.environ.get(signals.SUBMITIT) == "slurm":
                time.sleep(GRACE)  # a job that is to be queued again must not have a result
        text = (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace").strip()
        return code, text.rpartition("\n")[2].removeprefix("error: ")

    def end(self, by: signal.Signals = signal.SIGTERM) -> None:
        """Ask its process to save and leave."""
        if self.process:
            self.process.send_signal(by)

    def checkpoint(self):
        """What submitit queues again when time is up or the machine is wanted: this job, once it has saved."""
        from submitit.helpers import DelayedSubmission

        if self.process and self.process.returncode is None:
            self.end(signal.SIGUSR2)
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)  # `__call__` holds the lock of its wait()
        return DelayedSubmission(replace(self, process=None))

    @contextmanager
    def _handing_on(self) -> Iterator[None]:
        """SIGTERM is the job's to answer, not that of the process that waits for it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, lambda *_: self.end())
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


class Commands(Launcher):
    """Runs jobs as commands of their own; a subclass says where.

    Attributes:
        many: how many at a time; None: as many as there are.
    """

    many: int | None = 1

    def setup(self, *, hydra_context, task_function, config: DictConfig) -> None:
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Their returns: the exit code as value. Signals that end this process are handed on, and their jobs save."""
        root = Path(self.config.hydra.sweep.dir)
        jobs = [self._job(root, [*words], number) for number, words in enumerate(job_overrides, initial_job_idx)]
        codes: dict[int, int] = {}
        for job in jobs:
            if is_done(job.folder, job.words):
                say(f"done before: {os.path.relpath(job.folder)}")
                codes[job.number] = 0
        waiting, running = [job for job in jobs if job.number not in codes], {}
        try:
            while waiting or running:
                room = len(waiting) if self.many is None else self.many - len(running)
                batch, waiting = waiting[:room], waiting[room:]
                for job in batch:
                    job.folder.mkdir(parents=True, exist_ok=True)
                    say(f"job {job.number}: {os.path.relpath(job.folder)}")
                running |= zip(self.submit(batch), batch, strict=True)
                for handle in self.ended(running):
                    job = running.pop(handle)
                    codes[job.number] = _told(job, *self.outcome(handle))
        except BaseException:
            signals.leave()
            for handle, job in running.items():
                self.cancel(handle, job)
            raise
        finally:
            self.close()
        return [_returned(job, codes[job.number]) for job in jobs]

    @abstractmethod
    def submit(self, jobs: Sequence[Job]) -> list:
        """Start these; a handle of each."""

    @abstractmethod
    def ended(self, handles: Iterable) -> Iterable:
        """Those that have ended, perhaps none, after some waiting."""

    @abstractmethod
    def outcome(self, handle: Any) -> tuple[int, str]:
        """Exit code and last line of one that has ended."""

    @abstractmethod
    def cancel(self, handle: Any, job: Job) -> None:
        """Ask one that runs to save and leave."""

    def close(self) -> None:
        """The batch has ended, or is being left."""

    def environment(self, number: int) -> dict[str, str]:
        """What this package needs to be found, and to tell errors itself: this process has HYDRA_FULL_ERROR set."""
        paths = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH", ""))))
        return {"PYTHONPATH": paths, "HYDRA_FULL_ERROR": "0"}

    def _job(self, root: Path, words: list[str], number: int) -> Job:
        folder = root / job_name(str(root), words, number)
        command = [*program(), *words, f"hydra.run.dir={quoted(str(folder))}"]
        return Job(number, words, folder.absolute(), command, Path.cwd(), self.environment(number))


def _told(job: Job, code: int, last: str) -> int:
    """Say how a job ended; its exit code."""
    if code and not (job.folder / "run.json").exists():
        note_error(job.folder, last)
    say(f"job {job.number}: {'done' if code == 0 else last or f'exit code {code}'}")
    return code


def _returned(job: Job, code: int) -> JobReturn:
    found = JobReturn(overrides=job.words, cfg=OmegaConf.create(), working_dir=str(job.folder))
    found.status, found.return_value = JobStatus.COMPLETED, code  # the table tells what failed
    return found


class Processes(Commands):
    """Jobs on this machine.

    Args:
        side_by_side: how many at a time; None: one.
    """

    def __init__(self, side_by_side: int | None = None):
        self.many = whole("side_by_side", side_by_side) or 1
        self.pool: ThreadPoolExecutor | None = None

    def submit(self, jobs: Sequence[Job]) -> list[Future]:
        self.pool = self.pool or ThreadPoolExecutor(self.many)
        return [self.pool.submit(job) for job in jobs]

    def ended(self, handles: Iterable[Future]) -> Iterable[Future]:
        return wait(handles, return_when=FIRST_COMPLETED).done

    def outcome(self, handle: Future) -> tuple[int, str]:
        return handle.result()

    def cancel(self, handle: Future, job: Job) -> None:
        job.end()

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown()
        self.pool = None

    def environment(self, number: int) -> dict[str, str]:
        """Its part of the cores, and one GPU where there are several jobs."""
        plain = super().environment(number)
        if self.many == 1:
            return plain
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // self.many))
        given = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
        gpus = given or [str(each) for each in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]
        gpu = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
        return {**plain, "OMP_NUM_THREADS": threads, **gpu}


def whole(option: str, value: Any, least: int = 1) -> int | None:
    """An option of a launcher that is a whole number or null.

    Raises:
        UsageError: it is neither.
    """
    if value is not None and (type(value) is not int or value < least):
        raise UsageError(f"hydra.launcher.{option}={value}: expected a whole number of at least {least}")
    return value


def program() -> list[str]:
    """The command that this one is."""
    path = Path(sys.argv[0])
    return [sys.executable, str(path.absolute())] if path.name == "train.py" else [sys.executable, "-m", "distill"]


def register(plugin: type, group: str, name: str, /, **options) -> None:
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
