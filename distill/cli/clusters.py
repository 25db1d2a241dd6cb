"""`hydra/launcher=submitit_slurm`, `submitit_local`, `ray`: jobs of a sweep where a scheduler puts them. What they need
is that all machines see this folder and this Python.

Options are named as those of Hydra's own plugins, hydra-submitit-launcher and hydra-ray-launcher, whose jobs run inside
the scheduler's process: there no training on several processes begins, none saves when its time is up, and one that is
killed takes the table of all with it. Never imports torch; submitit and Ray only when jobs begin.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import OmegaConf

from distill.cli.launcher import Commands, Job, whole
from distill.errors import UsageError, UserError
from distill.files import PACKAGE

SECONDS = 0.5  # between two looks at what has ended
SILENCE = 10  # seconds until an address that says nothing is taken for nobody's
SAVING = 30  # seconds that a job of Ray's has to save in when all is left
TIMEOUTS = 100  # of a job: it goes on, so that its time may be up often
PLACE = ".submitit"  # in the sweep's folder: what submitit writes of its jobs
COMMON = {  # of submitit: what any scheduler understands
    "timeout_min": 60,
    "cpus_per_task": None,
    "gpus_per_node": None,
    "tasks_per_node": 1,
    "mem_gb": None,
    "nodes": 1,
    "name": "distill",
    "stderr_to_stdout": False,
}
SLURM = {
    **COMMON,
    "array_parallelism": None,  # jobs at a time; null: all of a grid, one trial of a search
    **dict.fromkeys(("partition", "qos", "account", "comment", "constraint", "exclude", "gres")),
    **dict.fromkeys(("cpus_per_gpu", "gpus_per_task", "mem_per_gpu", "mem_per_cpu")),
    "signal_delay_s": 120,  # before the time is up: to save in
    "max_num_timeout": TIMEOUTS,
    "additional_parameters": {},  # of sbatch: {mail-type: END}
    "setup": None,  # lines of the shell before the job: ["module load cuda"]
}
LOCAL = {**COMMON, "side_by_side": None, "max_num_timeout": TIMEOUTS}
RAY = {"ray": {"init": {"address": None}, "remote": {}}, "side_by_side": None}
NUMBERS = {"timeout_min", "cpus_per_task", "tasks_per_node", "nodes", "signal_delay_s"}
NUMBERS |= {"array_parallelism", "side_by_side"}


class Submitit(Commands):
    """Jobs of submitit. One that is told that its time is up, or that its machine is wanted (SIGUSR2), saves and is
    queued again, and goes on."""

    scheduler: str  # submitit's word

    def __init__(self, **options: Any):
        self.options = {name: _plain(value) for name, value in options.items()}
        for name in NUMBERS & {*options}:
            whole(name, options[name])
        for name in {"gpus_per_node", "max_num_timeout"} & {*options}:
            whole(name, options[name], 0)
        self.submitit = _needed("submitit", "submitit")
        self.executor: Any = None

    def submit(self, jobs: Sequence[Job]) -> list:
        _found()
        self.executor = self.executor or self._made()
        try:
            return self.executor.submit_array(jobs) if jobs else []
        except self.submitit.core.utils.FailedJobError as error:
            raise UserError(f"{self.scheduler} takes no job: {_line(error)}") from None

    def ended(self, handles: Iterable) -> list:
        time.sleep(SECONDS)
        return [each for each in handles if each.done()]

    def outcome(self, handle: Any) -> tuple[int, str]:
        """Of a job of several tasks the first that failed."""
        try:
            return next((each for each in handle.results() if each[0]), (0, ""))
        except Exception as error:  # whatever ended submitit's process, and it raises what that raised
            return 1, f"{self.scheduler}'s job {handle.job_id} ended without a word: {_line(error)}"

    def cancel(self, handle: Any, job: Job) -> None:
        handle.cancel()

    def environment(self, number: int) -> dict[str, str]:
        threads = self.options["cpus_per_task"]
        given = {} if threads is None or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
        return {**super().environment(number), **given}

    def _made(self):
        own = {"array_parallelism", "side_by_side"} if self.scheduler == "local" else {"side_by_side"}
        folder = Path(self.config.hydra.sweep.dir, PLACE).absolute()
        options = {name: value for name, value in self.options.items() if value is not None and name not in own}
        times = options.pop("max_num_timeout")
        executor = self.submitit.AutoExecutor(
            folder, cluster=self.scheduler, **{f"{self.scheduler}_max_num_timeout": times}
        )
        named = {name if name in COMMON else f"{self.scheduler}_{name}": each for name, each in options.items()}
        executor.update_parameters(**named)
        return executor


class Slurm(Submitit):
    """Jobs of SLURM, all of a grid in one array."""

    scheduler = "slurm"

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.many = options["array_parallelism"]
        if shutil.which("sbatch") is None:
            raise UsageError(
                "hydra/launcher=submitit_slurm: no SLURM here (no sbatch): start it where jobs are submitted; "
                "hydra/launcher=submitit_local or =processes runs them on this machine"
            )


class Local(Submitit):
    """Jobs on this machine, as SLURM would treat them."""

    scheduler = "local"

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.many = options["side_by_side"] or 1

    def cancel(self, handle: Any, job: Job) -> None:
        with suppress(ProcessLookupError):
            os.kill(int(handle.job_id), signal.SIGTERM)
        handle.wait()


class Ray(Commands):
    """Jobs as tasks of Ray, on this machine or on the cluster of `ray.init.address`; one whose machine is lost is
    started again elsewhere, and goes on.

    Args:
        ray: "init", what `ray.init` takes, and "remote", what a task asks for (num_cpus, num_gpus, max_retries).
        side_by_side: how many at a time; None: as many as Ray finds room for, of a search one.
    """

    def __init__(self, ray: Mapping, side_by_side: int | None = None):
        self.many = whole("side_by_side", side_by_side)
        self.given = _plain(ray)
        self.ray = _needed("ray", "ray")

    def submit(self, jobs: Sequence[Job]) -> list:
        self._begin()
        task = self.ray.remote(_run)
        options = {"max_retries": TIMEOUTS, **(self.given.get("remote") or {})}
        try:
            return [task.options(**options).remote(job) for job in jobs]
        except (TypeError, ValueError) as error:
            raise UsageError(f"hydra.launcher.ray.remote: {_line(error)}") from None

    def _begin(self) -> None:
        if self.ray.is_initialized():
            return
        _found()
        quiet = {"log_to_driver": False, "include_dashboard": False, "logging_level": "ERROR"}
        init = {**quiet, **{name: each for name, each in (self.given.get("init") or {}).items() if each is not None}}
        _reached(init.get("address"))
        try:
            self.ray.init(**init)
        except (ConnectionError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"hydra.launcher.ray.init: no Ray: {_line(error)}") from None

    def ended(self, handles: Iterable) -> list:
        return self.ray.wait([*handles], timeout=SECONDS)[0]

    def outcome(self, handle: Any) -> tuple[int, str]:
        try:
            return self.ray.get(handle)
        except self.ray.exceptions.RayError as error:
            return 1, f"Ray's task ended without a word: {_line(error)}"

    def cancel(self, handle: Any, job: Job) -> None:
        self.ray.cancel(handle)
        self.ray.wait([handle], timeout=SAVING)


def _found() -> None:
    """The scheduler's own processes, which begin with this environment, import this package."""
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(PACKAGE.parent) not in places:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PACKAGE.parent), *places)))


def _run(job: Job) -> tuple[int, str]:
    return job()


def _reached(address: str | None) -> None:
    """Raises UserError where nobody answers at HOST:PORT, which Ray itself would ask for minutes."""
    host, _, port = str(address).removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):  # "auto", or a Ray of this process's own
        return
    try:
        socket.create_connection((host, int(port)), timeout=SILENCE).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"hydra.launcher.ray.init.address={address}: no answer there: {_line(error)}") from None


def _needed(package: str, extra: str) -> ModuleType:
    """The module.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError:
        raise UsageError(
            f"{package} is not installed: pip install 'distill[{extra}]' (pip install {package})"
        ) from None


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


LAUNCHERS = {"submitit_slurm": (Slurm, SLURM), "submitit_local": (Local, LOCAL), "ray": (Ray, RAY)}
