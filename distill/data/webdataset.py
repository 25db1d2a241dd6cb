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
import zipfile
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from distill.data.base import Data, from_encoded, hold_out
from distill.data.files import DECODED, Encoded, header, read
from distill.errors import UsageError, UserError
from distill.files import atomic, file_stamp
from distill.locks import alone
from distill.progress import say
from distill.schema.ranges import Inside, Seed, Sides
from distill.types import checked_size, sides

LONGEST = 10_000_000  # bytes of an image's description
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
) -> Data:
    """Images in tar shards; what of val and test is not given is cut, and what is small is packed, as by `imagefolder`.

    Args:
        train, val, test: shards, such as "train-{000..009}.tar" or "train-*.tar"; uncompressed.
        classes: names, or a file with one in each line; None: "0" … "K-1".
        store: folder that keeps the shards' indices, and decoded arrays.

    Raises:
        UserError: a shard is missing or unreadable, has no images, or an image without a label.
    """
    if image_size is not None:
        image_size = checked_size(image_size)
    if pack is not None:
        pack = checked_size(pack, "data.pack")
    patterns = {split: pattern for split, pattern in (("train", train), ("val", val), ("test", test)) if pattern}
    shards = {split: _shards(pattern) for split, pattern in patterns.items()}
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
    every = torch.cat(list(labels.values()))
    names = _names(classes, int(every.max()))
    rows = hold_out(labels, {"val": val_fraction, "test": test_fraction}, split_seed, names)
    images = Shards(paths, index, max(sides(image_size or 224)))
    return from_encoded(names, images, every, rows, image_size, pack, store, augment)


class Shards(Encoded):
    """Images at their places in tar files.

    Args:
        paths: of the tar files.
        index: (N,) arrays "names", "shards" (a number in `paths`), "offsets" and "sizes" in bytes.
        largest: px, see `Encoded`.
    """

    def __init__(self, paths: Sequence[Path], index: Mapping[str, np.ndarray], largest: int):
        self.paths, self.index, self.largest = paths, dict(index), largest
        self.names = self.index["names"]

    def decode(self, row: int, draft: int | None = None) -> np.ndarray:
        encoded, name = self._encoded(row)
        return read(encoded, draft, name)

    def look(self, row: int) -> None:
        header(*self._encoded(row))

    def _encoded(self, row: int) -> tuple[io.BytesIO, str]:
        """An image's bytes, and what it is called."""
        path, size = self.paths[self.index["shards"][row]], int(self.index["sizes"][row])
        try:
            with open(path, "rb") as file:
                file.seek(int(self.index["offsets"][row]))
                encoded = file.read(size)
        except OSError as error:
            raise UserError(f"cannot read the shard {path} ({error.strerror})") from None
        return io.BytesIO(encoded), f"{self.names[row]} of {path}"

    def select(self, rows: Tensor) -> "Shards":
        return Shards(self.paths, {key: part[rows.numpy()] for key, part in self.index.items()}, self.largest)

    def listing(self) -> bytes:
        places = zip(self.index["shards"].tolist(), self.names, self.index["sizes"], strict=True)
        images = os.fsencode("".join(f"{shard}/{name}\t{size}\n" for shard, name, size in places))
        return DECODED + images + b"".join(file_stamp(path, path.name) for path in self.paths)


def _shards(pattern: str) -> list[Path]:
    """The files that a pattern names, in order; {000..009} counts, * ? and [] match."""
    found = _BRACES.search(pattern)
    if found:
        first, last = found.groups()
        numbers = range(int(first), int(last) + 1)
        filled = (pattern[: found.start()] + f"{n:0{len(first)}}" + pattern[found.end() :] for n in numbers)
        return [path for one in filled for path in _shards(one)]
    path = Path(pattern).expanduser().absolute()
    paths = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(str(path)))]
    if not paths:
        raise UserError(f"no shard {path}: set data.train, as FOLDER/train-{{000..009}}.tar or FOLDER/train-*.tar")
    return paths


def _index(path: Path, store: str | None) -> dict[str, np.ndarray]:
    """Of each image of a shard: name, offset and size in bytes, label. Kept in `store`, and read from there."""
    if store is None:
        return _scan(path)
    folder = Path(store).expanduser().absolute()
    kept = folder / f"{hashlib.sha256(b'index 1 ' + file_stamp(path, str(path))).hexdigest()[:16]}.npz"
    index = _kept(kept, path)
    if index is not None:
        return index
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder / "index.lock", "the shards' index"):
            index = _kept(kept, path)
            if index is None:
                if kept.exists():
                    say(f"index of shards: {kept} is damaged; it is made anew")
                index = _scan(path)
                with atomic(kept) as temporary, open(temporary, "wb") as file:
                    np.savez(file, **index)
    except OSError as error:
        say(f"warning: the index of {path.name} can't be kept in {folder} ({error.strerror})")
    return index or _scan(path)


def _kept(path: Path, shard: Path) -> dict[str, np.ndarray] | None:
    """An index that was kept, or None where there is none that fits the shard: then it is made anew."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                return None  # not as it is kept: it could unfold to anything
        with np.load(path) as index:  # arrays only: NumPy doesn't unpickle unless asked to
            found = {key: index[key] for key in ("names", "offsets", "sizes", "labels")}
        names, *numbers = found.values()
        ends = found["offsets"] + found["sizes"]
        kinds = names.dtype.kind == "U" and all(each.dtype == np.int64 for each in numbers)
        same = names.ndim == 1 and all(each.shape == names.shape for each in numbers)
        inside = min(each.min() for each in numbers) >= 0 and ends.max() <= shard.stat().st_size
        return found if kinds and same and inside else None
    except Exception:  # of a damaged file zipfile, zlib and NumPy raise nearly everything
        return None


def _scan(path: Path) -> dict[str, np.ndarray]:
    places: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, base = os.path.split(member.name)
                key, _, extension = base.partition(".")
                if not member.isfile() or not key:
                    continue
                key, extension = os.path.join(folder, key), extension.lower()
                if f".{extension}" in IMG_EXTENSIONS:
                    places.setdefault(key, (member.offset_data, member.size))
                elif extension in ("cls", "json") and member.size <= LONGEST:
                    label = _label(tar.extractfile(member).read(), extension)
                    if label is not None:
                        labels[key] = label
            tar.fileobj.seek(tar.offset)  # tarfile takes a header that is cut off for the end
            if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it is cut short")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"cannot read the shard {path} ({error}): an uncompressed tar file is expected") from None
    if not places:
        raise UserError(f"no images in the shard {path}: KEY.jpg and KEY.cls are expected")
    bare = [key for key in places if key not in labels]
    if bare:
        raise UserError(
            f"{path} has no label for {bare[0]} ({len(bare)} of {len(places)} images): {bare[0]}.cls with a number "
            'from 0 is needed, or .json with "label" or "cls"'
        )
    offsets, sizes = np.array(list(places.values())).T
    wanted = np.array([labels[key] for key in places])
    return {"names": np.array(list(places)), "offsets": offsets, "sizes": sizes, "labels": wanted}


def _label(content: bytes, extension: str) -> int | None:
    """A class number from 0; None where there is none."""
    try:
        if extension == "cls":
            return int(content) if int(content) >= 0 else None
        described = json.loads(content)
        label = described.get("label", described.get("cls"))
        return int(label) if int(label) >= 0 and int(label) == float(label) else None  # 1.5 is no class
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _names(classes: Sequence[str] | str | None, highest: int) -> list[str]:
    if classes is None:
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
