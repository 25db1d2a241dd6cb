"""From configuration to objects: with train.py and the other files of this room all that reads `cfg`."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hydra.utils import get_object, instantiate
from omegaconf import DictConfig

from distill.data.base import Data
from distill.data.findings import uneven
from distill.errors import UsageError
from distill.own import place_of, prefixed
from distill.progress import few, leads, say
from distill.training.trackers import Made, Tracker
from distill.types import in_px, plain_values

LOADING = ("batch_size", "num_workers")  # options of conf/data that are the loaders', not the image set's


def data(cfg: DictConfig, read: bool = False) -> Data:
    """The image set that a conf/data file describes, and how its images are loaded.

    Args:
        read: every image first, where they are files; what is damaged is left out.
    """
    described = plain_values(cfg)
    loading = {key: described[key] for key in LOADING if key in described}
    for key in loading:
        if not _takes(cfg._target_, key):  # a function of the user's may
            del described[key]
    if read and "corrupt" in described:
        described["corrupt"] = "skip"
    made = instantiate(described, _convert_="all")
    if not isinstance(made, Data):
        line = f"data: {cfg._target_} returns {made!r:.60}: expected a distill.data.base.Data"
        raise UsageError(prefixed(place_of(get_object(cfg._target_)), line))
    found = replace(made, **loading)
    say(
        f"data: {cfg._target_.rpartition('.')[2]}, {len(found.train):,} training, {len(found.val):,} validation and "
        f"{len(found.test):,} test images, {found.num_classes} classes, {in_px(found.image_size)}"
    )
    if found.left_out and not read:
        say(f"  {len(found.left_out):,} images are damaged and left out: {few(found.left_out)}")
    if line := uneven(found):
        say(f"  {line}")
    return found


def _takes(target: str, name: str) -> bool:
    taken = inspect.signature(get_object(target)).parameters
    return name in taken or any(each.kind is each.VAR_KEYWORD for each in taken.values())


def steps(cfg: DictConfig) -> dict[str, Callable]:
    """Compression steps or exporters by name, in the order given."""
    made = {name: instantiate(options, _convert_="all") for name, options in cfg.items()}
    for name, step in made.items():
        if not callable(step):
            line = f"{name}: {cfg[name]._target_} makes {step!r:.60}, which can't be called: add _partial_: true"
            raise UsageError(prefixed(place_of(get_object(cfg[name]._target_)), line))
    return made


def tolerance(cfg: DictConfig) -> dict:
    """What the files' answers may differ by. With compress=auto the budget says how much accuracy they may lose."""
    bounds = plain_values(cfg.tolerance)
    if "auto" in cfg.compress:
        bounds["compressed"]["accuracy_drop"] = cfg.compress.auto.accuracy_drop
    return bounds


def reloaders(cfg: DictConfig) -> dict[str, Callable]:
    """The `reload` that stands beside each exporter's `export`."""
    return {name: get_object(f"{options._target_.rpartition('.')[0]}.reload") for name, options in cfg.items()}


@contextmanager
def loggers(cfg: DictConfig, folder: Path) -> Iterator[list]:
    """The loggers besides the CSV files, of the process that leads; closed at the end."""
    recorded, opened = plain_values(cfg), []
    failed = True
    try:
        for options in cfg.logger.values() if leads() else ():
            opened.append(instantiate(options, _partial_=True)(folder=folder, name=cfg.name, cfg=recorded))
        yield opened
        failed = False
    finally:
        for tracker in _trackers(opened):
            tracker.close(failed)


def report(loggers: Iterable, made: Made) -> None:
    """Tell the trackers among the loggers, where others may be a user's own, what the run has made."""
    for tracker in _trackers(loggers):
        tracker.report(made)


def _trackers(loggers: Iterable) -> list[Tracker]:
    return [logger for logger in loggers if isinstance(logger, Tracker)]
