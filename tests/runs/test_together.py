"""Several processes at once, with locks that work, locks that lie (they are granted to everybody), and none."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK
from sets import fake
from torch import nn

from distill import files, locks
from distill.data import pack
from distill.data.files import Files
from distill.files import MACHINE, atomic
from distill.networks.network import Network
from distill.networks.weights import load_weights
from distill.runs import run
from distill.teachers.cache import Cached
from distill.teachers.frozen import Frozen
from distill.training import store
from distill.types import Batch

FORK = multiprocessing.get_context("fork")


class Granted:
    """A lock that everybody gets."""

    def __init__(self, path, **options): ...

    def acquire(self): ...

    def release(self): ...


@pytest.fixture(params=["working", "lying", "missing"])
def system(request, monkeypatch):
    """What the operating system's locks do."""
    if request.param == "lying":
        monkeypatch.setattr(locks, "FileLock", Granted)
    if request.param == "missing":

        def flock(*arguments):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr(fcntl, "flock", flock)
    return request.param


@pytest.fixture
def nothing_excludes(monkeypatch):
    """Neither the system's locks nor the owner's file keeps processes apart."""
    for module in (pack, store):
        monkeypatch.setattr(module, "alone", lambda *arguments: contextlib.nullcontext())


def at_once(*works) -> None:
    """Each in a process of its own, all begun together; they all end well."""
    begin = FORK.Barrier(len(works))

    def each(work):
        torch.set_num_threads(1)
        begin.wait()
        work()

    processes = [FORK.Process(target=each, args=(work,)) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * len(works)


def until(found, seconds=10) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.01)


# files


