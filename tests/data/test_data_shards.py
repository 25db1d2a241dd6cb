"""distill.data.webdataset: tar shards read by place, with the same views, cuts and packs as files."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sets import imagefolder, webdataset

from distill.data.augment import RandomResizedCrop, ShiftFlip, chain
from distill.data.files import ImageError
from distill.errors import UserError


def image_bytes(label: int, number: int, side: int, kind: str = "png") -> bytes:
    pixels = np.random.default_rng([label, number]).integers(256, size=(side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, {"jpg": "JPEG"}.get(kind, kind))
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def make_shards(stem: Path, classes: int, number: int, side: int = 32, shards: int = 2) -> Path:
    """stem-000.tar …, `number` images of each class among them, labels as .cls and as .json."""
    parts: list[dict[str, bytes]] = [{} for _ in range(shards)]
    for i in range(number):
        for label in range(classes):
            key, members = f"{label}/{i:03}", parts[i % shards]
            members[f"{key}.png"] = image_bytes(label, i, side)
            if label:
                members[f"{key}.cls"] = b"%d\n" % label
            else:
                members[f"{key}.json"] = json.dumps({"label" if i % 2 else "cls": label, "width": side}).encode()
    for shard, members in enumerate(parts):
        write_tar(stem.parent / f"{stem.name}-{shard:03}.tar", members)
    return stem


def as_folder(root: Path, classes: int, number: int, side: int) -> Path:
    """The same images as files."""
    for label in range(classes):
        (root / str(label)).mkdir(parents=True)
        for i in range(number):
            (root / str(label) / f"{i:03}.png").write_bytes(image_bytes(label, i, side))
    return root


@pytest.mark.parametrize("side", [32, 80])
def test_shards_hold_the_images_of_a_folder(tmp_path, side):
    make_shards(tmp_path / "train", 3, 10, side)
    make_shards(tmp_path / "test", 3, 4, side, shards=1)
    shards = webdataset(
        f"{tmp_path}/train-{{000..001}}.tar", 4, 0, test=f"{tmp_path}/test-*.tar", image_size=32, store=str(tmp_path)
    )
    folder = imagefolder(str(as_folder(tmp_path / "folder", 3, 4, side)), 4, 0, image_size=32)
    assert shards.classes == ["0", "1", "2"] and shards.image_size == 32
    assert [len(split) for split in (shards.train, shards.val, shards.test)] == [27, 3, 12]
    small = isinstance(shards.train.images, torch.Tensor)
    assert small == (side == 32)
    assert shards.train.transform == chain(None, ShiftFlip() if small else RandomResizedCrop())
    every = [split for split in (folder.train, folder.val, folder.test)]
    there = {  # label and pixels, evaluated alike
        (int(label), pixels.numpy().tobytes())
        for split in every
        for label, pixels in zip(split.labels, evaluated(split, folder), strict=True)
    }
    here = zip(shards.test.labels, evaluated(shards.test, shards), strict=True)
    assert {(int(label), pixels.numpy().tobytes()) for label, pixels in here} == there and len(there) == 12


def evaluated(split, data) -> torch.Tensor:
    rows = torch.arange(len(split))
    images = split.images[rows]
    return images if data.test.transform is None else data.test.transform(images, torch.empty(len(rows), 0), 32)


def test_views_are_repeatable_and_workers_change_nothing(tmp_path):
    make_shards(tmp_path / "train", 2, 12, 80, shards=3)

    def epoch(workers, **options):
        data = webdataset(f"{tmp_path}/train-*.tar", 4, workers, image_size=32, **options)
        return [(batch.images, batch.labels, batch.index) for batch in data.train_loader(5)], data.fingerprint

    (alone, fingerprint), (helped, _), (kept, same) = epoch(0), epoch(2), epoch(0, store=str(tmp_path / "store"))
    assert len(alone) > 3 and same == fingerprint
    for one, two, three in zip(alone, helped, kept, strict=True):
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three, strict=True))


def test_shards_are_scanned_once(tmp_path, monkeypatch, capsys):
    make_shards(tmp_path / "train", 2, 12, 80)
    store = tmp_path / "store"

    def make():
        return webdataset(f"{tmp_path}/train-*.tar", 4, 0, image_size=32, store=str(store))

    def refuse(*args, **kwargs):
        raise AssertionError("scanned again")

    before = make()
    kept = sorted(store.glob("*.npz"))
    assert len(kept) == 2
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", refuse)
        assert make().fingerprint == before.fingerprint
    kept[0].write_bytes(kept[0].read_bytes()[:100])  # damaged: scanned, and told
    assert make().fingerprint == before.fingerprint and "damaged" in capsys.readouterr().out
    make_shards(tmp_path / "train", 2, 14, 80)
    assert make().fingerprint != before.fingerprint and len(list(store.glob("*.npz"))) == 4


def test_large_images_can_be_packed(tmp_path):
    make_shards(tmp_path / "train", 2, 12, 80)
    data = webdataset(f"{tmp_path}/train-*.tar", 4, 0, image_size=32, pack=40, store=str(tmp_path / "store"))
    assert data.train.images[torch.arange(2)].shape == (2, 3, 40, 40)
    assert next(iter(data.train_loader(0))).images.shape == (4, 3, 32, 32)


def test_classes_have_names(tmp_path):
    make_shards(tmp_path / "train", 2, 12)
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    train = f"{tmp_path}/train-*.tar"
    assert webdataset(train, 4, 0, classes=["cat", "dog"]).classes == ["cat", "dog"]
    assert webdataset(train, 4, 0, classes=str(tmp_path / "names.txt")).classes == ["cat", "dog"]
    with pytest.raises(UserError, match=r"1 names.*class 1"):
        webdataset(train, 4, 0, classes=["cat"])
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.txt"):
        webdataset(train, 4, 0, classes=str(tmp_path / "nowhere.txt"))


def test_keys_end_at_the_first_dot_and_other_members_are_ignored(tmp_path):
    members = {"README": b"hello", "._a0.png": b"x", "lonely.cls": b"1"}
    for label in (0, 1):
        for i in range(8):
            key = f"v1.0/{label}{i}"  # a dot in a folder's name is part of the key
            members |= {
                f"{key}.JPG": image_bytes(label, i, 32, "jpg"),
                f"{key}.seg.png": b"not read",
                f"{key}.txt": b"",
            }
            members[f"{key}.cls"] = str(label).encode()
    path = write_tar(tmp_path / "train.tar", members)
    data = webdataset(str(path), 4, 0)
    assert len(data.train) + len(data.val) + len(data.test) == 16 and data.num_classes == 2


def one(**members: bytes) -> dict[str, bytes]:
    return {name.replace("_", "."): content for name, content in members.items()}


@pytest.mark.parametrize("members, expected", [
    (one(a_txt=b"1"), "no images in the shard"),
    (one(a_png=b"x"), r"no label for a \(1 of 1 images\): a.cls"),
    (one(a_png=b"x", a_cls=b"cat"), "no label for a"),
    (one(a_png=b"x", a_cls=b"-1"), "no label for a"),
    (one(a_png=b"x", a_json=b"[1]"), "no label for a"),
    (one(a_png=b"x", a_json=b"{"), "no label for a"),
    (one(a_png=b"x", a_json=b'{"caption": "a"}'), "no label for a"),
    (one(a_png=b"x", a_cls=b"0"), "class '0' has 1 images: too few"),
])  # fmt: skip
def test_bad_shards_are_one_line(tmp_path, members, expected):
    path = write_tar(tmp_path / "train.tar", members)
    with pytest.raises(UserError, match=expected) as raised:
        webdataset(str(path), 4, 0)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("harm", ["gone", "cut short", "compressed", "not a tar"])
def test_unreadable_shards_are_one_line(tmp_path, harm):
    make_shards(tmp_path / "train", 2, 12)
    path = tmp_path / "train-001.tar"
    content = path.read_bytes()
    if harm == "gone":
        path.unlink()
    elif harm == "compressed":
        with tarfile.open(path, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("a.png"))
    else:
        path.write_bytes(content[: len(content) // 2] if harm == "cut short" else b"no tar" * 1000)
    with pytest.raises(UserError, match=str(path)) as raised:
        webdataset(f"{tmp_path}/train-{{000..001}}.tar", 4, 0)
    assert "\n" not in str(raised.value)
    assert ("no shard" if harm == "gone" else "cannot read the shard") in str(raised.value)


def test_a_corrupt_image_is_named_before_training(tmp_path):
    make_shards(tmp_path / "train", 2, 12, 80)
    path = write_tar(tmp_path / "train-002.tar", {"bad.png": b"no image", "bad.cls": b"1"})
    with pytest.raises(
        ImageError, match=f"cannot read the image bad of {path} .cannot identify image file.:"
    ) as raised:
        webdataset(f"{tmp_path}/train-*.tar", 25, 0, image_size=32, val_fraction=0.01, test_fraction=0.01)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_whose_end_is_missing_is_named(tmp_path, workers):
    """In training, whose images are not decoded before it."""
    make_shards(tmp_path / "train", 2, 12, 80)
    members = {
        f"{n}{part}": content
        for n in range(9)
        for part, content in ((".png", image_bytes(1, n, 80)[:9000]), (".cls", b"1"))
    }
    path = write_tar(tmp_path / "train-002.tar", members)
    make_shards(tmp_path / "test", 2, 12, 80)
    words = {"val": f"{tmp_path}/test-000.tar", "test": f"{tmp_path}/test-001.tar"}
    data = webdataset(f"{tmp_path}/train-*.tar", 25, workers, image_size=32, **words)
    with pytest.raises(ImageError, match=f"of {path}") as raised:
        list(data.train_loader(0))
    assert "\n" not in str(raised.value)


def test_a_shard_in_two_splits_is_refused(tmp_path):
    make_shards(tmp_path / "train", 2, 12, 80)
    with pytest.raises(UserError, match=r"train-000.tar is in (train and in test|test and in train)"):
        webdataset(f"{tmp_path}/*.tar", 4, 0, test=f"{tmp_path}/train-000.tar")
