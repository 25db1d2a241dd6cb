"""Trainings that are done once, for all runs that ask for the same."""

import contextlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from distill.errors import DamagedError
from distill.files import content_key, write_json
from distill.locks import alone
from distill.networks.weights import save_weights
from distill.progress import leads, say


def kept(place: Path, described: Mapping) -> Path:
    """Where the weights of `once` lie, if it was done."""
    return place.with_name(f"{place.name}-{content_key(described)}") / "weights.safetensors"


def once(
    net: nn.Module,
    place: Path,
    described: Mapping,
    train: Callable[[Path], Mapping],
    load: Callable,
    said: str,
    restart: bool,
) -> nn.Module:
    """`net`, changed in place, with the weights that `train` gives it, or gave it before under the same description.

    They lie in PLACE-KEY, KEY being a hash of `described`, with the description beside them in fit.json. While one
    process trains, others that ask for the same wait; of those that train together the first holds the lock for all.

    Args:
        described: all that decides the weights, as plain values.
        train: trains `net` in the folder that it is given, where a killed training left its checkpoints, and returns
            "epoch" and "accuracy" of the weights that `net` has then.
        load: puts the weights of a file into `net`, as `load_weights` does.
        said: what was done before, for the line that says it is read: "teacher: fitted".
        restart: train anew where the weights were damaged since.

    Raises:
        DamagedError: they were, and `restart` is false.
    """
    weights = kept(place, described)
    folder = weights.parent
    if weights.exists() and _read(net, weights, load, said, restart):  # no lock, which a store that can't be written to
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # could not give
        return net
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / "lock", said.partition(":")[0]) if leads() else contextlib.nullcontext():
        if weights.exists() and _read(net, weights, load, said, restart):  # made while this process waited
            return net
        chosen = train(folder)
        if leads():
            found = {"epoch": chosen["epoch"], "val_accuracy": chosen["accuracy"]}
            found |= {"setbacks": chosen["setbacks"]} if chosen.get("setbacks") else {}
            write_json(folder / "fit.json", {**described, **found})
            save_weights(net, weights, {})
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return net


def _read(net: nn.Module, weights: Path, load: Callable, said: str, restart: bool) -> bool:
    """Whether `net` has them; not, where they are damaged and may be made anew."""
    say(f"{said} before, read from {weights}")
    try:
        load(net, weights)
    except DamagedError as error:
        if not restart:
            raise DamagedError(f"{error}: bring it back from a copy, or add restart=true to train it again") from error
        say(f"  warning: {error}: it is trained again")
        if leads():
            weights.unlink(missing_ok=True)
        return False
    return True
