"""Archives of the kind that torch writes (zip, nothing packed but text), opened without trust in their directory."""

import struct
import zipfile
import zlib
from pathlib import Path

TEXT = 1 << 24  # bytes that a TorchScript program's packed text may unfold to
FOLDER = 0x10  # the attribute of a folder in an archive's directory (MS-DOS)
FAULTS = (OSError, EOFError, ValueError, LookupError, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error)
"""What zipfile raises for a damaged archive."""


def unlike_torch(path: Path) -> str | None:
    """What in an archive torch does not write, and reads all the same; None where nothing is.

    What is packed may unfold without end; a tensor marked as a folder is never filled: its values are what lay in
    memory.

    Raises:
        FAULTS: a damaged archive.
    """
    if not zipfile.is_zipfile(path):  # torch's older format
        return None
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    unfolded, held = sum(member.file_size for member in members), path.stat().st_size
    if unfolded > held + TEXT:
        return f"it unfolds to {unfolded:,} bytes from {held:,}"
    folder = next((member for member in members if member.is_dir() or member.external_attr & FOLDER), None)
    return None if folder is None else f"{folder.filename} in it is marked as a folder"


def changed(path: Path) -> str | None:
    """The name of a member whose checksum is another than the archive says, which torch does not compare; else None.

    Raises:
        FAULTS: a damaged archive.
    """
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()
