"""distill.data: repeatable views, orders and splits, and what happens to bad folders."""

import gzip
import hashlib
import inspect
import os
import pickle
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from hydra.utils import get_object
from omegaconf import OmegaConf
from PIL import Image
from sets import cifar10, digits, fake, fashion_mnist, imagefolder
from test_data_shards import make_shards
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from torchvision.transforms.v2 import functional as F

from distill.cli import build
from distill.data.augment import CenterCrop, Chain, RandomResizedCrop, ShiftFlip
from distill.data.base import cut
from distill.data.batches import EpochBatches
from distill.data.draws import draws
from distill.data.files import ImageError, read
from distill.data.loader import unit
from distill.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "data"


def described(name: str, **overrides):
    """conf/data/NAME.yaml, as it is with augment=[]."""
    cfg = OmegaConf.create({"augment": {}, "data": OmegaConf.load(CONF / f"{name}.yaml")}).data
    cfg.update(overrides)
    return cfg


SHARED = os.environ.get("DISTILL_SHARED_DATA")
needs_shared = pytest.mark.skipif(not SHARED, reason="DISTILL_SHARED_DATA is not set")


def ints(*values):
    return torch.tensor(values)


def one_line(raised) -> str:
    message = str(raised.value)
    assert message and "\n" not in message
    return message


# ---- draws -----------------------------------------------------------------------------------------------


def splitmix64(seed: int, position: int) -> int:
    """The published generator, step by step, in Python's integers."""
    mask, state = 2**64 - 1, seed
    for _ in range(position + 1):
        state = (state + 0x9E3779B97F4A7C15) & mask
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_draws_are_nested_splitmix64():
    assert splitmix64(1234567, 0) == 6457827717110365317  # the reference implementation's first output
    for seed, row, view in ((0, 0, 0), (7, 41, 3), (2**63 + 5, 1000, 12)):
        state = splitmix64(splitmix64(seed, row), view)
        expected = [(splitmix64(state, k) >> 40) / 2**24 for k in range(4)]
        assert draws(seed, ints(row), ints(view), 4)[0].tolist() == expected
    assert torch.equal(draws(-1, ints(3), ints(0), 2), draws(2**64 - 1, ints(3), ints(0), 2))


def test_draws_are_uniform_and_independent_of_their_neighbours():
    size = 40_000
    rows, views = torch.arange(size), torch.zeros(size, dtype=torch.int64)
    base = draws(0, rows, views, 3).double()
    assert base.min() >= 0 and base.max() < 1
    others = {
        "row": draws(0, rows + 1, views, 1),
        "view": draws(0, rows, views + 1, 1),
        "seed": draws(1, rows, views, 1),
        "number": base[:, 1:2],
        "swapped": draws(0, views, rows, 1),
    }
    for name, other in others.items():
        # a uniform 16 × 16 contingency table of (u, neighbour): chi-square with 255 degrees of freedom
        cells = (base[:, 0] * 16).long() * 16 + (other[:, 0].double() * 16).long()
        counts = torch.bincount(cells, minlength=256).double()
        chi_square = ((counts - size / 256) ** 2 / (size / 256)).sum().item()
        assert 160 < chi_square < 370, (name, chi_square)  # 5 standard deviations about 255
    assert len({tuple(row) for row in base.tolist()}) == size


# ---- augmentation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding, flip", [(4, True), (2, False), (0, True)])
def test_shift_flip_equals_a_loop(padding, flip):
    images = torch.randint(1, 256, (64, 3, 9, 9), generator=torch.Generator().manual_seed(0)).byte()
    uniforms = draws(5, torch.arange(64), torch.zeros(64, dtype=torch.int64), 3)
    uniforms[0], uniforms[1] = 0.0, 1 - 2**-24  # both ends of the range
    expected = []
    for image, (down, right, mirror) in zip(images, uniforms.tolist(), strict=True):
        padded = F.pad(image, [padding] * 4)
        top, left = int(down * (2 * padding + 1)), int(right * (2 * padding + 1))
        crop = padded[:, top : top + 9, left : left + 9]
        expected.append(crop.flip(2) if flip and mirror < 0.5 else crop)
    assert torch.equal(ShiftFlip(padding, flip)(images, uniforms, 9), torch.stack(expected))


def test_random_resized_crop_covers_its_ranges():
    size = 4000
    uniforms = draws(0, torch.arange(size), torch.zeros(size, dtype=torch.int64), RandomResizedCrop.count)
    crop = RandomResizedCrop(scale=(0.1, 0.6), ratio=(0.5, 2.0))
    top, left, height, width = crop.boxes(torch.tensor([[300, 400]]).expand(size, 2), uniforms).unbind(1)
    assert min(top.min(), left.min()) >= 0 and (top + height).max() <= 300 and (left + width).max() <= 400
    area, ratio = (height * width) / (300 * 400), width / height
    assert 0.097 < area.min() < 0.11 and 0.57 < area.max() < 0.61  # rounded to pixels
    assert 0.48 < ratio.min() < 0.52 and 1.9 < ratio.max() < 2.05
    small = area < 0.2  # all ratios fit there, so they are log-uniform: as many wide as tall
    assert 0.45 < (ratio[small] > 1).double().mean() < 0.55
    for offset, room in ((top, 300 - height), (left, 400 - width)):
        place = (offset / room.clamp(min=1)).double()
        assert place.min() < 0.01 and place.max() > 0.99 and 0.48 < place.mean() < 0.52


