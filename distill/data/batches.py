"""The order of training: which rows make up which batch of which epoch."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from distill.data.draws import stream
from distill.processes import numbered


class EpochBatches(Sampler):
    """The batches of an epoch, each as (rows, view), in an order that depends on (seed, epoch) only.

    A view is the epoch's number, modulo `views` where only so many are wanted. With several processes each has its
    own rows, equally many; what is left over is dropped, and so is the last batch unless it is full or the only one:
    other rows in each epoch.

    Args:
        size: rows in the training set.
        batch_size: of one process.
        seed: of the order.
        views: how many views of a row take turns over the epochs; None: a new one in every epoch.
    """

    def __init__(self, size: int, batch_size: int, seed: int, views: int | None = None):
        self.size, self.batch_size, self.seed, self.views = size, batch_size, seed, views
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch; any epoch but the resumed one starts at its first batch."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def resume_at(self, epoch: int, batch: int) -> None:
        """Every iteration over this epoch starts at `batch`, until another epoch is set."""
        self.epoch, self.start = epoch, batch

    def __len__(self) -> int:
        """Batches of a full epoch, wherever it is resumed."""
        return max(1, self.size // numbered()[1] // self.batch_size)

    def __iter__(self) -> Iterator[tuple[list[int], int]]:
        # Not a generator: epoch and start are those of now, not of when the first batch is asked for.
        rank, processes = numbered()
        generator = torch.Generator().manual_seed(stream(self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator)
        mine = order[rank::processes][: self.size // processes]
        view = self.epoch % self.views if self.views else self.epoch
        batches = mine.split(self.batch_size)[: len(self)]
        return ((rows.tolist(), view) for rows in batches[self.start :])


class InOrder(Sampler):
    """Every row once, in order, in batches as (rows, 0).

    Args:
        size: rows.
        batch_size: of one process.
        shared: of several processes each has its part of the rows, none twice, in equally many batches: in each, DDP
            waits for all. Fewer rows than processes are everybody's.
    """

    def __init__(self, size: int, batch_size: int, shared: bool = False):
        self.size, self.batch_size, self.shared = size, batch_size, shared

    def __len__(self) -> int:
        return len(self._batches(numbered()[1]))

    def __iter__(self) -> Iterator[tuple[list[int], int]]:
        rank, processes = numbered()
        batches = self._batches(processes)
        if self.shared and self.size >= processes:
            batches = [batch.tensor_split(processes)[rank] for batch in batches]
        return ((rows.tolist(), 0) for rows in batches)

    def _batches(self, processes: int) -> list[torch.Tensor]:
        """Of all processes that share them together."""
        processes = processes if self.shared else 1
        batches = [*torch.arange(self.size).split(self.batch_size * processes)]
        if len(batches) > 1 and len(batches[-1]) < processes:  # somebody would have none
            batches[-2:] = [torch.cat(batches[-2:])]
        return batches


class ViewBatches(Sampler):
    """Every row in each of `views` views, in order, to ask a teacher ahead: all batches of a process are equally large.

    The last batch of a view is filled up with rows from the start, so that none is asked in another size than in
    training.
    """

    def __init__(self, size: int, batch_size: int, views: int):
        self.size, self.batch_size, self.views = size, batch_size, views

    def __len__(self) -> int:
        return self.views * -(-self.size // self._batch() // numbered()[1])

    def _batch(self) -> int:
        return min(self.batch_size, self.size // numbered()[1])

    def __iter__(self) -> Iterator[tuple[list[int], int]]:
        (rank, processes), batch = numbered(), self._batch()
        per_view = len(self) // self.views * processes
        order = torch.arange(per_view * batch) % self.size
        mine = order.split(batch)[rank::processes]
        return ((rows.tolist(), view) for view in range(self.views) for rows in mine)
