"""Static int8: weights and activations are int8, their ranges found on training images, without training."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn

from distill.compress import bias, flows
from distill.compress.calibrate import answers, calibration, enough, noise
from distill.compress.sensitivity import by_sensitivity
from distill.errors import UsageError
from distill.progress import say
from distill.schema.ranges import Calibration, Seed, Share


def static_int8(
    net: nn.Module,
    finetune=None,
    data=None,
    flow: str = "fx",
    *,
    images: Calibration = 512,
    observer: Literal["histogram", "minmax", "moving_average"] = "histogram",
    skip: Sequence[str] | Literal["auto"] = (),
    drop: Share = 0.01,
    bias_correction: bool = True,
    seed: Seed = 0,
) -> nn.Module:
    """`net` in int8 for the runtime of `flow`; see distill/compress/flows.py for what that means.

    Args:
        net: float32 on the CPU, images (N, C, H, W) to logits (N, K); untouched.
        finetune: part of every compression step's signature; not needed here.
        data: whose training images calibrate.
        images: how many, chosen by `seed`.
        observer: how an activation's range is found: one of flows.OBSERVERS.
        skip: layers that stay float, by name; or "auto": those to which the answers are most sensitive, as few as
            bring the answers within `drop`.
        drop: for skip=auto, the largest share of the calibration images, in [0, 1], whose class may change.
        bias_correction: whether biases make up for the rounded weights first, see distill/compress/bias.py.

    Raises:
        UsageError: unknown options.
        UserError: too few images, an unknown layer in `skip`, a network whose graph can't be captured.
    """
    batches = calibration(data, images, "compress.static_int8.images", seed)
    if skip == "auto":
        return _within(net, batches, flow, observer, drop, bias_correction)
    if isinstance(skip, str):
        raise UsageError(f"compress.static_int8.skip={skip}: expected a list of layers, such as [linear], or auto")
    return _quantized(net, batches, flow, observer, skip, bias_correction)


def attempt(
    net: nn.Module, data, flow: str, *, images=512, observer="histogram", skip=(), bias_correction=True, **others
) -> None:
    """Capture and quantize `net`: what can fail of static_int8 whatever the weights are."""
    enough(data, images, "compress.static_int8.images")
    _quantized(net, [noise(data)], flow, observer, () if skip == "auto" else skip, bias_correction)


def _quantized(
    net: nn.Module, batches: list[Tensor], flow: str, observer: str, skip: Sequence[str], bias_correction: bool
) -> nn.Module:
    flows.known(flow, observer)
    if bias_correction:
        net = bias.correct(net, batches, flows.layers(net, flow, skip), partial(flows.rounded, flow=flow))
    prepared = flows.prepare(net, batches[0][:2], flow, skip=skip, observer=observer)
    answers(prepared, batches)
    return flows.convert(prepared, flow)


def _within(
    net: nn.Module, batches: list[Tensor], flow: str, observer: str, drop: float, bias_correction: bool
) -> nn.Module:
    """The worst 0, 1, 2, 4, … layers in float, until no more than `drop` of the classes change."""
    wanted, order, skipped = answers(net, batches).argmax(1), [], 0
    while True:
        small = _quantized(net, batches, flow, observer, order[:skipped], bias_correction)
        changed = (answers(small, batches).argmax(1) != wanted).double().mean().item()
        if changed <= drop or (order and skipped >= len(order)):
            break
        order = order or by_sensitivity(net, batches)
        skipped = min(len(order), max(1, 2 * skipped))
    names = ", ".join(name.removeprefix("net.") for name in order[:skipped]) or "none"
    say(f"  skip=auto: int8 changes {changed:.1%} of the calibration images' classes; left in float: {names}")
    if changed > drop:
        say(f"  skip=auto: {drop:.1%} can't be met even so; what remains is in the operations between the layers")
    return small
