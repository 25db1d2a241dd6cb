"""Which images a run has: plain values that belong to its record, and in words how others differ from them.

Names and sizes are looked at, not contents: it costs an os.stat a file (or nothing, for shards). `Data.fingerprint` is
stricter: it also changes with files' times and with how images are seen, and names what is kept for later runs.
"""

import base64
import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from torch import Tensor

from distill.data.base import Data, Split
from distill.errors import UserError
from distill.progress import few
from distill.types import checked_size, in_px

LISTED = 500_000  # bytes: a set whose names take no more is listed in its fingerprint, a larger one summed by class


class Image(NamedTuple):
    """What is known of an image without reading it."""

    label: int
    mark: int  # its bytes in the file; of an image in memory the CRC-32 of its pixels
    name: str


def fingerprint(data: Data) -> dict:
    """JSON values: `classes`, `image_size`; by class `counts` and `contents`, by split `splits` (images, and a hash of
    names and sizes); `names`, every image's class, size and name, compressed, where they are short enough.

    What is in no split, or has another time of change, is not in it, and neither is the folder that all is in.
    """
    images = {split: sorted(_images(split, getattr(data, split))) for split in ("train", "val", "test")}
    every = sorted(chain.from_iterable(images.values()))
    by_class: list[list[str]] = [[] for _ in data.classes]
    for image in every:
        by_class[image.label].append(f"{image.mark}\t{os.path.basename(image.name)}\0")
    found = {
        "classes": list(data.classes),
        "image_size": data.image_size if isinstance(data.image_size, int) else list(data.image_size),
        "splits": {
            split: {"images": len(several), "hash": _hash(map(_line, several))} for split, several in images.items()
        },
        "counts": [len(part) for part in by_class],
        "contents": [_hash(sorted(part)) for part in by_class],  # without the class's folder, which may be renamed
    }
    listed = "".join(map(_line, every)).encode("utf-8", "surrogateescape")
    if len(listed) <= LISTED:
        found["names"] = base64.b64encode(zlib.compress(listed)).decode()
    return found


def _images(split: str, part: Split) -> list[Image]:
    source = part.images if hasattr(part.images, "entries") else part.source
    if source is not None:
        names, marks = source.entries()
    else:
        names, marks = [f"{split}[{row}]" for row in range(len(part))], _marks(part.images, len(part))
    return list(map(Image, part.labels.tolist(), marks, names))


def _marks(pixels, count: int) -> list[int]:
    if not isinstance(pixels, Tensor):  # a data set of the user's own that has no names
        return [0] * count
    return [zlib.crc32(np.ascontiguousarray(image)) for image in pixels.cpu().numpy()]


def _line(image: Image) -> str:
    return f"{image.label}\t{image.mark}\t{image.name}\0"  # names may have anything but NUL in them


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def difference(before: dict, now: dict) -> str | None:
    """How the images of `now` are others than those of `before`, both from `fingerprint`, in one line; None: they are
    the same.

    Raises:
        UserError: `before` is none of ours, or damaged.
    """
    if before == now:
        return None
    try:
        return "; ".join(_differences(before, now)) or "other images are in training, validation and test"
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, zlib.error, UserError):
        raise UserError("the record of this run's images is damaged: start a new run (another name=)") from None


def _differences(before: dict, now: dict) -> Iterator[str]:
    renamed = _renamed(before, now)
    new = [name for name in now["classes"] if name not in before["classes"] and name not in renamed.values()]
    gone = [name for name in before["classes"] if name not in now["classes"] and name not in renamed]
    if renamed:
        yield "classes renamed: " + few([f"{old} → {name}" for old, name in renamed.items()])
    if new:
        counts = dict(zip(now["classes"], now["counts"], strict=True))
        yield "new classes: " + few([f"{name} ({counts[name]:,} images)" for name in new])
    if gone:
        yield "classes that are gone: " + few(gone)
    if not (renamed or new or gone) and before["classes"] != now["classes"]:
        yield "classes in another order: " + few(now["classes"])
    both = [name for name in before["classes"] if name in now["classes"]]
    yield from (_by_name if "names" in before and "names" in now else _by_class)(before, now, both)
    if before["image_size"] != now["image_size"]:
        yield "images of {}, now of {}".format(*(in_px(checked_size(each["image_size"])) for each in (before, now)))


def _renamed(before: dict, now: dict) -> dict[str, str]:
    """Classes whose images are all there, under a name that is new."""
    contents = dict(zip(before["classes"], before["contents"], strict=True))
    lost = [name for name in before["classes"] if name not in now["classes"]]
    found = {}
    for name, content in zip(now["classes"], now["contents"], strict=True):
        old = next((old for old in lost if contents[old] == content), None)
        if name not in contents and old is not None:
            found[old] = name
            lost.remove(old)
    return found


def _by_name(before: dict, now: dict, classes: Sequence[str]) -> Iterator[str]:
    """Images of classes that are there in both."""
    old, new = (_read(each) for each in (before, now))
    here = {name: what for name, what in new.items() if what[0] in classes}
    yield from _several("new", [name for name in here if name not in old])
    yield from _several("gone", [name for name, what in old.items() if what[0] in classes and name not in new])
    yield from _several("with another class", [name for name in here if name in old and here[name][0] != old[name][0]])
    yield from _several("replaced", [name for name in here if name in old and here[name][1] != old[name][1]])


def _read(found: dict) -> dict[str, tuple[str, int]]:
    """Name → class and mark."""
    names = zlib.decompressobj().decompress(base64.b64decode(found["names"]), LISTED + 1)
    if len(names) > LISTED:
        raise ValueError("it is longer than ours")
    lines = (line.split("\t", 2) for line in names.decode("utf-8", "surrogateescape").split("\0")[:-1])
    return {name: (found["classes"][int(label)], int(mark)) for label, mark, name in lines}


def _by_class(before: dict, now: dict, classes: Sequence[str]) -> Iterator[str]:
    """Numbers of images of classes that are there in both."""
    old, new = (dict(zip(each["classes"], zip(each["counts"], each["contents"], strict=True), strict=True))
                for each in (before, now))  # fmt: skip
    other = [name for name in classes if old[name][0] != new[name][0]]
    if other:
        yield "other numbers of images: " + few([f"{name} {old[name][0]:,} → {new[name][0]:,}" for name in other])
    replaced = [name for name in classes if old[name][0] == new[name][0] and old[name][1] != new[name][1]]
    if replaced:
        yield "other images, as many: " + few(replaced)


def _several(what: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        yield f"{len(names):,} image{'s' * (len(names) > 1)} {what} ({few(names)})"
