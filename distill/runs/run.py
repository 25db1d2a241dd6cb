"""A run's folder: what is needed to continue it, to export it again, to analyse it, to rebuild its student."""

import contextlib
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from distill import locks
from distill.data.base import Data
from distill.errors import UsageError, UserError
from distill.files import atomic, read_yaml
from distill.networks.network import Network
from distill.networks.weights import save_weights
from distill.progress import leads
from distill.runs import trust
from distill.runs.moved import renamed
from distill.runs.records import STARTING_POINT, continued, read_record
from distill.runs.student import STUDENT, STUDENT_LAST, read_description, rebuild, without

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "torchmetrics", "numpy")
FREE = (
    "name",
    "run",
    "stages",
    "compress",
    "budget",
    "export",
    "logger",
    "tolerance",
    "experiment",
    "store",
    "baseline",
    "trust",
)

MADE = (STUDENT, STUDENT_LAST, "checkpoints", "metrics", "compress", "export", "report.json")  # by a run's stages
PATIENCE = 10  # seconds: a killed run's loader processes notice within five, and hold its lock until then


class Run:
    """`folder` and the configuration `cfg` that is in force in it."""

    def __init__(self, folder: Path, cfg: DictConfig, record: dict):
        self.folder, self.cfg, self.record = folder, cfg, record

    def does(self, *stages: str) -> bool:
        """Whether any of the stages is asked for."""
        return any(stage in self.cfg.stages for stage in stages)

    def compresses(self) -> bool:
        """Whether there is a compressed network: asked for now, or made by an earlier stage of this run."""
        return self.does("compress") or self.record.get("compressed") == list(self.cfg.compress)

    def distilled(self) -> bool:
        return (self.folder / STUDENT).is_file()

    def given(self) -> bool:
        """Whether this run trains no student: it compresses, exports or measures one that has its weights already.

        Raises:
            UsageError: it is such a run, and is to distil now.
        """
        given, student = self.record.get("given", False), self.cfg.student
        if given and self.does("cache", "distill"):
            raise UsageError(f"{self.folder} holds a student that came with its weights: to train it start a new run")
        has_weights = any(student.get(key) for key in STARTING_POINT)
        works = self.does("compress", "export", "report") and not self.does("cache", "distill")
        return given or (works and has_weights and not self.distilled())

    def save_student(self, student: Network, epochs: dict, data: Data) -> None:
        """student_last.safetensors and student.safetensors (the selected epoch), each with what rebuilds it; of a
        student that was given only the latter."""
        described = OmegaConf.to_container(self.cfg.student, resolve=True)
        described = without(STARTING_POINT, described)
        given = "given" in epochs
        if given:
            self.write(given=True)
        for file, which in [(STUDENT, "given")] if given else [(STUDENT_LAST, "last"), (STUDENT, self.cfg.select)]:
            student.net.load_state_dict(epochs[which]["state"])
            metadata = {
                "network": described,
                "classes": data.classes,
                "image_size": data.image_size,
                "selected": which,
                "epoch": epochs[which]["epoch"],
                "val_accuracy": epochs[which]["accuracy"],
            }
            texts = {key: json.dumps(value) for key, value in metadata.items()}
            save_weights(student.net, self.folder / file, texts)

    def student(self, file: str = STUDENT) -> Network:
        """The student, rebuilt from its file, which may name what this run's configuration names."""
        return rebuild(self.folder / file, trusted=trust.targets(OmegaConf.to_container(self.cfg.student)))

    def origin(self) -> dict:
        """Which run a file comes from: goes into every artifact."""
        return {
            "run": self.folder.name,
            "seed": self.cfg.seed,
            "git": self.record["git"],
            **self.record["choices"],
        }

    def context(self, data: Data) -> dict:
        """What the report says of the run: the commands one after the other make the same."""
        saved = read_description(self.folder / STUDENT)
        chosen = f"{saved['selected']} epoch, {saved['epoch']}" if saved["epoch"] else "none: its weights were given"
        commands = self.record.get("commands", [self.record["overrides"]])
        if len(commands) > 1 and not any(word.startswith("name=") for word in commands[0]):  # the others name it
            commands = [[*commands[0], f"name={self.folder.name}"], *commands[1:]]
        lines = (" ".join(["python train.py", *map(shlex.quote, words)]) for words in commands)
        context = {"command": " && ".join(lines), "student's epoch": chosen, "test images": len(data.test)}
        return {**self.origin(), **context}

    def write(self, **changes) -> None:
        self.record |= changes
        if not leads():
            return
        with atomic(self.folder / "run.json") as temporary:
            temporary.write_text(json.dumps(self.record, indent=2), encoding="utf-8")

    def failed(self, error: BaseException) -> None:
        """Say in run.json that it ended by `error`; on a full disk, in the place that the file has already."""
        reason = " ".join(str(error).split()) or type(error).__name__
        try:
            self.write(status="failed", error=reason, ended=_now())
        except OSError:
            path = self.folder / "run.json"
            with contextlib.suppress(OSError, ValueError):
                record = json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"status": "failed"}, indent=2)
                if len(record.encode()) <= path.stat().st_size:
                    with open(path, "r+b") as file:
                        file.write(record.encode().ljust(path.stat().st_size))


