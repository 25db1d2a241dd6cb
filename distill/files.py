"""Files that are whole or not there."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write to the yielded temporary path; it takes `path`'s place only when all of it is on the disk.

    A kill or a full disk leaves the old file as it was; a temporary file left by a kill is overwritten.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        stale.unlink(missing_ok=True)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def content_key(described: dict) -> str:
    """16 hex digits for plain values: the name, or part of it, of what is made from them and from nothing else."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def file_stamp(path: Path, name: str) -> bytes:
    """A line that changes when the file does: what it is called, its bytes and time of change."""
    stat = os.stat(path)
    return os.fsencode(f"{name}\t{stat.st_size}\t{stat.st_mtime_ns}\n")
