import importlib
import json
import math
import multiprocessing
import os
import pickle
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning_fabric.utilities import move_data_to_device
from sets import fake
from torch import nn

from distill.cli import rehearsal
from distill.data.augment import chain
from distill.errors import UsageError
from distill.files import human, parse_bytes
from distill.networks.network import Network
from distill.networks.sources import describe
from distill.teachers import cache
from distill.teachers.cache import Cached, Rows, TopK, identity, open_cache
from distill.teachers.committee import Committee
from distill.teachers.ema import Ema
from distill.teachers.frozen import Frozen

OPTIONS = {"keep": "auto", "dtype": "float32", "top_k": None, "budget": "1GB"}


class Small(nn.Module):
    """A small network."""

    def __init__(self, classes=10, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.linear = nn.Linear(4, classes)

    def forward(self, images):
        return self.linear(self.conv(images).relu().mean((2, 3)))


class Counted(Frozen):
    """Counts the images that it is asked about."""

    asked = 0

    def forward(self, batch):
        self.asked += len(batch.images)
        return super().forward(batch)


def teacher(classes=10, seed=0, taps=()) -> Counted:
    network = Network(Small(classes, seed), {"stage1": "conv"}, [0.5] * 3, [0.5] * 3)
    return Counted(network.to(memory_format=torch.channels_last).record(taps))


@pytest.fixture(scope="module")
def data():
    return fake(16, 0, image_size=8, train_size=40)


def opened(taught_by, data, folder, views=2, **options) -> Cached:
    example = taught_by(data.train[[0, 1], 0])
    taught_by.asked = 0
    return open_cache(
        taught_by,
        data,
        example,
        views,
        {**OPTIONS, "folder": folder, **options},
        lambda t, d, **kind: identity(t, d, example, {}, 0, "cpu", **kind),
    )


def same(a, b) -> bool:
    return torch.equal(a.logits, b.logits) and all(torch.equal(a.features[n], b.features[n]) for n in b.features)


@pytest.mark.parametrize("dtype", cache.DTYPES.values())
@pytest.mark.parametrize("shape, channels_last", [((10,), False), ((4, 3, 2), True), ((5, 7), False)])
def test_rows_come_back_in_value_and_in_layout(tmp_path, dtype, shape, channels_last):
    values = torch.randn(3, *shape).to(dtype)
    if channels_last:
        values = values.contiguous(memory_format=torch.channels_last)
    file = Rows(tmp_path / "a.rows", 0, 9, shape, dtype, channels_last)
    rows = np.array([7, 0, 4])
    assert not file.read(rows)[1].any()
    file.write(rows, values)
    found, good = Rows(tmp_path / "a.rows", 0, 9, shape, dtype, channels_last).read(rows)
    assert good.all() and torch.equal(found, values) and found.stride() == values.stride()
    assert not file.read(np.array([1, 2, 3, 5, 6, 8]))[1].any()


def test_a_row_of_zeros_is_told_from_one_that_is_missing(tmp_path):
    file = Rows(tmp_path / "a.rows", 0, 2, (4,), torch.float32, False)
    file.write(np.array([1]), torch.zeros(1, 4))
    assert file.read(np.array([0, 1]))[1].tolist() == [False, True]


def test_the_teacher_is_asked_once_for_each_row_and_view(tmp_path, data):
    taught_by = teacher()
    cached = opened(taught_by, data, tmp_path)
    first = [cached(data.train[range(16), view]) for view in (0, 1)]
    assert taught_by.asked == 32
    again = [cached(data.train[range(16), view]) for view in (0, 1)]
    other_order = cached(data.train[range(15, -1, -1), 1])
    assert taught_by.asked == 32
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(other_order.logits, first[1].logits.flip(0))
    assert not torch.equal(first[0].logits, first[1].logits)  # the views differ
    assert same(again[1], taught_by(data.train[range(16), 1]))


@pytest.mark.parametrize("options", [{}, {"keep": "features", "dtype": "bfloat16"}, {"top_k": 3}])
def test_workers_read_the_answers(tmp_path, data, options, capsys, monkeypatch):
    taught_by = teacher(taps=["stage1"] if "keep" in options else [])
    cached = opened(taught_by, data, tmp_path, **options)
    alone = data.train_loader(0, 1, answers=cached.kept)
    aided = replace(data, num_workers=2).train_loader(0, 1, answers=cached.kept)
    assert all(batch.answers is None for batch in (*alone, *aided))  # nothing is there yet
    first = [cached(batch) for batch in alone]
    taught_by.asked = 0
    monkeypatch.setattr(Rows, "read", None)  # in this process
    assert all(batch.answers is None for batch in alone) and not taught_by.asked
    monkeypatch.undo()
    found = [*aided]
    monkeypatch.setattr(Rows, "read", None)
    assert all(same(cached(batch), before) for batch, before in zip(found, first, strict=True)) and not taught_by.asked
    assert pickle.loads(pickle.dumps(cached.kept)).layouts == cached.layouts  # as to workers that are spawned
    moved = move_data_to_device(found[0], torch.device("meta"))
    assert all(part.is_meta for part in moved.answers.values()) and moved.index is found[0].index
    monkeypatch.undo()
    path = cached.folder / "logits-0000.rows"
    record = (path.stat().st_size - cache.HEADER) // 40
    with open(path, "r+b") as file:
        file.seek(cache.HEADER + int(found[0].index[2]) * record + 5)
        file.write(b"\x11\x22")
    broken, *whole = aided
    assert broken.answers is None and all(batch.answers is not None for batch in whole)
    assert "damaged" not in capsys.readouterr().out
    assert same(cached(broken), first[0]) and taught_by.asked == 16  # said and mended where it is asked
    assert "damaged rows" in capsys.readouterr().out and next(iter(aided)).answers is not None
    path.write_bytes(path.read_bytes()[:-1])
    assert cached.kept(found[0].index, 0) is None and path.stat().st_size == cache.HEADER + 40 * record - 1


def test_features_are_kept_in_their_layout_and_parameters_come_from_the_network(tmp_path, data):
    taught_by = teacher(taps=["stage1", "linear:weight"])
    cached = opened(taught_by, data, tmp_path, keep="features")
    batch = data.train[range(16), 0]
    first, second = cached(batch), cached(batch)
    assert taught_by.asked == 16 and same(first, second)
    assert first.features["stage1"].stride() == second.features["stage1"].stride()
    assert second.features["linear:weight"] is taught_by.network.net.linear.weight
    assert sorted(file.name for file in cached.folder.glob("*.rows")) == ["logits-0000.rows", "stage1-0000.rows"]


def test_a_run_that_reads_more_features_shares_what_is_there(tmp_path, data):
    batch = data.train[range(16), 0]
    first = opened(teacher(taps=["stage1"]), data, tmp_path, keep="features")
    first(batch)
    more = teacher(taps=["stage1", "linear"])
    cached = opened(more, data, tmp_path, keep="features")
    before = {file.name: file.read_bytes() for file in first.folder.glob("*.rows")}
    assert same(cached(batch), teacher(taps=["stage1", "linear"])(batch)) and more.asked == 16
    assert cached.folder == first.folder and len(before) == 2
    assert all((cached.folder / name).read_bytes() == content for name, content in before.items())


def test_images_outside_of_the_training_set_are_always_asked(tmp_path, data):
    taught_by = teacher()
    cached = opened(taught_by, data, tmp_path)
    for _ in range(2):
        cached(data.val[range(8), 0])
    assert taught_by.asked == 16 and not list(cached.folder.glob("*.rows"))


def folder_of(tmp_path, data, taught_by, seed=0, described=(), **options):
    example = taught_by(data.train[[0, 1], 0])
    return open_cache(
        taught_by,
        data,
        example,
        1,
        {**OPTIONS, "folder": tmp_path, **options},
        lambda t, d, **kind: identity(t, d, example, dict(described), seed, "cpu", **kind),
    ).folder


def test_what_another_teacher_or_other_views_gave_is_never_read(tmp_path, data):
    flipped = teacher()
    flipped.network.net.linear.bias.data.view(torch.int32)[3] ^= 1  # the last bit of one weight
    pixel = data.train.images.clone()
    pixel[5, 0, 0, 0] ^= 1
    transform = replace(data.train.transform, padding=3) if hasattr(data.train.transform, "padding") else None
    relabelled = Network(Small(), {}, [0.5] * 3, [0.25] * 3)  # another normalisation
    smooth = Small()
    smooth.add_module("activation", nn.GELU())  # no weights of its own
    folders = [
        folder_of(tmp_path, data, teacher()),
        folder_of(tmp_path, data, Frozen(Network(smooth, {}, [0.5] * 3, [0.5] * 3))),
        folder_of(tmp_path, data, Frozen(flipped.network)),
        folder_of(tmp_path, data, Frozen(relabelled)),
        folder_of(tmp_path, data, Frozen(Committee([teacher().network]))),
        folder_of(tmp_path, replace(data, train=replace(data.train, images=pixel)), teacher()),
        folder_of(tmp_path, replace(data, train=replace(data.train, transform=transform)), teacher()),
        folder_of(tmp_path, replace(data, batch_size=8), teacher()),
        folder_of(tmp_path, data, teacher(), seed=1),
        folder_of(tmp_path, data, teacher(), dtype="float16"),
        folder_of(tmp_path, data, teacher(), top_k=3),
        folder_of(tmp_path, data, teacher(taps=["stage1"]), keep="features"),  # the network, not its faster copy
        folder_of(tmp_path, data, Frozen(teacher().network, "bf16-mixed")),
    ]
    assert len(set(folders)) == len(folders)
    assert folder_of(tmp_path, data, teacher()) == folders[0]
    assert json.loads((folders[0] / "identity.json").read_text())["seed"] == 0


def damage_bit(path):
    content = bytearray(path.read_bytes())
    content[cache.HEADER + 3 * 44 + 20] ^= 4  # in row 3
    path.write_bytes(content)


def cut_short(path):
    os.truncate(path, cache.HEADER + 9 * 44 + 5)


def damage_header(path):
    content = bytearray(path.read_bytes())
    content[2] ^= 1
    path.write_bytes(content)


def rename_view(path):
    path.write_bytes((path.parent / "logits-0001.rows").read_bytes())


def swap_rows(path):
    content = bytearray(path.read_bytes())
    first, second = (slice(cache.HEADER + row * 44, cache.HEADER + (row + 1) * 44) for row in (0, 1))
    content[first], content[second] = content[second], content[first]
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [damage_bit, cut_short, damage_header, rename_view, swap_rows])
def test_a_damaged_file_is_noticed_said_and_mended(tmp_path, data, capsys, harm):
    cached = opened(teacher(), data, tmp_path)
    for view in (0, 1):
        cached(data.train[range(16), view])
    harm(cached.folder / "logits-0000.rows")
    capsys.readouterr()
    taught_by = teacher()
    cached = opened(taught_by, data, tmp_path)
    batch = data.train[range(16), 0]
    assert same(cached(batch), taught_by(batch))
    assert "asked again" in capsys.readouterr().out
    taught_by.asked = 0
    assert same(cached(batch), teacher()(batch)) and taught_by.asked == 0  # mended


