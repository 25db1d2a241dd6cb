"""A teacher that is asked once: its answers to every (row, view), kept on the disk.

One file holds one output (the logits, or a tap) for one view of all training rows:

    header   4096 bytes: JSON, padded with spaces
    row 0    crc32 (4 bytes), then the row's numbers
    row 1 …  a row of zeros is not filled yet

Rows have their place, so files can be filled in any order and by several processes; a row that a kill, a full disk or
a flipped bit left broken fails its checksum and is asked again. The folder's name is a hash of all that decides the
answers (`identity`), so what another teacher, other images or another augmentation gave is never read.
"""

import errno
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from distill.data.base import Data
from distill.errors import UsageError
from distill.files import atomic, content_key, human, own_temporary, parse_bytes, sweep
from distill.networks.sources import describe, layers
from distill.progress import leads, say
from distill.teachers.base import Teacher
from distill.teachers.frozen import Frozen
from distill.types import Batch, Outputs

HEADER = 4096
FORMAT = 2  # part of the identity: a change of the layout or of what fills it starts anew
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Rows:
    """One file: an output of one view. What is read is checked; what is missing or broken is told apart from it.

    Args:
        path: made if it isn't there.
        view: written into the header, so that a renamed file is not read.
        count: rows in the training set.
        shape, dtype, channels_last: of one row of the output, as tensors.
    """

    def __init__(
        self, path: Path, view: int, count: int, shape: Iterable[int], dtype: torch.dtype, channels_last: bool
    ):
        self.path, self.shape, self.dtype = path, tuple(shape), dtype
        self.channels_last = channels_last
        self.told = False  # that there are broken rows
        header, whole = _header(view, count, self.shape, dtype, channels_last)
        if not self._matches(header, whole):
            self._create(header, whole)
        self._records = np.memmap(path, np.uint8, "r", HEADER).reshape(count, -1)
        self._descriptor: int | None = None

    def _matches(self, header: bytes, whole: int) -> bool:
        """Whether the file is there with this header; one that was cut short is made whole again, its end empty. What
        is whole is only read: a cache may be one that can't be written."""
        try:
            with open(self.path, "rb") as file:
                found, length = file.read(HEADER), file.seek(0, os.SEEK_END)
        except FileNotFoundError:
            return False
        if found != header:
            say(f"cache: {self.path} is damaged; its rows are asked again")
            self.path.unlink(missing_ok=True)
            return False
        if length != whole:
            say(f"cache: {self.path} was cut short; the rows at its end are asked again")
            os.truncate(self.path, whole)
        return True

    def _create(self, header: bytes, whole: int) -> None:
        """All at once and only if no other process was faster: a link, unlike a rename, never replaces a file."""
        temporary = own_temporary(self.path)
        try:
            with open(temporary, "wb") as file:
                file.write(header)
                file.truncate(whole)  # sparse: takes no space until rows are written
            try:
                os.link(temporary, self.path)
            except FileExistsError:
                pass
            except OSError:  # a file system without links: what another process writes just now may be asked again
                os.replace(temporary, self.path)
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Rows (N,): their values (N, *shape), and which are good (N,) bool; the others' values mean nothing."""
        records = self._records[rows]  # (N, 4 + size), a copy
        found = records[:, :4].copy().view(np.uint32)[:, 0]
        wanted = [self._checksum(row, record[4:]) for row, record in zip(rows.tolist(), records, strict=True)]
        good = found == np.array(wanted, dtype=np.uint32)
        if not self.told and (broken := ~good & (found != 0)).any():
            self.told = True
            say(f"cache: {self.path} has damaged rows (row {rows[broken][0]}); they are asked again")
        return self._tensor(records[:, 4:]), good

    def write(self, rows: np.ndarray, values: Tensor) -> None:
        """Values (N, *shape). Raises OSError where the disk is full."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY)
        for row, payload in zip(rows.tolist(), self._bytes(values), strict=True):
            record = self._checksum(row, payload).to_bytes(4, "little") + payload.tobytes()
            place = HEADER + row * len(record)
            if os.pwrite(self._descriptor, record, place) != len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def close(self) -> None:
        """No more writing for now: one open file fewer."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _checksum(self, row: int, payload: np.ndarray) -> int:
        return zlib.crc32(payload, row) or 1  # 0 is for a row that is not filled

    def _bytes(self, values: Tensor) -> np.ndarray:
        values = values.permute(0, 2, 3, 1) if self.channels_last else values
        return values.to("cpu", self.dtype).contiguous().flatten(1).view(torch.uint8).numpy()

    def _tensor(self, payload: np.ndarray) -> Tensor:
        flat = torch.from_numpy(np.ascontiguousarray(payload)).view(self.dtype)
        if not self.channels_last:
            return flat.view(-1, *self.shape)
        channels, height, width = self.shape
        return flat.view(-1, height, width, channels).permute(0, 3, 1, 2)


