"""A run's student on the disk: its weights, and what rebuilds it."""

import json
from collections.abc import Iterable
from pathlib import Path

from omegaconf import OmegaConf

from distill.asked import again
from distill.data.prepare import described_as
from distill.errors import UserError
from distill.networks.network import Network
from distill.networks.student import Student
from distill.networks.weights import load_weights, read_metadata
from distill.runs import trust
from distill.runs.moved import renamed
from distill.runs.records import STARTING_POINT
from distill.types import checked_size

STUDENT, STUDENT_LAST = "student.safetensors", "student_last.safetensors"


def load_student(folder: str | Path, trust: bool = False) -> Student:
    """The student of a finished run: images (N, 3, H, W) in [0, 1] to logits (N, K), and `predict`.

    Args:
        folder: the run's folder, or a student.safetensors.
        trust: also build what is not a network of this package, torchvision or timm, and so runs code that the file
            names (see distill/runs/trust.py).

    Raises:
        UserError: no student there, a damaged file, or a network that `trust` would have to allow.
    """
    path = Path(folder).expanduser()
    file = path / STUDENT if path.is_dir() else path
    plain, saved = rebuild(file, trust).plain(), read_description(file)
    run = file.parent if (file.parent / "run.json").is_file() else None
    return Student.of(plain, saved["classes"], saved["prepared"], run)


def rebuild(file: Path, trusts: bool = False, trusted: Iterable[str] = ()) -> Network:
    """`load_student` with its taps, from the file.

    Args:
        trusts: build whatever the file names.
        trusted: names that it may give besides those that are registered, see distill/runs/trust.py.
    """
    from distill.networks.build import build_network, built_from

    if not file.is_file():
        raise UserError(f"no {file}: the run's distill stage is not finished; {again(f'run={file.parent}')} goes on")
    saved = read_description(file)
    described = renamed(without(STARTING_POINT, saved["network"]))
    if not trusts:
        trust.check({"student": described}, file, tuple(trusted))
    classes, image_size = saved["classes"], saved["image_size"]
    with built_from(file):
        network = build_network(OmegaConf.create({**described, "checkpoint": None}), len(classes), image_size, seed=0)
    load_weights(network.net, file)
    return network.eval()


def read_description(file: Path) -> dict:
    """What `save_student` wrote beside the weights.

    Raises:
        UserError: the file says nothing of it, or nothing that makes sense.
    """
    metadata = read_metadata(file)
    if "network" not in metadata:
        raise UserError(f"{file} does not say which network it belongs to: it is not a student that a run saved")
    try:
        saved = {key: json.loads(value) for key, value in metadata.items()}
        kinds = {"network": dict, "classes": list}
        wrong = [key for key, kind in kinds.items() if type(saved.get(key)) is not kind or not saved[key]]
        saved["image_size"] = checked_size(saved.get("image_size"))
        saved["prepared"] = described_as(saved.get("prepared"), saved["image_size"])
    except (ValueError, RecursionError):
        wrong = ["metadata"]
    except (UserError, AttributeError):
        wrong = ["image_size"]
    if wrong:
        raise UserError(f"{file} is damaged: what it says of its {wrong[0]} can't be read")
    return saved


def without(keys: Iterable[str], node):
    """Plain values of which no target, at any depth, has these arguments."""
    if isinstance(node, dict):
        dropped = keys if "_target_" in node else ()
        return {key: without(keys, child) for key, child in node.items() if key not in dropped}
    return [without(keys, child) for child in node] if isinstance(node, list) else node
