"""From networks to files. An exporter is a module with two functions and a constant:

export(net, example, stem, metadata) -> list[Artifact]    writes stem.SUFFIX …
reload(stem) -> list[Artifact]                            those of them that are there
FLOW                                                      which quantization its runtime executes natively
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from distill.called import called_as
from distill.errors import UsageError, UserError
from distill.own import place_in, place_of, prefixed
from distill.runtimes.artifact import Artifact
from distill.types import sides

if TYPE_CHECKING:  # a file's own process (serve.py) loads nothing of the data
    from distill.data.base import Data

Nets = Mapping[str, Mapping[str, nn.Module]]  # {file name: {flow: the plain network, quantized for that flow}}


def flow(exporter: Callable) -> str:
    """FLOW of the module in which an `export` or `reload` stands.

    Raises:
        UsageError: it has none.
    """
    module = sys.modules[getattr(exporter, "func", exporter).__module__]
    missing = [name for name in ("export", "reload", "FLOW") if not hasattr(module, name)]
    if missing:
        line = f"an exporter's module has export, reload and FLOW, and {module.__name__} has no {missing[0]}"
        raise UsageError(prefixed(place_of(exporter), line))
    return module.FLOW


def for_all(net: nn.Module, exporters: Mapping[str, Callable]) -> dict[str, nn.Module]:
    """A network that is the same in every flow, such as the float student."""
    return {flow(exporter): net for exporter in exporters.values()}


def export(
    nets: Nets, exporters: Mapping[str, Callable], folder: Path, data: Data, metadata: Mapping
) -> tuple[dict[str, list[Artifact]], list[str]]:
    """Write every network with every exporter as folder/NAME.SUFFIX; one that fails doesn't stop the others.

    Args:
        nets: plain networks by file name and flow; an exporter whose flow is not there is left out.
        exporters: `export(net, example, stem, metadata)` by name.

    Returns:
        The files by network, and one line for each failure.

    Raises:
        UserError: see `refuse_resize`.
    """
    refuse_resize(exporters, data)
    rows = torch.arange(2) % len(data.val)
    example = data.val[rows, 0].images
    metadata = {"classes": data.classes, "input": preparation(data), **metadata}
    files, failures = {name: [] for name in nets}, []
    for name, flows in nets.items():
        for exporter in exporters.values():
            if flow(exporter) not in flows:
                continue
            try:
                files[name] += _written(exporter, flows[flow(exporter)], example, folder / name, metadata)
            except Exception as error:  # whatever a runtime's compiler raises: the others go on
                failures.append(prefixed(place_in(error) or place_of(exporter), f"{name}: {told(error)}"))
    return files, failures


def attempt(net: nn.Module, exporters: Mapping[str, Callable], folder: Path, data: Data) -> None:
    """The user's own exporters, of which nothing is known, on `net`: a file, which is reloaded and answers.

    Raises:
        UserError: one does not.
    """
    own = {name: exporter for name, exporter in exporters.items() if place_of(exporter)}
    _, failures = export({"student": for_all(net, own)}, own, folder, data, {}) if own else ({}, [])
    if failures:
        raise UserError("; ".join(failures))
    for name, exporter in own.items():
        stem = folder / "student"
        again = sys.modules[getattr(exporter, "func", exporter).__module__].reload(stem)
        line = None
        if not isinstance(again, list) or not again or not all(isinstance(file, Artifact) for file in again):
            line = (
                f"export={name}: reload(stem) answers with {again!r:.60}: expected the list of Artifacts that are there"
            )
        for file in () if line else again:
            images = data.val[torch.zeros(1, dtype=torch.int64), 0].images
            answer = file.run(images)
            if not isinstance(answer, torch.Tensor) or answer.shape != (1, data.num_classes):
                came = tuple(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
                line = (
                    f"export={name}: {file.path.name} answers one image with {came}: expected (1, {data.num_classes})"
                )
        if line:
            raise UsageError(prefixed(place_of(exporter), line))


def _written(
    exporter: Callable, net: nn.Module, example: torch.Tensor, stem: Path, metadata: Mapping
) -> list[Artifact]:
    files = exporter(net, example, stem, metadata)
    if not isinstance(files, list) or not all(isinstance(file, Artifact) and file.path.exists() for file in files):
        raise UsageError(f"export answers with {files!r:.60}: expected a list of Artifacts, whose files are there")
    return files


def told(error: Exception) -> str:
    """An error of whatever kind in one line."""
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def reload(nets: Nets, reloaders: Mapping[str, Callable], folder: Path) -> dict[str, list[Artifact]]:
    """The files that an earlier `export` of the same networks wrote.

    Raises:
        UserError: there are none.
    """
    files = {
        name: [file for reload in reloaders.values() if flow(reload) in flows for file in reload(folder / name)]
        for name, flows in nets.items()
    }
    if not any(files.values()):
        raise UserError(f"no exported files in {folder}: add export to the stages")
    return files


def preparation(data: Data) -> dict:
    """How an image is resized before its middle is cut out, as the test images were.

    {"short_side": px} for squares, else {"covered": [height, width]}: the smallest that covers them; of packed images
    also {"pack": [height, width]}, to which they are brought first.
    """
    from distill.data.prepare import preparation  # not what a file's own process loads

    covered, pack = getattr(data.test.transform, "covered", None), preparation(data).pack
    if covered is None:
        return {}
    height, width = covered(data.image_size)
    described = {"short_side": height} if isinstance(data.image_size, int) else {"covered": [height, width]}
    return described if pack is None else {**described, "pack": [*sides(pack)]}


def refuse_resize(exporters: Mapping[str, Callable], data: Data) -> None:
    """Raises UserError where files are to resize (export.NAME.resize=true) as only a user's own code does."""
    transform = data.test.transform
    if transform is None or hasattr(transform, "covered"):
        return
    for name, exporter in exporters.items():
        if getattr(exporter, "keywords", {}).get("resize"):
            raise UserError(
                f"export.{name}.resize=true: the test images of this set are prepared by {type(transform).__name__}, "
                "which a file can't hold: files can resize a short side and cut out the middle"
            )


called_as(sys.modules[__name__], "distill.api.model:export")  # distill.export(student, …), from Python
