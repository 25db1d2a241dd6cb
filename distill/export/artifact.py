"""A file that ships, and how it is written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from distill.errors import UserError
from distill.files import atomic


@dataclass(frozen=True)
class Artifact:
    """An exported file. `run` answers from the file itself, reloaded in its own runtime at the first call."""

    format: str  # "torchscript", "lite"
    path: Path
    run: Callable[[Tensor], Tensor]  # images (N, C, H, W) in [0, 1] -> logits (N, K)


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