def test_a_file_that_two_write_is_whole_whenever_it_is_read(tmp_path):
    path, size = tmp_path / "file", 200_000

    def write(sign: bytes):
        for _ in range(40):
            with atomic(path) as temporary, open(temporary, "wb") as file:
                file.write(sign * (size // 2))
                file.flush()
                file.write(sign * (size // 2))

    def read():
        until(path.exists)
        for _ in range(200):
            content = path.read_bytes()
            assert len(content) == size and len(set(content)) == 1

    at_once(lambda: write(b"a"), lambda: write(b"b"), read)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_only_temporary_files_of_the_dead_are_removed(tmp_path):
    path = tmp_path / "a[1].json"
    process = FORK.Process(target=time.sleep, args=(60,))
    process.start()
    dead = FORK.Process(target=int)
    dead.start()
    dead.join()

    def left(machine: str, pid: int, age: float = 0, name: str = path.name) -> Path:
        made = tmp_path / f".{name}.{machine}.{pid}.tmp"
        made.touch()
        os.utime(made, (time.time() - age,) * 2)
        return made

    kept = [
        left(MACHINE, process.pid, age=10 * files.DAY),  # it lives
        left("elsewhere-0a1b2c", dead.pid),  # who knows
        left(MACHINE, dead.pid, name="a1.json"),  # of another file
    ]
    gone = [left(MACHINE, dead.pid), left("elsewhere-0a1b2c", 1, age=2 * files.DAY)]
    with atomic(path) as temporary:
        temporary.write_text("x")
    process.kill()
    assert all(each.exists() for each in kept) and not any(each.exists() for each in gone)
    assert path.read_text() == "x"


# locks


def test_one_at_a_time(tmp_path, system):
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count():
        for _ in range(10):
            with locks.alone(tmp_path / "lock", "the counter"):
                number = int(counter.read_text())
                time.sleep(0.002)
                counter.write_text(str(number + 1))

    at_once(count, count, count)
    assert counter.read_text() == "30"
    assert not list(tmp_path.glob("*.owner"))


def holding(path: Path, name: str):
    def hold():
        locks.run = name
        with locks.alone(path, "it"):
            time.sleep(60)

    process = FORK.Process(target=hold)
    process.start()
    until(lambda: locks._said(path.with_name("lock.owner")) != "another process")
    return process


def test_who_waits_says_for_whom_and_goes_on_when_that_one_is_killed(tmp_path, system, capfd, monkeypatch):
    monkeypatch.setattr(locks, "SOON", 0.2)
    process = holding(tmp_path / "lock", "outputs/first")
    with pytest.raises(locks.Held) as held, locks.alone(tmp_path / "lock", "teacher", patience=0.5):
        pass
    said = f"outputs/first (process {process.pid} on {os.uname().nodename}, since 2"
    assert held.value.owner.startswith(said)
    assert f"teacher: waiting for {said}" in capfd.readouterr().out
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    begun = time.monotonic()
    with locks.alone(tmp_path / "lock", "teacher", patience=10):
        assert time.monotonic() - begun < 5
        assert json.loads((tmp_path / "lock.owner").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("about", "age", "free"),
    [
        ({"host": "elsewhere-0a1b2c", "pid": 1}, 0, False),
        ({"host": "elsewhere-0a1b2c", "pid": os.getpid()}, locks.GONE + 9, True),
        ({"host": MACHINE, "pid": os.getpid(), "started": 1}, 0, True),  # another process had its number
        ({"host": MACHINE, "pid": os.getppid(), "started": files.started(os.getppid())}, 9999, False),
        (None, 0, False),  # it is only about to say
        (None, locks.GONE + 9, True),
        ("[" * 9000, locks.GONE + 9, True),
        ({"host": 5, "pid": "x"}, locks.GONE + 9, True),
    ],
    ids=["elsewhere", "silent", "number", "old", "begun", "empty", "damaged", "odd"],
)
def test_an_owner_that_is_gone_holds_nothing(tmp_path, monkeypatch, about, age, free):
    monkeypatch.setattr(locks, "FileLock", Granted)
    owner = tmp_path / "lock.owner"
    owner.write_text("" if about is None else about if isinstance(about, str) else json.dumps(about))
    os.utime(owner, (time.time() - age,) * 2)
    with contextlib.nullcontext() if free else pytest.raises(locks.Held), locks.alone(tmp_path / "lock", "it", 0.3):
        pass
    assert owner.exists() != free


def test_an_owner_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    with locks.alone(tmp_path / "lock", "it"):
        os.utime(tmp_path / "lock.owner", (0, 0))
        until(lambda: (tmp_path / "lock.owner").stat().st_mtime > 0)


def test_a_second_run_in_a_folder_is_told_who_is_at_work(train, tmp_path, capfd, monkeypatch, system):
    folder = tmp_path / "outputs" / "mine"
    folder.mkdir(parents=True)
    process = FORK.Process(target=lambda: held(folder / ".lock"))

    def held(path):
        locks.run = "outputs/mine"
        with locks.alone(path, "it"):
            time.sleep(60)

    process.start()
    until((folder / ".lock.owner").exists)
    monkeypatch.setattr(run, "PATIENCE", 0.3)
    assert train(*QUICK, "name=mine", cwd=tmp_path) == 1
    process.kill()
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: another process is at work in ") and f"process {process.pid} on" in error
    assert not (folder / "run.json").exists()


# what is made once


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(4, 3)


def fitting(folder: Path, number: int, seconds: float) -> None:
    """One of several processes that want the same teacher; each trains as long as it takes, to the same weights."""

    def train(place: Path) -> dict:
        (place / f"trained-{number}").touch()
        time.sleep(seconds)
        student.load_state_dict(net(7).state_dict())
        return {"epoch": 1, "accuracy": 0.5}

    student = net(number)
    store.once(student, folder / "teacher", {"a": 1}, train, load_weights, "teacher: fitted")
    assert torch.equal(student.weight, net(7).weight)


def test_a_teacher_that_several_want_is_fitted_by_one(tmp_path, system):
    at_once(*(lambda number=number: fitting(tmp_path, number, 0.3) for number in range(3)))
    assert len(list(tmp_path.glob("teacher-*/trained-*"))) == 1


def test_a_teacher_that_two_fit_at_once_is_right(tmp_path, nothing_excludes):
    at_once(*(lambda number=number: fitting(tmp_path, number, 0.1 * number) for number in range(2)))
    fitting(tmp_path, 5, 0)
    (folder,) = tmp_path.glob("teacher-*")
    assert sorted(path.name for path in folder.iterdir()) == [
        "fit.json",
        "trained-0",
        "trained-1",
        "weights.safetensors",
    ]


def images(folder: Path) -> Files:
    from PIL import Image

    names = []
    for row in range(12):
        pixels = np.random.default_rng(row).integers(256, size=(16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{row}.png")
        names.append(f"{row}.png")
    return Files(folder, names, 16)


@pytest.mark.parametrize("small", [True, False], ids=["small", "squares"])
def test_a_pack_that_two_make_at_once_is_right(tmp_path, nothing_excludes, small):
    found = images(tmp_path)
    wanted = torch.stack(found[torch.arange(12)])

    def make():
        for round in range(5):
            made = (
                pack.read_small(found, None, tmp_path / f"s{round}")
                if small
                else pack.pack(found, 16, tmp_path / f"s{round}")
            )
            assert torch.equal(torch.as_tensor(np.asarray(made)), wanted)

    at_once(make, make)
    assert {path.suffix for path in tmp_path.glob("s*/*")} == {".npy"}


def cached(folder: Path, data) -> Cached:
    network = Network(nn.Sequential(nn.Flatten(), net_of(data)), {}, [0.5] * 3, [0.5] * 3)
    teacher = Frozen(network)
    return Cached(teacher, folder, teacher(data.train[range(2), 0]), len(data.train))


def net_of(data) -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(data.train[[0], 0].images.numel(), data.num_classes)


def batches(data, order) -> list[Batch]:
    return [data.train[rows, view] for view in (0, 1) for rows in order.split(8)]


def test_a_cache_that_two_fill_at_once_is_right(tmp_path):
    data = fake(8, 0, train_size=24, image_size=8)
    rows = torch.arange(len(data.train))

    def fill(order):
        asked = cached(tmp_path, data)
        for batch in batches(data, order):
            assert torch.equal(asked(batch).logits, asked.teacher(batch).logits)

    at_once(lambda: fill(rows), lambda: fill(rows.flip(0)))
    filled = cached(tmp_path, data)
    for batch in batches(data, rows):
        read = filled._file("logits", batch.view).read(batch.index.numpy())
        assert read[1].all() and torch.allclose(read[0], filled.teacher(batch).logits, atol=1e-6)
    assert not list(tmp_path.glob(".*.tmp"))


# what can only be read


@pytest.fixture
def read_only(monkeypatch, tmp_path):
    """From `begin()` on nothing can be written there: as on a file system that is mounted so."""

    def refuses(name: str):
        function = getattr(os, name)

        def guarded(path, *arguments, **options):
            reads = name == "open" and not arguments[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if reads or not str(path).startswith(str(tmp_path)):
                return function(path, *arguments, **options)
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

        monkeypatch.setattr(os, name, guarded)

    def begin():
        for name in ("open", "mkdir", "link", "replace", "truncate", "unlink"):
            refuses(name)

    return begin


def test_what_is_there_is_read_where_nothing_can_be_written(tmp_path, read_only, monkeypatch):
    (tmp_path / "images").mkdir()
    found, data = images(tmp_path / "images"), fake(8, 0, train_size=24, image_size=8)
    made = pack.read_small(found, None, tmp_path / "packs")
    rows = torch.arange(len(data.train))
    for batch in batches(data, rows):
        cached(tmp_path / "cache", data)(batch)
    fitting(tmp_path, 0, 0)
    read_only()
    monkeypatch.setattr(Files, "decode", lambda *arguments: np.zeros((16, 16, 3), np.uint8))  # its first tells the size
    assert torch.equal(pack.read_small(found, None, tmp_path / "packs"), made)
    asked = cached(tmp_path / "cache", data)
    wanted = [asked.teacher(batch).logits for batch in batches(data, rows)]
    monkeypatch.setattr(asked, "teacher", asked.teacher.eval())
    answers = [asked._file("logits", batch.view).read(batch.index.numpy()) for batch in batches(data, rows)]
    assert all(
        good.all() and torch.allclose(values, right, atol=1e-6)
        for (values, good), right in zip(answers, wanted, strict=True)
    )
    fitting(tmp_path, 1, 0)


def test_a_row_that_is_missing_is_asked_where_nothing_can_be_written(tmp_path, read_only, capfd):
    data = fake(8, 0, train_size=24, image_size=8)
    first, second = batches(data, torch.arange(16))[:2]
    cached(tmp_path, data)(first)
    asked = cached(tmp_path, data)
    read_only()
    for batch in (first, second, second, first):
        assert torch.allclose(asked(batch).logits, asked.teacher(batch).logits, atol=1e-6)
    assert capfd.readouterr().out.count("Read-only file system") == 1


def test_a_folder_that_cannot_be_written_is_one_line(train, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(
        locks,
        "_claimed",
        lambda owner: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system", str(owner))),
    )
    assert train(*QUICK, "name=mine", cwd=tmp_path) == 1
    error = capfd.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: Read-only file system: ")