def test_a_row_that_a_kill_cut_off_is_missing(tmp_path, data, monkeypatch):
    cached = opened(teacher(), data, tmp_path)
    write = os.pwrite

    def killed(descriptor, record, place):
        write(descriptor, record[:20], place)
        raise KeyboardInterrupt

    batch = data.train[range(16), 0]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "pwrite", killed)
        cached(batch)
    taught_by = teacher()
    assert same(opened(taught_by, data, tmp_path)(batch), teacher()(batch))
    assert taught_by.asked == 16


def test_on_a_full_disk_the_teacher_answers_and_what_is_there_is_still_read(tmp_path, data, capsys, monkeypatch):
    taught_by = teacher()
    cached = opened(taught_by, data, tmp_path)
    stored, new = (data.train[range(start, start + 16), 0] for start in (0, 16))
    cached(stored)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    for _ in range(2):
        assert same(cached(new), teacher()(new))
    assert capsys.readouterr().out.count("No space left on device") == 1
    taught_by.asked = 0
    assert same(cached(stored), teacher()(stored)) and taught_by.asked == 0


def fill(folder, start):
    data = fake(16, 0, image_size=8, train_size=40)
    cached = opened(teacher(), data, folder)
    for turn in range(30):
        rows = [(start + turn * 7 + row) % len(data.train) for row in range(16)]
        cached(data.train[rows, turn % 2])


