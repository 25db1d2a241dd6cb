"""The order of training: which rows make up which batch of which epoch."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.utils.data import Sampler

from distill.data.draws import stream


class EpochBatches(Sampler):
    """The batches of an epoch, each as (rows, views), in an order that depends on (seed, epoch) only.

    A view is the epoch's number. With several processes each has its own rows, equally many; what is left
    over is dropped, and so is the last batch unless it is full or the only one: other rows in each epoch.

    Args:
        size: rows in the training set.
        batch_size: of one process.
        seed: of the order.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        self.size, self.batch_size, self.seed = size, batch_size, seed
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
        return max(1, self.size // _processes()[1] // self.batch_size)

    def __iter__(self) -> Iterator[tuple[list[int], list[int]]]:
        # Not a generator: epoch and start are those of now, not of when the first batch is asked for.
        rank, processes = _processes()
        generator = torch.Generator().manual_seed(stream(self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator)
        mine = order[rank::processes][: self.size // processes]
        epoch, batches = self.epoch, mine.split(self.batch_size)[: len(self)]
        return ((rows.tolist(), [epoch] * len(rows)) for rows in batches[self.start :])


def _processes() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
