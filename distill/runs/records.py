"""A run's record of itself."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hydra import compose
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.asked import program
from distill.errors import DamagedError
from distill.files import MOST, damaged, read_json, read_yaml
from distill.runs import trust
from distill.runs.moved import present, renamed

STARTING_POINT = ("checkpoint", "weights", "pretrained")  # of a network: what its training began with


def read_record(folder: Path, changed: bool = False) -> dict:
    """A run's run.json; `changed`: also one that was changed since it was written.

    Raises:
        DamagedError: it is not one that a run wrote.
    """
    file = folder / "run.json"
    with ways_on(folder):
        record = read_json(file, MOST, changed)
        record.setdefault("commands", [record.get("overrides")])  # which earlier versions did not write
        kinds = {"choices": dict, "overrides": list, "commands": list, "created": str, "versions": dict}
        wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]
        if not wrong and not _are_words(record["overrides"]):
            wrong = ["overrides"]
        if not wrong and not all(map(_are_words, record["commands"])):
            wrong = ["commands"]
        if wrong:
            raise damaged(file, f"it says nothing that makes sense of its {wrong[0]}")
    return record


def _are_words(given) -> bool:
    """Whether it is a list of a run's words. Hydra's own options never are: they could name folders and packages to
    search."""
    return isinstance(given, list) and all(
        isinstance(word, str) and "hydra" not in word.partition("=")[0] for word in given
    )


def choices(record: dict) -> dict:
    """What a run was composed of, {"teacher", "student", "data"}; the teacher is "none" where the student came with its
    weights and no command asked for one."""
    words = [word for command in record["commands"] for word in command]
    asked = any(word.startswith("stages=") and "teacher" in word for word in words)
    return record["choices"] | ({"teacher": "none"} if record.get("given") and not asked else {})


PATHS = ("root", "store", "folder", "checkpoint", "train", "val", "test")  # last words of options that name files
CWD = "cwd"  # in run.json: the working directory, as the run's folder sees it


def read_config(folder: Path, changed: bool = False) -> dict:
    """A run's config.yaml with the present names, its paths as one would type them in the present working directory: so
    a run goes on from anywhere, and where it was moved to with what lies around it.

    Args:
        changed: also one that was changed since it was written.

    Raises:
        DamagedError: it is not one that a run wrote.
    """
    file = folder / "config.yaml"
    with ways_on(folder):
        found = read_yaml(file, changed)
        absent = [key for key in ("data", "teacher", "student", "loss") if not isinstance(found.get(key), dict)]
        if absent:
            raise damaged(file, f"it says nothing of the {absent[0]}")
    cwd = read_record(folder, changed).get(CWD, ".")
    base = os.path.realpath(folder / cwd) if isinstance(cwd, str) and cwd != "." else os.getcwd()
    return renamed(found if base == os.getcwd() else _rebased(found, base))


def _rebased(node: dict, base: str) -> dict:
    """Plain values with the paths that were relative to the folder `base`."""
    found = {}
    for key, value in node.items():
        is_path = key in PATHS and isinstance(value, str) and value and "://" not in value
        if is_path:
            path = os.path.normpath(os.path.join(base, os.path.expanduser(value)))
            value = path.removeprefix(os.path.join(os.getcwd(), ""))
        found[key] = _rebased(value, base) if isinstance(value, dict) else value
    return found


@contextmanager
def ways_on(folder: Path) -> Iterator[None]:
    """What can be done where one of a run's records is damaged."""
    try:
        yield
    except DamagedError as error:
        changed = "; force=true takes it as it is" if "checksum" in str(error) else ""
        raise DamagedError(
            f"{error}: bring it back from a copy{changed}; or start a new run (another name=), whose student may begin "
            f"with this one's weights (student.checkpoint={folder / 'student.safetensors'})"
        ) from None


def command_line(words: Iterable[str]) -> str:
    """What was typed: `words` as a shell takes them."""
    return " ".join([program(), *map(shlex.quote, words)])


def _added(recorded: list[str], words: list[str]) -> list[str]:
    """A run's recorded words with those of the command line that continues it: a group chosen anew forgets what was set
    in the old one."""
    words = [word for word in words if not word.startswith("run=")]
    again = {word.partition("=")[0] for word in words}
    return [*(word for word in recorded if re.split("[.=]", word)[0] not in again), *words]


def continued(folder: Path, words: list[str], trusts: bool, changed: bool) -> tuple[DictConfig, list[str]]:
    """The configuration of a run's recorded words with those of the present command line, and these words.

    Args:
        trusts: it may name what isn't this package's.
        changed: also where its records were changed since they were written.

    Raises:
        UntrustedError: it names such, and `trusts` is false; nothing of that has been opened.
        DamagedError: a record isn't what was written.
    """
    try:
        return _continued(folder, words, trusts, changed)
    except DamagedError:
        with suppress(DamagedError, HydraException, OmegaConfBaseException):
            _continued(folder, words, trusts, True)  # whoever changed it, what it names is told first
        raise


def forced(words: list[str]) -> list[str]:
    """The words of a command line that continues a run, so that Hydra takes them for what they are an option of: it
    composes them without the run's. `unforced` takes that back, and then they must be options."""
    continues = any(word.startswith("run=") for word in words)
    return [f"++{word}" if continues and _OPTION.match(word) else word for word in words]


_OPTION = re.compile(r"(?!hydra\.)\w+\.[\w.@]+=")


def unforced(words: list[str]) -> list[str]:
    return [word.removeprefix("++") for word in words]


def _continued(folder: Path, words: list[str], trusts: bool, changed: bool) -> tuple[DictConfig, list[str]]:
    recorded, words = read_record(folder, changed)["overrides"], unforced(words)
    given = [word.partition("=")[2] for word in words if word.partition("=")[0].endswith("_target_")]
    said = {word.lstrip("+~").partition("=")[0] for word in words}
    if not trusts:
        trust.check_words(recorded, folder / "run.json")
    words = _added(recorded, words)
    cfg = present(compose("train", words))
    values = OmegaConf.to_container(cfg, resolve=True)
    if not trusts:
        trust.check(values, folder, given)
        trust.check_folders(values, folder, said)
    if (folder / "config.yaml").is_file():
        saved = read_config(folder, changed)
        if not trusts:
            trust.check(saved, folder, given)  # before an expression in it becomes one
            trust.check_folders(saved, folder, said)
        before = OmegaConf.to_container(present(compose("train", recorded)), resolve=True)
        values = _kept(saved, before, values, said)
        cfg = OmegaConf.create(values)
        OmegaConf.set_struct(cfg, True)
    return cfg, words


def _kept(saved: dict, before: dict, now: dict, said: set[str], prefix: str = "") -> dict:
    """`now` with what was `saved` where the present words, which say something of the keys `said`, change nothing:
    defaults may be others than they were."""
    found = {}
    for key, value in now.items():
        parts, dotted = [part.get(key) for part in (saved, before, now)], f"{prefix}{key}"
        if all(isinstance(part, dict) for part in parts):
            found[key] = _kept(*parts, said, f"{dotted}.")
        else:
            same = key in saved and key in before and before[key] == value and dotted not in said
            found[key] = saved[key] if same else value
    return found
