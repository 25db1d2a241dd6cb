"""Weights from files and back. Files are untrusted: nothing but tensors is ever unpickled."""

import hashlib
import io
import json
import math
import os
import pickle
import struct
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from distill import archives
from distill.errors import DamagedError, UserError
from distill.files import CHECKSUM, atomic
from distill.types import grid

# Where a training program keeps its state dict; of several the first, averaged weights last.
STATE_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "student",
    "weights",
    "params",
    "backbone",
    "encoder",
    "teacher",
    "ema",
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "params_ema",
)
# Where two parts of a file fit a network alike, one with such a word in its name is not taken.
SECOND_CHOICE = ("teacher", "ema", "momentum", "target", "averag")
EXTRA = "_extra_state"  # what a module keeps besides tensors (nn.Module.get_extra_state) ends in this
REPEATED = 1 << 24  # bytes that a tensor may seem to have whose numbers are fewer
DEPTH = 4  # mappings in mappings among which a state dict is looked for: in a file they may hold each other
SHOWN = 5  # keys named in an error before the rest is only counted


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name, on the CPU: safetensors or a torch file, told apart by content.

    Of a torch file the state dict is taken, also where it lies under a usual key ("state_dict", "model" …).

    Raises:
        UserError: no such file, a folder, an empty or broken file, one that holds more than tensors and
            plain values, or one without a state dict. DamagedError: one that is not what was written.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected a file of weights: name the .safetensors or .pt file in it")
    if not path.is_file():
        raise UserError(f"no file {path}: expected weights as .safetensors or a torch state dict")
    if path.stat().st_size == 0:
        raise DamagedError(f"{path} is empty: copy or download it again")
    try:
        content = _with_extra_states(_checked(path, load_file(path))) if _is_safetensors(path) else _unpickle(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # of bytes that are no pickle torch's reader raises whatever it stumbles over
        raise DamagedError(
            f"{path} is broken, or neither safetensors nor a torch file: copy or download it again"
        ) from error
    state = _find_state(content)
    if state is None:
        came = type(content).__name__
        if isinstance(content, Mapping):
            came = f"a dict of {', '.join(map(str, list(content)[:SHOWN])) or 'nothing'}"
        raise UserError(f"{path} holds no state dict but {came}: save it with torch.save(net.state_dict(), PATH)")
    odd = next((key for key, value in state.items() if isinstance(value, Tensor) and not _is_plain(value)), None)
    if odd is not None:
        raise UserError(
            f"{path}: {odd} is no plain tensor with numbers of its own (sparse, quantized, or expanded from fewer): "
            "save it dense and contiguous"
        )
    return state


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor has all its numbers in memory: a file of a few bytes can hold one of any shape that has not."""
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_quantized:
        return False
    return value.device.type == "cpu" and value.numel() * value.element_size() <= max(
        archives.TEXT, value.untyped_storage().nbytes()
    )


def load_weights(
    net: nn.Module,
    path: str | Path,
    new_head: bool = False,
    heads: Collection[str] = (),
    image: tuple[int, int] = (1, 1),
) -> list[str]:
    """Load a file's weights into `net` in place, every one of them or none.

    - Names in front ("module.", "backbone.", "student.net." …) are dropped: of the file's parts, the one that fits
      most of `net` is taken, and what it lacks (a classifier) from the part that has that.
    - Batch norm's num_batches_tracked may be missing; half precision is converted.
    - Auxiliary classifiers (GoogLeNet's, Inception's) that `net` is made without are left out.
    - Position embeddings of another image size are interpolated (bicubic, as in timm and torchvision).

    Args:
        net: the plain network.
        path: see `read_state`.
        new_head: layers that start anew instead of failing: those that differ in the number of classes alone, a first
            convolution that differs in its kernel or the image's channels (see distill.networks.stem), and `heads`
            where the file has none.
        heads: paths of the layers that give the logits.
        image: height and width of what `net` takes, of which only the ratio counts.

    Returns:
        The names that were left as they were.

    Raises:
        UserError: as `read_state`; or names or shapes that differ, told one by one.
    """
    wanted = net.state_dict()
    state = _unwrap(read_state(path), wanted)
    for key in state.keys() & wanted.keys():
        state[key] = at_positions(key, state[key], wanted[key], image)
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in wanted and not key.lower().startswith("aux")]
    tensors = [key for key in wanted if key in state and not key.endswith(EXTRA)]
    reshaped = [key for key in tensors if _shape(state[key]) != _shape(wanted[key])]
    headless = [key for key in missing if _inside(key, heads)] if new_head else []
    classes = _of_other_classes(reshaped, state, wanted, heads)
    stem = [key for key in reshaped if key not in classes and _reads_other_images(state[key], wanted[key])][:1]
    if missing != headless or unexpected or {*reshaped} != {*classes, *stem}:
        shapes = [f"{key} {_shape(state[key])}, expected {_shape(wanted[key])}" for key in reshaped]
        found = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        listed = "; ".join(f"{kind}: {_some(keys)}" for kind, keys in found.items() if keys)
        raise UserError(f"{path} does not fit {type(net).__name__}: {listed}; is it a file of another network?")
    if classes and not new_head:
        raise UserError(
            f"{path}: the checkpoint has {len(state[classes[0]])} classes, the data {len(wanted[classes[0]])}: "
            "use a checkpoint of the same classes, or fit a new head with teacher.fit.epochs=N"
        )
    if stem and not new_head:
        raise UserError(
            f"{path}: {stem[0]} is {_shape(state[stem[0]])} for images of another size, and {_shape(wanted[stem[0]])} "
            "here: use a checkpoint of this image size, or fit a new first layer with teacher.fit.epochs=N"
        )
    fresh = {*classes, *stem, *headless}
    net.load_state_dict({key: value if key in fresh else state.get(key, value) for key, value in wanted.items()})
    return [key for key in wanted if key in fresh]


def save_weights(net: nn.Module, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Write `net`'s state dict as safetensors; an older file at `path` stays whole until the new one is.

    Shared tensors are written under each of their names. The same weights and metadata make the same bytes; a checksum
    of both is among the metadata, and compared where the file is read.

    Raises:
        UserError: the file cannot be written, or a module's extra state holds more than tensors and plain values.
    """
    path = Path(path)
    state = {key: _as_tensor(key, value).detach().cpu().contiguous().clone() for key, value in net.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            save_file(state, temporary, {**metadata, CHECKSUM: _checksum(state, metadata)})
            _sort_metadata(temporary)
            os.chmod(temporary, 0o666 & ~_umask())  # the library's are the owner's alone
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def serialised_bytes(net: nn.Module) -> int:
    """How large `net`'s state dict is as safetensors, tensors that are shared counted once."""
    state = {key: _as_tensor(key, value).contiguous() for key, value in net.state_dict().items()}
    once = {
        (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape): key for key, value in state.items()
    }
    return len(save({key: state[key] for key in once.values()}))


def _checksum(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(
        f"{json.dumps(dict(metadata), sort_keys=True)}{tensors_hash(state.items())}".encode()
    ).hexdigest()


def _checked(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` as the file has it; raises DamagedError where that is not what `save_weights` wrote."""
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    checksum = metadata.pop(CHECKSUM, None)  # others' files, and those of earlier versions, have none
    if checksum is not None and checksum != _checksum(state, metadata):
        raise DamagedError(f"{path} is damaged: it is not what was written (its checksum): copy it again")
    return state


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sort_metadata(path: Path) -> None:
    """The library writes metadata in another order every time: the header again, in as many bytes."""
    with open(path, "r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(size))


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata that `save_weights` was given; empty where there is none.

    Raises:
        UserError: not a readable safetensors file.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {key: value for key, value in (file.metadata() or {}).items() if key != CHECKSUM}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        raise DamagedError(f"{path} is damaged, or no safetensors file: {error}") from error


def _is_safetensors(path: Path) -> bool:
    """A length of 8 bytes, then a header of JSON."""
    start = _start(path)
    return len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < 100_000_000


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(9)


def _unpickle(path: Path):
    if reason := archives.unlike_torch(path):
        raise UserError(
            f"{path} is not opened: {reason}, which torch.save does not write; "
            "save it again with torch.save(net.state_dict(), PATH)"
        )
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


def _as_tensor(key: str, value) -> Tensor:
    """A module's extra state, whatever it is, as the bytes of a torch file of plain values."""
    if not key.endswith(EXTRA):
        return value
    buffer = io.BytesIO()
    torch.save(value, buffer)
    if _extra_state(buffer.getvalue()) is None and value is not None:
        raise UserError(
            f"{key} is a {type(value).__name__} with more than tensors and plain values: it cannot be saved"
        )
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _with_extra_states(state: dict[str, Tensor]) -> dict:
    for key, value in state.items():
        if key.endswith(EXTRA) and value.dtype == torch.uint8:
            state[key] = _extra_state(value.numpy().tobytes())
    return state


def _extra_state(content: bytes):
    """What the bytes hold, or None where that is more than tensors and plain values."""
    try:
        return torch.load(io.BytesIO(content), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        return None


def _find_state(content, depth: int = DEPTH) -> dict[str, Tensor] | None:
    """The state dict in `content`: under a usual name, else `content` itself, else the largest under any name but an
    optimizer's."""
    if not isinstance(content, Mapping) or not depth:
        return None
    for key in STATE_KEYS:
        found = _find_state(content.get(key), depth - 1)
        if found:
            return found
    own = {key: value for key, value in content.items() if isinstance(key, str) and _is_state(key, value)}
    if any(isinstance(value, Tensor) for value in own.values()):
        return own
    others = (_find_state(value, depth - 1) for key, value in content.items() if "optim" not in str(key).lower())
    return max(filter(None, others), key=len, default=None)


def _is_state(key: str, value) -> bool:
    return isinstance(value, Tensor) or key.endswith(EXTRA)


def _unwrap(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` below the prefix that makes most of its names `wanted`; the shortest such prefix.

    What lies beside the prefix is a training program's own (losses, a teacher) and left out, but for what is still
    missing, where another prefix has all of it.
    """
    parts: dict[str, set[str]] = {"": set()}  # prefix: the wanted names below it
    for key in state:
        words = key.split(".")
        for number in range(len(words)):
            name = ".".join(words[number:])
            if name in wanted:
                parts.setdefault(key.removesuffix(name), set()).add(name)

    def fit(prefix: str) -> tuple:
        return len(parts[prefix]), not any(word in prefix.lower() for word in SECOND_CHOICE), -len(prefix)

    best = max(parts, key=fit)
    taken = {key.removeprefix(best): value for key, value in state.items() if key.startswith(best)}
    missing = {key for key in wanted if not key.endswith("num_batches_tracked")} - parts[best]
    other = max((prefix for prefix in parts if missing and missing <= parts[prefix]), key=fit, default=best)
    if other != best and fit(other)[1]:
        taken |= {key: state[other + key] for key in missing}
    return taken


def at_positions(key: str, came, expected, image: tuple[int, int] = (1, 1)):
    """What is learned for each of an image's positions, interpolated for as many as expected: embeddings (1, T, D) with
    class tokens in front, (1, S, S, D) or (1, D, S, S), and Swin's and BEiT's tables ((2w - 1)² …, heads). What came is
    of squares, what is expected of images (height, width) in the ratio of `image`."""
    if _shape(came) == _shape(expected) or len(_shape(came)) != len(_shape(expected)):
        return came
    if key.endswith("relative_position_bias_table"):
        return _resized(came[None].flip(1), expected[None])[0].flip(0)  # tokens that are no positions come last
    if "pos_emb" not in key and "position_emb" not in key:
        return came
    if came.dim() == 4 and came.shape[1:] == (came.shape[1], came.shape[1], expected.shape[3]):
        return _resized(came.flatten(1, 2), expected.flatten(1, 2), image).view(-1, *expected.shape[1:])
    if came.dim() == 4 and came.shape[1:] == (expected.shape[1], came.shape[3], came.shape[3]):
        resized = _resized(came.flatten(2).transpose(1, 2), expected.flatten(2).transpose(1, 2), image)
        return resized.transpose(1, 2).reshape(-1, *expected.shape[1:])
    return _resized(came, expected, image) if came.dim() == 3 else came


def _resized(came: Tensor, expected: Tensor, image: tuple[int, int] = (1, 1)) -> Tensor:
    """(1, n + S², D) as (1, n + H W, D), with H : W as `image`; as it is where the two are no such tables."""
    for n in range(min(came.shape[1], expected.shape[1]) if came.shape[::2] == expected.shape[::2] else 0):
        old, new = grid(came.shape[1] - n, (1, 1)), grid(expected.shape[1] - n, image)
        if math.prod(old) == came.shape[1] - n and math.prod(new) == expected.shape[1] - n:
            table = came[:, n:].float().transpose(1, 2).unflatten(2, old)  # (1, D, S, S)
            table = F.interpolate(table, size=new, mode="bicubic", antialias=True)
            return torch.cat([came[:, :n].float(), table.flatten(2).transpose(1, 2)], 1)
    return came


def _of_other_classes(reshaped: list[str], state: Mapping, wanted: Mapping, heads: Collection[str]) -> list[str]:
    """The weights that classify: the only ones that differ in their first dimension alone, all by the same numbers, and
    among them a head's, where those are known. So a second head, or an auxiliary one, is found too."""
    differ = [key for key in reshaped if _shape(state[key])[1:] == _shape(wanted[key])[1:] and len(_shape(wanted[key]))]
    changes = {(len(state[key]), len(wanted[key])) for key in differ}
    matrices = [key for key in differ if wanted[key].dim() > 1]
    known = not heads or any(_inside(key, heads) for key in matrices)
    return differ if len(changes) == 1 and matrices and known else []


def _inside(key: str, heads: Collection[str]) -> bool:
    """Whether a weight belongs to one of these layers."""
    return any(key.startswith(f"{path}." if path else "") for path in heads)


def _reads_other_images(came: Tensor, expected: Tensor) -> bool:
    """Whether both are kernels of a first convolution (O, 1 or 3, h, w) of as many outputs."""
    kernels = all(value.dim() == 4 and value.shape[1] in (1, 3) for value in (came, expected))
    return kernels and len(came) == len(expected)


def _shape(value) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _some(keys: list[str]) -> str:
    rest = len(keys) - SHOWN
    return ", ".join(keys[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def content_hash(module: nn.Module) -> str:
    """Hexadecimal SHA-256 of all parameters and buffers, names and dtypes included."""
    return tensors_hash([*module.named_parameters(), *module.named_buffers()])


def tensors_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """Hexadecimal SHA-256 of tensors with their names and dtypes, in whatever order they come."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
