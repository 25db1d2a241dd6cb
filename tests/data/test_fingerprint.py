"""distill.data.fingerprint: which images a run has, and in words how others differ."""

import base64
import json
import os
import shutil
import time
import zlib

import pytest
import torch
from PIL import Image
from sets import digits, fake, imagefolder, webdataset
from test_data_shards import make_shards, write_tar

from distill.data import fingerprint as module
from distill.data.base import Data, Split
from distill.data.files import Files
from distill.data.fingerprint import difference, fingerprint
from distill.errors import UserError


@pytest.fixture
def root(tmp_path):
    for split, number in (("train", 10), ("test", 4)):
        for name in ("cat", "dog"):
            for i in range(number):
                path = tmp_path / "set" / split / name / f"{i:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (i, len(name + split), 0)).save(path)
    return tmp_path / "set"


def found(root, **options) -> dict:
    """As it comes back from a file."""
    return json.loads(json.dumps(fingerprint(imagefolder(str(root), 4, 0, **options))))


def add(root, *names, size=(8, 8)):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(root / name)


def change(root, what: str) -> None:
    if what == "renamed":
        for split in ("train", "test"):
            (root / split / "dog").rename(root / split / "ape")  # comes first now: every row is another
    elif what == "new class" or what == "gone class":
        add(root, *(f"{split}/emu/{i}.png" for split in ("train", "test") for i in range(5)))
    elif what == "new images":
        add(root, *(f"train/cat/x{i}.png" for i in range(12)))
    elif what == "gone":
        for i in range(3):
            (root / f"train/dog/{i:02}.png").unlink()
    elif what == "replaced":
        (root / "test/dog/01.png").write_bytes((root / "test/dog/01.png").read_bytes() + b"1")
    elif what == "moved":
        os.replace(root / "train/cat/02.png", root / "train/dog/02b.png")


@pytest.mark.parametrize("what, told, summed", [
    ("nothing", None, None),
    ("touched", None, None),
    ("renamed", "classes renamed: dog → ape", "classes renamed: dog → ape"),
    ("new class", "new classes: emu (10 images)", "new classes: emu (10 images)"),
    ("new images", "12 images new (train/cat/x0.png, train/cat/x1.png, train/cat/x10.png, train/cat/x11.png, "
     "train/cat/x2.png and 7 more)", "other numbers of images: cat 14 → 26"),
    ("gone", "3 images gone (train/dog/00.png, train/dog/01.png, train/dog/02.png)",
     "other numbers of images: dog 14 → 11"),
    ("replaced", "1 image replaced (test/dog/01.png)", "other images, as many: dog"),
    ("moved", "1 image new (train/dog/02b.png); 1 image gone (train/cat/02.png)",
     "other numbers of images: cat 14 → 13, dog 14 → 15"),
])  # fmt: skip
@pytest.mark.parametrize("size", [None, 72], ids=["small", "decoded by batch"])
def test_a_difference_is_told(root, monkeypatch, what, told, summed, size):
    def both(limit):
        monkeypatch.setattr(module, "LISTED", limit)
        return found(root, image_size=size)

    listed, by_class = both(500_000), both(10)
    assert "names" in listed and "names" not in by_class
    change(root, what)
    if what == "touched":
        for path in root.rglob("*.png"):
            os.utime(path, (1, 1))
    after_by_class, after = both(10), both(500_000)
    assert difference(listed, after) == told
    assert difference(by_class, after_by_class) == summed


def test_a_class_that_goes_and_other_splits_and_sizes_are_told(root, tmp_path):
    change(root, "new class")
    before = found(root)
    for split in ("train", "test"):
        shutil.rmtree(root / split / "emu")
    assert difference(before, found(root)) == "classes that are gone: emu"
    now = found(root, image_size=6)
    assert difference(found(root), now) == "images of 8 px, now of 6 px"
    assert difference(now, found(root, image_size=6, split_seed=1)) == (
        "other images are in training, validation and test"
    )
    moved = tmp_path / "elsewhere"
    root.rename(moved)
    assert difference(now, found(moved, image_size=6)) is None


