"""Images decoded once, into one uint8 array in a file that is mapped into memory, not read.

The file is NumPy's .npy, named by a hash of what was packed: names, sizes, times of change, and the side, with a
checksum for each image at its end. Processes share its pages, and the next run opens it at once.
"""

import contextlib
import errno
import hashlib
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.data.augment import SMALL, CenterCrop
from distill.data.files import Encoded, tensor
from distill.files import atomic
from distill.locks import alone
from distill.progress import say
from distill.types import ImageSize, checked_size, in_px, sides

_FORMAT = 2  # of what is packed: a change of how images are decoded or cropped packs anew
_CHUNK = 256  # images decoded at once
_CRC = np.dtype("<u4")


class Packed:
    """Images of a pack, as `packed[rows] -> (N, 3, H, W) uint8`.

    Args:
        pixels: (M, 3, H, W), from `pack`; a copy sent to another process opens the file there.
        source: of the pack's rows that belong here, for `listing`.
        rows: where these are in the pack, (N,) int64.
    """

    def __init__(self, pixels: np.memmap, source: Encoded, rows: Tensor):
        self.pixels, self.source, self.rows = pixels, source, rows.numpy()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(self.pixels[self.rows[rows.numpy()]]))

    def entries(self) -> tuple[list[str], list[int]]:
        return self.source.entries()

    def listing(self) -> bytes:
        size = checked_size(self.pixels.shape[2:])
        return self.source.listing() + f"packed at {size}".encode()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "pixels": self.pixels.filename}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = {**state, "pixels": np.load(state["pixels"], mmap_mode="c")}


def read_small(images: Encoded, size: ImageSize | None, store: str | None) -> Tensor | None:
    """All images as one (N, 3, H, W) uint8 array; None where they do not suit one.

    They suit if none has a side above 64 px and, without `size`, if all are of the same size.
    With `size` they are resized and cropped to it where they differ.

    Args:
        store: folder in which the array is kept and found again; None: it is in memory only.
    """
    first = images.decode(0)
    space = sides(size or first.shape[:2])
    if max(*space, *first.shape) > SMALL:
        return None
    if store is None:
        pixels = _small(images, space, resize=size is not None)
        return None if pixels is None else torch.from_numpy(pixels)
    path = _path(store, images, f"small {size}")
    shape = (len(images), 3, *space)
    pixels = None
    try:
        if (there := _open(path, shape)) is not None:
            return torch.from_numpy(there)
        with _alone(path):
            pixels = _open(path, shape)
            if pixels is None:
                pixels = _small(images, space, resize=size is not None)
                if pixels is None:
                    return None
                _write(path, shape, [pixels])
                pixels = _open(path, shape)
    except OSError as error:
        say(f"warning: images can't be packed into {path.parent} ({_reason(error)}): they are kept in memory")
        if pixels is None:
            pixels = _small(images, space, resize=size is not None)
    return None if pixels is None else torch.from_numpy(pixels)


def pack(images: Encoded, size: ImageSize, store: str) -> np.memmap | None:
    """The largest middle part of every image of the shape of `size`, resized to it: (N, 3, H, W) uint8, made once.

    Returns:
        None where it can't be written: said, and the images are to be decoded as they are.
    """
    path = _path(store, images, f"squares {size}")
    shape = (len(images), 3, *sides(size))
    try:
        if (there := _open(path, shape)) is not None:
            return there
        with _alone(path):
            pixels = _open(path, shape)
            if pixels is None:
                say(f"packing {len(images):,} images at {in_px(size)}, {math.prod(shape) / 1e9:.2f} GB → {path}")
                _write(path, shape, _middles(images, size))
                pixels = _open(path, shape)
            return pixels
    except OSError as error:
        say(f"warning: images can't be packed into {path.parent} ({_reason(error)}): they are decoded every time")
        return None


def _small(images: Encoded, space: tuple[int, int], resize: bool) -> np.ndarray | None:
    pixels = np.empty((len(images), 3, *space), np.uint8)
    for row in range(len(images)):  # threads would be slower: so little of it is done outside Python's lock
        image = images.decode(row)
        if image.shape == (*space, 3):
            pixels[row] = image.transpose(2, 0, 1)
        elif resize and max(image.shape) <= SMALL:
            pixels[row] = _middle(image, space)
        else:
            return None
    return pixels


def _middles(images: Encoded, size: ImageSize) -> Iterator[np.ndarray]:
    """(n, 3, H, W) at a time, in order."""
    decode: Callable[[int], np.ndarray] = lambda row: _middle(images.decode(row, 2 * max(sides(size))), size)  # noqa: E731
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(images), _CHUNK):
            yield np.stack(list(pool.map(decode, range(start, min(start + _CHUNK, len(images))))))


def _middle(image: np.ndarray, size: ImageSize) -> np.ndarray:
    """(H, W, 3) → (3, *sides(size))"""
    return CenterCrop(resize=1.0)([tensor(image)], torch.empty(1, 0), size)[0].numpy()


def _path(store: str, images: Encoded, what: str) -> Path:
    key = hashlib.sha256(f"{_FORMAT} {what}\n".encode() + images.listing()).hexdigest()
    return Path(store).expanduser().absolute() / f"{key[:16]}.npy"


def _alone(path: Path) -> contextlib.AbstractContextManager:
    """Nobody else where a pack is to be made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return alone(path.with_suffix(".lock"), "packed images")


def _open(path: Path, shape: tuple[int, ...]) -> np.memmap | None:
    """The array, or None where there is none or the file isn't what `_write` made of such a one: its checksums, one
    an image, are compared. It is read where nothing can be written, and so without a lock."""
    try:
        pixels = np.load(path, mmap_mode="c")  # copy on write: torch wants writable memory, the file stays as it is
        right = isinstance(pixels, np.memmap) and pixels.dtype == np.uint8 and pixels.shape == shape
        end = pixels.offset + pixels.nbytes if right and pixels.flags.c_contiguous else None
        if end is not None and path.stat().st_size == end + _CRC.itemsize * shape[0]:
            return pixels if (_checksums(pixels) == np.fromfile(path, _CRC, offset=end)).all() else None
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise
    except Exception:  # of a damaged header NumPy raises nearly everything, TokenError included
        pass
    return None


def _checksums(pixels: np.ndarray) -> np.ndarray:
    """One an image, (N,)."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = pool.map(lambda rows: [zlib.crc32(row) for row in rows], np.array_split(pixels, os.cpu_count() or 1))
        return np.array([each for part in parts for each in part], _CRC)


def _write(path: Path, shape: tuple[int, ...], chunks: Iterable[np.ndarray]) -> None:
    """The array as NumPy writes it, then the checksums. Written, not mapped: on a full disk a mapped file kills the
    process instead of raising."""
    if path.exists():
        say(f"packed images: {path} is damaged; it is made anew")
    if shutil.disk_usage(path.parent).free < math.prod(shape):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        checksums = []
        for chunk in chunks:
            file.write(chunk)
            checksums.append(_checksums(chunk))
        file.write(np.concatenate(checksums).tobytes())


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