def test_two_processes_fill_the_same_files(tmp_path, data):
    spawn = multiprocessing.get_context("fork")
    processes = [spawn.Process(target=fill, args=(tmp_path, start)) for start in (0, 5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    taught_by = teacher()
    cached = opened(taught_by, data, tmp_path)
    for view in (0, 1):
        for rows in (range(16), range(16, 32), range(24, 40)):
            batch = data.train[rows, view]
            assert same(cached(batch), teacher()(batch))
    assert taught_by.asked == 0


def test_top_k_keeps_the_largest_and_the_mass_of_the_rest():
    logits = torch.tensor([[2.0, -1.0, 0.5, 3.0, 0.0], [0.0, 0.0, 9.0, 0.0, 1.0]])
    found = TopK(2, 5).unpack(TopK(2, 5).pack(logits))
    for row, kept in enumerate(([0, 3], [2, 4])):
        exact = [math.exp(value) for value in logits[row].tolist()]
        rest = (sum(exact) - sum(exact[k] for k in kept)) / 3
        expected = [exact[k] / sum(exact) if k in kept else rest / sum(exact) for k in range(5)]
        assert torch.allclose(found[row].softmax(0), torch.tensor(expected), atol=1e-6)
        assert torch.equal(found[row, kept], logits[row, kept])


def test_top_k_and_half_precision_are_small_and_near(tmp_path, data):
    batch = data.train[range(16), 0]
    exact = teacher()(batch).logits
    full, half, top = (
        opened(teacher(), data, tmp_path, **options) for options in ({}, {"dtype": "float16"}, {"top_k": 3})
    )
    assert (full.bytes_per_row, half.bytes_per_row, top.bytes_per_row) == (44, 24, 32)
    for cached, tolerance in ((full, 0), (half, 1e-3)):
        first = cached(batch)
        assert same(first, cached(batch))  # a run that asks and one that reads see the same
        assert torch.allclose(first.logits.float(), exact, rtol=0, atol=tolerance)
    assert same(top(batch), top(batch))
    assert torch.equal(top(batch).logits.topk(3).indices, exact.topk(3).indices)


def test_float16_refuses_what_it_cannot_hold(tmp_path, data):
    loud = teacher()
    loud.network.net.linear.bias.data[0] = 1e5
    with pytest.raises(UsageError, match=r"cache\.dtype=float16 cannot hold the teacher's logits"):
        opened(loud, data, tmp_path, dtype="float16")(data.train[range(16), 0])


def test_the_budget_says_what_would_fit(tmp_path, data, capsys):
    view = 40 * 44 + cache.HEADER
    with pytest.raises(UsageError, match=r"5 views of 40 rows take .* 3 views would fit \(cache.views=3\)"):
        opened(teacher(), data, tmp_path, views=5, keep="logits", budget=3 * view + 1)
    assert opened(teacher(), data, tmp_path, views=3, keep="logits", budget=3 * view)
    assert opened(teacher(), data, tmp_path, views=5, budget=3 * view) is None
    assert "cache: none, 5 views" in capsys.readouterr().out


def test_modes(tmp_path, data, capsys):
    taps, moving = teacher(taps=["stage1"]), Ema(teacher().network)
    with pytest.raises(
        UsageError, match=r"cache=logits: the losses read the teacher's stage1 too .cache=features keeps"
    ):
        opened(taps, data, tmp_path, keep="logits")
    with pytest.raises(UsageError, match=r"cache=logits: the teacher \(Ema\) changes while it teaches"):
        opened(moving, data, tmp_path, keep="logits")
    assert opened(taps, data, tmp_path) is None and opened(moving, data, tmp_path) is None
    assert capsys.readouterr().out.count("cache: none") == 2


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"top_k": 10}, {"top_k": 0}, {"budget": "much"}])
def test_wrong_options_are_named(tmp_path, data, options):
    with pytest.raises(UsageError, match=f"cache.{next(iter(options))}"):
        opened(teacher(), data, tmp_path, **options)


