"""Random numbers by counter: what is drawn depends on what it is for, not on what was drawn before."""

import numpy as np
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def draws(seed: int, rows: Tensor, views: Tensor, count: int) -> Tensor:
    """Uniform numbers for each (row, view): number k is a pure function of (seed, row, view, k).

    Args:
        seed: any integer; taken modulo 2^64.
        rows, views: (N,) int64.
        count: how many numbers each pair gets.

    Returns:
        (N, count) float32, multiples of 2^-24 in [0, 1).

    SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), nested: the seed's stream at `row` seeds a stream, whose
    output at `view` seeds the stream of the numbers.
    """
    state = _state(seed, rows, views)[:, None]  # (N, 1)
    bits = _at(state, np.arange(count, dtype=np.uint64))  # (N, count)
    return torch.from_numpy((bits >> np.uint64(40)).astype(np.float32) * np.float32(2**-24))


def stream(seed: int, number: int) -> int:
    """An integer in [0, 2^63) that seeds the `number`-th of many independent generators."""
    return int(_state(seed, torch.tensor([number]), torch.tensor([0]))[0] >> np.uint64(1))


def _state(seed: int, rows: Tensor, views: Tensor) -> np.ndarray:
    seeds = np.array([seed % 2**64], dtype=np.uint64)
    for counter in (rows, views):
        seeds = _at(seeds, counter.numpy().astype(np.uint64))
    return seeds  # (N,)


def _at(state: np.ndarray, position: np.ndarray) -> np.ndarray:
    """What SplitMix64 started at `state` gives at `position`; arithmetic is modulo 2^64."""
    bits = state + (position + np.uint64(1)) * _GOLDEN
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
