"""Trainings that are done once, for all runs that ask for the same."""

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from distill.files import atomic, content_key
from distill.locks import alone
from distill.networks.weights import save_weights
from distill.progress import leads, say


def kept(place: Path, described: Mapping) -> Path:
    """Where the weights of `once` lie, if it was done."""
    return place.with_name(f"{place.name}-{content_key(described)}") / "weights.safetensors"


def once(
    net: nn.Module, place: Path, described: Mapping, train: Callable[[Path], Mapping], load: Callable, said: str
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
    """
    weights = kept(place, described)
    folder = weights.parent
    with _alone(weights, said.partition(":")[0]):
        if weights.exists():
            say(f"{said} before, read from {weights}")
            load(net, weights)
            return net
        chosen = train(folder)
        if leads():
            found = {"epoch": chosen["epoch"], "val_accuracy": chosen["accuracy"]}
            with atomic(folder / "fit.json") as temporary:
                temporary.write_text(json.dumps({**described, **found}, indent=2), encoding="utf-8")
            save_weights(net, weights, {})
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return net


def _alone(weights: Path, what: str) -> contextlib.AbstractContextManager:
    """Nobody else where these weights are to be made; those that are there are read, even where none can be written."""
    if weights.exists():
        return contextlib.nullcontext()
    weights.parent.mkdir(parents=True, exist_ok=True)
    return alone(weights.parent / "lock", what) if leads() else contextlib.nullcontext()