def test_random_resized_crop_takes_the_middle_where_nothing_fits():
    box = RandomResizedCrop(scale=(0.9, 1.0)).boxes(torch.tensor([[10, 200], [200, 10]]), torch.rand(2, 23))
    assert box.tolist() == [[0, 94, 10, 13], [94, 0, 13, 10]]


def test_random_resized_crop_takes_its_pixels_from_the_box_and_mirrors():
    images = [torch.randint(256, (3, 40, 60)).byte(), torch.randint(256, (3, 70, 50)).byte()]
    uniforms = torch.rand(2, 23)
    uniforms[:, -1] = torch.tensor([0.4, 0.6])  # mirrored, not
    crop = RandomResizedCrop()
    made = crop(images, uniforms, 32)
    boxes = crop.boxes(torch.tensor([[40, 60], [70, 50]]), uniforms).tolist()
    plain = [F.resized_crop(image, *box, [32, 32]) for image, box in zip(images, boxes, strict=True)]
    assert torch.equal(made, torch.stack([plain[0].flip(2), plain[1]]))
    assert torch.equal(RandomResizedCrop(flip=False)(images, uniforms, 32), torch.stack(plain))


def test_center_crop_keeps_the_middle():
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    image[:, :, 20:60] = 200  # the middle square
    assert CenterCrop(resize=1.0)([image], torch.empty(1, 0), 40).unique().tolist() == [200]
    assert CenterCrop()([image], torch.empty(1, 0), 28).shape == (1, 3, 28, 28)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ShiftFlip(padding=-1),
        lambda: RandomResizedCrop(scale=(0.5, 0.2)),
        lambda: RandomResizedCrop(scale=(0.5, 1.2)),
        lambda: RandomResizedCrop(ratio=(0, 1)),
    ],
)
def test_impossible_augmentations_are_refused(make):
    with pytest.raises(UserError) as raised:
        make()
    one_line(raised)


# ---- order -----------------------------------------------------------------------------------------------


def rows_of(batches) -> list[int]:
    return [row for rows, _ in batches for row in rows]


def test_order_depends_on_seed_and_epoch_only():
    def epoch(seed, number):
        sampler = EpochBatches(103, 10, seed)
        sampler.set_epoch(number)
        return list(sampler)

    torch.manual_seed(1)
    first = epoch(3, 5)
    torch.manual_seed(2)
    assert first == epoch(3, 5)
    assert len({str(epoch(seed, number)) for seed in (3, 4) for number in (4, 5, 6)}) == 6
    assert [len(rows) for rows, _ in first] == [10] * 10
    assert {view for _, view in first} == {5}
    assert len(set(rows_of(first))) == 100 and set(rows_of(first)) < set(range(103))
    assert rows_of(epoch(3, 5))[:10] != sorted(rows_of(epoch(3, 5))[:10])


def test_a_batch_larger_than_the_set_is_kept():
    sampler = EpochBatches(7, 10, seed=0)
    assert len(sampler) == 1 and sorted(rows_of(sampler)) == list(range(7))


def test_resume_gives_exactly_the_tail_and_then_full_epochs():
    whole, sampler = EpochBatches(100, 10, seed=1), EpochBatches(100, 10, seed=1)
    whole.set_epoch(2)
    sampler.resume_at(2, 7)
    sampler.set_epoch(2)  # Lightning does
    assert list(sampler) == list(sampler) == list(whole)[7:]
    assert len(sampler) == 10
    for epoch in (3, 2):  # even back at the resumed one
        sampler.set_epoch(epoch)
        whole.set_epoch(epoch)
        assert list(sampler) == list(whole)


def test_iteration_belongs_to_the_epoch_in_which_it_began():
    sampler = EpochBatches(100, 10, seed=1)
    expected, iterator = list(sampler), iter(sampler)
    sampler.set_epoch(1)
    assert list(iterator) == expected != list(sampler)


