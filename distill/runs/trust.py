"""What a run's folder or a student's file may name without being trusted: what this package registers, and no more.

A folder that a stranger made holds the names of callables (`_target_`): they are called when a network is rebuilt or a
run continued. The table of what may be called, by role, is this package's own conf/ and that of a --config-dir on the
present command line: what a YAML file there names as its `_target_` is registered for that group, the name being equal
letter by letter, so that nothing else is ever looked up or imported. Networks may also be the model functions of
torchvision and timm, optimizers the classes of torch.optim. Everything else needs `trust=true`.

Nor do its words read the environment, open configuration that lies elsewhere, or name folders elsewhere to write into.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import yaml

from distill.errors import UntrustedError
from distill.files import CONF, config_dirs

# which groups' files register what may stand in a part of the configuration; a part that is not here may name nothing
ROLES = {
    "teacher": ("network", "teacher"),
    "student": ("network",),
    "data": ("data", "augment"),
    **{
        group: (group,)
        for group in ("augment", "loss", "optimizer", "schedule", "trainer", "logger", "compress", "export")
    },
}
OPTIMIZERS = (
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "NAdam", "RAdam", "RMSprop"),
    *("Rprop", "SGD"),
)
# timm's ways to a network that others describe, and to files and hosts of theirs
REMOTE = ("hf-hub", "local-dir:")
OTHERS = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}
# of a run's words: far more than a person types, far less than would keep Hydra's parser and OmegaConf busy
MOST_SIGNS, MOST_WORDS, MOST_POINTERS, DEEPEST = 20_000, 500, 12, 20
POINTER = re.compile(r"\$\{\.*\w[\w.]*\}")  # at another option; what has a colon calls a resolver
KEY = re.compile(r"[+~]{0,2}[\w.-]+(@[\w.]*)?")
WRITTEN = ("store", "cache.folder", "data.store", "trainer.default_root_dir")  # options that name folders to write into
KEPT = re.compile(r"(?<![0-9a-f])[0-9a-f]{16}(?![0-9a-f])")  # is in the name of all that is kept by its content


def check(described: Mapping, source: str | os.PathLike, trusted: Collection[str] = ()) -> None:
    """Refuse a configuration, by its roles, that names what is not registered for the role. Imports nothing it names.

    Args:
        described: plain values, resolved: {"student": {"_target_": …}, "loss": {…}, …}.
        source: where it comes from, for the error.
        trusted: names that are allowed besides, such as those that the present command line gave.

    Raises:
        UserError: says what is named and how to allow it.
    """
    for role, part in described.items():
        odd = next(filter(_leads_away, _names(part)), None)
        if odd is not None:  # names of losses, steps and files become parts of paths
            raise UntrustedError(f"{source} names {odd[:80]!r} in {role}, which is no name")
        known = {*registered(role), *trusted}
        for target in targets(part):
            if target not in known and not _library(role, target):
                raise UntrustedError(
                    f"{source} names {target} as {role}, which is not one of this package's: it is not run. "
                    "If you trust the folder and what it names, add trust=true (in Python: trust=True)"
                )
        expressions = [value for _, value in _leaves(part) if "${" in value]
        if expressions:  # what it would become is not known here
            raise UntrustedError(f"{source} holds an expression in {role}, {expressions[0][:80]}: trust=true allows it")
        if role in ("teacher", "student"):
            foreign = [
                f"{key}={value}"
                for key, value in _leaves(part)
                if {*key.split(".")} & OTHERS or _scheme(value).startswith(REMOTE)
            ]
            if foreign:
                raise UntrustedError(f"{source} takes {role}.{foreign[0]} from elsewhere: trust=true allows it")


def check_words(words: Sequence[str], source: str | os.PathLike) -> None:
    """Refuse words of a stranger's command line that do more than choose from groups and set values, before Hydra
    reads them: it would open configuration that lies anywhere, and its resolvers read the environment.

    Raises:
        UserError: says which word.
    """
    signs, pointers = sum(map(len, words)), sum(word.count("${") for word in words)
    if signs > MOST_SIGNS or len(words) > MOST_WORDS or pointers > MOST_POINTERS:
        raise UntrustedError(
            f"{source} has {len(words)} words of {signs:,} signs, {pointers} of them pointing at others: more "
            "than a command line of ours; trust=true reads them"
        )
    groups = {entry.name for folder in (CONF, *config_dirs()) for entry in os.scandir(folder) if entry.is_dir()}
    for word in words:
        key, _, value = word.partition("=")
        name = key.lstrip("+~").partition("@")[0]
        chooses = name in groups or name in ("teacher", "student")
        if not KEY.fullmatch(key) or (chooses and re.search(r"[/\\$]", value)):
            why = "opens configuration from elsewhere"
        elif "${" in POINTER.sub("", value):
            why = "reads more than this run's options"
        elif _depth(value) > DEEPEST:
            why = "is nested too deep"
        else:
            continue
        raise UntrustedError(
            f"{source}: the word {word[:80]} {why}: it is not read. If you trust the folder, add trust=true"
        )


def check_folders(described: Mapping, folder: Path, said: Collection[str]) -> None:
    """Refuse that a run's folder makes its reader write elsewhere: what it says of stores and caches has to be in the
    working directory, beside the run, or a folder that is one already; nor may it hold links that lead out.

    Args:
        described: plain values, resolved.
        said: options that the present command line sets itself.

    Raises:
        UserError: says which option, or link.
    """
    inside = [os.path.realpath(place) for place in (os.curdir, folder.parent)]
    for key in WRITTEN:
        value = described
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if not isinstance(value, str) or key in said:
            continue
        place = os.path.realpath(Path(value).expanduser())
        if not any(_within(place, each) for each in inside) and not _keeps(place):
            raise UntrustedError(
                f"{folder} would write into {place} ({key}), which is neither here nor beside it nor in use yet: if "
                f"that is meant, say {key}={value} again, or trust=true"
            )
    for above, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = os.path.join(above, name)
            if os.path.islink(path) and not _within(os.path.realpath(path), os.path.realpath(folder)):
                raise UntrustedError(
                    f"{path} leads out of the folder, to {os.path.realpath(path)}: trust=true follows it"
                )


def _within(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _keeps(place: str) -> bool:
    """Whether a folder is a store or a cache already."""
    try:
        with os.scandir(place) as entries:
            return any(KEPT.search(entry.name) for entry in entries)
    except OSError:
        return False


def _depth(text: str) -> int:
    depth = deepest = 0
    for sign in text:
        depth += (sign in "[{(") - (sign in "]})")
        deepest = max(deepest, depth)
    return deepest


def _scheme(value: str) -> str:
    """As urllib reads it, by which timm goes: blanks and control signs left out, small letters."""
    return re.sub(r"[\x00-\x20]", "", value).lower().replace("_", "-")


def _leads_away(name: str) -> bool:
    return bool(re.search(r"[/\\]", name)) or not name.isprintable() or name in ("", ".", "..")


def _names(node) -> Iterator[str]:
    """Every key of plain values, at any depth."""
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield str(name)
            yield from _names(child)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for child in node:
            yield from _names(child)


def targets(node) -> Iterator[str]:
    """Every `_target_` of plain values, at any depth: all of them would be called."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield str(node["_target_"])
        for child in node.values():
            yield from targets(child)
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for child in node:
            yield from targets(child)


