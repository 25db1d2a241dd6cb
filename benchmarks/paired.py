"""What the benchmarks share: contenders that take turns in one process, and the record of a run."""

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch


def in_turns(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """A B C, B C A, C A B …: what each contender returns, by round; a first round, to warm up, is left out.

    Who begins changes, because what runs before a contender leaves it warm or cold memory.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            value = contenders[name]()
            if turn > 0:
                found[name].append(value)
                print(f"  round {turn}/{rounds} {name}: {value:.3f}", flush=True)
    return found


def in_own_process(module: str, *words: str, **environment: str):
    """What `python -m module words` prints as JSON in its last line."""
    command, env = [sys.executable, "-m", module, *words], os.environ | environment
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def ratio(found: Mapping[str, list[float]], name: str, other: str) -> float:
    """The median over the rounds of `name` / `other`."""
    return statistics.median(a / b for a, b in zip(found[name], found[other], strict=True))


def record(module: str, path: Path | None, **figures) -> None:
    """Write the figures with the command and the machine that made them."""
    if path is None:
        return
    about = {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "versions": {"python": sys.version.split()[0], "torch": version("torch")},
        "cpu": cpu(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    path.write_text(json.dumps({**about, **figures}, indent=2, ensure_ascii=False) + "\n")


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")
