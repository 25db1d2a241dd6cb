"""Weights from files and back. Files are untrusted: nothing but tensors is ever unpickled."""

import pickle
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.errors import UserError
from distill.files import atomic
from distill.models.taps import head_path

# Where a training program keeps its state dict, averaged weights last.
STATE_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "student",
    "ema",
    "state_dict_ema",
    "model_ema",
)
# What wrappers put in front of a network's own names.
WRAPPERS = ("module.", "model.", "net.", "student.", "_orig_mod.")
SHOWN = 5  # keys named in an error before the rest is only counted


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU: safetensors or a torch file, told apart by content.

    Of a torch file the state dict is taken, also where it lies under a usual key ("state_dict", "model" …).

    Raises:
        UserError: no such file, a folder, an empty or broken file, one that holds more than tensors and
            plain values, or one without a state dict.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a file of weights: name the .safetensors or .pt file in it")
    if not path.is_file():
        raise UserError(f"no file {path}: expected weights as .safetensors or a torch state dict")
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty: copy or download it again")
    try:
        content = load_file(path) if _is_safetensors(path) else _unpickle(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (safetensors.SafetensorError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is broken, or neither safetensors nor a torch file: copy or download it again"
        ) from error
    state = _find_state(content)
    if state is None:
        came = type(content).__name__
        if isinstance(content, Mapping):
            came = f"a dict of {', '.join(map(str, list(content)[:SHOWN])) or 'nothing'}"
        raise UserError(f"{path} holds no state dict but {came}: save it with torch.save(net.state_dict(), PATH)")
    return state


def load_weights(net: nn.Module, path: str | Path, new_head: bool = False) -> list[str]:
    """Load a file's weights into `net` in place, every one of them or none.

    Names in front ("module.", "model.", "net.", "student.net.", "_orig_mod.") are dropped as far as `net`
    needs it. Batch norm's num_batches_tracked may be missing; half precision is converted.

    Args:
        net: the plain network.
        path: see `read_state`.
        new_head: where only the classes differ, leave the head as it is instead of failing.

    Returns:
        The names that were left as they were: the head's, or none.

    Raises:
        UserError: as `read_state`; or names or shapes that differ, told one by one.
    """
    wanted = net.state_dict()
    state = _unwrap(read_state(path), wanted)
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted]
    reshaped = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    head = [key for key in reshaped if _classes_differ(net, key, state[key], wanted[key])]
    if missing or unexpected or reshaped != head:
        shapes = [f"{key} {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)}" for key in reshaped]
        found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        listed = "; ".join(f"{kind}: {_some(keys)}" for kind, keys in found.items() if keys)
        raise UserError(f"{path} does not fit {type(net).__name__}: {listed}; is it a file of another network?")
    if head and not new_head:
        raise UserError(
            f"{path}: the checkpoint has {len(state[head[0]])} classes, the data {len(wanted[head[0]])}: "
            "use a checkpoint of the same classes, or fit a new head with teacher.fit.epochs=N"
        )
    net.load_state_dict({key: state.get(key, value) if key not in head else value for key, value in wanted.items()})
    return head


def save_weights(net: nn.Module, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write `net`'s state dict as safetensors; an older file at `path` stays whole until the new one is.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    state = {key: value.detach().cpu().contiguous().clone() for key, value in net.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            save_file(state, temporary, dict(metadata))
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata that `save_weights` wrote; empty where there is none.

    Raises:
        UserError: not a readable safetensors file.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from error


def _is_safetensors(path: Path) -> bool:
    """A length of 8 bytes, then a header of JSON."""
    start = _start(path)
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < 100_000_000


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(9)


def _unpickle(path: Path):
    try:
        with open(path, "rb") as file, warnings.catch_warnings():  # given a path, torch goes by its ending
            warnings.simplefilter("ignore")  # the errors below say the same in one line
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not _start(path).startswith((b"PK", b"\x80")):
            raise ValueError("no pickle") from error
        raise UserError(
            f"{path} holds more than tensors and plain values and is not opened, because it could run code: "
            "where it comes from, save it again with torch.save(net.state_dict(), PATH)"
        ) from error
    except RuntimeError as error:
        if "TorchScript" not in str(error):
            raise
        raise UserError(f"{path} is a TorchScript program, expected weights: save its state_dict() instead") from error


def _find_state(content) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping):
        return None
    for key in STATE_KEYS:
        found = _find_state(content.get(key))
        if found:
            return found
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)} or None


def _unwrap(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` below the prefix that makes most of its names `wanted`; the shortest such prefix.

    What lies beside the prefix is a training program's own (losses, a teacher) and left out.
    """
    prefixes = [""]
    for prefix in prefixes:  # grows while it is read
        longer = (prefix + wrapper for wrapper in WRAPPERS)
        prefixes += [name for name in longer if any(key.startswith(name) for key in state)]
    best = max(prefixes, key=lambda prefix: sum(prefix + key in state for key in wanted))
    return {key.removeprefix(best): value for key, value in state.items() if key.startswith(best)}


def _classes_differ(net: nn.Module, key: str, came: Tensor, expected: Tensor) -> bool:
    """Whether `key` belongs to the head and only its first dimension, the classes, is another."""
    of_head = key.rpartition(".")[0] == head_path(net)
    return of_head and came.dim() > 0 and came.shape[1:] == expected.shape[1:]


def _some(keys: list[str]) -> str:
    rest = len(keys) - SHOWN
    return ", ".join(keys[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