def test_sizes():
    assert (parse_bytes("1.5kB", "x"), parse_bytes("20GB", "x"), parse_bytes(7, "x")) == (1500, 20 * 10**9, 7)
    assert (human(999), human(18_800), human(20 * 10**9)) == ("999 bytes", "18.8 kB", "20.0 GB")


def student_of(folder) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "student_last.safetensors")


@pytest.mark.parametrize("choice", ["loss=[ce,kd]", "loss=[ce,kd,fitnet]", "teacher.precision=int8"])
def test_a_cached_run_ends_with_the_bits_of_the_online_run(train, quick, tmp_path, choice, capsys, monkeypatch):
    monkeypatch.setattr(rehearsal, "rehearse", lambda *given: None)  # which asks a teacher of its own
    words = [*quick, choice, "loss.kd.weight=3", "trainer.max_epochs=4", "cache.views=2", "baseline=false"]
    words += ["stages=[teacher,distill]"]
    assert train(*words, "cache=off", "name=online", cwd=tmp_path) == 0
    asked = []
    forward = Frozen.forward
    monkeypatch.setattr(Frozen, "forward", lambda self, batch: asked.append(batch.view) or forward(self, batch))
    assert train(*words, "cache=features", "name=cached", cwd=tmp_path) == 0
    assert train(*words, "cache=features", "name=shared", cwd=tmp_path) == 0
    online = student_of(tmp_path / "outputs/online")
    for name in ("cached", "shared"):
        found = student_of(tmp_path / "outputs" / name)
        assert all(torch.equal(found[key], value) for key, value in online.items())
    # a dry run and two batches of validation each; two views of seven batches, and of eight rows that they left over
    assert len(asked) <= 2 * (1 + 2) + 2 * (7 + 7)
    assert train(*words, "cache=off", "cache.views=null", "name=fresh", cwd=tmp_path) == 0
    fresh = student_of(tmp_path / "outputs/fresh")
    assert any(not torch.equal(fresh[key], value) for key, value in online.items())  # the views do matter


