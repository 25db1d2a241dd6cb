"""Tar shards in the WebDataset convention: KEY.jpg beside KEY.cls, or KEY.json with "label" or "cls".

Each shard's headers are read once; then any image is read by its place, so that order, views and cuts are the same
functions of the seed as for files.
"""

import glob
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.data.base import Data, from_encoded
from distill.data.files import DECODED, SUFFIXES, Encoded, opened, read_arrays
from distill.errors import UsageError, UserError
from distill.files import atomic, stamp, stamp_line
from distill.locks import alone
from distill.progress import printable, say
from distill.schema.ranges import Inside, OnCorrupt, Seed, Sides
from distill.types import checked_size, sides

LONGEST = 10_000_000  # bytes of an image's description
LONGEST_NAME = 4096
MOST_CLASSES = 10**9
MOST_SHARDS = 1_000_000
KEPT = ("names", "offsets", "sizes", "labels")
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def webdataset(
    train: str,
    val: str | None = None,
    test: str | None = None,
    classes: Sequence[str] | str | None = None,
    image_size: Sides | None = None,
    val_fraction: Inside = 0.1,
    test_fraction: Inside = 0.2,
    split_seed: Seed = 0,
    augment: Mapping[str, Callable] | None = None,
    pack: Sides | None = None,
    store: str | None = None,
    corrupt: OnCorrupt = "stop",
) -> Data:
    """Images in tar shards; what of val and test is not given is cut, and what is small is packed, as by `imagefolder`.

    Args:
        train, val, test: shards, such as "train-{000..009}.tar" or "train-*.tar"; uncompressed.
        classes: names, or a file with one in each line; None: "0" … "K-1".
        store: folder that keeps the shards' indices, and decoded arrays.
        corrupt: as by `imagefolder`.

    Raises:
        UserError: a shard is missing or unreadable, has no images, or an image without a label.
    """
    if image_size is not None:
        image_size = checked_size(image_size)
    if pack is not None:
        pack = checked_size(pack, "data.pack")
    patterns = {split: pattern for split, pattern in (("train", train), ("val", val), ("test", test)) if pattern}
    shards = {split: _shards(pattern) for split, pattern in patterns.items()}
    stamps = [stamp(os.stat(path)) for found in shards.values() for path in found]
    indices = {split: [_index(path, store) for path in found] for split, found in shards.items()}
    for split, found in shards.items():
        for other, others in shards.items():
            same = {path.resolve() for path in found} & {path.resolve() for path in others}
            if split != other and same:
                raise UserError(f"the shard {min(same)} is in {other} and in {split}: each needs shards of its own")
    paths, parts = (list(chain.from_iterable(found.values())) for found in (shards, indices))

    index = {key: np.concatenate([part[key] for part in parts]) for key in ("names", "offsets", "sizes")}
    index["shards"] = np.repeat(np.arange(len(paths)), [len(part["names"]) for part in parts])
    labels = {
        split: torch.from_numpy(np.concatenate([part["labels"] for part in found])) for split, found in indices.items()
    }
    names = _names(classes, int(max(part.max() for part in labels.values())), len(index["names"]))
    return from_encoded(
        names,
        Shards(paths, index, max(sides(image_size or 224)), stamps),
        labels,
        {"val": val_fraction, "test": test_fraction},
        split_seed,
        corrupt,
        image_size,
        pack,
        store,
        augment,
    )


class Shards(Encoded):
    """Images at their places in tar files.

    Args:
        paths: of the tar files.
        index: (N,) arrays "names", "shards" (a number in `paths`), "offsets" and "sizes" in bytes.
        largest: px, see `Encoded`.
        stamps: of the tar files when they were scanned, see `distill.files.stamp`.
    """

    def __init__(
        self, paths: Sequence[Path], index: Mapping[str, np.ndarray], largest: int, stamps: Sequence[tuple[int, int]]
    ):
        self.paths, self.index, self.largest, self.stamps = paths, dict(index), largest, stamps
        self.names = self.index["names"]

    @contextmanager
    def opened(self, row: int):
        shard, size = self.index["shards"][row], int(self.index["sizes"][row])
        path = self.paths[shard]
        with opened(path, self.stamps[shard], f"the shard {printable(str(path))}") as file:
            file.seek(int(self.index["offsets"][row]))
            encoded = file.read(size)
        yield io.BytesIO(encoded), f"{self.names[row]} of {path}"

    def select(self, rows: Tensor) -> "Shards":
        index = {key: part[rows.numpy()] for key, part in self.index.items()}
        return Shards(self.paths, index, self.largest, self.stamps)

    def entries(self) -> tuple[list[str], list[int]]:
        above = os.path.commonpath([path.parent for path in self.paths])
        shards = [os.path.relpath(path, above) for path in self.paths]
        names = [f"{shards[shard]}/{name}" for shard, name in zip(self.index["shards"], self.names, strict=True)]
        return names, self.index["sizes"].tolist()

    def listing(self) -> bytes:
        places = zip(self.index["shards"].tolist(), self.names, self.index["sizes"], strict=True)
        images = "".join(f"{shard}/{name}\t{size}\n" for shard, name, size in places).encode("utf-8", "surrogateescape")
        shards = (stamp_line(path.name, stamp) for path, stamp in zip(self.paths, self.stamps, strict=True))
        return DECODED + images + b"".join(shards)


