"""Low-rank factorisation: a Linear layer or a 1×1 convolution becomes two narrow ones.

Source: Denil et al. 2013 (arXiv:1306.0543); truncated by the singular value decomposition, the best approximation of
rank r (Eckart & Young 1936):

    W (O, I) ≈ (U_r √S_r) (√S_r V_rᵀ),   r · (O + I) < O · I,   Σ_{i ≤ r} s_i² ≥ energy · Σ s_i²
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from distill.compress.calibrate import noise
from distill.compress.layers import called
from distill.compress.tuning import tuning
from distill.errors import UsageError, UserError
from distill.networks.fold import without_fast_paths
from distill.progress import say
from distill.runtimes.measure import parameters
from distill.schema.ranges import Inside, Number, Positive


def low_rank(
    net: nn.Module,
    finetune: Callable | None = None,
    data=None,
    flow: str = "fx",
    *,
    energy: Inside = 0.95,
    epochs: Number = 2,
    lr: Positive = 5e-3,
) -> nn.Module:
    """A copy of `net` with every Linear and 1×1 convolution factorised that becomes smaller by it.

    Args:
        net: float32 on the CPU, images (N, C, H, W) to logits (N, K).
        finetune: trains it, see distill/training/finetune.py; not needed with epochs=0.
        data: gives the size of the images, with which is found what the network calls; without it, all layers are.
        flow: part of every compression step's signature; not needed here.
        energy: the share of a weight's squared norm, in (0, 1), that its factors keep.
        epochs, lr: of the fine-tuning.

    Raises:
        UsageError: options out of range.
        UserError: no layer becomes smaller; nothing to fine-tune with.
    """
    if not 0 < energy < 1 or epochs < 0:
        raise UsageError(f"compress.low_rank: energy={energy} must be between 0 and 1, epochs={epochs} at least 0")
    train = tuning("low_rank", finetune, epochs, lr)
    small, count = without_fast_paths(copy.deepcopy(net).eval()), 0
    layers = dict(small.named_modules())
    names = layers if data is None else called(small, noise(data))
    for name, layer in layers.items():
        if name not in names:
            continue
        factors = _factors(layer, energy)
        if factors is not None:
            small.set_submodule(name, factors)
            count += 1
    if count == 0:
        raise UserError(
            f"compress.low_rank makes no layer smaller at energy={energy}: lower compress.low_rank.energy, or leave "
            "the step out"
        )
    say(f"  low_rank: {count} layers factorised, {parameters(net):,} → {parameters(small):,} parameters")
    return train(small, "low_rank")


@torch.no_grad()
def _factors(layer: nn.Module, energy: float) -> nn.Sequential | None:
    """The layer as two, or None where that is no smaller."""
    pointwise = type(layer) is nn.Conv2d and layer.kernel_size == (1, 1) and layer.groups == 1
    if type(layer) is not nn.Linear and not (pointwise and layer.padding == (0, 0)):
        return None
    weight = layer.weight.flatten(1)  # (O, I)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    kept = values.square().cumsum(0) / values.square().sum()
    rank = int((kept < energy).sum()) + 1
    if rank * sum(weight.shape) >= weight.numel():
        return None
    root = values[:rank].sqrt()
    first, second = root[:, None] * right[:rank], left[:, :rank] * root  # (r, I), (O, r)
    outputs, inputs = weight.shape
    if pointwise:
        pair = nn.Conv2d(inputs, rank, 1, layer.stride, bias=False), nn.Conv2d(rank, outputs, 1)
    else:
        pair = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs)
    pair[0].weight.copy_(first.view_as(pair[0].weight))
    pair[1].weight.copy_(second.view_as(pair[1].weight))
    pair[1].bias.copy_(_bias(layer))
    return nn.Sequential(*pair)


def _bias(layer: nn.Module) -> Tensor:
    return torch.zeros(len(layer.weight)) if layer.bias is None else layer.bias