def _header(
    view: int, count: int, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> tuple[bytes, int]:
    """How a file begins, and its bytes."""
    about = {"view": view, "rows": count, "shape": shape, "dtype": str(dtype), "channels_last": channels_last}
    return json.dumps(about).encode().ljust(HEADER), HEADER + count * (4 + math.prod(shape) * dtype.itemsize)


class Kept:
    """`kept(rows, view)`: the values of each output, (N, *shape), for a process that loads images: it only reads.
    None where a row is missing or broken: who asks the teacher reads again, and mends.

    Args:
        folder, count, layouts: as Cached has them.
    """

    def __init__(self, folder: Path, count: int, layouts: Mapping[str, tuple]):
        self.folder, self.count, self.layouts = folder, count, dict(layouts)
        self._view: int | None = None
        self._files: dict[str, Rows] = {}

    def __call__(self, rows: Tensor, view: int) -> dict[str, Tensor] | None:
        if view != self._view:
            self._view, self._files = view, {}
        try:
            read = {name: self._file(name).read(rows.numpy()) for name in self.layouts}
        except (OSError, ValueError):  # not there yet, or damaged
            return None
        if not all(good.all() for _, good in read.values()):
            return None
        return {name: values for name, (values, _) in read.items()}

    def _file(self, name: str) -> Rows:
        if name not in self._files:
            path, layout = file_of(self.folder, name, self._view), self.layouts[name]
            with open(path, "rb") as file:
                if (file.read(HEADER), file.seek(0, os.SEEK_END)) != _header(self._view, self.count, *layout):
                    raise ValueError("it is damaged")
            self._files[name] = Rows(path, self._view, self.count, *layout)
            self._files[name].told = True  # by who mends them
        return self._files[name]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_view": None, "_files": {}}


class TopK:
    """Logits as their k largest and the mass of the rest, which is spread evenly when they are read again.

    Softmax at temperature 1 is kept for the k classes and for the rest together (Shen & Xing, "A fast knowledge
    distillation framework", ECCV 2022; Wu et al., "TinyViT", ECCV 2022). A row is k values, the log of the rest's
    summed exponentials, and k class numbers, all as float32: exact below 2^24 classes.
    """

    def __init__(self, k: int, classes: int):
        self.k, self.classes = k, classes

    def pack(self, logits: Tensor) -> Tensor:
        """(N, K) → (N, 2k + 1)"""
        values, classes = logits.float().topk(self.k)
        rest = logits.float().scatter(1, classes, -math.inf).logsumexp(1, keepdim=True)
        return torch.cat([values, rest, classes.float()], 1)

    def unpack(self, packed: Tensor) -> Tensor:
        """(N, 2k + 1) → (N, K)"""
        values, rest, classes = packed.split([self.k, 1, self.k], 1)
        each = rest - math.log(self.classes - self.k)
        return each.expand(-1, self.classes).scatter(1, classes.long(), values)


class Cached(Teacher):
    """`teacher` where it has not answered to a (row, view) before, else what it answered.

    A batch of which a row is missing goes through the teacher whole: on a CPU an answer's last bits depend on how many
    images are asked at once, though not on which. Rows outside of the training set (index -1) are always asked.

    Args:
        teacher: a fixed one.
        folder: of this identity, see `open_cache`.
        example: what the teacher answers to some images: shapes and layouts.
        rows: in the training set.
        dtype: what is stored; float32 keeps the run's bits.
        top_k: store only so many logits; None: all.
    """

    def __init__(
        self,
        teacher: Teacher,
        folder: Path,
        example: Outputs,
        rows: int,
        dtype: torch.dtype = torch.float32,
        top_k: int | None = None,
    ):
        super().__init__()
        self.teacher, self.folder, self.count, self.dtype = teacher, folder, rows, dtype
        self.top = None if top_k is None else TopK(top_k, example.logits.shape[1])
        constants = teacher.network.tensors()
        answers = {"logits": example.logits, **{k: v for k, v in example.features.items() if k not in constants}}
        self.layouts = {name: self._layout(name, value) for name, value in answers.items()}
        self.writing = True
        self._files: dict[tuple[str, int], Rows] = {}
        self._view: int | None = None

    def _layout(self, name: str, value: Tensor) -> tuple[tuple[int, ...], torch.dtype, bool]:
        if name == "logits" and self.top:
            return (2 * self.top.k + 1,), torch.float32, False
        channels_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
        return tuple(value.shape[1:]), self.dtype, channels_last and not value.is_contiguous()

    @property
    def network(self):
        return self.teacher.network

    @property
    def kept(self) -> Kept:
        return Kept(self.folder, self.count, self.layouts)

    @property
    def bytes_per_row(self) -> int:
        """Of one view, with the checksums."""
        return sum(4 + math.prod(shape) * dtype.itemsize for shape, dtype, _ in self.layouts.values())

    @torch.no_grad()
    def forward(self, batch: Batch) -> Outputs:
        if (batch.index < 0).any():
            return self.teacher(batch)
        if batch.answers is not None:
            return self._outputs(batch.answers, batch.images.device)
        rows = batch.index.numpy()
        try:
            files = {name: self._file(name, batch.view) for name in self.layouts}
            read = {name: file.read(rows) for name, file in files.items()}
        except OSError as error:
            self._stop_writing(error)
            files, read = {}, {}
        if read and all(good.all() for _, good in read.values()):
            return self._outputs({name: values for name, (values, _) in read.items()}, batch.images.device)
        answer = self._stored(self.teacher(batch))
        if self.writing:
            self._write(files, rows, answer, {name: ~good for name, (_, good) in read.items()})
        return self._outputs(answer, batch.images.device)

    def _stored(self, answer: Outputs) -> dict[str, Tensor]:
        """The answer as files hold it: a run must not depend on whether it was the one that asked."""
        values = {"logits": self.top.pack(answer.logits) if self.top else answer.logits} | answer.features
        rounded = {name: values[name].to(dtype) for name, (_, dtype, _) in self.layouts.items()}
        for name, value in rounded.items():
            if value.dtype == torch.float16 and not torch.isfinite(value).all():
                raise UsageError(f"cache.dtype=float16 cannot hold the teacher's {name}: choose bfloat16 or float32")
        return rounded

    def _file(self, name: str, view: int) -> Rows:
        if view != self._view:  # one view is filled at a time
            for file in self._files.values():
                file.close()
            self._view = view
        if (name, view) not in self._files:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files[name, view] = Rows(file_of(self.folder, name, view), view, self.count, *self.layouts[name])
        return self._files[name, view]

    def _outputs(self, values: dict[str, Tensor], device: torch.device) -> Outputs:
        values = {name: value.to(device, non_blocking=True) for name, value in values.items()}
        logits = values.pop("logits")
        return Outputs(self.top.unpack(logits) if self.top else logits, self.teacher.network.tensors() | values)

    def _write(
        self, files: dict[str, Rows], rows: np.ndarray, values: dict[str, Tensor], missing: dict[str, np.ndarray]
    ) -> None:
        try:
            for name, file in files.items():
                file.write(rows[missing[name]], values[name][torch.from_numpy(missing[name])])
        except OSError as error:
            self._stop_writing(error)

    def _stop_writing(self, error: OSError) -> None:
        if self.writing:
            self.writing = False
            say(f"warning: cache: {error.strerror} ({self.folder}): the teacher answers what is not stored")


class Ask(pl.LightningModule):
    """For Trainer.predict: the teacher answers, and its cache fills, on the device and in the precision of a run."""

    def __init__(self, teacher: Cached):
        super().__init__()
        self.teacher = teacher

    def predict_step(self, batch: Batch, batch_idx: int) -> None:
        if self.teacher.writing:  # until the disk is full
            self.teacher(batch)


def identity(teacher: Frozen, data: Data, seen: Outputs, described: Mapping, seed: int, device: str, **stored) -> dict:
    """All that decides the bits of the answers to a (row, view), and how they are `stored`, as plain values.

    Args:
        seen: what the teacher answers, on this machine's CPU, to a few images: networks that are made alike and compute
            otherwise differ here.
        described: the teacher's configuration.
    """
    network = teacher.network
    return {
        "format": FORMAT,
        "weights": teacher.fingerprint,
        "network": content_key(layers(network)),
        "described": dict(described),
        "answers": content_key(describe(seen.logits)),
        "precision": teacher.precision,
        "looked_into": network.recording,  # else a faster copy answers, whose last bits differ
        "images": data.fingerprint,
        "transform": describe(data.train.transform),
        "image_size": data.image_size,
        "seed": seed,
        "batch_size": data.batch_size,
        "device": device if device == "cpu" else torch.cuda.get_device_name() if device == "cuda" else device,
        "versions": versions(),
        **stored,
    }


def versions() -> dict[str, str]:
    """Of what computes the answers: libraries, and the processor's instructions that they use."""
    found = {"cpu": torch.backends.cpu.get_cpu_capability()}
    for package in ("distill", "torch", "torchvision", "timm"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def check_top_k(top_k: int | None, classes: int) -> None:
    """Raises UsageError where so many are no part of a row's logits."""
    if top_k is not None and not 0 < top_k < classes:
        raise UsageError(f"cache.top_k={top_k}: expected 1 to {classes - 1}, fewer than the classes")


def reads(features: Iterable[str]) -> str:
    """Why a cache of logits isn't enough."""
    return f"the losses read the teacher's {', '.join(features)} too (cache=features keeps them)"


def size_of(teacher: Teacher, data: Data, example: Outputs, views: int, options: Mapping) -> int | None:
    """Bytes of the cache of `options` (conf/cache); None where mode "auto" finds that the teacher must be asked.

    Args:
        example: the teacher's answer to a few images, with all that the losses read.
        views: how many are to be kept.

    Raises:
        UsageError: the teacher changes while it teaches, a loss reads features of a cache of logits, an unknown dtype,
            too large a top_k, or more views than the budget holds.
    """
    mode, dtype, top_k = options["keep"], options["dtype"], options["top_k"]
    if dtype not in DTYPES:
        raise UsageError(f"cache.dtype={dtype}: choose one of {', '.join(DTYPES)}")
    check_top_k(top_k, example.logits.shape[1])
    features = [name for name in example.features if name not in teacher.network.tensors()]
    reason = None
    if not teacher.fixed:
        reason = f"the teacher ({type(teacher).__name__}) changes while it teaches"
    elif features and mode != "features":
        reason = reads(features)
    if reason and mode == "auto":
        say(f"cache: none, {reason}")
        return None
    if reason:
        raise UsageError(f"cache={mode}: {reason}; cache=off asks the teacher every time")
    cached = Cached(teacher, Path(options["folder"]), example, len(data.train), DTYPES[dtype], top_k)
    view_bytes = cached.bytes_per_row * len(data.train) + HEADER * len(cached.layouts)
    budget = parse_bytes(options["budget"], "cache.budget")
    if views * view_bytes > budget:
        fits = budget // view_bytes
        line = (
            f"{views} views of {len(data.train):,} rows take {human(views * view_bytes)}, cache.budget is "
            f"{human(budget)}: {fits} views would fit (cache.views={max(fits, 1)}), or cache.dtype=float16"
        )
        if mode == "auto":
            say(f"cache: none, {line}")
            return None
        raise UsageError(f"cache.views: {line}")
    return views * view_bytes


def place_of(options: Mapping, known_by: Mapping) -> Path:
    """The folder of the answers of one `identity`."""
    return Path(options["folder"]) / content_key(known_by)


def file_of(folder: Path, name: str, view: int) -> Path:
    """Which of an identity's files holds one output (the logits, or a tap) of one view."""
    return folder / f"{name.replace(':', '-').replace('/', '-')}-{view:04d}.rows"


def open_cache(
    teacher: Teacher, data: Data, example: Outputs, views: int, options: Mapping, identify: Callable[..., dict]
) -> Cached | None:
    """The cache of `options`, its size told; None where mode "auto" finds that the teacher must be asked.

    Args:
        teacher, data, example, views, options: see `size_of`, which raises what is wrong with them.
        identify: `identity` but for teacher and data.
    """
    size = size_of(teacher, data, example, views, options)
    if size is None:
        return None
    dtype, top_k = options["dtype"], options["top_k"]
    known_by = identify(teacher, data, dtype=dtype, top_k=top_k)
    folder = place_of(options, known_by)
    cached = Cached(teacher, folder, example, len(data.train), DTYPES[dtype], top_k)
    if leads():
        with suppress(OSError):  # a full disk: said when rows are written
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
            with atomic(folder / "identity.json") as temporary:
                temporary.write_text(json.dumps(known_by, indent=2), encoding="utf-8")
            if shutil.disk_usage(folder).free < size:
                say(f"warning: cache: {human(shutil.disk_usage(folder).free)} are free, it may not fit")
    say(
        f"cache: {', '.join(cached.layouts)} of {views} views, {cached.bytes_per_row:,} bytes a row and view, "
        f"{human(size)} in all → {folder}"
    )
    return cached
