"""What may change of a run that goes on: nothing that its result depends on, unless force=true."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from hydra import compose
from omegaconf import DictConfig, OmegaConf

from distill.errors import UsageError
from distill.progress import say
from distill.runs.moved import renamed
from distill.runs.records import PATHS

IMAGES = "images.json"  # in a run's folder: what its images were
FREE = (  # of other stages than training, of where things lie and of what a person sees
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
    "force",
    "restart",
    "on_divergence",
)
SAME_BITS = (  # told, and taken
    "checkpoint_every",
    "data.num_workers",
    "data.root",
    "data.train",
    "data.val",
    "data.test",
    "data.store",
    "cache.folder",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.profiler",
    "trainer.default_root_dir",
)
SHOWN = 6


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def refuse_changes(folder: Path, saved: dict, words: list[str], new: DictConfig, force: bool) -> list[str]:
    """What differs and is taken because of `force`; what changes no bit is told.

    Args:
        saved: the run's configuration as it was; options that came into being since have the values that its `words`
            give them now.

    Raises:
        UsageError: something else differs, named key by key, and `force` is false.
    """
    known, new = (renamed(OmegaConf.to_container(cfg, resolve=True)) for cfg in (compose("train", words), new))
    known, saved, new = (dict(_leaves(each)) for each in (known, saved, new))
    old = known | saved
    known_now = {key.partition(".")[0] for key in new} - {*FREE}
    keys = [key for key in dict.fromkeys([*new, *saved]) if key.partition(".")[0] in known_now]
    changed = {key: (old.get(key), new.get(key)) for key in keys if not _same(key, old.get(key), new.get(key))}
    told = {key: f"{key} {_short(before)} → {_short(now)}" for key, (before, now) in changed.items()}
    for key in (key for key in told if key in SAME_BITS):
        say(f"changed: {told[key]}, which changes no bit of the result")
    others = [told[key] for key in told if key not in SAME_BITS]
    if others and not force:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        raise UsageError(
            f"{folder} holds a run of another configuration ({'; '.join(others[:SHOWN])}{more}): it can be continued "
            "or exported again as it is; for other values start a new run (another name=), or go on all the same "
            "(force=true)"
        )
    return others


def _same(key: str, before, now) -> bool:
    if key.rpartition(".")[2] in PATHS and isinstance(before, str) and isinstance(now, str):
        before, now = _absolute(before), _absolute(now)
    if key in ("trainer.devices", "trainer.accelerator") and not torch.cuda.is_available():
        before, now = (value if value not in ("auto", "cpu", 1, "1") else 1 for value in (before, now))
    return before == now


def _leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of all that is no mapping, and of empty mappings."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif value != {}:
            yield f"{prefix}{key}", value


def _short(value) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