def _shards(pattern: str) -> list[Path]:
    """The files that a pattern names, in order; {000..009} counts, * ? and [] match."""
    found = _BRACES.search(pattern)
    if found:
        first, last = found.groups()
        numbers = range(int(first), int(last) + 1)
        if len(numbers) > MOST_SHARDS:
            raise UsageError(f"{pattern} are {len(numbers):,} shards, more than {MOST_SHARDS:,}")
        filled = (pattern[: found.start()] + f"{n:0{len(first)}}" + pattern[found.end() :] for n in numbers)
        return [path for one in filled for path in _shards(one)]
    path = Path(pattern).expanduser().absolute()
    paths = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(path))) if os.path.isfile(name)]
    if not paths:
        raise UserError(f"no shard {path}: set data.train, as FOLDER/train-{{000..009}}.tar or FOLDER/train-*.tar")
    return paths


def _index(path: Path, store: str | None) -> dict[str, np.ndarray]:
    """Of each image of a shard: name, offset and size in bytes, label. Kept in `store`, and read from there."""
    if store is None:
        return _scan(path)
    folder = Path(store).expanduser().absolute()
    now = os.stat(path)
    key = hashlib.sha256(b"index 2 " + stamp_line(str(path), stamp(now))).hexdigest()[:16]
    kept = folder / f"{key}.npz"
    index = _kept(kept, now.st_size)
    if index is not None:
        return index
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / "index.lock", "the shards' index"):
            index = _kept(kept, now.st_size)
            if index is None:
                if kept.exists():
                    say(f"index of shards: {kept} is damaged; it is made anew")
                index = _scan(path)
                with atomic(kept) as temporary, open(temporary, "wb") as file:
                    np.savez(file, **index)
    except OSError as error:
        say(f"warning: the index of {path.name} can't be kept in {folder} ({error.strerror})")
    return index or _scan(path)


def _kept(path: Path, size: int) -> dict[str, np.ndarray] | None:
    """The index in a file, of a shard of so many bytes."""
    arrays = read_arrays(path, *KEPT)
    if arrays is None:
        return None
    names, offsets, sizes, labels = arrays
    whole = names.ndim == 1 and len(names) > 0 and names.dtype.kind == "U"
    whole = whole and all(part.shape == names.shape and part.dtype == np.int64 for part in arrays[1:])
    if whole and (np.concatenate([offsets, sizes, size - offsets, size - offsets - sizes, labels]) >= 0).all():
        return dict(zip(KEPT, arrays, strict=True))
    say(f"{path} is damaged; it is made anew")
    return None


class _Member(tarfile.TarInfo):
    """One whose header claims no more than there is: tarfile believes it, and reads long names at once."""

    def _proc_member(self, tar: tarfile.TarFile):
        left = os.fstat(tar.fileobj.fileno()).st_size - tar.fileobj.tell()
        extended = self.type in (*tarfile.GNU_TYPES, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
        if not 0 <= self.size <= (min(left, LONGEST) if extended else left):
            raise tarfile.ReadError("it is cut short, or damaged")
        return super()._proc_member(tar)


def _scan(path: Path) -> dict[str, np.ndarray]:
    places: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:", tarinfo=_Member) as tar:
            end = os.fstat(tar.fileobj.fileno()).st_size
            for member in tar:
                folder, base = os.path.split(member.name)
                key, _, extension = base.partition(".")
                if not member.isfile() or member.issparse() or not key:
                    continue
                if len(member.name) > LONGEST_NAME or not 0 <= member.size <= end - member.offset_data:
                    raise tarfile.ReadError("it is damaged")
                key, extension = os.path.join(folder, key), extension.lower()
                if f".{extension}" in SUFFIXES:
                    places.setdefault(key, (member.offset_data, member.size))
                elif extension in ("cls", "json") and member.size <= LONGEST:
                    label = _label(tar.extractfile(member).read(), extension)
                    if label is not None:
                        labels[key] = label
            tar.fileobj.seek(tar.offset)  # tarfile takes a header that is cut off for the end
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it is cut short")
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:  # the last two by numbers that are none
        raise UserError(f"cannot read the shard {path} ({error}): an uncompressed tar file is expected") from None
    if not places:
        raise UserError(f"no images in the shard {path}: KEY.jpg and KEY.cls are expected")
    bare = [key for key in places if key not in labels]
    if bare:
        first = printable(bare[0])
        raise UserError(
            f"{path} has no label for {first} ({len(bare)} of {len(places)} images): {first}.cls with a number "
            'from 0 is needed, or .json with "label" or "cls"'
        )
    offsets, sizes = np.array(list(places.values()), dtype=np.int64).T
    wanted = np.array([labels[key] for key in places], dtype=np.int64)
    return {"names": np.array(list(places)), "offsets": offsets, "sizes": sizes, "labels": wanted}


def _label(content: bytes, extension: str) -> int | None:
    """A class number from 0; None where there is none."""
    try:
        if extension == "json":
            described = json.loads(content)
            content = described.get("label", described.get("cls"))
        label = int(content)
        same = extension == "cls" or label == float(content)  # 1.5 is no class
        return label if same and 0 <= label < MOST_CLASSES else None
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return None


def _names(classes: Sequence[str] | str | None, highest: int, images: int) -> list[str]:
    if classes is None:
        if highest >= images:
            raise UserError(f"there is an image of class {highest}, but only {images} images: number classes from 0 on")
        return [str(label) for label in range(highest + 1)]
    if isinstance(classes, str):
        try:
            classes = [
                line for line in Path(classes).expanduser().read_text(encoding="utf-8").splitlines() if line.strip()
            ]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.classes: cannot read {classes} ({error})") from None
    if highest >= len(classes):
        raise UsageError(f"data.classes has {len(classes)} names, but there is an image of class {highest}")
    return [str(name) for name in classes]