def test_processes_share_the_epoch(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        sampler = EpochBatches(81, 10, seed=0)
        assert len(sampler) == len(list(sampler)) == 4
        shares.append(set(rows_of(sampler)))
    assert not shares[0] & shares[1] and len(shares[0]) == len(shares[1]) == 40


def test_lightning_sets_the_epoch():
    class Watch(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.seen = []

        def training_step(self, batch, _):
            self.seen.append((self.current_epoch, batch.index.tolist(), batch.view))
            return self.layer(batch.images.mean().view(1, 1)).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data, watch = fake(16, 0, train_size=60), Watch()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(watch, data.train_loader(seed=4))
    expected = []
    sampler = EpochBatches(len(data.train), 16, seed=4)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        expected += [(epoch, rows, epoch) for rows, _ in sampler]
    assert watch.seen == expected


# ---- views -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Larger images of several sizes, as class folders."""
    return make_folder(tmp_path_factory.mktemp("photos"), {"cat": 12, "dog": 12}, size=(90, 70))


def make_folder(root: Path, classes: dict[str, int], size=(32, 32), vary=3, suffix="png") -> Path:
    for label, (name, number) in enumerate(classes.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(number):
            rng = np.random.default_rng([label, i, sum(map(ord, str(root.name)))])
            width, height = size[0] + (i % vary if size[0] > 64 else 0), size[1]
            Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8)).save(
                root / name / f"{i:03}.{suffix}"
            )
    return root


@pytest.fixture(params=["arrays", "files"])
def data(request, photos):
    if request.param == "arrays":
        return fake(8, 0, train_size=60, image_size=16)
    return imagefolder(str(photos), 4, 0, image_size=48)


def test_a_view_is_the_same_in_any_batch(data):
    train = data.train
    batch = train[[3, 1, 4, 2], 7]
    assert batch.images.shape == (4, 3, data.image_size, data.image_size)
    assert batch.images.dtype == torch.float32 and 0 <= batch.images.min() < batch.images.max() <= 1
    assert batch.index.tolist() == [3, 1, 4, 2] and batch.view == 7
    assert batch.labels.tolist() == [train.labels[row] for row in (3, 1, 4, 2)]
    torch.manual_seed(99)
    assert torch.equal(train[[4, 5], 7].images[0], batch.images[2])
    several = [train[[1], view].images for view in range(6)]
    assert len({image.numpy().tobytes() for image in several}) > 3  # views differ


def test_the_seed_changes_the_views(data):
    one, same, other = (next(iter(data.train_loader(seed))) for seed in (0, 0, 1))
    assert torch.equal(one.images, same.images) and not torch.equal(one.index, other.index)
    loader = data.train_loader(1)
    rows = one.index.tolist()
    assert not torch.equal(loader.dataset[rows, 0].images, one.images)


def test_evaluation_is_not_augmented(data):
    for split, loader in ((data.val, data.val_loader()), (data.test, data.test_loader())):
        batches = list(loader)
        assert len(batches) == len(loader) and sum(len(batch.labels) for batch in batches) == len(split)
        assert torch.equal(torch.cat([batch.labels for batch in batches]), split.labels)
        assert all((batch.index == -1).all() and batch.view == 0 for batch in batches)
        assert torch.equal(split[[0, 1], 0].images, split[[0, 1], 9].images)
    if isinstance(data.test.images, torch.Tensor):
        assert torch.equal(data.test[[0, 1], 0].images, data.test.images[:2] / 255)


def test_workers_change_nothing(data):
    def epochs(workers):
        data.num_workers = workers
        loader = data.train_loader(seed=3)
        loader.sampler.resume_at(1, 1)  # as after an interruption
        resumed = list(loader)
        loader.sampler.set_epoch(2)
        return [*resumed, *loader, *data.val_loader()]

    alone, helped = epochs(0), epochs(2)
    assert len(alone) == len(helped) > 4
    for one, two in zip(alone, helped, strict=True):
        assert one.view == two.view
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True) if isinstance(a, torch.Tensor))


def test_workers_hand_over_bytes_and_loaders_give_floats(data):
    data = replace(data, num_workers=1)
    loader = data.in_order(data.val)
    rows = torch.arange(2)
    assert loader.dataset[rows, 0].images.dtype == torch.uint8 and data.val[rows, 0].images.dtype == torch.float32
    first = next(iter(loader)).images
    assert first.dtype == torch.float32 and torch.equal(first[:2], data.val[rows, 0].images)
    assert torch.equal(unit(torch.arange(256, dtype=torch.uint8)), torch.arange(256) / 255)


def test_what_an_augmentation_makes_floats_of_is_scaled_once(data):
    def halved(images, uniforms, size):
        return torch.stack([image[:, :16, :16] for image in images]) / 2

    halved.count = 0
    split = replace(data.train, transform=halved)
    expected = torch.stack([image[:, :16, :16] for image in data.train.images[torch.arange(2)]]) / 510
    for workers in (0, 1):
        loader = replace(data, num_workers=workers).in_order(replace(split, training=False))
        assert torch.equal(next(iter(loader)).images[:2], expected)


def test_a_split_can_be_sent_to_spawned_workers(data):
    copy = pickle.loads(pickle.dumps(data.train))
    assert torch.equal(copy[[2], 5].images, data.train[[2], 5].images)


class Elsewhere(torch.Tensor):
    """Stands in for a tensor on an accelerator."""


@pytest.mark.parametrize("free, workers, moves", [(4 * 184_320, 0, True), (4 * 184_319, 0, False), (10**9, 2, False)])
def test_images_go_to_a_device_that_has_room(monkeypatch, free, workers, moves):
    data = fake(8, workers, train_size=60)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **_: tensor.as_subclass(Elsewhere))
    moved = data.resident(torch.device("cuda", 0))
    assert isinstance(moved.train.images, Elsewhere) == moves and data.resident(torch.device("cpu")) is data
    assert (moved is data) != moves
    monkeypatch.undo()
    assert torch.equal(moved.train[[3], 1].images.as_subclass(torch.Tensor), data.train[[3], 1].images)
    assert moved.fingerprint == data.fingerprint


# ---- splits and fingerprints -----------------------------------------------------------------------------