def test_a_teacher_in_int8_says_how_near_it_is_and_has_no_features(train, quick, tmp_path, capsys):
    words = [*quick, "teacher.precision=int8", "baseline=false", "stages=[teacher,distill]"]
    assert train(*words, cwd=tmp_path) == 0
    assert re.search(
        r"teacher.precision=int8: the same class as in float32 for (100|[89]\d)\.\d% of 1\d\d images",
        capsys.readouterr().out,
    )
    assert train(*words, "loss=[ce,kd,fitnet]", "name=features", cwd=tmp_path) == 2
    assert "teacher.precision=int8 answers with logits only" in capsys.readouterr().err


def test_filled_ahead_nothing_is_asked_while_training(train, quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rehearsal, "rehearse", lambda *given: None)  # which asks a teacher of its own
    words = [*quick, "trainer.max_epochs=3", "cache.views=2", "baseline=false"]
    assert train(*words, "stages=[cache]", "name=ahead", cwd=tmp_path) == 0
    assert "filled in" in capsys.readouterr().out
    asked = []
    forward = Frozen.forward
    monkeypatch.setattr(Frozen, "forward", lambda self, batch: asked.append(batch.index[0]) or forward(self, batch))
    assert train(*words, "stages=[distill]", "name=run", cwd=tmp_path) == 0
    assert all(index < 0 for index in asked[1:])  # the dry run, then validation only


