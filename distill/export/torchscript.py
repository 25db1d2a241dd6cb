"""TorchScript: NAME.pt for libtorch and Python, NAME.ptl for PyTorch Mobile's lite interpreter."""

import io
import json
import linecache
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.backends import xnnpack
from torch.jit.mobile import _load_for_lite_interpreter
from torch.utils.mobile_optimizer import optimize_for_mobile

from distill import archives
from distill.errors import UserError
from distill.export.resize import before, cuts, described_with, shown
from distill.progress import say
from distill.runtimes.artifact import Artifact, Model, describe, publish, read_zipped

FLOW = "fx"
METADATA = "metadata.json"


def export(net: nn.Module, example: Tensor, stem: Path, metadata: dict, *, resize: bool = False) -> list[Artifact]:
    """Writes stem.pt and stem.ptl, both for any batch size, with `metadata` inside.

    Args:
        net: float or int8, eval mode on the CPU, images in [0, 1] to logits (N, K).
        example: images (N, C, H, W); gives the input's size.
        stem: the files' path without suffix.
        metadata: plain JSON values, such as {"classes": [...]}; the input's description is added.
        resize: the files take images of any height and width, and make of them what `metadata` says.

    Raises:
        UserError: `net` cannot be traced, or a file cannot be written.
    """
    from distill.runtimes.coverage import stored  # not what a file's own process loads

    stem = Path(stem)
    described = described_with(describe(example, metadata), resize)
    steps, extra = cuts(described["input"]), {METADATA: json.dumps(described, ensure_ascii=False)}
    script_file, lite_file = _artifacts(stem)
    with _no_deprecations(), torch.no_grad():
        traced, kinds, note = _trace(net, example), stored(net), ""
        if steps:
            traced = torch.jit.script(before(traced, steps))
        # freezing would write weights that are only stored in int8 out as float
        script = traced if "weight-only int8" in kinds else torch.jit.freeze(traced)
        # and a frozen lite file holds twice those that are packed to compute in int8
        lite = traced if {"static int8", "dynamic int8"} & kinds.keys() else script
        if set(kinds) == {"float"}:
            if xnnpack.enabled:
                lite = optimize_for_mobile(traced)
            else:
                note = "not optimised for mobile: this build of PyTorch has no XNNPACK"
        buffer = io.BytesIO()
        torch.jit.save(script, buffer, _extra_files=extra)
        publish(script_file, buffer.getvalue(), *shown(net, example, steps))
        lite_bytes = lite._save_to_buffer_for_lite_interpreter(_extra_files=extra)
        publish(lite_file, lite_bytes, *shown(net, example, steps))
    if note:
        say(f"  {lite_file.path.name}: {note}")
    return [script_file, lite_file]


def reload(stem: Path) -> list[Artifact]:
    """The files that `export` wrote at `stem`, those of them that are there."""
    return [file for file in _artifacts(stem) if file.path.is_file()]


def _artifacts(stem: Path) -> list[Artifact]:
    script_path, lite_path = stem.parent / f"{stem.name}.pt", stem.parent / f"{stem.name}.ptl"
    return [Artifact("torchscript", script_path, FLOW, load_script), Artifact("lite", lite_path, FLOW, load_lite)]


def read_metadata(path: Path) -> dict:
    """What `export` wrote beside the weights; nothing of the file is executed.

    Raises:
        UserError: `path` is not such a file.
    """
    return read_zipped(path, f"/extra/{METADATA}", ".pt or .ptl")


def load_script(path: Path) -> Model:
    return _load(torch.jit.load, path)


def load_lite(path: Path) -> Model:
    return _load(_load_for_lite_interpreter, path)


def _load(load: Callable, path: Path) -> Model:
    _refuse_files(path)
    try:
        with _no_deprecations():
            module = load(str(path))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"cannot load {path}: {reason}; export it again") from error
    return torch.no_grad()(lambda images: module(images))


# The operators that reach files: a program of theirs would write where it likes, when it is loaded or run.
_FILES = re.compile(rb"\b(torch|aten)(\.|::)(save|from_file)\b")


def _refuse_files(path: Path) -> None:
    """Raises UserError for a program that reads or writes files, and for an archive that is not as torch writes it."""
    try:
        if reason := archives.unlike_torch(path):
            raise UserError(f"cannot load {path}: {reason}; export it again")
        if changed := archives.changed(path):
            raise UserError(f"cannot load {path}: {changed} in it is not what was written; export it again")
        with zipfile.ZipFile(path) as archive:
            code = [member for member in archive.infolist() if member.filename.endswith((".py", "/bytecode.pkl"))]
            found = next(filter(None, (_FILES.search(archive.read(member)) for member in code)), None)
    except archives.FAULTS as error:
        raise UserError(f"cannot load {path}: {error}; export it again") from error
    if found:
        raise UserError(f"{path} is not opened: its program calls {found[0].decode()}, which reaches files")


def _trace(net: nn.Module, example: Tensor) -> torch.jit.ScriptModule:
    """`net` as a graph that answers like it on other images and in other batch sizes."""
    name = type(net.net if hasattr(net, "net") else net).__name__
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            traced = torch.jit.trace(net, example, check_trace=False)
        except Exception as error:  # whatever the network's own code raises under tracing
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{name} cannot be traced to TorchScript: {type(error).__name__}: {reason}") from error
    for images in _other_batches(example):
        wanted = net(images)
        try:
            same = torch.allclose(traced(images), wanted, rtol=1e-3, atol=1e-4, equal_nan=True)
        except RuntimeError:  # a batch size that is fixed in the graph
            same = False
        if not same:
            raise UserError(
                f"{name} cannot be traced to TorchScript: on {len(images)} other images the trace fails or "
                f"answers differently from the network; {_suspects(caught)}"
            )
    return traced


def _other_batches(example: Tensor) -> list[Tensor]:
    """Dark, random and bright images in three batch sizes, so that a branch taken by any of them shows."""
    shape, generator = example.shape[1:], torch.Generator().manual_seed(0)
    return [torch.zeros(1, *shape), torch.rand(7, *shape, generator=generator), torch.ones(2, *shape)]


def _suspects(caught: list[warnings.WarningMessage]) -> str:
    places = [
        f"`{linecache.getline(warning.filename, warning.lineno).strip()}` "
        f"({Path(warning.filename).name}:{warning.lineno})"
        for warning in caught
        if issubclass(warning.category, torch.jit.TracerWarning)
    ]
    if not places:
        return "does its forward draw random numbers or keep state?"
    return f"rewrite what depends on the values or the number of images: {', '.join(dict.fromkeys(places))}"


@contextmanager
def _no_deprecations() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is deprecated, and what phones run
        warnings.simplefilter("ignore", FutureWarning)
        yield