def test_cut_is_stratified_disjoint_and_stable():
    labels = torch.tensor([0] * 100 + [1] * 40 + [2] * 7)[torch.randperm(147, generator=torch.Generator())]
    parts = cut(labels, (0.1, 0.25), 0, ["a", "b", "c"])
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(147))
    counts = [torch.bincount(labels[part]).tolist() for part in parts]
    assert counts == [[65, 26, 4], [10, 4, 1], [25, 10, 2]]
    assert all(torch.equal(a, b) for a, b in zip(parts, cut(labels, (0.1, 0.25), 0, "abc"), strict=True))
    assert not torch.equal(parts[1], cut(labels, (0.1, 0.25), 1, "abc")[1])
    # Fixed for good: another value means that old and new runs validate on different images.
    even = cut(torch.arange(50) % 2, (0.2,), 0, "ab")
    assert even[1].tolist() == [5, 11, 17, 18, 19, 24, 26, 28, 31, 42]


@pytest.mark.parametrize("fractions", [(0.0,), (-0.1,), (1.0,), (0.5, 0.6)])
def test_cut_refuses_impossible_fractions(fractions):
    with pytest.raises(UserError) as raised:
        cut(torch.arange(100) % 2, fractions, 0, "ab")
    assert str(list(fractions)) in one_line(raised)


def test_cut_refuses_tiny_classes():
    with pytest.raises(UserError, match="class 'b' has 2 images: too few"):
        cut(torch.tensor([0] * 50 + [1] * 2), (0.1, 0.2), 0, ["a", "b"])


def test_fingerprint_sees_pixels_labels_and_splits():
    base = fake(8, 0, train_size=60)
    prints = {base.fingerprint, fake(8, 0, train_size=60, seed=1).fingerprint}
    for change in ("pixel", "label", "swap", "class"):
        changed = fake(8, 0, train_size=60)
        if change == "pixel":
            changed.train.images[5, 1, 3, 3] += 1
        elif change == "label":
            changed.test.labels[0] = (changed.test.labels[0] + 1) % 10
        elif change == "swap":
            changed.val, changed.test = changed.test, changed.val
        else:
            changed.classes[0] = "other"
        prints.add(changed.fingerprint)
    assert len(prints) == 6 and fake(4, 2, train_size=60).fingerprint == base.fingerprint
    assert len(base.fingerprint) == 64


def test_fingerprint_of_files(tmp_path):
    root = make_folder(tmp_path / "set", {"a": 10, "b": 10}, size=(70, 70))
    before = imagefolder(str(root), 4, 0).fingerprint
    moved = shutil.copytree(root, tmp_path / "elsewhere")
    assert imagefolder(str(moved), 4, 0).fingerprint == before
    assert imagefolder(str(root), 4, 0, split_seed=1).fingerprint != before
    assert imagefolder(str(root), 4, 0, image_size=96).fingerprint != before
    image = root / "a" / "003.png"
    content = bytearray(image.read_bytes())
    content[-20] ^= 1  # as long as before
    image.write_bytes(content)
    assert imagefolder(str(root), 4, 0).fingerprint != before
    (moved / "a" / "003.png").rename(moved / "a" / "0030.png")
    assert imagefolder(str(moved), 4, 0).fingerprint != before


# ---- the sets --------------------------------------------------------------------------------------------


def test_digits():
    data = digits(64, 0)
    assert (data.num_classes, data.image_size) == (10, 32)
    assert [len(split) for split in (data.train, data.val, data.test)] == [989, 269, 539]
    train, test = (split.images[:, 0].flatten(1).float() for split in (data.train, data.test))
    nearest = torch.cdist(test, train).argmin(1)
    assert (data.train.labels[nearest] == data.test.labels).double().mean() > 0.95  # pixels fit labels
    assert data.train.transform == Chain((ShiftFlip(padding=3, flip=False),))
    assert torch.equal(data.train.images[:, 0], data.train.images[:, 2])
    again, other = digits(8, 2), digits(64, 0, split_seed=1)
    assert again.fingerprint == data.fingerprint != other.fingerprint
    every = torch.cat([split.images.flatten(1) for split in (data.train, data.val, data.test)])
    assert len(every.unique(dim=0)) > 1790  # a few scans are alike: no split repeats another


def test_fake_can_be_learned_and_is_repeatable():
    data = fake(8, 0, num_classes=4, train_size=100, image_size=8)
    assert torch.equal(data.train.images, fake(8, 0, num_classes=4, train_size=100, image_size=8).train.images)
    means = torch.stack([data.train.images[data.train.labels == k].float().mean(0) for k in range(4)])
    nearest = torch.cdist(data.test.images.float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == data.test.labels).double().mean() > 0.9
    with pytest.raises(UserError, match="num_classes"):
        fake(8, 0, num_classes=1)


def make_cifar(root: Path, dataset: type, monkeypatch) -> Path:
    """torchvision's layout with 20 images of two classes a file, and checksums to match."""
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    key = "labels" if dataset is CIFAR10 else "fine_labels"

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(name):
        pixels = np.random.default_rng(len(name)).integers(256, size=(20, 3072), dtype=np.uint8)
        return write(name, {"data": pixels, key: [0, 1] * 10})

    monkeypatch.setattr(dataset, "train_list", [batch(name) for name, _ in dataset.train_list])
    monkeypatch.setattr(dataset, "test_list", [batch(name) for name, _ in dataset.test_list])
    meta = dataset.meta
    _, md5 = write(meta["filename"], {meta["key"]: ["red", "blue"]})
    monkeypatch.setattr(dataset, "meta", {**meta, "md5": md5})
    return root