def test_nothing_to_fill_is_said(train, quick, tmp_path, capsys):
    assert train(*quick, "stages=[cache]", "cache=off", "name=nothing", cwd=tmp_path) == 1
    assert "nothing to fill" in capsys.readouterr().err
    assert train(*quick, "cache=logits", "loss=[ce,fitnet]", "name=features", cwd=tmp_path) == 2
    assert "cache=features keeps them" in capsys.readouterr().err
    assert train(*quick, "cache.views=0", "name=none", cwd=tmp_path) == 2
    assert "cache.views=0" in capsys.readouterr().err


def test_a_batch_has_one_view_and_keeps_its_rows_on_the_host(data):
    batch = data.train[range(4), 7]
    assert batch.view == 7 and type(batch.view) is int
    moved = move_data_to_device(batch, torch.device("meta"))
    assert moved.images.is_meta and moved.labels.is_meta and moved.index is batch.index and moved.view == 7
    with pytest.raises(TypeError):
        data.train[range(4), [0, 0, 1, 1]]


def test_the_key_knows_how_a_network_computes_and_with_what(tmp_path, data, monkeypatch):
    """Two networks with the same weights, layers and images; another configuration; another library."""
    alike, bent = (Frozen(Network(Small(10, 0), {}, [0.5] * 3, [0.5] * 3)) for _ in range(2))
    bent.network.net.linear.forward = lambda x: nn.functional.linear(x, bent.network.net.linear.weight)  # no bias
    monkeypatch.setattr(
        Frozen, "prepare", lambda self, _: setattr(self.outside, "quick", lambda images: self.network(images).logits)
    )
    folders = [folder_of(tmp_path, data, alike), folder_of(tmp_path, data, bent)]
    folders.append(folder_of(tmp_path, data, alike, described={"heads": 6}))
    monkeypatch.setattr(cache, "version", lambda package: "9.9")
    folders.append(folder_of(tmp_path, data, alike))
    assert len(set(folders)) == 4


OWN = """
class Brighter:
    count = 1

    def __init__(self, by):
        self.by = by

    def __call__(self, images, uniforms, size):
        return (images.int() + self.by).clamp(0, 255).byte()
"""


def test_the_key_of_an_augmentation_of_ones_own(tmp_path, data, monkeypatch):
    """The same for another object and in another process; another with other options, or another source."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def folder(by: int, source: str = OWN):
        (tmp_path / "own_for_cache.py").write_text(source)
        sys.modules.pop("own_for_cache", None)
        importlib.invalidate_caches()
        sys.dont_write_bytecode = True
        kind = importlib.import_module("own_for_cache").Brighter
        bright = replace(data, train=replace(data.train, transform=chain({"own": kind(by)}, None)))
        return folder_of(tmp_path, bright, teacher())

    assert folder(3) == folder(3) != folder(4)
    assert folder(3) != folder(3, OWN.replace("+ self.by", "- self.by"))
    described = json.dumps(describe(chain({"own": importlib.import_module("own_for_cache").Brighter(3)}, None)))
    assert "0x" not in described and "own_for_cache.Brighter@" in described
