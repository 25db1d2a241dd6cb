"""What a run will write, and whether it can. Never imports torch."""

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from distill.errors import UserError
from distill.files import human


@dataclass(frozen=True)
class Write:
    """Something that a run will write: what, into which folder, which an option names, about how many bytes, and
    whether it ends where it can't."""

    what: str
    option: str
    folder: Path
    bytes: int
    needed: bool = True


def refuse_unwritable(writes: Iterable[Write]) -> None:
    """Raises UserError where a folder can neither be written to nor be made. Nothing is left in it."""
    for one in (each for each in writes if each.needed):
        try:
            with tempfile.TemporaryFile(dir=_there(one.folder)):
                pass
        except OSError as error:
            raise UserError(
                f"{one.option}={one.folder}: {one.what} can't be written there ({error.strerror}): give another folder"
            ) from error


def room(writes: Iterable[Write]) -> str:
    """A line: bytes needed and free.

    Raises:
        UserError: a disk has less room than that, what is in the folders already counted as if it were of this run.
    """
    disks: dict[int, list[Write]] = {}
    for one in writes:
        disks.setdefault(_there(one.folder).stat().st_dev, []).append(one)
    lines = []
    for several in disks.values():
        free, wanted = shutil.disk_usage(_there(several[0].folder)).free, sum(one.bytes for one in several)
        said = ", ".join(f"{one.what} {human(one.bytes)}" for one in several if one.bytes)
        line = f"about {human(wanted)} to be written ({said}), {human(free)} free"
        if wanted > free and wanted > free + sum(_taken(one.folder) for one in several):
            options = ", ".join(dict.fromkeys(f"{one.option}={one.folder}" for one in several if one.bytes))
            raise UserError(f"disk: {line}: make room, or write elsewhere ({options})")
        lines.append(line)
    return "disk: " + "; ".join(lines)


def _there(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    folder = Path(folder).absolute()
    return next(each for each in (folder, *folder.parents) if each.exists())


def _taken(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in Path(folder).rglob("*") if file.is_file())