def test_packs_and_shards_have_the_same_names(root, tmp_path):
    plain, packed = found(root, image_size=72), found(root, image_size=72, pack=72, store=str(tmp_path / "store"))
    assert plain == packed
    make_shards(tmp_path / "a/train", 2, 10)

    def shards():
        return fingerprint(webdataset(f"{tmp_path}/a/train-*.tar", 4, 0))

    before = shards()
    assert difference(before, shards()) is None
    write_tar(tmp_path / "a/train-002.tar", {"new.png": (root / "train/cat/00.png").read_bytes(), "new.cls": b"1"})
    with pytest.raises(UserError):
        imagefolder(str(tmp_path / "a"), 4, 0)
    assert difference(before, fingerprint(webdataset(f"{tmp_path}/a/train-*.tar", 4, 0, image_size=32))) == (
        "1 image new (train-002.tar/new)"
    )


def test_images_in_memory():
    before = fingerprint(fake(4, 0))
    assert before == fingerprint(fake(4, 0)) and difference(before, fingerprint(fake(8, 0))) is None
    assert "replaced (" in difference(before, fingerprint(fake(4, 0, seed=1)))
    assert "images new (" in difference(before, fingerprint(fake(4, 0, train_size=660)))
    changed = fake(4, 0)
    changed.train.images[7, 0, 0, 0] ^= 1
    assert difference(before, fingerprint(changed)) == "1 image replaced (train[7])"
    changed = fake(4, 0)
    changed.test.labels = changed.test.labels.roll(1)
    assert f"{len(changed.test):,} images with another class (" in difference(before, fingerprint(changed))
    assert fingerprint(digits(4, 0))["counts"] == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_names_of_any_bytes(root):
    names = [b"a\nb.png", b"\xff\xfe.png", "😀 ש.png".encode(), b"tab\there.png", b"\x1b[31m.png"]
    before = found(root)
    for name in names:
        shutil.copy(root / "train/cat/00.png", os.fsencode(root) + b"/train/cat/" + name)
    told = difference(before, found(root))
    assert told.startswith("5 images new (") and "\\udcff\\udcfe.png" in told and told.isprintable()
    assert "😀 ש.png" in told and difference(found(root), found(root)) is None


@pytest.mark.parametrize("damage", [
    {"classes": None}, {"contents": []}, {"names": "no base64 of zlib"}, {"names": 3}, {"counts": None, "names": None},
    {"image_size": None, "names": ""},
])  # fmt: skip
def test_a_damaged_record_is_one_line(root, damage):
    now = found(root)
    with pytest.raises(UserError, match="damaged: start a new run"):
        difference({**now, **damage}, now)
    with pytest.raises(UserError, match="damaged"):
        difference({}, now)


def test_a_bomb_is_not_unpacked(root):
    now = found(root)
    bomb = base64.b64encode(zlib.compress(bytes(10**7))).decode()
    with pytest.raises(UserError, match="damaged"):
        difference({**now, "names": bomb}, now)


def test_ten_thousand_files_take_half_a_second(tmp_path):
    names = [f"class{i % 10}/{i:05}-of-a-photo.jpg" for i in range(10_000)]
    for k in range(10):
        (tmp_path / f"class{k}").mkdir()
    for name in names:
        (tmp_path / name).touch()
    labels = torch.arange(10_000) % 10
    split = Split(Files(tmp_path, names, 224), labels, 224)
    empty = Split(Files(tmp_path, names[:0], 224), labels[:0], 224)
    data = Data([f"class{k}" for k in range(10)], 224, split, empty, empty)
    began = time.process_time()
    result = fingerprint(data)
    assert time.process_time() - began < 0.5 and len(json.dumps(result)) < 300_000
