"""A run's folder: what is needed to continue it, to export it again, to analyse it, to rebuild its student."""

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from distill import locks
from distill.data.base import Data, Split
from distill.data.fingerprint import difference, fingerprint
from distill.data.prepare import preparation
from distill.errors import DamagedError, Pruned, UsageError, UserError
from distill.files import atomic, read_json, sealed, write_json, write_yaml
from distill.networks.network import Network
from distill.networks.weights import read_state, save_weights
from distill.progress import leads, printable, say
from distill.runs import trust
from distill.runs.changes import IMAGES, refuse_changes
from distill.runs.records import (
    CWD,
    STARTING_POINT,
    choices,
    command_line,
    continued,
    read_config,
    read_record,
    unforced,
    ways_on,
)
from distill.runs.student import STUDENT, STUDENT_LAST, read_description, rebuild, without
from distill.runs.sweeps import LOCK
from distill.signals import Ended

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "torchmetrics", "numpy")
MADE = (STUDENT, STUDENT_LAST, "checkpoints", "metrics", "compress", "export", "report.json")  # by a run's stages
RECORDS = ("run.json", "config.yaml", IMAGES)
SOURCES = ("root", "train", "val", "test")  # options of a data set that say where its images lie
ONCE = ("trust", "force", "restart")  # are for one command
PATIENCE = 10  # seconds: a killed run's loader processes notice within five, and hold its lock until then


class Run:
    """`folder` and the configuration `cfg` that is in force in it; `words` are those of the present command."""

    def __init__(self, folder: Path, cfg: DictConfig, record: dict, words: Sequence[str] = ()):
        self.folder, self.cfg, self.record, self.words = folder, cfg, record, words

    def does(self, *stages: str) -> bool:
        """Whether any of the stages is asked for."""
        return any(stage in self.cfg.stages for stage in stages)

    def compresses(self) -> bool:
        """Whether there is a compressed network: asked for now, or made by an earlier stage of this run."""
        return self.does("compress") or self.record.get("compressed") == list(self.cfg.compress)

    def distilled(self, whole: bool = False) -> bool:
        """Whether there is a student; `whole`: one that is what was written. If not, and there are checkpoints to take
        it from again, that is said.

        Raises:
            DamagedError: it is not, and there are none.
        """
        found = (self.folder / STUDENT).is_file()
        files = [file for name in (STUDENT, STUDENT_LAST) if (file := self.folder / name).is_file()]
        for file in files if found and whole else []:
            try:
                read_state(file)
            except DamagedError as error:
                if not (self.folder / "checkpoints").exists():
                    raise DamagedError(f"{error}; there are no checkpoints to take it from again") from error
                say(f"warning: {error}; the student is taken from the checkpoints")
                return False
        return found

    def check_images(self, data: Data) -> None:
        """Raises UserError where the run's images are others than they were, and force=true is not given."""
        file, now = self.folder / IMAGES, fingerprint(data)
        changed = self.cfg.force or self.cfg.trust
        if file.is_file() and _made(self.folder):
            told = difference(read_json(file, changed=changed), now)
            if told and not self.cfg.force:
                raise UserError(
                    f"{self.folder}: its images are not those it began with: {told}: bring them back, start a new run "
                    "(another name=), or go on all the same (force=true)"
                )
            if told:
                self.write(forced=[*self.record.get("forced", []), told])
        if leads() and list(self.cfg.stages) != ["check"]:
            write_json(file, now)

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
                "prepared": preparation(data).described(),
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
            **choices(self.record),
        }

    def commands(self) -> list[str]:
        """The command lines of this run: one after the other make the same."""
        commands = self.record["commands"]
        if len(commands) > 1 and not any(word.startswith("name=") for word in commands[0]):  # the others name it
            commands = [[*commands[0], f"name={self.folder.name}"], *commands[1:]]
        return [command_line(words) for words in commands]

    def command(self) -> str:
        """The present command line; of one that only goes on, that with which it goes on."""
        return self.commands()[-1] if _goes_on(self.words) else command_line(self.words)

    def context(self, data: Data) -> dict:
        """What the report says of the run."""
        saved = read_description(self.folder / STUDENT)
        chosen = f"{saved['selected']} epoch, {saved['epoch']}" if saved["epoch"] else "none: its weights were given"
        roots = [self.cfg.data[key] for key in SOURCES if self.cfg.data.get(key)]
        context = {
            "command": " && ".join(self.commands()),
            "student's epoch": chosen,
            **({"data root": ", ".join(map(printable, map(str, roots)))} if roots else {}),
            **{f"{split} images": len(part) for split, part in _splits(data).items()},
            "classes": data.num_classes,
        }
        forced = {"went on although": "; ".join(self.record["forced"])} if self.record.get("forced") else {}
        return {**self.origin(), **context, **forced}

    def write(self, **changes) -> None:
        self.record |= changes
        if leads():
            with atomic(self.folder / "run.json") as temporary:
                temporary.write_text(sealed(self.record), encoding="utf-8")

    def failed(self, error: BaseException) -> None:
        """Say in run.json that it ended by `error`; on a full disk, in the place that the file has already."""
        reason = " ".join(str(error).split()) or type(error).__name__
        status = error.status if isinstance(error, (Ended, Pruned)) else "failed"
        try:
            self.write(status=status, error=reason, ended=_now())
        except OSError:
            path = self.folder / "run.json"
            with contextlib.suppress(OSError, UserError):
                record = json.dumps(read_json(path) | {"status": status}, indent=2)  # shorter without its checksum
                if len(record.encode()) <= path.stat().st_size:
                    with open(path, "r+b") as file:
                        file.write(record.encode().ljust(path.stat().st_size))


