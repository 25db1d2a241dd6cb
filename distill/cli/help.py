"""What each option is, may be and does, from the YAML files and the signatures: `--help GROUP` and docs/options.md.
Never imports torch."""

import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from distill.asked import program
from distill.cli import options
from distill.errors import UsageError
from distill.files import CONF
from distill.schema import signatures
from distill.schema.values import describe, nearest, written

EVERYWHERE = "@package _global_"  # opens a file that sets options of other groups
HYDRAS = ("_target_", "_partial_", "defaults", "hydra")  # not the user's to set, or not here


class Option(NamedTuple):
    """`key` as it is typed on the command line, its default as it would be typed, and in words, or empty: the values
    that it may have, and what it does."""

    key: str
    default: str
    allowed: str
    does: str


class Choice(NamedTuple):
    """`words`: whether it is one word for many, options of other groups, as a recipe is."""

    name: str
    about: str
    options: list[Option]
    words: bool = False

    def line(self) -> str:
        """What it stands for, as it would be typed."""
        return " ".join(f"{option.key}={option.default}" for option in self.options)


def groups(folders: Sequence[str] = (CONF,)) -> list[str]:
    """The groups that a word on the command line chooses from."""
    found = {path.name for folder in folders for path in Path(folder).iterdir() if path.is_dir()}
    return sorted(found - {"role"})


def choices(group: str, folders: Sequence[str] = (CONF,)) -> list[Choice]:
    """A group's choices: those of its YAML files; of "train" the options that no group holds.

    Raises:
        UsageError: there is no such group.
    """
    if group == "train":
        return [_choice(Path(CONF, "train.yaml"), "")]
    files = sorted(file for folder in folders for file in Path(folder, group).glob("*.yaml"))
    if not files:
        known = ["train", *groups(folders), "student"]
        raise UsageError(f"--help {group}: no such group{nearest(group, known)}; there are {', '.join(known)}")
    return [_choice(file, group) for file in files]


def role(name: str) -> list[Choice]:
    """What the student or teacher has beside its network's own options: that of conf/role/NAME.yaml."""
    return [_choice(Path(CONF, "role", f"{name}.yaml"), name)] if Path(CONF, "role", f"{name}.yaml").is_file() else []


def _choice(file: Path, group: str) -> Choice:
    text = file.read_text(encoding="utf-8")
    about = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        about.append(line.lstrip("# "))
    node = yaml.safe_load(text) or {}
    words = about[:1] == [EVERYWHERE]
    key = "" if words else "student" if group == "network" else group
    options = [*(_chosen(node.get("defaults", ()), group) if words else ()), *_options(node, key, "", _comments(text))]
    if words and about[1].startswith("python"):
        about[1] += ":"  # the command to copy
    if group == "sweep":  # words of a command line, or W&B's: no options
        options = []
    return Choice(file.stem, " ".join(" ".join(about[words:]).split()), options, words)


def _chosen(defaults: Sequence, group: str) -> Iterator[Option]:
    """What a file chooses from groups: another of its own, whose values it has besides, and others."""
    for entry in defaults:
        if isinstance(entry, str):
            other, _, name = entry.lstrip("/").rpartition("/")
            yield Option(other or group, name, "", "")
        else:
            [(place, value)] = entry.items()
            yield Option(place.rpartition("/")[2], written(value), "", "")


def _comments(text: str) -> dict[str, str]:
    """{dotted key: the comment behind it}, of a file that is indented by two."""
    found, path = {}, []
    for line in text.splitlines():
        match = re.match(r"( *)([\w@.]+):(.*)$", line)
        if match:
            depth = len(match[1]) // 2
            path = [*path[:depth], match[2]]
            found[".".join(path)] = match[3].partition(" # ")[2].strip() if " # " in match[3] else ""
        elif path and (more := re.match(r" +# (.*)$", line)):  # it goes on
            found[".".join(path)] = f"{found['.'.join(path)]} {more[1].strip()}".strip()
    return found


def _options(node: dict, key: str, place: str, comments: dict[str, str]) -> Iterator[Option]:
    """The options of a node: `key` is its name on the command line, `place` that in its file."""
    target = node.get("_target_")
    takes = options.within(key, signatures.read(str(target)) if target else None)
    for name, value in node.items():
        inner, here = f"{key}.{name}".lstrip("."), f"{place}.{name}".lstrip(".")
        if name in HYDRAS or "@" in str(name) or value == {}:  # which groups fill
            continue
        if isinstance(value, dict) and ("_target_" in value or not target) and value:
            yield from _options(value, inner, here, comments)
            continue
        kind = takes.types.get(name) if takes else None
        allowed = describe(kind) if kind is not None else ""
        yield Option(inner, written(value), "" if allowed == "Any" else allowed, comments.get(here, ""))


def page(group: str, folders: Sequence[str] = (CONF,)) -> str:
    """A group for the terminal."""
    width = max(60, min(shutil.get_terminal_size((80, 24)).columns, 120))
    lines = []
    parts = {"student": ("network",), "teacher": ("network", "teacher")}.get(group, (group,))
    for choice in [*(choice for part in parts for choice in choices(part, folders)), *role(group)]:
        if group != "train":
            lines += textwrap.wrap(f"{choice.name}: {choice.about}", width, subsequent_indent="    ")
        if choice.words:
            indent = {"initial_indent": "  ", "subsequent_indent": "  "}
            lines += textwrap.wrap(choice.line(), width, **indent, break_long_words=False, break_on_hyphens=False)
            continue
        for option in choice.options:
            said = "; ".join(filter(None, (option.allowed, option.does)))
            word = option.key.replace("student", group, 1) if group == "teacher" else option.key
            lines += textwrap.wrap(
                f"{word}={option.default}   {said}", width, initial_indent="  ", subsequent_indent="      "
            )
    return "\n".join(lines).replace("python train.py", program())  # as conf/ says it
