"""Your own images: a folder for each class, in one folder or in train/, val/ and test/."""

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.data.base import Data, from_encoded
from distill.data.files import SUFFIXES, Files
from distill.errors import UserError
from distill.files import stamp
from distill.progress import few, printable, say
from distill.schema.ranges import Inside, OnCorrupt, Seed, Sides
from distill.types import checked_size, sides

LITTER = (  # what systems leave in folders of images; hidden files besides
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir"),
    *("lost+found", "__pycache__"),
)
_SPLITS = {  # in whatever case
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


def imagefolder(
    root: str,
    image_size: Sides | None = None,
    val_fraction: Inside = 0.1,
    test_fraction: Inside = 0.2,
    split_seed: Seed = 0,
    augment: Mapping[str, Callable] | None = None,
    pack: Sides | None = None,
    store: str | None = None,
    corrupt: OnCorrupt = "stop",
) -> Data:
    """Images of every mode as RGB; classes are the folders' names in order, and the same in every split.

    Splits are folders named train or training, val, valid, validation or dev, test or testing, in whatever case, with
    class folders in them. With train/ and test/, validation is val/ or, without one, cut from train/. With train/ and
    val/, val/ is the test set and validation is cut from train/, so that nothing is chosen by what is reported. With
    only train/ or class folders both are cut. Cuts are stratified.

    If every image is at most 64 px and so is `image_size`, all are decoded once, into one array; otherwise they
    are decoded batch by batch, cropped at random in training and in the middle in evaluation.

    Args:
        image_size: px, what networks see: the side of squares, or [height, width]; None: that of the images if all
            are equal and at most 64 px, otherwise 224.
        val_fraction, test_fraction: of the folder that is cut.
        pack: px, as `image_size`: to which large images are resized and cropped once, so that no batch has to decode
            them; what is outside of that middle part is never seen. None: they are decoded every time.
        store: folder that keeps decoded arrays for the next run; None: nothing is kept.
        corrupt: what to do about images that can't be decoded: "stop", or "skip": all are read first (which `store`
            remembers), and the damaged are left out before anything is cut. What becomes damaged later ends the run.

    Raises:
        UserError: the folder is missing, empty, unreadable or not laid out as said, a file is there twice, an image
            can't be read, or a class is too small to be cut.
    """
    if image_size is not None:
        image_size = checked_size(image_size)
    if pack is not None:
        pack = checked_size(pack, "data.pack")
    base = Path(root).expanduser().absolute()
    listed = {split: _class_files(folder, base) for split, folder in _split_folders(base).items()}
    classes = _same_classes(listed)

    names = [name for found in listed.values() for files in found.values() for name in files]
    stamps = _stamps(base, names)
    return from_encoded(
        classes,
        Files(base, names, max(sides(image_size or 224)), stamps),
        {split: _labels(found) for split, found in listed.items()},
        {"val": val_fraction, "test": test_fraction},
        split_seed,
        corrupt,
        image_size,
        pack,
        store,
        augment,
    )


def _split_folders(root: Path) -> dict[str, Path]:
    """Folders of class folders: of train, val and test what is there; or `root` itself as train.

    A folder named as a split is one if it has class folders in it, or if it is train's.
    """
    if not root.is_dir():
        raise UserError(f"no folder {root}: set data.root to a folder with a subfolder of images for each class")
    inside = _folders(root)
    found = {split: [path for path in inside if _is_split(path, split)] for split in _SPLITS}
    if not any(found.values()):
        sets = [path.name for path in inside if any(_is_split(each, "train") for each in _folders(path))]
        if sets:
            raise UserError(f"{root} holds data sets ({few(sets)} have training images): set data.root to one of them")
        return {"train": root}
    if not found["train"]:
        raise UserError(f"{root} has {', '.join(p.name for ps in found.values() for p in ps)} but no folder 'train'")
    for split, folders in found.items():
        if len(folders) > 1:
            names = " and ".join(folder.name for folder in folders)
            raise UserError(f"{root} has {names}: keep one of them, for {split}")
    chosen = {split: folders[0] for split, folders in found.items() if folders}
    left = [path.name for path in inside if path not in chosen.values()]
    if left:
        say(f"  {root}: {few(left)} beside {', '.join(path.name for path in chosen.values())} are left out")
    return chosen


def _is_split(path: Path, split: str) -> bool:
    return path.name.lower() in _SPLITS[split] and bool(_folders(path))


def _folders(path: Path) -> list[Path]:
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(error) from None
    return [Path(entry.path) for entry in entries if _is_folder(entry) and not _is_litter(entry.name)]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name.lower() in LITTER


def _unreadable(error: OSError) -> UserError:
    return UserError(f"cannot read the folder {error.filename} ({error.strerror}): allow it, or move it away")


def _class_files(folder: Path, root: Path) -> dict[str, list[str]]:
    """{class: image files anywhere below its folder, as paths relative to `root`}, all in order."""
    found = {path.name: [os.path.relpath(file, root) for file in _images(path)] for path in _folders(folder)}
    if len(found) < 2:
        raise UserError(f"{folder} has {len(found)} class folders, at least 2 are needed: FOLDER/CLASS/IMAGE.jpg")
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise UserError(f"no images in {len(empty)} class folders of {folder}: {few(empty)}; fill or remove them")
    return found


def _images(folder: Path, above: tuple[str, ...] = ()) -> list[str]:
    """Image files anywhere below a folder, links followed, in order.

    Args:
        above: where the folders really are that `folder` is in.
    """
    here = os.path.realpath(folder)
    if here in above:
        raise UserError(f"{folder} is a link to a folder that it is in: remove it")
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(error) from None
    found = []
    for entry in entries:
        if _is_litter(entry.name):
            continue
        if _is_folder(entry):
            found += _images(Path(entry.path), (*above, here))
        elif entry.name.lower().endswith(SUFFIXES):
            found.append(entry.path)
    return sorted(found)


def _stamps(base: Path, names: list[str]) -> np.ndarray:
    """(N, 2) int64: bytes and time of change of each.

    Raises:
        UserError: a file is none, or is there twice, by links: it could be in training and in test.
    """
    places: dict[tuple[int, int], str] = {}
    stamps = np.empty((len(names), 2), np.int64)
    for row, name in enumerate(names):
        path = printable(str(base / name))
        try:
            found = os.stat(base / name)
        except OSError as error:
            raise UserError(f"cannot read the image {path} ({error.strerror}): mend or remove it") from None
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"cannot read the image {path} (it is no file, but a pipe or a device): remove it")
        if found.st_ino and (first := places.setdefault((found.st_dev, found.st_ino), name)) != name:
            both = f"{printable(first)} and {printable(name)} in {base}"
            raise UserError(f"{both} are the same file: remove one, or copy it if both are meant")
        stamps[row] = stamp(found)
    return stamps


def _same_classes(listed: dict[str, dict[str, list[str]]]) -> list[str]:
    classes = list(listed["train"])
    for split, found in listed.items():
        if list(found) != classes:
            absent = sorted(set(classes) - set(found))
            extra = sorted(set(found) - set(classes))
            raise UserError(
                f"the classes of {split} and train differ: missing {few(absent)}; extra {few(extra)}; "
                "every split needs the same class folders"
            )
    return classes


def _labels(found: dict[str, list[str]]) -> Tensor:
    counts = torch.tensor([len(files) for files in found.values()])
    return torch.arange(len(found)).repeat_interleave(counts)
