"""From networks to files. An exporter is a module with two functions:

export(net, example, stem, metadata) -> list[Artifact]    writes stem.SUFFIX …
reload(stem) -> list[Artifact]                            those of them that are there
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from distill.data.base import Data
from distill.errors import UserError
from distill.export.artifact import Artifact


def export(
    nets: Mapping[str, nn.Module],
    exporters: Mapping[str, Callable],
    folder: Path,
    data: Data,
    metadata: Mapping,
) -> tuple[dict[str, list[Artifact]], list[str]]:
    """Write every network with every exporter as folder/NAME.SUFFIX; one that fails doesn't stop the others.

    Args:
        nets: plain networks by file name.
        exporters: `export(net, example, stem, metadata)` by name.

    Returns:
        The files by network, and one line for each failure.
    """
    rows = torch.arange(2) % len(data.val)
    example = data.val[rows, rows].images
    metadata = {"classes": data.classes, **metadata}
    files, failures = {name: [] for name in nets}, []
    for name, net in nets.items():
        for exporter in exporters.values():
            try:
                files[name] += exporter(net, example, folder / name, metadata)
            except UserError as error:
                failures.append(str(error))
    return files, failures


def reload(nets: Mapping[str, nn.Module], reloaders: Mapping[str, Callable], folder: Path) -> dict[str, list[Artifact]]:
    """The files that an earlier `export` of the same networks wrote.

    Raises:
        UserError: there are none.
    """
    files = {name: [file for reload in reloaders.values() for file in reload(folder / name)] for name in nets}
    if not any(files.values()):
        raise UserError(f"no exported files in {folder}: add export to the stages")
    return files