def _goes_on(words: Sequence[str]) -> bool:
    return bool(words) and all(word.startswith("run=") for word in words)


def _splits(data: Data) -> dict[str, Split]:
    return {"training": data.train, "validation": data.val, "test": data.test}


@contextlib.contextmanager
def open_run(cfg: DictConfig) -> Iterator[Run]:
    """The run that this command line starts or continues; how it ended is written into its run.json.

    A continued run is composed anew from its own command line with the present one's words added, so that
    groups can be chosen again (`stages=[compress,export,report] compress=...`). A folder in which nothing was made yet
    (the first command was refused) takes any configuration. A command that fails before it made anything leaves the
    records of a run as they were.

    Raises:
        UsageError: the folder holds a run of another configuration, and force=true is not given.
        UserError: another process is at work in it, its records are damaged, or what it says names something that
            isn't this package's (see distill/runs/trust.py) and trust=true is not given.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    with _alone_in(folder):
        before = _made(folder)
        there = [folder / name for name in RECORDS if (folder / name).is_file()] if before or cfg.run else []
        records = {file.name: file.read_bytes() for file in there}
        run = _opened(folder, cfg, begun=bool(before))
        run.write(status="running", seed=run.cfg.seed, stages=list(run.cfg.stages), error=None)
        try:
            yield run
        except BaseException as error:
            if records and isinstance(error, Exception) and _made(folder) == before:
                _restore(folder, records)
            else:
                run.failed(error)
            raise
        run.write(status="done", ended=_now())


def _made(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file that a run's stages have made."""
    tops = (folder / name for name in MADE)
    files = (file for top in tops for file in (top.rglob("*") if top.is_dir() else [top]) if file.is_file())
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


def _restore(folder: Path, records: dict[str, bytes]) -> None:
    if leads():
        for name, content in records.items():
            with contextlib.suppress(OSError), atomic(folder / name) as temporary:
                temporary.write_bytes(content)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """The folder's lock, which ends with its process however that ends; of several that train together one holds it."""
    with contextlib.ExitStack() as held:
        if leads():
            locks.run = str(folder)
            try:
                held.enter_context(locks.alone(folder / LOCK, "the run's folder", PATIENCE))
            except locks.Held as other:
                raise UserError(
                    f"another process is at work in {folder}, {other.owner}: wait for it or end it, or start a new run "
                    "(another name=)"
                ) from None
        yield


def _opened(folder: Path, cfg: DictConfig, begun: bool) -> Run:
    hydra = HydraConfig.get()
    words = [word for word in hydra.overrides.task if word.partition("=")[0] not in ONCE]
    words = words if cfg.run is None else unforced(words)
    command, once = words, {key: cfg[key] for key in ONCE}
    record = {
        "choices": {group: hydra.runtime.choices[group] for group in ("teacher", "student", "data")},
        "overrides": words,
        "commands": [words],
        "versions": _versions(),
        "git": _git_commit(),
        "created": _now(),
    }
    changed = once["force"] or once["trust"]  # records may be: they are taken as they are
    absent = [name for name in ("run.json", "config.yaml") if begun and not (folder / name).is_file()]
    if absent:
        with ways_on(folder):
            raise DamagedError(f"{folder} holds what a run has made, and no {absent[0]}")
    if (folder / "run.json").is_file() and (begun or cfg.run is not None):
        if cfg.run is not None:
            cfg, words = continued(folder, words, once["trust"], changed)
        record = read_record(folder, changed)
        commands = record["commands"]
        again = command in commands or _goes_on(command)
        if begun:
            if not once["trust"]:
                trust.check_words(record["overrides"], folder / "run.json")
            saved = read_config(folder, changed)
            forced = refuse_changes(folder, saved, record["overrides"], cfg, once["force"])
            record["forced"] = [*record.get("forced", []), *forced]
        record["overrides"] = words
        record["commands"] = commands if again else [*commands, command]
    record[CWD] = os.path.relpath(os.getcwd(), folder.resolve())
    with open_dict(cfg):
        cfg.name, cfg.run = folder.name, None
        cfg.update(once)
    if leads():
        write_yaml(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    return Run(folder, cfg, record, command)


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
