"""`-m`, `sweep=NAME`: where a sweep lives, so that two share no folder and one can go on. Never imports torch."""

import itertools
import shutil
import time
from contextlib import suppress
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from distill.errors import UsageError
from distill.files import CONF, config_dirs, read_yaml, write_json
from distill.progress import leads
from distill.runs.sweeps import FILE, ROOT, read_sweep

FLAGS = {"-m", "--multirun"}
DIR = "hydra.sweep.dir"
LAUNCHER = "hydra/launcher="


def placed(argv: list[str]) -> list[str]:
    """The command line of a sweep with its folder: outputs/sweeps/NAME of `sweep=NAME`, which goes on where there is
    such a sweep, else one of the present time, and never one that another sweep has.

    Raises:
        UsageError: `sweep=` without a sweep; a NAME that is no folder's; the folder holds another sweep; `run=` in one.
    """
    given = [word.partition("=")[2] for word in argv if word.startswith("sweep=")]
    argv = [word for word in argv if not word.startswith("sweep=")]
    argv = [*argv, *(_ready(given[-1], argv) if given else [])]
    if not FLAGS & {*argv}:
        if given:
            raise UsageError(f"sweep={given[-1]} names a sweep, and this is none: add -m, or seeds=0,1,2")
        return argv
    if {"--help", "-h", "--cfg", "-c", "--info", "-i"} & {*argv}:
        return argv
    words = [word for word in get_args_parser().parse_known_intermixed_args(argv)[0].overrides if not _is_hydras(word)]
    if any(word.startswith("run=") for word in words):
        raise UsageError("run= continues one run, and -m makes new ones: leave out one of the two")
    elsewhere = [word.partition("=")[2] for word in argv if word.startswith(f"{DIR}=")]
    if elsewhere and given:
        raise UsageError(f"give either sweep= or {DIR}=")
    plugins = [word for word in argv if _is_hydras(word) and not word.startswith(DIR)]
    described = {"fixed": _fixed(words), "command": [*plugins, *words]}
    if elsewhere:
        _keep(Path(elsewhere[-1].strip("'\"")), described)
        return argv
    folder = _named(given[-1]) if given else _new()
    _keep(folder, described)
    return [*argv, *_apart(argv), f"{DIR}='{folder}'"]


def _is_hydras(word: str) -> bool:
    return word.lstrip("+~").startswith("hydra")


def _ready(name: str, argv: list[str]) -> list[str]:
    """The words of conf/sweep/NAME.yaml, the user's own folder included, but for what the command line says otherwise.

    Raises:
        UsageError: there is such a file, and it has no list of words.
    """
    files = [file for folder in (*config_dirs(), CONF) if (file := Path(folder, "sweep", f"{name}.yaml")).is_file()]
    if not files:
        return []
    words = read_yaml(files[0]).get("words")
    if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise UsageError(f"{files[0]}: expected words: and a list of what a command line would have")
    said = {word.lstrip("+~").partition("=")[0] for word in argv}
    return [word for word in words if word.lstrip("+~").partition("=")[0] not in said]


def _apart(argv: list[str]) -> list[str]:
    """Jobs that train on several processes need one of their own: each of them would begin a sweep."""
    options = ("trainer=", "trainer.devices=", "trainer.strategy=", "trainer.num_nodes=")
    several = any(word.startswith(options) and word != "trainer=default" for word in argv)
    given = any(word.startswith(LAUNCHER) for word in argv)
    return [f"{LAUNCHER}processes"] if several and not given else []


def _fixed(words: list[str]) -> list[str]:
    """The words that are alike for all jobs.

    Raises:
        HydraException: a word that is none.
    """
    parsed = OverridesParser.create().parse_overrides(words)
    return [as_handed_on(override) for override in parsed if not override.is_sweep_override()]


def as_handed_on(override: Override) -> str:
    """A word as Hydra gives it to a job: 1e-3 is 0.001."""
    return f"{override.get_key_element()}={override.get_value_element_as_str()}"


def _named(name: str) -> Path:
    if not name.isprintable() or {*name} & {*"/\\'\""} or name in ("", ".", ".."):
        raise UsageError(f"sweep={name!r}: expected the name of a folder in {ROOT}/, such as sweep=temperatures")
    return Path(ROOT, name)


def _new() -> Path:
    """A folder of the present time that nobody has."""
    if not leads():
        raise UsageError("several processes train together: name the sweep, sweep=NAME, so that all find its folder")
    Path(ROOT).mkdir(parents=True, exist_ok=True)
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count(1):
        folder = Path(ROOT, now if number == 1 else f"{now}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder


def _keep(folder: Path, described: dict) -> None:
    """Say in the folder what its sweep is.

    Raises:
        UsageError: it holds another one.
    """
    if (folder / FILE).is_file():
        before, now = read_sweep(folder)["fixed"], described["fixed"]
        if {*before} != {*now}:
            apart = [f"then {' '.join(sorted({*before} - {*now})) or 'nothing'}"]
            apart.append(f"now {' '.join(sorted({*now} - {*before})) or 'nothing'}")
            raise UsageError(
                f"{folder} holds another sweep: of what all jobs share, {', '.join(apart)}; give the same words, or "
                "another name (sweep=NAME)"
            )
    if leads():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, described)


def folder_of(argv: list[str]) -> Path | None:
    """The folder of the command line's sweep."""
    return next((Path(word.partition("=")[2].strip("'\"")) for word in argv if word.startswith(f"{DIR}=")), None)


def abandoned(argv: list[str]) -> None:
    """Take back the folder of a sweep of which no job was begun. Hydra leaves a multirun.yaml in it."""
    folder = folder_of(argv)
    if folder and leads() and {path.name for path in folder.glob("*")} <= {FILE, "multirun.yaml"}:
        shutil.rmtree(folder, ignore_errors=True)