def make_fashion(root: Path) -> Path:
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, number in (("train", 60), ("t10k", 30)):
        pixels = np.random.default_rng(number).integers(256, size=(number, 28, 28), dtype=np.uint8)
        labels = np.arange(number, dtype=np.uint8) % 10
        for name, magic, array in (("images-idx3", 2051, pixels), ("labels-idx1", 2049, labels)):
            header = np.array([magic, *array.shape], dtype=">i4").tobytes()
            (folder / f"{part}-{name}-ubyte").write_bytes(header + array.tobytes())
    return root


@pytest.mark.parametrize("dataset, train", [(CIFAR10, 100), (CIFAR100, 20)])
def test_cifar(tmp_path, monkeypatch, dataset, train):
    make_cifar(tmp_path, dataset, monkeypatch)
    data = build.data(described(dataset.__name__.lower(), root=str(tmp_path)))
    assert data.classes == ["red", "blue"] and data.image_size == 32
    assert [len(s) for s in (data.train, data.val, data.test)] == [train * 9 // 10, train // 10, 20]
    source = dataset(tmp_path, train=False)
    assert torch.equal(data.test[[7], 0].images[0], F.pil_to_tensor(source[7][0]) / 255)
    assert data.test.labels.tolist() == source.targets
    assert data.train.transform == Chain((ShiftFlip(4, True),))


def test_fashion_mnist(tmp_path):
    data = fashion_mnist(str(make_fashion(tmp_path)), 16, 0)
    assert data.num_classes == 10 and data.image_size == 32
    assert [len(split) for split in (data.train, data.val, data.test)] == [50, 10, 30]
    image = data.test[[3], 0].images[0]
    assert torch.equal(image[:, 2:30, 2:30], FashionMNIST(tmp_path, train=False).data[3].expand(3, 28, 28) / 255)
    assert image[:, :2].max() == 0 and image[:, :, 30:].max() == 0


@pytest.mark.parametrize("make", [cifar10, fashion_mnist])
def test_an_absent_set_offline_says_what_to_put_where(tmp_path, monkeypatch, make):
    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", offline)
    with pytest.raises(UserError) as raised:
        make(str(tmp_path / "new"), 16, 0)
    message = one_line(raised)
    assert str(tmp_path / "new") in message and "http" in message and ".gz" in message


def test_a_damaged_set_is_a_user_error(tmp_path, monkeypatch):
    make_fashion(tmp_path)
    (tmp_path / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte").write_bytes(b"\0\0")
    with pytest.raises(UserError) as raised:
        fashion_mnist(str(tmp_path), 16, 0)
    one_line(raised)


MADE = {
    "cifar10": lambda root, patch: {"root": str(make_cifar(root, CIFAR10, patch))},
    "cifar100": lambda root, patch: {"root": str(make_cifar(root, CIFAR100, patch))},
    "fashion_mnist": lambda root, patch: {"root": str(make_fashion(root))},
    "imagefolder": lambda root, patch: {"root": str(make_folder(root, {"a": 20, "b": 20}))},
    "webdataset": lambda root, patch: {"train": str(make_shards(root / "train", 2, 20)) + "-*.tar"},
}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_every_config_gives_data(name, tmp_path, monkeypatch):
    overrides = MADE[name](tmp_path, monkeypatch) if name in MADE else {}
    monkeypatch.chdir(tmp_path)  # packs lie there
    data = build.data(described(name, **overrides))
    batch = next(iter(data.train_loader(0)))
    assert batch.images.shape[1:] == (3, data.image_size, data.image_size)
    assert set(batch.labels.tolist()) <= set(range(data.num_classes))
    assert min(len(data.train), len(data.val), len(data.test)) > 0


def test_augment_is_chosen_by_its_target():
    augment = {"mine": {"_target_": "distill.data.augment.RandomResizedCrop", "scale": [0.5, 1.0]}}
    cfg = OmegaConf.create({"augment": augment, "data": OmegaConf.load(CONF / "fake.yaml")}).data
    data = build.data(cfg)
    assert data.train.transform == Chain((RandomResizedCrop(scale=[0.5, 1.0]),))
    assert next(iter(data.train_loader(0))).images.shape == (64, 3, 32, 32)


def own_set(train_size: int, batch_size: int = 4):
    """A function of a user's that takes what earlier versions gave it."""
    asked.append(batch_size)
    return replace(fake(1, 0, train_size=train_size), batch_size=batch_size)


def their_set(**options):
    asked.append(options)
    return fake(2, 0, train_size=60)


asked = []


@pytest.mark.parametrize(
    ("name", "given"), [("own_set", 16), ("their_set", {"train_size": 60, "batch_size": 16, "num_workers": 1})]
)
def test_a_function_of_the_users_own_may_ask_for_the_loaders_options(name, given):
    cfg = {"_target_": f"test_data.{name}", "train_size": 60, "batch_size": 16, "num_workers": 1}
    data = build.data(OmegaConf.create(cfg))
    assert (data.batch_size, data.num_workers, asked.pop()) == (16, 1, given)
    del cfg["batch_size"], cfg["num_workers"]
    assert build.data(OmegaConf.create(cfg)).batch_size == {"own_set": 4, "their_set": 2}[name]


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_an_image_set_knows_nothing_of_loaders(name):
    taken = inspect.signature(get_object(described(name)._target_)).parameters
    assert not {"batch_size", "num_workers"} & {*taken}


@pytest.mark.parametrize("numbers", [{"batch_size": 0, "num_workers": 0}, {"batch_size": 4, "num_workers": -1}])
def test_impossible_loaders_are_refused(numbers):
    with pytest.raises(UserError) as raised:
        fake(**numbers)
    assert "batch_size" in one_line(raised)


# ---- folders of images -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folders, sizes",
    [
        ({"": 20}, (28, 4, 8)),
        ({"train": 20}, (28, 4, 8)),
        ({"train": 20, "val": 5}, (36, 4, 10)),  # val/ is tested on, validation is cut
        ({"train": 20, "test": 5}, (36, 4, 10)),
        ({"train": 20, "valid": 6, "test": 5}, (40, 12, 10)),
        ({"train": 20, "validation": 6, "test": 5}, (40, 12, 10)),
    ],
)
@pytest.mark.parametrize("side", [20, 80])
def test_layouts(tmp_path, folders, sizes, side):
    tmp_path = tmp_path / "test"  # whatever the root itself is called
    for folder, number in folders.items():
        make_folder(tmp_path / folder, {"dog": number, "cat": number}, size=(side, side), vary=1)
    data = imagefolder(str(tmp_path), 4, 0)
    assert data.classes == ["cat", "dog"] and data.image_size == (20 if side == 20 else 224)
    assert isinstance(data.train.images, torch.Tensor) == (side == 20)
    splits = (data.train, data.val, data.test)
    assert tuple(len(split) for split in splits) == sizes == tuple(len(split.images) for split in splits)
    assert all(torch.bincount(split.labels).tolist() == [len(split) // 2] * 2 for split in splits)
    if side == 20:
        pixels = {image.numpy().tobytes() for split in splits for image in split.images}
    else:
        pixels = {name for split in splits for name in split.images.names}
    assert len(pixels) == sum(sizes)  # all different: no image is in two splits
    if "test" in folders:
        first = F.pil_to_tensor(Image.open(tmp_path / "test" / "cat" / "000.png"))
        test = data.test.images[ints(0)][0]
        assert torch.equal(test, first) and data.test.labels[0] == 0


def test_small_images_are_shifted_and_larger_ones_cropped(tmp_path, photos):
    small = imagefolder(str(make_folder(tmp_path, {"a": 20, "b": 20})), 4, 0)
    assert small.train.transform == Chain((ShiftFlip(4, True),)) and small.test.transform is None
    large = imagefolder(str(photos), 4, 0)
    assert large.train.transform == Chain((RandomResizedCrop(),)) and large.test.transform == CenterCrop()
    with pytest.raises(UserError, match="RandomResizedCrop"):
        imagefolder(str(photos), 4, 0, augment={"shift_flip": ShiftFlip()})


def test_image_size(tmp_path):
    root = make_folder(tmp_path, {"a": 10, "b": 10}, size=(24, 24))
    assert imagefolder(str(root), 4, 0).image_size == 24
    assert imagefolder(str(root), 4, 0, image_size=16).train.images.shape[1:] == (3, 16, 16)
    assert next(iter(imagefolder(str(root), 4, 0, image_size=96).train_loader(0))).images.shape[2:] == (
        96,
        96,
    )
    Image.new("RGB", (30, 40)).save(root / "b" / "odd.png")
    assert imagefolder(str(root), 4, 0).image_size == 224  # not all equal
    assert imagefolder(str(root), 4, 0, image_size=24).train.images.shape[1:] == (3, 24, 24)
    Image.new("RGB", (65, 65)).save(root / "b" / "big.png")
    assert not isinstance(imagefolder(str(root), 4, 0, image_size=24).train.images, torch.Tensor)


@pytest.mark.parametrize("mode, value, expected", [
    ("L", 90, [90] * 3), ("P", 0, [0] * 3), ("RGBA", (10, 20, 30, 128), [132, 137, 142]), ("1", 1, [255] * 3),
    ("LA", (90, 10), [249] * 3), ("I;16", 90 * 256, [90] * 3), ("CMYK", (255, 0, 0, 0), [0, 255, 255]),
])  # fmt: skip
def test_every_mode_becomes_rgb(tmp_path, mode, value, expected):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.new(mode, (4, 5), value).save(path)
    pixels = read(path)
    assert pixels.shape == (5, 4, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels[2, 2].astype(int) - expected).max() <= 2  # JPEG


@pytest.mark.parametrize("key", [0, b"\x00", (10, 20, 30)], ids=["palette", "palette of alphas", "colour"])
def test_hidden_colours_are_seen_on_white(tmp_path, key):
    mode = "RGB" if isinstance(key, tuple) else "P"
    Image.new(mode, (4, 4), key if mode == "RGB" else 0).save(tmp_path / "image.png", transparency=key)
    assert (read(tmp_path / "image.png") == 255).all()


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    values = np.array([[0, 90 * 256, 65535]], dtype=np.uint16)
    (tmp_path / "image.pgm").write_bytes(b"P5 3 1 65535\n" + values.byteswap().tobytes())
    Image.fromarray(values).save(tmp_path / "image.tif")
    for name in ("image.pgm", "image.tif"):
        assert read(tmp_path / name)[0, :, 0].tolist() == [0, 90, 255]


@pytest.mark.parametrize("values", [np.float32(0.5), np.float32(200), np.int32(90), np.int32(10**6)])
def test_values_of_an_unknown_range_are_refused_by_name_before_training(tmp_path, values):
    root = make_folder(tmp_path, {"a": 10, "b": 10}, size=(80, 80))
    Image.fromarray(np.full((80, 80), values)).save(root / "a" / "004.tif")
    with pytest.raises(ImageError, match=r"004\.tif .*no range that is agreed on") as raised:
        imagefolder(str(root), 4, 0)
    one_line(raised)


def test_photos_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # taken with the camera on its side
    Image.new("RGB", (40, 20)).save(tmp_path / "image.jpg", exif=exif)
    assert read(tmp_path / "image.jpg").shape == (40, 20, 3)


def test_large_jpegs_are_decoded_reduced(tmp_path):
    Image.new("RGB", (800, 640)).save(tmp_path / "image.jpg")
    assert read(tmp_path / "image.jpg", draft=160).shape == (160, 200, 3)
    assert read(tmp_path / "image.jpg", draft=500).shape == (640, 800, 3)


def test_other_files_are_ignored(tmp_path):
    root = make_folder(tmp_path, {"a": 10, "b": 10})
    for name in ("README.md", "a/notes.txt", "b/._000.png", "a/.DS_Store"):
        (root / name).write_text("not an image")
    (root / ".git").mkdir()
    make_folder(root / "a", {"deeper": 3})
    data = imagefolder(str(root), 4, 0)
    assert data.classes == ["a", "b"] and len(data.train) + len(data.val) + len(data.test) == 23


@pytest.mark.parametrize(
    "names", [("Train", "Test"), ("training", "testing"), ("TRAIN", "Validation", "test"), ("train", "dev", "TESTING")]
)
def test_splits_have_usual_names_in_any_case(tmp_path, names):
    for name in names:
        make_folder(tmp_path / name, {"a": 10, "b": 10})
    data = imagefolder(str(tmp_path), 4, 0)
    assert data.classes == ["a", "b"] and len(data.test) == 20 and len(data.train) == (18 if len(names) == 2 else 20)


def test_a_class_may_be_named_as_a_split(tmp_path):
    make_folder(tmp_path, {"bus": 10, "train": 10})
    assert imagefolder(str(tmp_path), 4, 0).classes == ["bus", "train"]


def test_what_lies_beside_the_splits_is_told(tmp_path, capsys):
    for name in ("train", "test", "extra"):
        make_folder(tmp_path / name, {"a": 10, "b": 10})
    imagefolder(str(tmp_path), 4, 0)
    assert "extra beside train, test are left out" in capsys.readouterr().out


def test_images_that_training_does_not_see_are_read_before_it(tmp_path):
    """Of the others their headers; once for the same files."""
    for split in ("train", "test"):
        make_folder(tmp_path / "set" / split, {"a": 10, "b": 10}, size=(90, 90), vary=1)
    root, store = tmp_path / "set", str(tmp_path / "store")
    imagefolder(str(root), 4, 0, store=store)
    assert len(list(Path(store).glob("*.checked"))) == 1
    path = root / "test/b/003.png"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"<html>"):
        path.write_bytes(content)
        with pytest.raises(ImageError, match=r"test/b/003\.png"):
            imagefolder(str(root), 4, 0, store=store)
    path.write_bytes(whole)
    (root / "train/a/000.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"train/a/000\.png"):
        imagefolder(str(root), 4, 0, store=store)


def bad(root: Path, what: str) -> str:
    """Makes a folder that cannot be used; what its message must name."""
    if what == "missing":
        return f"no folder {root / 'nowhere'}"
    if what == "empty":
        return "has 0 class folders"
    if what == "one class":
        make_folder(root, {"a": 10})
        return "has 1 class folders"
    if what == "empty class":
        make_folder(root, {"a": 10, "b": 10, "hollow": 0})
        return "1 class folders .*: hollow"
    if what == "tiny class":
        make_folder(root, {"a": 10, "rare": 2})
        return "'rare' has 2 images: too few"
    if what == "other classes":
        make_folder(root / "train", {"a": 10, "b": 10})
        make_folder(root / "test", {"a": 10, "c": 10})
        return "classes of test and train differ: missing b; extra c"
    if what == "no train":
        make_folder(root / "val", {"a": 10, "b": 10})
        return "val but no folder 'train'"
    if what == "two validations":
        for split in ("train", "val", "valid"):
            make_folder(root / split, {"a": 10, "b": 10})
        return "val and valid"
    if what == "two sets":
        make_folder(root / "first" / "train", {"a": 10, "b": 10})
        make_folder(root / "second" / "Training", {"a": 10, "b": 10})
        return "holds data sets .first, second have training images"
    if what == "two trainings":
        make_folder(root / "train", {"a": 10, "b": 10})
        make_folder(root / "Training", {"a": 10, "b": 10})
        return "Training and train: keep one of them, for train"
    make_folder(root, {"a": 10, "b": 10})
    if what == "loop":
        (root / "a" / "again").symlink_to(root, target_is_directory=True)
        return "again.* is a link to a folder that it is in"
    if what == "class linked twice":
        (root / "c").symlink_to(root / "a", target_is_directory=True)
        return "a/000.png and c/000.png .*are the same file"
    if what == "same file in training and test":
        for split in ("train", "test"):
            make_folder(root / split, {"a": 10, "b": 10})
        (root / "test/a/000.png").unlink()
        os.link(root / "train/a/005.png", root / "test/a/000.png")
        return "train/a/005.png and test/a/000.png .*are the same file"
    if what == "file linked in a class":
        (root / "b" / "x.png").symlink_to(root / "b" / "001.png")
        return "b/001.png and b/x.png .*are the same file"
    if what == "link to nothing":
        (root / "b" / "x.png").symlink_to(root / "nowhere.png")
        return "cannot read the image .*x.png"
    if what == "line break":
        (root / "b").rename(root / "b\nc")
        return r"class 'b.nc' has signs that are no text"
    if what == "separator":
        (root / "b").rename(root / "b\u2028c")
        return r"class 'b.u2028c' has signs that are no text"
    if what == "no text":
        os.rename(root / "b", os.fsencode(root) + b"/b\xff")
        return r"class 'b.udcff' has signs that are no text"
    path = root / "b" / "004.png"
    path.write_bytes(path.read_bytes()[:200] if what == "cut off" else b"<html>not found</html>")
    return f"cannot read the image {path}"


@pytest.mark.parametrize("what", [
    "missing", "empty", "one class", "empty class", "tiny class", "other classes", "no train",
    "two validations", "cut off", "not an image", "two sets", "two trainings", "loop", "class linked twice",
    "same file in training and test", "file linked in a class", "link to nothing", "line break", "separator", "no text",
])  # fmt: skip
def test_bad_folders_are_one_line(tmp_path, what):
    expected = bad(tmp_path, what)
    root = tmp_path / "nowhere" if what == "missing" else tmp_path
    with pytest.raises(UserError, match=expected) as raised:
        imagefolder(str(root), 4, 0)
    one_line(raised)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    root, scandir = make_folder(tmp_path, {"a": 10, "b": 10}), os.scandir
    (root / "b" / "closed").mkdir()

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot read the folder .*closed \(Permission denied\)"):
        imagefolder(str(root), 4, 0)


@pytest.mark.parametrize("harm, told, workers", [
    ("cut short before", "cannot read the image .* mend or remove it", 0),
    ("replaced", "has changed since this run began: put the former back", 0),
    ("gone", "was there when this run began and is gone: put it back", 0),
    ("gone", "was there when this run began and is gone: put it back", 2),
])  # fmt: skip
def test_an_unreadable_image_arrives_as_one_line(tmp_path, harm, told, workers):
    root = make_folder(tmp_path, {"a": 10, "b": 10}, size=(80, 80), vary=1)
    broken = root / imagefolder(str(root), 2, workers, image_size=32).train.images.names[3]
    whole = broken.read_bytes()
    if harm == "cut short before":
        broken.write_bytes(whole[: len(whole) // 2])
    data = imagefolder(str(root), 2, workers, image_size=32)
    if harm == "gone":
        broken.unlink()
    elif harm == "replaced":
        stat = broken.stat()
        broken.write_bytes(whole[::-1])
        os.utime(broken, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(ImageError, match=f"{broken}.*{told}|{told}") as raised:
        list(data.train_loader(0))
    assert str(broken) in one_line(raised)


# ---- real data -------------------------------------------------------------------------------------------


@needs_shared
def test_real_idx_files(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"  # MNIST has the same format
    raw.mkdir(parents=True)
    for packed in (Path(SHARED) / "mnist").glob("*.gz"):
        with gzip.open(packed) as source, open(raw / packed.stem, "wb") as target:
            shutil.copyfileobj(source, target)
    data = fashion_mnist(str(tmp_path), 128, 0)
    assert len(data.train) + len(data.val) == 60_000 and len(data.test) == 10_000
    assert 5_990 < len(data.val) < 6_010  # a tenth of each class, rounded
    assert data.test.labels[:5].tolist() == [7, 2, 1, 0, 4]


@needs_shared
def test_real_photos(tmp_path):
    with tarfile.open(Path(SHARED) / "clothing-small-192" / "test.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    data = imagefolder(str(tmp_path / "test"), 32, 0, image_size=96)
    assert data.num_classes == 10 and len(data.train) + len(data.val) + len(data.test) == 372
    batch = next(iter(data.train_loader(0)))
    assert batch.images.shape == (32, 3, 96, 96) and 0.3 < batch.images.mean() < 0.9
