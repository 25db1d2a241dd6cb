"""A run's record of itself."""

from __future__ import annotations

import re
from pathlib import Path

from hydra import compose
from omegaconf import DictConfig, OmegaConf

from distill.errors import UserError
from distill.files import MOST, read_json, read_yaml
from distill.runs import trust
from distill.runs.moved import present, renamed

STARTING_POINT = ("checkpoint", "weights", "pretrained")  # of a network: what its training began with


def read_record(folder: Path) -> dict:
    """A run's run.json.

    Raises:
        UserError: it is not one that a run wrote.
    """
    record = read_json(folder / "run.json", MOST)
    words = record.get("overrides")
    kinds = {"choices": dict, "overrides": list, "created": str, "versions": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]
    # Hydra's own options are never among a run's words: they could name folders and packages to search
    if wrong or not all(isinstance(word, str) and "hydra" not in word.partition("=")[0] for word in words):
        raise UserError(f"{folder}/run.json is damaged, or not one of ours ({(wrong or ['overrides'])[0]})")
    return record


def _added(recorded: list[str], words: list[str]) -> list[str]:
    """A run's recorded words with those of the command line that continues it: a group chosen anew forgets what was set
    in the old one."""
    words = [word for word in words if not word.startswith("run=")]
    again = {word.partition("=")[0] for word in words}
    return [*(word for word in recorded if re.split("[.=]", word)[0] not in again), *words]


def continued(folder: Path, recorded: list[str], words: list[str], trusts: bool) -> tuple[DictConfig, list[str]]:
    """The configuration of a run's recorded words with those of the present command line, and these words.

    Raises:
        UserError: it names what isn't this package's, and `trusts` is false; nothing of that has been opened.
    """
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
        saved = renamed(read_yaml(folder / "config.yaml"))
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