@contextlib.contextmanager
def open_run(cfg: DictConfig) -> Iterator[Run]:
    """The run that this command line starts or continues; how it ended is written into its run.json.

    A continued run is composed anew from its own command line with the present one's words added, so that
    groups can be chosen again (`stages=[compress,export,report] compress=...`). A folder in which nothing was made yet
    (the first command was refused) takes any configuration.

    Raises:
        UsageError: the folder holds a run of another configuration.
        UserError: another process is at work in it, its records are damaged, or what it says names something that
            isn't this package's (see distill/runs/trust.py) and trust=true is not given.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    with _alone_in(folder):
        run = _opened(folder, cfg)
        run.write(status="running", seed=run.cfg.seed, stages=list(run.cfg.stages), error=None)
        try:
            yield run
        except BaseException as error:
            run.failed(error)
            raise
        run.write(status="done", ended=_now())


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """The folder's lock, which ends with its process however that ends; of several that train together one holds it."""
    with contextlib.ExitStack() as held:
        if leads():
            locks.run = str(folder)
            try:
                held.enter_context(locks.alone(folder / ".lock", "the run's folder", PATIENCE))
            except locks.Held as other:
                raise UserError(
                    f"another process is at work in {folder}, {other.owner}: wait for it or end it, or start a new run "
                    "(another name=)"
                ) from None
        yield


def _opened(folder: Path, cfg: DictConfig) -> Run:
    hydra = HydraConfig.get()
    words = [word for word in hydra.overrides.task if not word.startswith("trust=")]  # trust is for one command
    command = words
    record = {
        "choices": {group: hydra.runtime.choices[group] for group in ("teacher", "student", "data")},
        "overrides": words,
        "commands": [words],
        "versions": _versions(),
        "git": _git_commit(),
        "created": _now(),
    }
    begun, trusts = any((folder / name).exists() for name in MADE), cfg.trust
    if (folder / "run.json").is_file() and (begun or cfg.run is not None):
        record = read_record(folder)
        commands = record.get("commands", [record["overrides"]])
        again = command in commands or all(word.startswith("run=") for word in command)  # it only goes on
        if cfg.run is not None:
            cfg, words = continued(folder, record["overrides"], words, trusts)
        if begun:
            if not trusts:
                trust.check_words(record["overrides"], folder / "run.json")
            _refuse_change(folder, record["overrides"], cfg)
        record["overrides"] = words
        record["commands"] = commands if again else [*commands, command]
    with open_dict(cfg):
        cfg.name, cfg.run, cfg.trust = folder.name, None, trusts
    if leads():
        with atomic(folder / "config.yaml") as temporary:
            temporary.write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
    return Run(folder, cfg, record)


def _refuse_change(folder: Path, words: list[str], new: DictConfig) -> None:
    """Options that came into being after the run was made have the values that its `words` give them now."""
    known, new = (renamed(OmegaConf.to_container(cfg, resolve=True)) for cfg in (compose("train", words), new))
    old = _merged(known, renamed(read_yaml(folder / "config.yaml")))
    changed = [key for key in new if key not in FREE and old.get(key) != new[key]]
    if changed:
        raise UsageError(
            f"{folder} holds a run of another configuration ({', '.join(changed)} differ): it can be continued "
            "or exported again as it is; for other values start a new run (another name=)"
        )


def _merged(old, new):
    """`old` with what `new` says, mappings key by key."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _merged(old[key], value) if key in old else value for key, value in new.items()}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _git_commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(sys.argv[0]).resolve().parent,
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
