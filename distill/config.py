"""Where the configuration lives, and what Hydra doesn't check by itself. Never imports torch."""

import difflib
import itertools
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from distill.errors import UsageError

PACKAGE = Path(__file__).parent
PATH = str(PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf")
NULLABLE = ("cache.views",)  # numbers that null may stand for, whatever their default
STAGES = ["teacher", "cache", "distill", "compress", "export", "report"]


def register(argv: list[str] | None = None) -> None:
    """Offer every conf/network/NAME.yaml, the user's own included, as `teacher=NAME` and `student=NAME`."""
    OmegaConf.register_new_resolver("run_dir", run_dir, replace=True)
    folders = [PATH, *config_dirs(argv)]
    for file in sorted(file for folder in folders for file in Path(folder, "network").glob("*.yaml")):
        for role in ("teacher", "student"):
            defaults = [{"/role@_here_": role}, {"/network@_here_": file.stem}, "_self_"]
            ConfigStore.instance().store(group=role, name=file.stem, node={"defaults": defaults})


def config_dirs(argv: list[str] | None = None) -> list[str]:
    """The folders of the user's own configuration that the command line names."""
    argv = sys.argv if argv is None else argv
    folders = []
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        if flag in ("--config-dir", "-cd"):
            folders.append(value)
        elif flag.startswith("--config-dir="):
            folders.append(flag.partition("=")[2])
    return folders


def run_dir(run: str | None, new: str) -> str:
    """The folder of the run to continue, or of the new one: outputs/NAME. Hydra makes it, so a wrong one is refused
    first; where no name is given and another run began in the same second, the new one gets a number behind its name.

    Raises:
        UsageError: `run` is no run's folder; a name that is none, or leads out of outputs/.
    """
    if run is not None:
        if not Path(run, "run.json").is_file():
            raise UsageError(f"run={run} is not the folder of a run (no run.json in it)")
        return run
    name = new.partition("/")[2]
    if not name or any(part in ("", ".", "..") or not part.isprintable() for part in name.split("/")):
        raise UsageError(f"name={name!r}: expected the name of a folder in outputs/, such as name=first")
    given = any(word.startswith("name=") for word in sys.argv[1:])
    return new if given else _unused(new)


@cache
def _unused(folder: str) -> str:
    """`folder`, made; where it is there already the first of folder-2, folder-3 … that isn't. Once a process."""
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        made = folder if number == 1 else f"{folder}-{number}"
        with suppress(FileExistsError):
            Path(made).mkdir()
            return made


def is_group(override: str, choices) -> bool:
    """Whether a command line word chooses from a group (`loss=[ce,kd]`) rather than setting a value."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0] in choices


def check(cfg: DictConfig, overrides: list[str], choices) -> None:
    """Refuse values that no default allows: stages, and a word where the default is a number.

    Raises:
        UsageError: names the option, what it takes and what came.
    """
    from hydra import compose

    missing = OmegaConf.missing_keys(cfg)
    if missing:
        key = sorted(missing)[0]
        raise UsageError(f"{key} must be given: {key}=VALUE")
    unknown = [stage for stage in cfg.stages if stage not in STAGES]
    if unknown:
        raise UsageError(f"stages={list(cfg.stages)}: no stage '{unknown[0]}'; there are {', '.join(STAGES)}")
    if cfg.select not in ("best", "last"):
        raise UsageError(f"select={cfg.select}: choose best or last")
    values = [word for word in overrides if not is_group(word, choices) and word[0] not in "+~"]
    defaults = compose("train", [word for word in overrides if word not in values])
    for word in values:
        key = word.partition("=")[0]
        default, value = OmegaConf.select(defaults, key), OmegaConf.select(cfg, key)
        expected = _kind(default)
        schedule = key.endswith(".weight") and OmegaConf.is_list(value)
        if value is None and key in NULLABLE:
            continue
        if expected and _kind(value) != expected and not schedule and not (expected == "number" and _whole(value)):
            raise UsageError(f"{word}: expected a {expected}, such as {default}")


def _kind(value) -> str | None:
    """What a default tells of the values it may be replaced by; None: anything."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int):
        return "whole number"
    return "number" if isinstance(value, float) else None


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def keys(cfg, prefix: str = "") -> list[str]:
    """Every dotted key of a configuration."""
    found = []
    for name in cfg:
        found.append(f"{prefix}{name}")
        if OmegaConf.is_dict(cfg) and not OmegaConf.is_missing(cfg, name) and OmegaConf.is_dict(cfg._get_node(name)):
            found += keys(cfg[name], f"{prefix}{name}.")
    return found


def nearest(word: str, known: list[str]) -> str:
    """'; did you mean X?' where something known is near, else '.'."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else "."
