"""Every image read once: what is damaged, of what kind and size images are, and which are there twice."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill.data.files import CorruptImage, Encoded, Look, read_and_look, read_arrays
from distill.files import atomic
from distill.progress import counted, printable

FORMAT = b"survey 1\n"  # a change of what is found reads all anew
CHUNK = 512  # images that are asked for at once


@dataclass(frozen=True, eq=False)
class Survey:
    """What was found of N images.

    Args:
        digests: (N,) uint64, of the pixels as they are seen; 0: damaged.
        sizes: (N, 2) int32, height and width in px, as stored.
        kinds: (N,), format and mode, as "PNG I;16".
        frames: (N,) bool, whether there are several.
        reasons: of each that is damaged, its name and why.
    """

    digests: np.ndarray
    sizes: np.ndarray
    kinds: np.ndarray
    frames: np.ndarray
    reasons: Sequence[str] = ()

    @property
    def corrupt(self) -> np.ndarray:
        """(N,) bool"""
        return self.digests == 0

    def select(self, rows: np.ndarray) -> "Survey":
        """Of these rows, or this mask; reasons are left out."""
        return Survey(self.digests[rows], self.sizes[rows], self.kinds[rows], self.frames[rows])


KEPT = ("digests", "sizes", "kinds", "frames", "reasons")


def survey(images: Encoded, store: str | None) -> Survey:
    """Read every image, in threads and with a progress bar; once for a set of files, which `store` remembers.

    Raises:
        ImageError: one can't be read for another reason than what is in it: its disk, its permission, a package that is
            missing. It might be read another time, so it is not left out.
    """
    kept = None
    if store is not None:
        key = hashlib.sha256(FORMAT + images.listing()).hexdigest()[:16]
        kept = Path(store).expanduser().absolute() / f"{key}.survey.npz"
        found = _kept(kept, len(images))
        if found is not None:
            return found
    found = _read(images)
    if kept is not None:
        with suppress(OSError):  # a full disk: they are read again
            kept.parent.mkdir(parents=True, exist_ok=True)
            with atomic(kept) as temporary, open(temporary, "wb") as file:
                np.savez(file, **{key: np.asarray(getattr(found, key), *_strings(key)) for key in KEPT})
    return found


def _strings(key: str) -> tuple:
    return (np.str_,) if key == "reasons" else ()  # so that none is an array of strings, too


def _kept(path: Path, count: int) -> Survey | None:
    arrays = read_arrays(path, *KEPT)
    if arrays is None:
        return None
    found = Survey(*arrays[:4], tuple(map(str, arrays[4].tolist())))
    shapes = [each.shape for each in arrays[:4]] == [(count,), (count, 2), (count,), (count,)]
    return found if shapes and found.corrupt.sum() == len(found.reasons) else None


def _read(images: Encoded) -> Survey:
    def read(row: int) -> tuple[int, Look] | str:
        try:
            with images.opened(row) as (file, name):
                pixels, look = read_and_look(file, 2 * images.largest, name)
        except CorruptImage as error:
            return f"{printable(images.names[row])} ({error.reason})"
        return digest(pixels), look

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        starts = range(0, len(images), CHUNK)
        chunks = (list(pool.map(read, range(start, min(start + CHUNK, len(images))))) for start in starts)
        found = list(counted(chunks, len(images), "reading images"))
    looks = [(0, Look("", 0, 0, False)) if isinstance(each, str) else each for each in found]
    return Survey(
        np.array([digest for digest, _ in looks], np.uint64),
        np.array([(look.height, look.width) for _, look in looks], np.int32).reshape(-1, 2),
        np.array([look.kind for _, look in looks], np.str_),
        np.array([look.frames for _, look in looks], bool),
        tuple(each for each in found if isinstance(each, str)),
    )


def digest(pixels: np.ndarray) -> int:
    """64 bits of an image's pixels and shape, not 0."""
    content = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=8)
    content.update(np.ascontiguousarray(pixels))
    return int.from_bytes(content.digest(), "little") or 1
