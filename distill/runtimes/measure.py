"""Measuring functions: networks and logits in, numbers out."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from distill.errors import UserError
from distill.files import size
from distill.runtimes.coverage import is_quantized, stored
from distill.types import Batch

Model = Callable[[Tensor], Tensor]  # images (N, C, H, W) in [0, 1] -> logits (N, K)
Timer = Callable[[Tensor], float]  # images -> milliseconds of one answer

ECE_BINS = 15
BURST = 10  # runs in a turn
COLD = 5  # the first of them, not counted: they find the processor's memory as another model left it
TURNS = 4  # at least
SURE, SURE_TURNS = 0.02, 10  # a median known to ±2 % is measured no longer, once there are so many turns
WARM_UP = 1  # turns: TorchScript specialises its graph during the first runs


@torch.no_grad()
def predict(models: Mapping[str, Model], loader: Iterable[Batch]) -> tuple[dict[str, Tensor], Tensor, dict[str, str]]:
    """One pass over `loader` for all models: ({name: logits (N, K) float32}, labels (N,), {name: why it failed}).

    A model that raises UserError is left out from then on.

    Raises:
        UserError: the loader is empty.
    """
    logits: dict[str, list[Tensor]] = {name: [] for name in models}
    labels: list[Tensor] = []
    failed: dict[str, str] = {}
    for batch in loader:
        labels.append(batch.labels)
        for name in list(logits):
            try:
                logits[name].append(models[name](batch.images).float())
            except UserError as error:
                failed[name] = str(error)
                del logits[name]
    if not labels:
        raise UserError("there are no test images to measure on: the test set is empty")
    return {name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(labels), failed


def agreement(a: Tensor, b: Tensor) -> float:
    """The share of N images to which logits (N, K) of two models give the same top-1 class."""
    return (a.argmax(1) == b.argmax(1)).double().mean().item()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The share of N images whose label (N,) is the top-1 class of logits (N, K)."""
    return (logits.argmax(1) == labels).double().mean().item()


def accuracy_on(net: nn.Module, loader: Iterable[Batch]) -> float:
    """The share of the images of `loader` that `net`, images to logits, classifies rightly."""
    logits, labels, _ = predict({"net": net}, loader)
    return accuracy(logits["net"], labels)


def signal_to_noise(logits: Tensor, wanted: Tensor) -> float:
    """10 · log10(Σ wanted² / Σ (logits - wanted)²) in dB, over all images, each image's logits (N, K) less their mean
    over the classes: what softmax sees of them. Infinite where both are the same, NaN where one is not finite."""
    logits, wanted = (values.double() - values.double().mean(1, keepdim=True) for values in (logits, wanted))
    return 10 * torch.log10(wanted.square().sum() / (logits - wanted).square().sum()).item()


def logit_delta(a: Tensor, b: Tensor) -> float:
    """max |a - b| over all images and classes, in logits."""
    return (a - b).abs().max().item()


def scores(logits: Tensor, labels: Tensor, teacher: Tensor | None, student: Tensor | None) -> dict[str, float | None]:
    """What a model is worth on N labelled images; shares are in [0, 1].

    Args:
        logits: (N, K); labels: (N,) int64 in [0, K).
        teacher, student: logits (N, K) of the teacher and of the float student, None where there is none.

    Returns:
        top1, its standard error on so many images (top1_error), macro (the mean of the classes' own top-1, of those
        that there are images of), top5 (None with at most five classes), ece (expected calibration error, 15 equal
        bins, Guo et al. 2017, arXiv:1706.04599), teacher_agreement, student_agreement, student_delta (max |Δlogit|).

    Raises:
        UserError: a logit is not finite, or a label is not a class of the model.
    """
    classes = logits.shape[1]
    if not torch.isfinite(logits).all():
        bad = (~torch.isfinite(logits).all(1)).sum().item()
        raise UserError(f"the model answers NaN or infinity for {bad} of {len(logits)} images: it cannot be scored")
    if labels.min() < 0 or labels.max() >= classes:
        raise UserError(
            f"labels run from {labels.min().item()} to {labels.max().item()}, but the model has "
            f"{classes} classes (0 to {classes - 1}): the test set's classes must be the model's"
        )
    accuracy = dict(preds=logits, target=labels, num_classes=classes, average="micro")
    ece = multiclass_calibration_error(logits.softmax(1), labels, num_classes=classes, n_bins=ECE_BINS, norm="l1")
    top1 = multiclass_accuracy(**accuracy).item()
    right = (logits.argmax(1) == labels).double()
    counts = labels.bincount(minlength=classes)
    recalls = torch.zeros(classes, dtype=torch.float64).index_add_(0, labels, right)[counts > 0] / counts[counts > 0]
    return {
        "top1": top1,
        "top1_error": (top1 * (1 - top1) / len(labels)) ** 0.5,
        "macro": recalls.mean().item(),
        "top5": multiclass_accuracy(**accuracy, top_k=5).item() if classes > 5 else None,
        "ece": ece.item(),
        "teacher_agreement": None if teacher is None else agreement(logits, teacher),
        "student_agreement": None if student is None else agreement(logits, student),
        "student_delta": None if student is None else logit_delta(logits, student),
    }


