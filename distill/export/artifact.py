"""A file that ships, and how it is written."""

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from distill.errors import UserError
from distill.files import atomic

MOST = 50_000_000  # bytes of a file's description of itself: the names of its classes
Model = Callable[[Tensor], Tensor]  # images (N, C, H, W) in [0, 1] -> logits (N, K)


@dataclass(frozen=True)
class Artifact:
    """An exported file.

    `load(path)` opens it in its own runtime, on as many threads as torch then has, and raises UserError where it
    can't. It is a function of a module, so that another process can import it (distill/export/serve.py).
    """

    format: str  # "torchscript", "lite", "executorch", "onnx", "torch_export"
    path: Path
    flow: str  # which quantization the runtime executes: distill.compress.flows
    load: Callable[[Path], Model]
    rounds: bool = False  # in int8 kernels of its own: an int8 file equals its source but for roundings

    def run(self, images: Tensor) -> Tensor:
        """The file's answer, in this process: images (N, C, H, W) in [0, 1] to logits (N, K)."""
        return self._model(images)

    @cached_property
    def _model(self) -> Model:
        return self.load(self.path)


def describe(example: Tensor, metadata: Mapping) -> dict:
    """What every file says of itself: how its input is to be made from an image, and `metadata`.

    Args:
        example: images (N, C, H, W).
        metadata: plain JSON values; what it says of "input" is added to what is said here.
    """
    channels, height, width = example.shape[1:]
    described = {
        "layout": "NCHW",
        "dtype": "float32",
        "range": [0, 1],
        "channels": channels,
        "height": height,
        "width": width,
        "normalization": "in the graph",
    }
    return {**metadata, "input": described | metadata.get("input", {})}


def read_zipped(path: Path, ending: str, kinds: str) -> dict:
    """The JSON in the member of a zip file whose name has this ending; nothing of the file is executed.

    Args:
        kinds: what was expected, for the error, such as ".pt or .ptl".

    Raises:
        UserError: `path` is no such file.
    """
    try:
        with zipfile.ZipFile(path) as file:
            member = next(member for member in file.infolist() if member.filename.endswith(ending))
            if member.file_size > MOST:
                raise ValueError(f"it has {member.file_size:,} bytes")
            return json.loads(file.read(member))
    except (OSError, zipfile.BadZipFile, StopIteration, ValueError, RecursionError) as error:
        name = ending.rpartition("/")[2]
        raise UserError(f"{path} has no readable {name}: expected a {kinds} that distill exported") from error


def write(path: Path, data: bytes) -> None:
    """Writes all of `data` or nothing: an earlier file stays whole when the disk is full.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path} ({len(data):,} bytes): {reason}; an earlier file is unchanged") from error
