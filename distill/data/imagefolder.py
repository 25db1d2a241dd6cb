"""Your own images: a folder for each class, in one folder or in train/, val/ and test/."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from distill.data.augment import CenterCrop, RandomResizedCrop, ShiftFlip
from distill.data.base import Data, Split, cut, from_arrays
from distill.data.files import Files, read_small
from distill.errors import UsageError, UserError

_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def imagefolder(
    root: str,
    batch_size: int,
    num_workers: int | None,
    image_size: int | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    augment: Callable | None = None,
) -> Data:
    """Images of every mode as RGB; classes are the folders' names in order, and the same in every split.

    With train/ and test/, validation is val/ or, without one, cut from train/. With train/ and val/, val/ is
    the test set and validation is cut from train/, so that nothing is chosen by what is reported. With only
    train/ or class folders both are cut. Cuts are stratified.

    If every image is at most 64 px and so is `image_size`, all are decoded once, into memory; otherwise they
    are decoded batch by batch, cropped at random in training and in the middle in evaluation.

    Args:
        image_size: side of the squares that networks see; None: that of the images if all are equal squares
            of at most 64 px, otherwise 224.
        val_fraction, test_fraction: of the folder that is cut.

    Raises:
        UserError: the folder is missing, empty, or not laid out as said, or a class is too small to be cut.
    """
    base = Path(root).expanduser().absolute()
    listed = {split: _class_files(folder, base) for split, folder in _split_folders(base).items()}
    classes = _same_classes(listed)

    names = {split: [name for files in found.values() for name in files] for split, found in listed.items()}
    labels = {split: _labels(found) for split, found in listed.items()}
    if "val" in names and "test" not in names:
        names["test"], labels["test"] = names.pop("val"), labels.pop("val")
    fractions = {"val": val_fraction, "test": test_fraction}
    missing = [split for split in fractions if split not in names]
    if missing:
        parts = cut(labels["train"], [fractions[split] for split in missing], split_seed, classes)
        whole = names["train"], labels["train"]
        for split, rows in zip(["train", *missing], parts, strict=True):
            names[split], labels[split] = [whole[0][row] for row in rows.tolist()], whole[1][rows]

    pixels = read_small(base, names["train"] + names["val"] + names["test"], image_size)
    if pixels is not None:
        arrays = pixels.split([len(names[split]) for split in _SPLITS])
        pairs = [(images, labels[split]) for images, split in zip(arrays, _SPLITS, strict=True)]
        return from_arrays(classes, *pairs, augment, batch_size, num_workers or 0)

    if isinstance(augment, ShiftFlip):
        raise UsageError("data.augment: ShiftFlip is for images of at most 64 px; here use RandomResizedCrop or null")
    size = image_size or 224
    files = {split: Files(base, names[split], size) for split in _SPLITS}
    train = Split(files["train"], labels["train"], size, augment or RandomResizedCrop(), training=True)
    val, test = (Split(files[split], labels[split], size, CenterCrop()) for split in ("val", "test"))
    return Data(classes, size, train, val, test, batch_size, 2 if num_workers is None else num_workers)


def _split_folders(root: Path) -> dict[str, Path]:
    """Folders of class folders: of train, val and test what is there; or `root` itself as train."""
    if not root.is_dir():
        raise UserError(f"no folder {root}: set data.root to a folder with a subfolder of images for each class")
    found = {split: [root / name for name in names if (root / name).is_dir()] for split, names in _SPLITS.items()}
    if not any(found.values()):
        return {"train": root}
    if not found["train"]:
        raise UserError(f"{root} has {', '.join(p.name for ps in found.values() for p in ps)} but no folder 'train'")
    if len(found["val"]) > 1:
        names = " and ".join(folder.name for folder in found["val"])
        raise UserError(f"{root} has {names}: keep one of them as the validation set")
    return {split: folders[0] for split, folders in found.items() if folders}


def _class_files(folder: Path, root: Path) -> dict[str, list[str]]:
    """{class: image files anywhere below its folder, as paths relative to `root`}, all in order."""
    found = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("."):
            found[entry.name] = sorted(
                os.path.relpath(os.path.join(where, name), root)
                for where, _, files in os.walk(entry.path, followlinks=True)
                for name in files
                if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
            )
    if len(found) < 2:
        raise UserError(f"{folder} has {len(found)} class folders, at least 2 are needed: FOLDER/CLASS/IMAGE.jpg")
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise UserError(f"no images in {len(empty)} class folders of {folder}: {_few(empty)}; fill or remove them")
    return found


def _same_classes(listed: dict[str, dict[str, list[str]]]) -> list[str]:
    classes = list(listed["train"])
    for split, found in listed.items():
        if list(found) != classes:
            absent = sorted(set(classes) - set(found))
            extra = sorted(set(found) - set(classes))
            raise UserError(
                f"the classes of {split} and train differ: missing {_few(absent)}; extra {_few(extra)}; "
                "every split needs the same class folders"
            )
    return classes


def _labels(found: dict[str, list[str]]) -> Tensor:
    counts = torch.tensor([len(files) for files in found.values()])
    return torch.arange(len(found)).repeat_interleave(counts)


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"