def registered(role: str) -> frozenset[str]:
    """The names that the files of the role's groups give as `_target_`."""
    folders = [CONF, *config_dirs()]
    return frozenset().union(*(_named(folder, group) for folder in folders for group in ROLES.get(role, ())))


@cache
def _named(folder: str, group: str) -> frozenset[str]:
    files = sorted(Path(folder, group).glob("*.yaml"))
    return frozenset(target for file in files for target in targets(yaml.safe_load(file.read_text(encoding="utf-8"))))


def _library(role: str, target: str) -> bool:
    """Whether `target` is a model function of torchvision or timm, or an optimizer of PyTorch, by its full name."""
    package, _, name = target.rpartition(".")
    if role == "optimizer":
        return package == "torch.optim" and name in OPTIMIZERS
    if role not in ("teacher", "student"):
        return False
    if package == "torchvision.models" or package.startswith("torchvision.models."):
        import torchvision.models as models

        known = models.list_models(module=models)
        return name in known and package in ("torchvision.models", models.get_model_builder(name).__module__)
    if package == "timm.models" or package.startswith("timm.models."):
        try:
            from timm.models import is_model, model_entrypoint
        except ImportError:
            return False
        return is_model(name) and package in ("timm.models", model_entrypoint(name).__module__)
    return False


def _leaves(node, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of all values that are neither null nor containers, at any depth."""
    if isinstance(node, Mapping):
        for name, child in node.items():
            yield from _leaves(child, f"{key}.{name}".lstrip("."))
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for child in node:
            yield from _leaves(child, key)
    elif node is not None:
        yield key, str(node)
