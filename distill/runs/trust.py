"""What a run's folder or a student's file may name without being trusted: what this package registers, and no more.

A folder that a stranger made holds the names of callables (`_target_`): they are called when a network is rebuilt or a
run continued. The table of what may be called, by role, is this package's own conf/ and that of a --config-dir on the
present command line: what a YAML file there names as its `_target_` is registered for that group, the name being equal
letter by letter, so that nothing else is ever looked up or imported. Networks may also be the model functions of
torchvision and timm, optimizers the classes of torch.optim. Everything else needs `trust=true`.
"""

import os
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
REMOTE = ("hf-hub:", "hf_hub:", "local-dir:")
OTHERS = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"}


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
                if {*key.split(".")} & OTHERS or value.startswith(REMOTE)
            ]
            if foreign:
                raise UntrustedError(f"{source} takes {role}.{foreign[0]} from elsewhere: trust=true allows it")


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
