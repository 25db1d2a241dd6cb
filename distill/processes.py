"""The processes that train together, once torch has joined them."""

import torch
import torch.distributed as dist
from torch import Tensor


def numbered() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(values: Tensor) -> Tensor:
    """The rows of all processes, in their order: (N, ...) to (N · processes, ...), without gradient."""
    if numbered()[1] == 1:
        return values.detach()
    parts = [torch.empty_like(values) for _ in range(numbered()[1])]
    dist.all_gather(parts, values.detach().contiguous())
    return torch.cat(parts)
