"""A file that ships, and how it is written."""

import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.archives import FAULTS
from distill.errors import UserError
from distill.files import atomic

MOST = 50_000_000  # bytes of a file's description of itself: the names of its classes
BATCHES = (1, 3)  # how many images a file has to answer before it counts as written
EXACT, ROUNDED = 1e-2, 1.0  # relative error of its logits that it may have then: a float file, and any other
Model = Callable[[Tensor], Tensor]  # images (N, C, H, W) in [0, 1] -> logits (N, K)


@dataclass(frozen=True)
class Artifact:
    """An exported file, or a folder of files that belong together.

    `load(path)` opens it in its own runtime, on as many threads as torch then has, and raises UserError where it
    can't. It is a function of a module, so that another process can import it (distill/runtimes/serve.py).
    """

    format: str  # "torchscript", "lite", "executorch", "onnx", "torch_export", "litert", "openvino", "coreml"
    path: Path
    flow: str  # which quantization the runtime executes: distill.compress.flows
    load: Callable[[Path], Model]
    rounds: bool = False  # in int8 kernels of its own: an int8 file equals its source but for roundings
    # of its learned numbers, the shares in [0, 1] stored and computed in int8, as the file says; None: as its network
    shares: Callable[[Path], tuple[float, float | None]] | None = None
    halves: bool = False  # floats are float16 in it: an exact file equals its source but for roundings
    elsewhere: str = ""  # why this machine can't execute it: "Core ML runs on macOS and iOS only"

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
    except (*FAULTS, StopIteration) as error:
        name = ending.rpartition("/")[2]
        raise UserError(f"{path} has no readable {name}: expected a {kinds} that distill exported") from error


Content = bytes | Mapping[str, bytes]  # of a file, or of the files of a folder by their paths in it


def write(path: Path, data: Content, proof: Callable[[Path], None] = lambda temporary: None) -> None:
    """Writes all of `data` or nothing: an earlier file stays whole when the disk is full.

    Args:
        path: of the file or folder.
        proof: is shown the new file before it takes its place, and raises where it may not.

    Raises:
        UserError: the file cannot be written.
    """
    parts = data if isinstance(data, Mapping) else {"": data}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            for name, content in parts.items():
                part = temporary / name
                part.parent.mkdir(parents=True, exist_ok=True)
                part.write_bytes(content)
            proof(temporary)
    except OSError as error:
        reason = error.strerror or error
        size = sum(map(len, parts.values()))
        raise UserError(f"cannot write {path} ({size:,} bytes): {reason}; an earlier file is unchanged") from error


def publish(
    file: Artifact, data: Content, net: nn.Module, example: Tensor, place: Callable[[str], str] = lambda said: ""
) -> None:
    """`write`, but only what runs: the new file answers one image and another batch, and not otherwise than `net`.

    How near its answers are on real images is for the report to judge; here they may only not be nonsense.

    Args:
        net: what the file was made of.
        example: images (N, C, H, W); what the file is asked about is made of them, in BATCHES.
        place: " at the operator X (layer Y)" of what its runtime says when it fails, else "".

    Raises:
        UserError: the file cannot be written, its runtime fails, or it answers otherwise than `net`.
    """
    write(file.path, data, lambda temporary: _prove(file, temporary, net, example, place))


@torch.no_grad()
def _prove(file: Artifact, path: Path, net: nn.Module, example: Tensor, place: Callable[[str], str]) -> None:
    from distill.runtimes.coverage import stored  # not what a file's own process loads

    bound = EXACT if stored(net).keys() == {"float"} else ROUNDED
    answer = None
    for count in BATCHES:
        images = example[torch.arange(count) % len(example)]
        try:
            wanted = net(images)
        except Exception as error:  # whatever its own code raises
            raise UserError(
                f"{file.path.name} is not kept: the network itself fails on a batch of {count}: {_line(error)}"
            ) from error
        try:
            answer = answer or file.load(path)
            found = answer(images)
        except Exception as error:  # of whatever kind its runtime raises
            line = _line(error).replace(str(path), file.path.name)
            raise UserError(
                f"{file.path.name} is not kept: its runtime fails on a batch of {count}{place(str(error))}: {line}"
            ) from error
        if found.shape != wanted.shape:
            raise UserError(
                f"{file.path.name} is not kept: it answers a batch of {count} with {tuple(found.shape)} where the "
                f"network answers {tuple(wanted.shape)}"
            )
        error = ((found.double() - wanted).norm() / wanted.double().norm().clamp(min=1e-12)).item()
        if torch.isfinite(wanted).all() and not error <= bound:
            raise UserError(
                f"{file.path.name} is not kept: on a batch of {count} it answers otherwise than the network, with a "
                f"relative error of {error:.2g}"
            )


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
