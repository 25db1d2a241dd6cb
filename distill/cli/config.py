"""Where the configuration lives, and what Hydra doesn't check by itself. Never imports torch."""

import itertools
import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from distill import asked
from distill.cli import crossings, options
from distill.cli.hints import meant
from distill.errors import UsageError
from distill.files import CONF, config_dirs
from distill.losses.weight import check_weight
from distill.progress import leads
from distill.runs.records import STARTING_POINT, continued, unforced
from distill.runs.sweeps import job_name
from distill.schema.values import Problem, problems

LEAST = 0.1  # of a weight of 1: the labels' part


def register(argv: list[str] | None = None) -> None:
    """Offer every conf/network/NAME.yaml, the user's own included, as `teacher=NAME` and `student=NAME`."""
    _unused.cache_clear()  # another run of this process is another folder's
    OmegaConf.register_new_resolver("program", asked.program, replace=True)
    OmegaConf.register_new_resolver("run_dir", run_dir, replace=True)
    OmegaConf.register_new_resolver("by_start", by_start, replace=True)
    OmegaConf.register_new_resolver("rest_of", rest_of, replace=True)
    OmegaConf.register_new_resolver("share_of_epochs", share_of_epochs, replace=True)
    OmegaConf.register_new_resolver("job_name", job_name, replace=True)
    store = ConfigStore.instance()
    store.__deepcopy__ = lambda memo: (
        store
    )  # Hydra copies it for each group that --help lists, and only reads the copies
    folders = [CONF, *config_dirs(argv)]
    for file in sorted(file for folder in folders for file in Path(folder, "network").glob("*.yaml")):
        for role in ("teacher", "student"):
            defaults = [{"/role@_here_": role}, {"/network@_here_": file.stem}, "_self_"]
            store.store(group=role, name=file.stem, node={"defaults": defaults})


def by_start(from_weights, from_scratch, *, _root_):
    """What suits a student that starts from weights (a file's, a library's), or one from scratch."""
    student = _root_.get("student") or {}
    return from_weights if any(student.get(key) for key in STARTING_POINT) else from_scratch


def rest_of(weight):
    """What the labels weigh beside a teacher of this weight, so that both together weigh 1: at least LEAST; of a
    schedule [[epoch, weight], …] likewise, point by point."""
    weight = OmegaConf.to_container(weight) if OmegaConf.is_list(weight) else weight
    try:
        check_weight("kd", weight)
    except UsageError:  # it is told where it stands
        return 1.0
    if isinstance(weight, list):
        return [[epoch, rest_of(value)] for epoch, value in weight]
    return round(max(LEAST, 1 - weight), 6)


def share_of_epochs(share, *, _root_):
    """So much of the training, in epochs: 20 of 240 are 0.083."""
    return round(share * _root_.trainer.max_epochs, 3)


def run_dir(run: str | None, new: str) -> str:
    """The folder of the run to continue, or of the new one: outputs/NAME. Hydra makes it, so a wrong one is refused
    first; where no name is given and another run began in the same second, the new one gets a number behind its name.

    Raises:
        UsageError: `run` is no run's folder; a name that is none, or leads out of outputs/.
    """
    if run is not None:
        if not Path(str(run), "run.json").is_file():
            raise UsageError(f"run={run} is not the folder of a run (no run.json in it)")
        return run
    name = new.partition("/")[2]
    if not name or any(part in ("", ".", "..") or not part.isprintable() for part in name.split("/")):
        raise UsageError(f"name={name!r}: expected the name of a folder in outputs/, such as name=first")
    given = any(word.startswith("name=") for word in asked.words())
    return _unused(new) if leads() and not given else new


@cache
def _unused(folder: str) -> str:
    """`folder`, made; where it is there already the first of folder-2, folder-3 … that isn't. Once a run."""
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        made = folder if number == 1 else f"{folder}-{number}"
        with suppress(FileExistsError):
            Path(made).mkdir()
            return made


def groups() -> set[str]:
    """What a word without a dot chooses from."""
    folders = {entry.name for entry in os.scandir(CONF) if entry.is_dir()}
    return (folders | {"teacher", "student"}) - {"sweep"}  # its files are words of command lines


def is_group(override: str, choices) -> bool:
    """Whether a command line word chooses from a group (`loss=[ce,kd]`) rather than setting a value."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0] in choices


def check(cfg: DictConfig, overrides: list[str]) -> None:
    """Refuse what can be known to be wrong before work begins: values against the signatures that take them and the
    models of distill/cli/options.py, and values that don't go together. Of several, the command line's is told.
    Where a run is continued, its recorded words belong to `cfg`, and what they say was checked when it began.

    Raises:
        UsageError: names the option, what came and what it takes.
    """
    continues = isinstance(cfg.get("run"), str)
    if continues:
        folder = Path(cfg.run)  # a stranger's, perhaps: its names are judged before any signature is read
        overrides = unforced(overrides)
        cfg, _ = continued(folder, overrides, cfg.trust, cfg.trust or cfg.force)
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        key = sorted(missing)[0]
        raise UsageError(f"{key} must be given: {key}=VALUE")
    values = OmegaConf.to_container(cfg, resolve=True)
    found = [
        *unread(cfg),
        *crossings.nodes(values),
        *crossings.refused_options(values),
        *problems(values, options.within),
    ]
    found = found or [*crossings.twice(overrides, values), *crossings.across(values)]
    given = [word.lstrip("+~").partition("=")[0] for word in overrides]
    if continues:
        found = [problem for problem in found if problem.key in given]
    for problem in sorted(found, key=lambda problem: problem.key not in given):
        raise UsageError(str(problem))


def unread(cfg: DictConfig) -> list[Problem]:
    """Values added at the top (`+epochs=3`) that no other value points at: they would do nothing."""
    added = [key for key in cfg if key not in options.hints_of(options.Run)]
    text = OmegaConf.to_yaml(cfg) if added else ""
    idle = [key for key in added if not re.search(rf"\$\{{[^}}]*\b{re.escape(key)}\b", text)]
    near = {key: meant(key, [each for each in keys(cfg) if each not in added]) for key in idle}
    hints = {key: f"; did you mean {name}?" if name else "" for key, name in near.items()}
    return [Problem(key, cfg[key], f"no option of this name, and nothing points at it{hints[key]}") for key in idle]


def keys(cfg, prefix: str = "") -> list[str]:
    """Every dotted key of a configuration."""
    found = []
    for name in cfg:
        found.append(f"{prefix}{name}")
        if OmegaConf.is_dict(cfg) and not OmegaConf.is_missing(cfg, name) and OmegaConf.is_dict(cfg._get_node(name)):
            found += keys(cfg[name], f"{prefix}{name}.")
    return found