def parameters(net: nn.Module) -> int:
    """How many numbers were learned, whatever they are stored in."""
    return sum(part.weights for part in stored(net).values())


@torch.no_grad()
def macs(net: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of convolutions, matrix products and attention for one of `example` (N, C, H, W), in float
    or in int8."""
    quantized = 0

    def count(module: nn.Module, inputs, output: Tensor) -> None:
        nonlocal quantized
        weight = module.weight()
        counted = inputs[0] if "Transpose" in type(module).__name__ else output
        # where a weight is applied: a convolution's channels are the first dimension, a Linear's features the last
        places = counted.numel() // counted.shape[-1 if weight.dim() == 2 else 1]
        quantized += places * weight.numel()

    hooks = [module.register_forward_hook(count) for module in net.modules() if is_quantized(module)]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused attention would not be counted
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            net(example[:1])
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() // 2 + quantized


def timed(model: Model) -> Timer:
    """`model` in this process as what `latency` asks."""

    @torch.no_grad()
    def milliseconds(images: Tensor) -> float:
        start = time.perf_counter()
        model(images)
        return (time.perf_counter() - start) * 1000

    return milliseconds


def latency(
    timers: Mapping[str, Timer], example: Tensor, seconds: float = 2.0
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Milliseconds for one image on one thread: ({name: {"latency_ms": median, "latency_p95_ms": …}}, {name: why it
    failed}).

    The models take turns of BURST runs (A A A … B B B … A A A …), also those in other processes, so that a busy moment
    of the machine hits all of them alike, while each is measured as where one image follows the other. About `seconds`
    a model after the warm-up, until all medians are known to ±2 %, and at least TURNS turns each. A timer that raises
    UserError is asked no more. What has answered large batches before may be slower for one image ever after:
    TorchScript's int8 files are, by up to two times.
    """
    image = example[:1].contiguous()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times: dict[str, list[float]] = {name: [] for name in timers}
        failed: dict[str, str] = {}
        end, rounds = None, -WARM_UP
        while rounds < TURNS or (time.perf_counter() < end and not all(map(_known, times.values()))):
            if rounds == 0:
                end = time.perf_counter() + seconds * len(timers)
            for name in list(times):
                try:
                    burst = [timers[name](image) for _ in range(BURST)]
                except UserError as error:
                    failed[name] = str(error)
                    del times[name]
                    continue
                if rounds >= 0:
                    times[name] += burst[COLD:]
            rounds += 1
    finally:
        torch.set_num_threads(threads)
    quantiles = {name: torch.tensor(runs, dtype=torch.float64).quantile(_MEDIAN_P95) for name, runs in times.items()}
    return {name: {"latency_ms": q[0].item(), "latency_p95_ms": q[1].item()} for name, q in quantiles.items()}, failed


def _known(runs: Sequence[float]) -> bool:
    """Whether the median of the turns' medians has a narrow interval (95 %, by order): runs of one turn are alike, and
    say less than as many turns would."""
    counted = BURST - COLD
    turns = len(runs) // counted
    if turns < SURE_TURNS:
        return False
    medians = torch.tensor(runs, dtype=torch.float64).view(turns, counted).median(1).values.sort().values
    low, high = (medians[round((turns - 1) / 2 + sign * 0.98 * math.sqrt(turns))] for sign in (-1, 1))
    return bool(high - low <= 2 * SURE * medians.median())


_MEDIAN_P95 = torch.tensor([0.5, 0.95], dtype=torch.float64)


def file_bytes(path: Path) -> int:
    return size(path)
