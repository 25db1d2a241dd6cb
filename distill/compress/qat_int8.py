"""Quantization-aware training: the network is fine-tuned with the teacher while it is rounded as int8 will round it.

Source: Jacob et al. 2018 (arXiv:1712.05877), section 3. The rounding passes gradients straight through. Ranges of
activations start from calibration and move along; for the last part of the training they are frozen, and so are the
statistics of batch norms (Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.2).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.compress import flows
from distill.compress.calibrate import calibration, enough, noise
from distill.errors import UsageError, UserError
from distill.schema.ranges import Calibration, Count, Positive, Seed, Share


def qat_int8(
    net: nn.Module,
    finetune=None,
    data=None,
    flow: str = "fx",
    *,
    epochs: Count = 2,
    lr: Positive = 5e-4,
    freeze: Share = 0.67,
    images: Calibration = 512,
    skip: Sequence[str] = (),
    seed: Seed = 0,
) -> nn.Module:
    """`net` in int8 for the runtime of `flow`, of the epoch that was best on the validation images.

    Args:
        net: float32 on the CPU, images (N, C, H, W) to logits (N, K); untouched.
        finetune: trains it, see distill/training/finetune.py.
        data: whose training images calibrate the start.
        epochs, lr: of the fine-tuning; about a hundredth of the training's learning rate.
        freeze: the share of the epochs, in [0, 1], after which ranges and statistics stay as they are.
        images, seed: of the calibration, as in static_int8.
        skip: layers that stay float, by name.

    Raises:
        UsageError: `epochs` or `freeze` out of range.
        UserError: as static_int8; or there is nothing to fine-tune with.
    """
    if epochs < 1 or not 0 <= freeze <= 1:
        raise UsageError(f"compress.qat_int8: epochs={epochs} must be at least 1 and freeze={freeze} in [0, 1]")
    if isinstance(skip, str):
        raise UsageError(f"compress.qat_int8.skip={skip}: expected a list of layers, such as [linear]")
    if finetune is None:
        raise UserError("compress=qat_int8 trains: it needs a run with data and losses; static_int8 does without")
    batches = calibration(data, images, "compress.qat_int8.images", seed)
    prepared = _prepared(net, batches, flow, skip, seed)

    at_work: list[nn.Module] = []

    def on_epoch(network: nn.Module, epoch: int, epochs: int, training: bool) -> None:
        at_work[:] = [network]
        late = epoch >= freeze * epochs
        flows.freeze(network, observers=late or not training, statistics=late)

    try:
        trained = finetune(prepared.train(), f"qat_int8-{flow}", epochs=epochs, lr=lr, on_epoch=on_epoch)
    except (AssertionError, RuntimeError) as error:  # of an observer that sees NaN, before a loss does
        if all(torch.isfinite(value).all() for network in at_work for value in network.parameters()):
            raise
        raise UserError(f"compress.qat_int8: the training diverged: lower compress.qat_int8.lr={lr}") from error
    return flows.convert(trained, flow)


def attempt(net: nn.Module, data, flow: str, *, images=512, skip=(), seed=0, **others) -> None:
    """Capture `net` and quantize it as it is: what can fail of qat_int8 before it trains."""
    enough(data, images, "compress.qat_int8.images")
    _prepared(net, [noise(data)], flow, skip, seed)


def _prepared(net: nn.Module, batches: list[Tensor], flow: str, skip: Sequence[str], seed: int) -> nn.Module:
    prepared = flows.prepare(net, batches[0][:2], flow, qat=True, skip=skip)
    flows.calibrate(prepared, batches, seed)
    _refuse_unlike(prepared, batches[0], flow)
    return prepared


@torch.no_grad()
def _refuse_unlike(prepared: nn.Module, images: Tensor, flow: str) -> None:
    """Before a training in vain: converted as it is now, it must answer one image as it does in a batch."""
    small = flows.convert(prepared, flow)
    together = small(images)
    scale = together.abs().max().clamp(min=1e-6)
    alone = torch.cat([small(images[:1]), small(images[1:4])])
    if (alone - together[:4]).abs().max() > 0.1 * scale:
        raise UserError(
            "compress.qat_int8: captured as a graph, the network answers an image otherwise than among others: its "
            "forward must not depend on the number of images"
        )
