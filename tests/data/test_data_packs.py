"""distill.data.pack: images decoded once, kept whole or not at all."""

import errno
import os
import pickle
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sets import imagefolder

from distill.data import files as files_module
from distill.data.augment import CenterCrop, RandomResizedCrop, ShiftFlip
from distill.data.files import ImageError, read
from distill.data.pack import Packed
from distill.errors import UserError
from distill.export import preparation as described


def make_folder(root: Path, sizes: list[tuple[int, int]], classes=("a", "b")) -> Path:
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i, (width, height) in enumerate(sizes):
            pixels = np.random.default_rng([label, i]).integers(256, size=(height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:03}.png")
    return root


def views(data) -> list[torch.Tensor]:
    """What a run sees: two epochs and the evaluation."""
    loader = data.train_loader(seed=3)
    batches = [*loader]
    loader.sampler.set_epoch(1)
    return [batch.images for batch in (*batches, *loader, *data.val_loader(), *data.test_loader())]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


class Set:
    """A folder of images and how to read it."""

    def __init__(self, folder: Path, kind: str):
        sizes = [(24, 24)] * 20 if kind == "small" else [(90, 70), (70, 90), (80, 80)] * 6
        self.kind, self.root, self.store = kind, make_folder(folder / "set", sizes), folder / "store"
        self.options = {} if kind == "small" else {"pack": 64, "image_size": 48}

    def make(self, store: str | None = "store", **others):
        store = store and str(self.store)
        return imagefolder(str(self.root), 4, 0, **{**self.options, "store": store, **others})

    @property
    def packs(self) -> list[Path]:
        return sorted(self.store.glob("*.npy"))


@pytest.fixture(params=["small", "large"])
def images(request, tmp_path):
    return Set(tmp_path, request.param)


@pytest.fixture
def decoded(monkeypatch) -> list[Path]:
    """Files decoded so far."""
    found = []
    monkeypatch.setattr(files_module, "read", lambda path, *rest: found.append(path) or read(path, *rest))
    return found


def test_images_are_decoded_once(images, decoded):
    first = images.make()
    assert len(decoded) == len(first.train) + len(first.val) + len(first.test) + (images.kind == "small")
    assert len(images.packs) == 1
    seen, written = views(first), images.packs[0].stat().st_mtime_ns
    decoded.clear()
    again = images.make()
    assert same(views(again), seen) and again.fingerprint == first.fingerprint
    assert len(decoded) == (images.kind == "small")  # one, to see whether they are small
    assert images.packs[0].stat().st_mtime_ns == written
    copy = pickle.loads(pickle.dumps(again.train))
    assert torch.equal(copy[[2], 5].images, again.train[[2], 5].images)


def test_small_images_are_the_same_packed_or_not(tmp_path):
    images = Set(tmp_path, "small")
    packed, plain = images.make(), images.make(store=None)
    assert same(views(packed), views(plain)) and packed.fingerprint == plain.fingerprint
    packed.train.images[0] = 0  # of this process alone: the file stays
    assert same(views(images.make()), views(plain))


def test_packed_squares_are_the_middle_of_the_images(tmp_path):
    images = Set(tmp_path, "large")
    data = images.make()
    assert isinstance(data.train.images, Packed) and data.train.transform.steps == (RandomResizedCrop(),)
    for split in (data.train, data.val, data.test):
        pixels = split.images[torch.arange(len(split))]
        assert pixels.shape == (len(split), 3, 64, 64) and pixels.dtype == torch.uint8
        for square, name in zip(pixels, split.images.source.names, strict=True):
            whole = torch.from_numpy(read(images.root / name)).permute(2, 0, 1)
            assert torch.equal(square, CenterCrop(resize=1.0)([whole], torch.empty(1, 0), 64)[0])
    square = data.test.images[torch.tensor([1])]
    assert torch.equal(data.test[[1], 0].images * 255, CenterCrop()(square, torch.empty(1, 0), 48).float())
    assert described(data) == {"short_side": 55, "pack": [64, 64]}  # what a file's metadata says
    assert described(images.make(pack=None)) == {"short_side": 55}


def test_packed_at_their_final_size_they_can_be_shifted(tmp_path):
    images = Set(tmp_path, "large")
    data = images.make(pack=48, augment={"shift_flip": ShiftFlip()})
    assert torch.equal(data.test[[1], 0].images * 255, data.test.images[torch.tensor([1])].float())
    assert data.train[[0, 1], 0].images.shape == (2, 3, 48, 48)
    assert len({images.make(pack=pack).fingerprint for pack in (48, 56, 64, None)}) == 4
    with pytest.raises(UserError, match="resized_crop"):
        images.make(pack=56, augment={"shift_flip": ShiftFlip()})


@pytest.mark.parametrize("options, expected", [({"pack": 40}, "image_size .48"), ({"store": None}, "needs data.store")])
def test_impossible_packs_are_refused(tmp_path, options, expected):
    with pytest.raises(UserError, match=expected):
        Set(tmp_path, "large").make(**options)


def test_a_change_of_the_images_packs_anew(images):
    before = views(images.make())
    path = images.root / "b" / "003.png"
    stat = path.stat()
    Image.fromarray(255 - read(path)).save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert not same(views(images.make()), before) and len(images.packs) == 2
    path.unlink()
    images.make()
    assert len(images.packs) == 3


@pytest.mark.parametrize("harm", ["cut short", "emptied", "not an array", "only a header", "flipped"])
def test_a_damaged_pack_is_made_anew_and_told(images, harm, capsys):
    before = views(images.make())
    pack = images.packs[0]
    whole = pack.read_bytes()
    cut = {"cut short": whole[:-1], "emptied": b"", "not an array": b"no array" * 100, "only a header": whole[:128]}
    cut["flipped"] = whole[:-400] + bytes([whole[-400] ^ 16]) + whole[-399:]
    pack.write_bytes(cut[harm])
    capsys.readouterr()
    assert same(views(images.make()), before)
    assert f"{pack} is damaged" in capsys.readouterr().out and pack.read_bytes() == whole


def limited(images, kind: str, monkeypatch) -> None:
    """No room in the store: known beforehand, or found out while writing."""
    if kind == "known":
        usage = shutil._ntuple_diskusage(10, 10, 0)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    else:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


@pytest.fixture
def no_limit():
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("kind", ["known", "while writing"])
def test_a_full_disk_is_told_and_the_run_goes_on(images, kind, monkeypatch, no_limit, capsys):
    expected = views(images.make(store=None, pack=None))
    limited(images, kind, monkeypatch)
    data = images.make()
    said = capsys.readouterr().out
    assert f"warning: images can't be packed into {images.store} (" in said
    assert os.strerror(errno.ENOSPC if kind == "known" else errno.EFBIG) in said
    assert same(views(data), expected)
    assert [path.suffix for path in images.store.iterdir()] == [".lock"]  # nothing half-written


def test_a_corrupt_image_is_named_and_nothing_is_kept(images):
    broken = images.root / "b" / "004.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ImageError, match=str(broken)):
        images.make()
    assert not images.packs
