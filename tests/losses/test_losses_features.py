"""Losses on features against calculations of their own: NumPy, float64, loops, from the papers' expressions."""

import itertools
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from sets import fake
from test_module import network

from distill.errors import UserError
from distill.losses.ab import AB, ab
from distill.losses.at import at
from distill.losses.cat_kd import CATKD, cat_kd, class_maps
from distill.losses.cwd import CWD, cwd
from distill.losses.dist import dist
from distill.losses.dist_plus import DISTPlus, channel_relation, spatial_relation
from distill.losses.fsp import FSP, fsp
from distill.losses.ft import FT, ft
from distill.losses.mgd import MGD, mgd
from distill.losses.nst import NST, nst
from distill.losses.ofa import OFA, ofa
from distill.losses.ofd import OFD, margin, ofd, partial_l2
from distill.losses.relations import unit
from distill.losses.reviewkd import ReviewKD, hcl, reviewkd
from distill.losses.semckd import Embed, SemCKD, semckd
from distill.losses.simkd import SimKD, simkd
from distill.losses.srd import SRD, srd
from distill.losses.srrl import SRRL, srrl
from distill.losses.vid import VID, vid
from distill.losses.vkd import VKD, vkd
from distill.networks.build import build_network
from distill.networks.network import Network
from distill.networks.resnet_cifar import resnet
from distill.networks.simkd import simkd as simkd_model
from distill.networks.weights import load_weights, save_weights
from distill.runs.run import STARTING_POINT
from distill.teachers.frozen import Frozen
from distill.training.connect import connect
from distill.training.module import Distill
from distill.types import Batch, Outputs

CONF = Path(__file__).parents[2] / "conf"
NAMES = [
    "vid",
    "reviewkd",
    "ofd",
    "ab",
    "nst",
    "fsp",
    "cwd",
    "mgd",
    "ft",
    "srrl",
    "srd",
    "cat_kd",
    "ofa",
    "dist_plus",
    "vkd",
    "semckd",
]


def numbers(*shape, seed=0, scale=1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(labels) -> Batch:
    rows = torch.arange(len(labels))
    return Batch(torch.zeros(len(labels), 3, 4, 4), labels, rows, 0)


def slope(by_hand, arrays: list[np.ndarray], which: int, step: float = 1e-5) -> np.ndarray:
    """The gradient of `by_hand(*arrays)` with respect to one of them, by central differences."""
    found = np.zeros(arrays[which].shape)
    for place in np.ndindex(found.shape):
        ends = []
        for sign in (1, -1):
            moved = [array.copy() for array in arrays]
            moved[which][place] += sign * step
            ends.append(by_hand(*moved))
        found[place] = (ends[0] - ends[1]) / (2 * step)
    return found


def agree(function, by_hand, *inputs: torch.Tensor, learned: int | None = None) -> None:
    """Value, and gradient with respect to the first `learned` inputs (all), of `function` and of `by_hand`."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    arrays = [tensor.detach().numpy() for tensor in inputs]
    value = function(*inputs)
    assert value.dim() == 0
    assert value.item() == pytest.approx(by_hand(*arrays), rel=1e-9, abs=1e-12)
    for which, gradient in enumerate(torch.autograd.grad(value, inputs[:learned], allow_unused=True)):
        gradient = torch.zeros_like(inputs[which]) if gradient is None else gradient
        np.testing.assert_allclose(gradient.numpy(), slope(by_hand, arrays, which), rtol=1e-5, atol=1e-7)


# The layers that the losses learn, by hand


def convolve(maps: np.ndarray, layer) -> np.ndarray:
    """(N, C, H, W) through a convolution of stride 1 with odd kernels and padding that keeps the size."""
    kernel = layer.weight.detach().numpy()
    size = kernel.shape[2]
    n, _, height, width = maps.shape
    padded = np.pad(maps, ((0, 0), (0, 0), (size // 2,) * 2, (size // 2,) * 2))
    out = np.zeros((n, len(kernel), height, width))
    for i, k, h, w in np.ndindex(out.shape):
        out[i, k, h, w] = (padded[i, :, h : h + size, w : w + size] * kernel[k]).sum()
    return out if layer.bias is None else out + layer.bias.detach().numpy()[:, None, None]


def batch_normalise(maps: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    """Per channel over batch and space, by the biased variance, as in training at weight 1 and bias 0."""
    out = np.zeros_like(maps)
    for c in range(maps.shape[1]):
        out[:, c] = (maps[:, c] - maps[:, c].mean()) / math.sqrt(maps[:, c].var() + epsilon)
    return out


def pool(maps: np.ndarray, size: int) -> np.ndarray:
    """Average pooling to `size` × `size`, which divides the map's height and width."""
    n, channels, height, width = maps.shape
    out = np.zeros((n, channels, size, size))
    for h, w in np.ndindex(size, size):
        rows = slice(h * height // size, (h + 1) * height // size)
        columns = slice(w * width // size, (w + 1) * width // size)
        out[:, :, h, w] = maps[:, :, rows, columns].mean((2, 3))
    return out


def enlarge(maps: np.ndarray, size: int) -> np.ndarray:
    """Nearest neighbour to a multiple of the size."""
    return maps.repeat(size // maps.shape[2], 2).repeat(size // maps.shape[3], 3)


def softmax(row: np.ndarray) -> np.ndarray:
    powers = np.array([math.exp(value - row.max()) for value in row])
    return powers / powers.sum()


def features(shapes: dict, seed: int, logits=(3, 5)) -> Outputs:
    made = {name: numbers(*shape, seed=seed + place) for place, (name, shape) in enumerate(shapes.items())}
    return Outputs(numbers(*logits, seed=seed + 50), made)


def built(loss, student: Outputs, teacher: Outputs, data=None):
    """`loss` in float64, built by these outputs."""
    torch.manual_seed(0)
    loss.build(student, teacher, data)
    return loss.double()


def array(outputs: Outputs, tap: str) -> np.ndarray:
    return outputs.features[tap].numpy()


# VID


def vid_by_hand(mean, target, variance):
    total, count = 0.0, 0
    for i, c, h, w in np.ndindex(mean.shape):
        total += (target[i, c, h, w] - mean[i, c, h, w]) ** 2 / (2 * variance[c]) + 0.5 * math.log(variance[c])
        count += 1
    return total / count


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (3, 2, 2, 3)])
def test_vid_is_the_gaussian_log_likelihood(shape):
    variance = numbers(shape[1], seed=3).exp()
    agree(vid, vid_by_hand, numbers(*shape, seed=1), numbers(*shape, seed=2), variance)


def test_vid_is_least_where_the_variance_is_the_mean_squared_error():
    mean, target = numbers(4, 3, 2, 2, seed=1), numbers(4, 3, 2, 2, seed=2)
    best = (mean - target).pow(2).mean((0, 2, 3)).requires_grad_()
    vid(mean, target, best).backward()
    assert best.grad.abs().max() < 1e-9
    assert vid(mean, target, best) < min(vid(mean, target, best * 1.1), vid(mean, target, best * 0.9))


def test_vid_learns_a_regressor_and_a_variance_that_begins_as_told():
    student = features({"stage1": (3, 2, 4, 4), "pooled": (3, 4)}, 1)
    teacher = features({"stage1": (3, 3, 2, 2), "pooled": (3, 5)}, 7)
    loss = built(VID(["stage1", "pooled"], variance=5.0), student, teacher)
    expected = 0.0
    for gaussian, source, target in [
        (loss.gaussians[0], pool(array(student, "stage1"), 2), array(teacher, "stage1")),
        (loss.gaussians[1], array(student, "pooled")[:, :, None, None], array(teacher, "pooled")[:, :, None, None]),
    ]:
        mean = convolve(source, gaussian.mean[0]).clip(0)
        mean = convolve(convolve(mean, gaussian.mean[2]).clip(0), gaussian.mean[4])
        expected += vid_by_hand(mean, target, np.full(target.shape[1], 5.0))
    assert loss(student, teacher, None).item() == pytest.approx(expected, rel=1e-6)
    names = {name for name, _ in loss.named_parameters()}
    assert {"gaussians.0.scale", "gaussians.1.scale"} < names == set(loss.state_dict())
    loss(student, teacher, None).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())


# ReviewKD


def hcl_by_hand(student, teacher):
    levels, weights = [((student - teacher) ** 2).mean()], [1.0]
    for level in (4, 2, 1):
        if level < student.shape[2]:
            levels.append(((pool(student, level) - pool(teacher, level)) ** 2).mean())
            weights.append(weights[-1] / 2)
    return sum(a * b for a, b in zip(levels, weights, strict=True)) / sum(weights)


@pytest.mark.parametrize(
    ("size", "weights"), [(1, [1]), (2, [1, 0.5]), (4, [1, 0.5, 0.25]), (8, [1, 0.5, 0.25, 0.125])]
)
def test_hcl_weighs_the_resolutions_that_are_smaller_than_the_map(size, weights):
    student, teacher = numbers(1, 1, size, size, seed=1), numbers(1, 1, size, size, seed=2)
    agree(hcl, hcl_by_hand, student, teacher)
    constant = torch.full_like(student, 3.0)  # every resolution differs by the same
    assert hcl(constant, 0 * constant).item() == pytest.approx(9.0)
    board = student * 0 + 1
    board.view(-1)[1::2] = -1  # columns of +1 and -1: no coarser resolution sees them
    if size > 1:
        assert hcl(board, 0 * board).item() == pytest.approx(1 / sum(weights))


def test_reviewkd_sums_the_stages_and_is_zero_at_the_teacher():
    maps = [numbers(2, 3, 4, 4, seed=1), numbers(2, 5, 2, 2, seed=2)]
    others = [numbers(2, 3, 4, 4, seed=3), numbers(2, 5, 2, 2, seed=4)]
    expected = sum(hcl_by_hand(a.numpy(), b.numpy()) for a, b in zip(maps, others, strict=True))
    assert reviewkd(maps, others).item() == pytest.approx(expected, rel=1e-9)
    assert reviewkd(maps, maps).item() == 0


def test_reviewkd_fuses_from_deep_to_shallow():
    student = features({"stage1": (3, 2, 8, 8), "stage2": (3, 4, 4, 4), "pooled": (3, 6)}, 1)
    teacher = features({"stage1:pre": (3, 3, 8, 8), "stage2:pre": (3, 5, 8, 8), "pooled": (3, 7)}, 9)
    loss = built(ReviewKD(["stage1", "stage2", "pooled"]), student, teacher)
    assert loss.teacher_taps == ("stage1:pre", "stage2:pre", "pooled")
    expected, deeper = 0.0, None
    for fusion, name in reversed(list(zip(loss.fusions, ("stage1", "stage2", "pooled"), strict=True))):
        maps = array(student, name)
        target = array(teacher, name if name == "pooled" else f"{name}:pre")
        maps, target = (part[:, :, None, None] if part.ndim == 2 else part for part in (maps, target))
        own = batch_normalise(convolve(maps, fusion.enter[0]))  # (N, 6, H, W)
        assert own.shape[1] == 6  # the deepest stage's channels
        if deeper is not None:
            deeper = enlarge(deeper[:, :, ::2, ::2] if deeper.shape[2] > own.shape[2] else deeper, own.shape[2])
            share = 1 / (1 + np.exp(-convolve(np.concatenate([own, deeper], 1), fusion.attention)))
            own = own * share[:, :1] + deeper * share[:, 1:]
        own = enlarge(own, target.shape[2])
        expected += hcl_by_hand(batch_normalise(convolve(own, fusion.leave[0])), target)
        deeper = own
    assert loss(student, teacher, None).item() == pytest.approx(expected, rel=1e-6)
    loss(student, teacher, None).backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())


# OFD


def test_the_margin_is_the_mean_of_what_is_negative():
    weight = torch.tensor([1.0, -0.5, 2.0, 0.3, 1e-3], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.2, -1.0, 2.0, -0.5], dtype=torch.float64)
    for found, s, m in zip(margin(weight, bias).tolist(), weight.abs().tolist(), bias.tolist(), strict=True):
        # integrate x φ(x) and φ(x) below zero
        width = 1e-4 * s
        x = np.arange(m - 12 * s, 0, width) + width / 2 if m - 12 * s < 0 else np.array([])
        density = np.exp(-(((x - m) / s) ** 2) / 2) / (s * math.sqrt(2 * math.pi)) * width
        inside = density.sum()
        expected = (x * density).sum() / inside if inside > 0.001 else -3 * s
        assert found == pytest.approx(expected, rel=1e-3)
        assert found < 0


def partial_l2_by_hand(student, teacher, margins):
    total = 0.0
    for i, c, h, w in np.ndindex(student.shape):
        target = max(teacher[i, c, h, w], margins[c])
        if student[i, c, h, w] > target or target > 0:
            total += (student[i, c, h, w] - target) ** 2
    return total / len(student)


@pytest.mark.parametrize("shape", [(1, 2, 2, 2), (3, 2, 1, 3)])
def test_ofd_skips_what_is_negative_in_both_and_lower_in_the_student(shape):
    margins = -numbers(shape[1], seed=3).abs()
    agree(partial_l2, partial_l2_by_hand, numbers(*shape, seed=1), numbers(*shape, seed=2), margins)
    student, teacher = -numbers(*shape, seed=1).abs() - 9, -numbers(*shape, seed=2).abs()
    assert partial_l2(student, teacher, margins).item() == 0
    at_teacher = teacher.maximum(margins.view(1, -1, 1, 1))
    assert partial_l2(at_teacher, teacher, margins).item() == 0


def test_ofd_connects_each_stage_and_doubles_its_weight():
    student = features({"stage1:pre": (3, 2, 4, 4), "stage2:pre": (3, 3, 2, 2)}, 1)
    teacher = features({"stage1:pre": (3, 4, 4, 4), "stage2:pre": (3, 5, 2, 2)}, 5)
    for stage, channels in (("stage1", 4), ("stage2", 5)):
        teacher.features[f"{stage}:norm.weight"] = numbers(channels, seed=20)
        teacher.features[f"{stage}:norm.bias"] = numbers(channels, seed=21)
    loss = built(OFD(["stage1", "stage2"]), student, teacher)
    assert set(loss.teacher_taps) == set(teacher.features)
    terms = []
    for regressor, stage in zip(loss.connect, ("stage1", "stage2"), strict=True):
        source = batch_normalise(convolve(array(student, f"{stage}:pre"), regressor[0]))
        norm = [teacher.features[f"{stage}:norm.{part}"] for part in ("weight", "bias")]
        terms.append(partial_l2_by_hand(source, array(teacher, f"{stage}:pre"), margin(*norm).numpy()))
    assert loss(student, teacher, None).item() == pytest.approx(terms[0] / 2 + terms[1], rel=1e-6)
    maps, others = [numbers(2, 2, 1, 1, seed=s) for s in (1, 2, 3)], [numbers(2, 2, 1, 1, seed=s) for s in (4, 5, 6)]
    margins = [-torch.ones(2, dtype=torch.float64)] * 3
    single = [partial_l2(*stage).item() for stage in zip(maps, others, margins, strict=True)]
    assert ofd(maps, others, margins).item() == pytest.approx(single[0] / 4 + single[1] / 2 + single[2])


# AB


def ab_by_hand(students, teachers, border):
    total = 0.0
    for level, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        part = 0.0
        for place in np.ndindex(student.shape):
            s, t = student[place], teacher[place]
            if t > 0 and s <= border:
                part += (s - border) ** 2
            elif t <= 0 and s > -border:
                part += (s + border) ** 2
        total += part / len(student) * 2.0 ** (level - len(students) + 1)
    return total


@pytest.mark.parametrize("border", [0.5, 1.0])
@pytest.mark.parametrize("n", [1, 3])
def test_ab_is_a_hinge_on_the_side_of_the_boundary(n, border):
    shapes = [(n, 2, 2, 2), (n, 3, 1, 2)]
    inputs = [numbers(*shape, seed=seed) for seed in (1, 2) for shape in shapes]
    agree(
        lambda a, b, c, d: ab([a, b], [c, d], border), lambda a, b, c, d: ab_by_hand([a, b], [c, d], border), *inputs
    )  # nothing to learn from the teacher: a sign has no gradient


def test_ab_asks_for_the_sign_and_not_for_the_size():
    student, teacher = numbers(2, 3, 2, 2, seed=1), numbers(2, 3, 2, 2, seed=2)
    assert ab([student], [teacher], 1.0).item() == pytest.approx(ab([student], [9 * teacher], 1.0).item())
    assert ab([2 * teacher.sign()], [teacher], 1.0).item() == 0


def test_ab_connects_the_maps_before_their_activations():
    student, teacher = features({"stage2:pre": (3, 2, 2, 2)}, 1), features({"stage2:pre": (3, 4, 2, 2)}, 5)
    loss = built(AB(["stage2"], 0.7), student, teacher)
    source = batch_normalise(convolve(array(student, "stage2:pre"), loss.connect[0][0]))
    expected = ab_by_hand([source], [array(teacher, "stage2:pre")], 0.7)
    assert loss(student, teacher, None).item() == pytest.approx(expected, rel=1e-6)


# NST


def nst_by_hand(student, teacher):
    def unit(maps):
        flat = maps.reshape(*maps.shape[:2], -1)
        return flat / np.sqrt((flat**2).sum(2, keepdims=True))

    student, teacher, total = unit(student), unit(teacher), 0.0
    for s, t in zip(student, teacher, strict=True):
        for a, b, factor in ((s, s, 1), (t, t, 1), (s, t, -2)):
            total += factor * np.mean([np.dot(x, y) ** 2 for x in a for y in b])
    return total / len(student)


@pytest.mark.parametrize(("n", "channels"), [(1, (2, 3)), (2, (3, 3))])
def test_nst_is_the_squared_mean_discrepancy_of_channels(n, channels):
    student, teacher = numbers(n, channels[0], 2, 2, seed=1), numbers(n, channels[1], 2, 2, seed=2)
    agree(lambda s, t: nst([s], [t]), nst_by_hand, student, teacher)


def test_nst_ignores_the_order_and_the_scale_of_channels():
    maps, others = numbers(2, 4, 3, 3, seed=1), numbers(2, 5, 3, 3, seed=2)
    assert nst([maps[:, [2, 0, 3, 1]] * 7], [others]).item() == pytest.approx(nst([maps], [others]).item(), rel=1e-9)
    assert nst([maps], [maps[:, [1, 0, 2, 3]]]).item() == pytest.approx(0, abs=1e-12)
    assert nst([maps], [others]).item() > 1e-3
    student, teacher = Outputs(maps, {"stage1": maps}), Outputs(maps, {"stage1": others.repeat_interleave(2, 3)})
    loss = built(NST(["stage1"]), student, teacher)
    assert loss(student, teacher, None).item() == pytest.approx(nst([maps], [others]).item(), rel=1e-9)


# FSP


def fsp_by_hand(students, teachers):
    def flow(before, after):
        size = min(before.shape[2], after.shape[2])
        before, after = pool(before, size), pool(after, size)
        out = np.zeros((len(before), before.shape[1], after.shape[1]))
        for i, c, d in np.ndindex(out.shape):
            out[i, c, d] = (before[i, c] * after[i, d]).sum() / size**2
        return out

    total = 0.0
    for (s, s2), (t, t2) in zip(itertools.pairwise(students), itertools.pairwise(teachers), strict=True):
        total += ((flow(s, s2) - flow(t, t2)) ** 2).mean()
    return total


@pytest.mark.parametrize("n", [1, 2])
def test_fsp_compares_the_flow_between_stages(n):
    shapes = [(n, 2, 4, 4), (n, 2, 2, 2), (n, 3, 2, 2)]
    inputs = [numbers(*shape, seed=seed) for seed in (1, 2) for shape in shapes]
    agree(lambda *maps: fsp(maps[:3], maps[3:]), lambda *maps: fsp_by_hand(maps[:3], maps[3:]), *inputs)
    assert fsp(inputs[:3], inputs[:3]).item() == 0


def test_fsp_ignores_a_common_permutation_of_pixels():
    maps, others = [numbers(2, 3, 2, 2, seed=s) for s in (1, 2)], [numbers(2, 3, 2, 2, seed=s) for s in (3, 4)]
    assert fsp([m.flip(3) for m in maps], others).item() == pytest.approx(fsp(maps, others).item(), rel=1e-9)


def test_fsp_projects_only_where_the_channels_differ():
    student = features({"stage1": (2, 2, 4, 4), "stage2": (2, 3, 2, 2)}, 1)
    teacher = features({"stage1": (2, 2, 4, 4), "stage2": (2, 4, 2, 2)}, 5)
    loss = built(FSP(["stage1", "stage2"]), student, teacher)
    assert [name for name, _ in loss.named_parameters()] == ["align.1.weight", "align.1.bias"]
    sources = [array(student, "stage1"), convolve(array(student, "stage2"), loss.align[1])]
    expected = fsp_by_hand(sources, [array(teacher, "stage1"), array(teacher, "stage2")])
    assert loss(student, teacher, None).item() == pytest.approx(expected, rel=1e-6)


# CWD


def cwd_by_hand(student, teacher, temperature):
    total = 0.0
    for i, c in np.ndindex(student.shape[:2]):
        p, q = softmax(teacher[i, c].flatten() / temperature), softmax(student[i, c].flatten() / temperature)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / (len(student) * student.shape[1])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("shape", [(1, 2, 2, 2), (3, 2, 1, 3)])
def test_cwd_is_the_divergence_of_each_channel_over_space(shape, temperature):
    inputs = numbers(*shape, seed=1, scale=3), numbers(*shape, seed=2, scale=3)
    agree(lambda s, t: cwd([s], [t], temperature), lambda s, t: cwd_by_hand(s, t, temperature), *inputs)
    shifted = inputs[1] + numbers(*shape[:2], 1, 1, seed=3)
    assert cwd([shifted], [inputs[1]], temperature).item() == pytest.approx(0, abs=1e-12)


def test_cwd_aligns_channels():
    student, teacher = features({"stage3": (2, 2, 4, 4)}, 1), features({"stage3": (2, 3, 2, 2)}, 5)
    loss = built(CWD(["stage3"], 2.0), student, teacher)
    source = convolve(pool(array(student, "stage3"), 2), loss.align[0])
    expected = cwd_by_hand(source, array(teacher, "stage3"), 2.0)
    assert loss(student, teacher, None).item() == pytest.approx(expected, rel=1e-6)


# MGD


def test_mgd_is_the_squared_error_summed_per_image():
    def by_hand(student, teacher):
        return sum(((s - t) ** 2).sum() for s, t in zip(student, teacher, strict=True)) / len(student)

    for n in (1, 3):
        agree(lambda s, t: mgd([s], [t]), by_hand, numbers(n, 2, 2, 2, seed=1), numbers(n, 2, 2, 2, seed=2))


@pytest.mark.parametrize("masked", [0.0, 0.5])
def test_mgd_generates_the_teachers_map_from_masked_channels(masked):
    student, teacher = features({"stage3": (3, 2, 3, 3)}, 1), features({"stage3": (3, 4, 3, 3)}, 5)
    loss = built(MGD(["stage3"], masked), student, teacher)
    generator = loss.generators[0]
    torch.manual_seed(11)
    mask = (torch.rand(3, 4, 1, 1) >= masked).numpy()
    assert bool(mask.all()) == (masked == 0)
    hidden = convolve(convolve(array(student, "stage3"), generator.align) * mask, generator.generate[0]).clip(0)
    expected = ((convolve(hidden, generator.generate[2]) - array(teacher, "stage3")) ** 2).sum() / 3
    torch.manual_seed(11)
    assert loss(student, teacher, None).item() == pytest.approx(expected, rel=1e-6)


# FT


def ft_by_hand(student, teacher):
    differences = []
    for s, t in zip(student, teacher, strict=True):
        differences.append(np.abs(s / math.sqrt((s**2).sum()) - t / math.sqrt((t**2).sum())))
    return np.mean(differences)


@pytest.mark.parametrize("shape", [(1, 2, 2, 2), (3, 2, 1, 3)])
def test_ft_compares_factors_of_unit_length(shape):
    student, teacher = numbers(*shape, seed=1), numbers(*shape, seed=2)
    agree(ft, ft_by_hand, student, teacher)
    assert ft(5 * student, teacher).item() == pytest.approx(ft(student, teacher).item(), rel=1e-9)
    assert ft(student, 5 * student).item() == pytest.approx(0, abs=1e-12)


def test_ft_learns_translator_and_paraphraser_each_from_its_own_term():
    student, teacher = features({"stage3": (2, 2, 3, 3)}, 1), features({"stage3": (2, 5, 3, 3)}, 5)
    loss = built(FT(["stage3"], 0.5, 0.1), student, teacher)

    def through(maps, layers):
        for convolution in layers[::2]:
            maps = convolve(maps, convolution)
            maps = np.where(maps > 0, maps, 0.1 * maps)
        return maps

    factors = through(array(teacher, "stage3"), loss.encode[0])
    assert factors.shape[1] == 2  # round(5 / 2)
    translated = through(array(student, "stage3"), loss.translate[0])
    decoded = loss.decode[0](torch.from_numpy(factors)).detach().numpy()
    expected = ft_by_hand(translated, factors) + 0.1 * np.abs(decoded - array(teacher, "stage3")).mean()
    assert loss(student, teacher, None).item() == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():  # without reconstruction, the paraphraser learns nothing
        loss.reconstruction = 0.0
    loss(student, teacher, None).backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in loss.encode.parameters())
    assert all(p.grad.abs().sum() > 0 for p in loss.translate.parameters())


# SRRL


@pytest.mark.parametrize("n", [1, 3])
def test_srrl_is_feature_and_logit_regression_through_the_teachers_classifier(n):
    weight, bias = numbers(5, 4, seed=3), numbers(5, seed=4)
    teacher_features, teacher_logits = numbers(n, 4, seed=2), numbers(n, 5, seed=5)

    def by_hand(projected, target, weight, bias, logits):
        found = np.array([[np.dot(row, w) + b for w, b in zip(weight, bias, strict=True)] for row in projected])
        return ((projected - target) ** 2).mean() + ((found - logits) ** 2).mean()

    inputs = numbers(n, 4, seed=1), teacher_features, weight, bias, teacher_logits
    agree(srrl, by_hand, *inputs)
    assert srrl(teacher_features, teacher_features, weight, bias, teacher_features @ weight.T + bias).item() < 1e-20


@pytest.mark.parametrize("shape", [(3, 2, 2, 2), (3, 2)])
def test_srrl_connects_then_pools(shape):
    student, teacher = features({"stage3": shape}, 1), features({"pooled": (3, 4)}, 5)
    teacher.features.update({"head:weight": numbers(5, 4, seed=8), "head:bias": numbers(5, seed=9)})
    loss = built(SRRL("stage3"), student, teacher)
    source = array(student, "stage3").reshape(3, 2, *(shape[2:] or (1, 1)))
    projected = batch_normalise(convolve(source, loss.connect[0])).clip(0).mean((2, 3))
    logits = projected @ array(teacher, "head:weight").T + array(teacher, "head:bias")
    expected = ((projected - array(teacher, "pooled")) ** 2).mean()
    expected += ((logits - teacher.logits.numpy()) ** 2).mean()
    assert loss(student, teacher, None).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 5.0), (0.5, 0.0), (0.0, 2.0)])
def test_srrl_weighs_the_feature_by_alpha_and_the_logits_by_beta(alpha, beta):
    weight, bias, logits = numbers(5, 4, seed=3), numbers(5, seed=4), numbers(3, 5, seed=5)

    def by_hand(projected, target):
        found = projected @ weight.numpy().T + bias.numpy()
        return alpha * ((projected - target) ** 2).mean() + beta * ((found - logits.numpy()) ** 2).mean()

    inputs = numbers(3, 4, seed=1), numbers(3, 4, seed=2)
    agree(lambda p, t: srrl(p, t, weight, bias, logits, alpha, beta), by_hand, *inputs)
    outputs = features({"stage3": (3, 2, 2, 2), "pooled": (3, 4)}, 1)
    outputs.features.update({"head:weight": weight, "head:bias": bias})
    parts = [built(SRRL("stage3", alpha=a, beta=b), outputs, outputs) for a, b in ((1, 0), (0, 1), (alpha, beta))]
    values = [part(outputs, outputs, None).item() for part in parts]
    assert values[2] == pytest.approx(alpha * values[0] + beta * values[1], rel=1e-9)


# DIST+


def pearson(a, b) -> float:
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (math.sqrt((a**2).sum() * (b**2).sum()) + 1e-8)


def channel_by_hand(student, teacher):
    n, _, height, width = student.shape
    places = list(np.ndindex(n, height, width))
    return 1 - sum(pearson(student[i, :, h, w], teacher[i, :, h, w]) for i, h, w in places) / len(places)


def spatial_by_hand(student, teacher):
    places = list(np.ndindex(student.shape[2:]))
    sums = [pearson(student[:, :, h, w].sum(1), teacher[:, :, h, w].sum(1)) for h, w in places]
    return 1 - sum(sums) / len(places)


@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (4, 5, 1, 3)])
def test_dist_plus_correlates_channels_at_each_pixel_and_images_at_each_pixel(shape):
    inputs = numbers(*shape, seed=1), numbers(*shape, seed=2)
    agree(channel_relation, channel_by_hand, *inputs)
    agree(spatial_relation, spatial_by_hand, *inputs)
    for relation in (channel_relation, spatial_relation):
        assert relation(3 * inputs[0] + 2, inputs[0]).item() == pytest.approx(0, abs=1e-6)
        assert relation(-inputs[0], inputs[0]).item() == pytest.approx(2, abs=1e-6)


def test_dist_plus_adds_the_features_to_dist_and_falls_towards_the_teacher():
    student, teacher = features({"last": (3, 2, 4, 4)}, 1), features({"last": (3, 4, 2, 2)}, 7)
    loss = built(DISTPlus(beta=1.5, gamma=0.5, iota=2.0, kappa=3.0, temperature=2.0), student, teacher)
    source, target = convolve(pool(array(student, "last"), 2), loss.align), array(teacher, "last")
    expected = dist(student.logits, teacher.logits, 1.5, 0.5, 2.0).item()
    expected += 2.0 * channel_by_hand(source, target) + 3.0 * spatial_by_hand(source, target)
    assert loss(student, teacher, None).item() == pytest.approx(expected, rel=1e-7)
    same = built(DISTPlus(), teacher, teacher)
    assert same(teacher, teacher, None).item() == pytest.approx(0, abs=1e-3)  # DIST's 1e-8
    assert same(Outputs(teacher.logits, {"last": -teacher.features["last"]}), teacher, None).item() > 3.9
    one = Outputs(student.logits[:1], {"last": student.features["last"][:1]})
    assert "loss dist_plus needs at least 2 images" in error_of(loss, one, one, None)
    vector = features({"last": (3, 4)}, 1)
    assert "loss.dist_plus.student_tap" in error_of(DISTPlus().build, vector, teacher, None)


# VkD


def vkd_by_hand(projected, teacher):
    total = 0.0
    for row, target in zip(projected, teacher, strict=True):
        normal = (target - target.mean()) / math.sqrt(target.var() + 1e-5)
        total += sum(0.5 * d * d if abs(d) < 1 else abs(d) - 0.5 for d in row - normal)
    return total / projected.size


@pytest.mark.parametrize("shape", [(1, 3), (4, 5)])
def test_vkd_is_the_smooth_distance_to_the_normalised_teacher(shape):
    agree(vkd, vkd_by_hand, numbers(*shape, seed=1, scale=2.0), numbers(*shape, seed=2))
    projected, teacher = numbers(*shape, seed=1), numbers(*shape, seed=2, scale=30.0)
    moved = 5 * teacher + numbers(shape[0], 1, seed=3)
    assert vkd(projected, moved).item() == pytest.approx(vkd(projected, teacher).item(), rel=1e-4)


@pytest.mark.parametrize(("narrow", "wide"), [(3, 7), (7, 3), (4, 4)])
def test_vkds_projector_is_orthogonal_and_stays_so(narrow, wide):
    student, teacher = features({"pooled": (5, narrow)}, 1), features({"pooled": (5, wide, 2, 2)}, 4)
    loss = built(VKD(), student, teacher)
    step = torch.optim.SGD(loss.parameters(), lr=5.0)
    start = loss.project.weight.detach().clone()
    for _ in range(3):
        step.zero_grad()
        loss(student, teacher, None).backward()
        step.step()
    weight = loss.project.weight.detach()  # (wide, narrow)
    gram = weight.T @ weight if wide >= narrow else weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(min(narrow, wide)).double(), rtol=1e-5, atol=1e-6)
    assert torch.dist(weight, start) > 0.01
    projected = np.array([[np.dot(row, w) for w in weight.numpy()] for row in array(student, "pooled")])
    expected = vkd_by_hand(projected, array(teacher, "pooled").mean((2, 3)))
    assert loss(student, teacher, None).item() == pytest.approx(expected, rel=1e-9)


# SemCKD


def semckd_by_hand(errors, queries, keys):
    total = 0.0
    for error, query, key in zip(errors, queries, keys, strict=True):
        for i, row in enumerate(query):
            attention = softmax(np.array([np.dot(row, each) for each in key]))
            total += sum(attention * error[i])
    return total / (len(errors) * errors.shape[1])


@pytest.mark.parametrize(("n", "s", "t"), [(1, 2, 3), (3, 3, 2)])
def test_semckd_weighs_the_errors_by_attention(n, s, t):
    inputs = numbers(n, s, t, seed=1).pow(2), numbers(n, s, 4, seed=2), numbers(n, t, 4, seed=3)
    agree(semckd, semckd_by_hand, *inputs)
    even = numbers(n, s, 4, seed=2) * 0
    assert semckd(inputs[0], even, inputs[2]).item() == pytest.approx(inputs[0].mean().item(), rel=1e-9)


def test_semckd_joins_every_stage_with_every_stage():
    shapes = {"stage1": (4, 2, 4, 4), "stage2": (4, 3, 2, 2)}
    student, teacher = (
        features(shapes, 1, (4, 5)),
        features({k: (4, c + 2, *hw) for k, (_, c, *hw) in shapes.items()}, 7),
    )
    loss = built(SemCKD(["stage1", "stage2"], factor=2), student, teacher, SimpleNamespace(batch_size=6))

    def embedded(embed, maps):
        flat = maps.reshape(len(maps), -1)
        similar = np.zeros((4, 6))  # filled up with zeros
        similar[:, :4] = flat @ flat.T
        first, last = ((layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in embed.layers[::2])
        rows = np.maximum(similar @ first[0].T + first[1], 0) @ last[0].T + last[1]
        assert rows.shape == (4, 3)
        return rows / np.sqrt((rows**2).sum(1, keepdims=True))

    def brought(layers, maps):
        maps = batch_normalise(convolve(maps, layers[0])).clip(0)
        return convolve(batch_normalise(convolve(maps, layers[3])).clip(0), layers[6])

    names = ["stage1", "stage2"]
    errors = np.zeros((4, 2, 2))
    for i, j in np.ndindex(2, 2):
        source, target = array(student, names[i]), array(teacher, names[j])
        size = min(source.shape[2], target.shape[2])
        difference = brought(loss.regressors[i][j], pool(source, size)) - pool(target, size)
        errors[:, i, j] = (difference**2).mean((1, 2, 3))
    queries, keys = (
        np.stack([embedded(embed, array(side, name)) for embed, name in zip(embeds, names, strict=True)], 1)
        for embeds, side in ((loss.queries, student), (loss.keys, teacher))
    )
    assert loss(student, teacher, None).item() == pytest.approx(semckd_by_hand(errors, queries, keys), rel=1e-6)
    loss(student, teacher, None).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())


def test_semckd_wants_two_images_and_no_more_than_a_batch():
    outputs = features({"stage1": (3, 2, 2, 2)}, 1)
    loss = built(SemCKD(["stage1"]), outputs, outputs, SimpleNamespace(batch_size=2))
    assert "batches of 2 images or fewer, and this one has 3" in error_of(loss, outputs, outputs, None)
    one = Outputs(outputs.logits[:1], {"stage1": outputs.features["stage1"][:1]})
    assert "loss semckd relates the images of a batch" in error_of(loss, one, one, None)
    embeddings = Embed(3, 2)(numbers(3, 4).float())
    torch.testing.assert_close(embeddings, unit(embeddings))


# SRD


@pytest.mark.parametrize("exponent", [2.0, 4.0])
def test_srd_is_the_logarithm_of_the_summed_powers(exponent):
    def by_hand(student, teacher):
        return math.log(sum(abs(s - t) ** exponent for s, t in zip(student.flat, teacher.flat, strict=True)))

    for n in (1, 3):
        agree(lambda s, t: srd(s, t, exponent), by_hand, numbers(n, 4, seed=1), numbers(n, 4, seed=2))


def test_srd_is_finite_and_least_at_the_teacher():
    maps = numbers(3, 4).requires_grad_()
    value = srd(maps, maps.detach(), 4.0)
    value.backward()
    assert value.item() == pytest.approx(math.log(1e-12))
    assert maps.grad.abs().max() == 0


def test_srd_ignores_scale_and_shift_of_every_feature():
    student, teacher = features({"pooled": (6, 3)}, 1), features({"pooled": (6, 4)}, 5)
    loss = built(SRD(), student, teacher)
    weight, bias = loss.project.weight.detach().numpy(), loss.project.bias.detach().numpy()
    projected = np.array([[np.dot(row, w) for w in weight] for row in array(student, "pooled")]) + bias
    difference = batch_normalise(projected, 1e-4) - batch_normalise(array(teacher, "pooled"), 1e-4)
    expected = math.log((np.abs(difference) ** 4).sum())
    assert loss(student, teacher, None).item() == pytest.approx(expected, rel=1e-6)
    moved = Outputs(teacher.logits, {"pooled": 50 * teacher.features["pooled"] + torch.arange(4)})
    scaled = loss(student, Outputs(teacher.logits, {"pooled": 50 * teacher.features["pooled"]}), None)
    assert loss(student, moved, None).item() == pytest.approx(scaled.item(), rel=1e-9)
    assert scaled.item() == pytest.approx(expected, rel=1e-2)  # but for the batch norm's ε


# CAT-KD


def cat_kd_by_hand(student, student_weight, teacher, teacher_weight, resolution, normalize):
    pooled = []
    for maps, weight in ((student, student_weight), (teacher, teacher_weight)):
        cams = np.zeros((len(maps), len(weight), *maps.shape[2:]))
        for i, k, h, w in np.ndindex(cams.shape):
            cams[i, k, h, w] = sum(weight[k, d] * maps[i, d, h, w] for d in range(maps.shape[1]))
        cams = pool(cams, resolution)
        pooled.append(cams / np.sqrt((cams**2).sum((2, 3), keepdims=True)) if normalize else cams)
    return ((pooled[0] - pooled[1]) ** 2).mean()


@pytest.mark.parametrize(("n", "normalize", "resolution"), [(1, False, 2), (2, True, 2), (2, False, 1)])
def test_cat_kd_compares_pooled_class_activation_maps(n, normalize, resolution):
    inputs = numbers(n, 2, 4, 4, seed=1), numbers(3, 2, seed=2), numbers(n, 4, 2, 2, seed=3), numbers(3, 4, seed=4)

    def function(maps, weight, others, other_weight):
        return cat_kd(class_maps(maps, weight), class_maps(others, other_weight), resolution, normalize)

    agree(function, lambda *arrays: cat_kd_by_hand(*arrays, resolution, normalize), *inputs)
    student = Outputs(numbers(n, 3), {"last": inputs[0], "head:weight": inputs[1]})
    teacher = Outputs(numbers(n, 3), {"last": inputs[2], "head:weight": inputs[3][:, :, None, None]})
    loss = built(CATKD(resolution=resolution, normalize=normalize), student, teacher)
    assert loss(student, teacher, None).item() == pytest.approx(function(*inputs).item(), rel=1e-9)


def test_cat_kd_averages_to_the_logits_and_is_zero_at_the_teacher():
    maps, weight = numbers(2, 4, 3, 3), numbers(5, 4, seed=1)
    torch.testing.assert_close(class_maps(maps, weight).mean((2, 3)), maps.mean((2, 3)) @ weight.T)
    cams = class_maps(maps, weight)
    assert cat_kd(cams, cams, 2, True).item() == 0
    other = class_maps(numbers(2, 4, 3, 3, seed=2), weight)
    assert cat_kd(3 * cams, other, 2, True).item() == pytest.approx(cat_kd(cams, other, 2, True).item(), rel=1e-9)


# OFA


def ofa_by_hand(logits, teacher_logits, labels, exponent, temperature):
    total = 0.0
    for z, z_t, label in zip(logits, teacher_logits, labels, strict=True):
        q, p = softmax(z / temperature), softmax(z_t / temperature)
        for k in range(len(z)):
            hit = float(k == label)
            total -= ((p[k] + hit) ** exponent - hit) * math.log(q[k])
    return total / len(logits)


@pytest.mark.parametrize(("exponent", "temperature"), [(1.0, 1.0), (1.5, 1.0), (1.2, 3.0)])
@pytest.mark.parametrize("n", [1, 4])
def test_ofa_is_a_cross_entropy_with_the_enhanced_target(n, exponent, temperature):
    labels = torch.arange(n) % 3
    agree(
        lambda s, t: ofa(s, t, labels, exponent, temperature),
        lambda s, t: ofa_by_hand(s, t, labels.tolist(), exponent, temperature),
        numbers(n, 3, seed=1, scale=2),
        numbers(n, 3, seed=2, scale=2),
        learned=1,
    )


def test_ofa_is_least_at_the_teacher_and_raises_the_target():
    teacher, labels = numbers(3, 4, seed=2), torch.tensor([0, 3, 1])
    student = teacher.clone().requires_grad_()
    value = ofa(student, teacher, labels, 1.0, 1.0)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.abs().max() < 1e-12
    assert value.item() == pytest.approx(torch.distributions.Categorical(logits=teacher).entropy().mean().item())
    (raised,) = torch.autograd.grad(ofa(student, teacher, labels, 1.5, 1.0), student)
    assert (raised.gather(1, labels[:, None]) < 0).all()  # the target's logit is pushed up


def test_ofa_adds_a_branch_for_every_stage():
    student = features({"stage1": (3, 4, 8, 8), "stage2": (3, 6, 4, 4), "stage3": (3, 17, 8)}, 1)
    teacher, labels = features({}, 9), torch.tensor([0, 4, 2])
    loss = built(OFA(["stage1", "stage2", "stage3"], 1.4), student, teacher)
    halvings = [sum(getattr(m, "stride", None) == (2, 2) for m in branch.modules()) for branch in loss.branches]
    assert halvings == [2, 1, 0]
    answers = [branch(student.features[tap]) for branch, tap in zip(loss.branches, loss.student_taps, strict=True)]
    rows = [logits.detach().numpy() for logits in (student.logits, *answers)]
    expected = sum(ofa_by_hand(z, teacher.logits.numpy(), labels.tolist(), 1.4, 1.0) for z in rows)
    assert loss(student, teacher, batch_of(labels)).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("tokens", "read"), [(17, slice(0, 1)), (16, slice(0, 16))])
def test_a_token_branch_reads_the_class_token_or_the_mean(tokens, read):
    student, teacher = features({"stage1": (2, tokens, 8)}, 1, (2, 5)), features({}, 9)
    branch = built(OFA(["stage1"]), student, teacher).branches[0].eval()
    inside = branch.blocks(student.features["stage1"])
    torch.testing.assert_close(branch(student.features["stage1"]), branch.head(inside[:, read].mean(1)))


# All of them


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [100.0, 0.0])
def test_extreme_features_and_logits_give_finite_values_and_gradients(name, value):
    torch.manual_seed(0)
    shapes = {"stage1:in": (4, 8), "stage1": (4, 8), "stage2": (6, 4), "stage3": (8, 2)}

    def side(wider, requires_grad):
        made = {tap: torch.randn(4, c + wider, s, s).sign() * value for tap, (c, s) in shapes.items()}
        made |= {f"{tap}:pre": made[tap].clone() for tap in ("stage1", "stage2", "stage3")}
        made["last"] = made["stage3"]
        made |= {f"stage{i}:norm.{part}": torch.zeros(c + wider) for i, c in ((1, 4), (2, 6), (3, 8)) for part in
                 ("weight", "bias")}  # fmt: skip
        made |= {"pooled": torch.randn(4, 8 + wider).sign() * value, "head:weight": torch.randn(5, 8 + wider)}
        made["head:bias"] = torch.zeros(5)
        outputs = Outputs(torch.randn(4, 5).sign() * value, made)
        return Outputs(*(part if not requires_grad else _leaves(part) for part in outputs))

    student, teacher = side(0, True), side(4, False)
    loss, _ = configured(name)
    loss.build(student, teacher, SimpleNamespace(batch_size=4))
    total = loss(student, teacher, batch_of(torch.tensor([0, 1, 2, 4])))
    assert total.dtype == torch.float32 and torch.isfinite(total)
    total.backward()
    gradients = [t.grad for t in (student.logits, *student.features.values(), *loss.parameters()) if t.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def _leaves(part):
    if isinstance(part, dict):
        return {name: tensor.clone().requires_grad_() for name, tensor in part.items()}
    return part.clone().requires_grad_()


def configured(name: str):
    """The loss that conf/loss/NAME.yaml describes, and its weight."""
    text = (CONF / "loss" / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    options = yaml.safe_load(text)[name]
    weight = options.pop("weight")
    return instantiate(options, _convert_="all"), weight


@pytest.fixture(scope="module")
def data():
    return fake(num_classes=5, train_size=96, image_size=16, batch_size=16, num_workers=0)


class Means(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, module):
        self.seen.append(module.means()["only"].item())


def distil(student: Network, teacher: Network, loss, data) -> tuple[Distill, list[float]]:
    teacher = Frozen(teacher)
    connect(student, teacher, {"only": loss}, data, seed=0)
    adam = partial(torch.optim.Adam, lr=0.003)
    module = Distill(student, teacher, {"only": loss}, {"only": 1.0}, adam, lambda epoch: 1.0, num_classes=5)
    means = Means()
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False, callbacks=[means],
    )  # fmt: skip
    trainer.fit(module, data.train_loader(0))
    return module, means.seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_each_trains_itself_and_what_it_learns_and_saves_it(name, data):
    loss, weight = configured(name)
    assert weight > 0
    start = {}
    original = loss.build

    def remember(*arguments):
        original(*arguments)
        start.update({key: p.detach().clone() for key, p in loss.named_parameters()})

    loss.build = remember
    module, means = distil(network(0, (4, 8, 16)), network(1, (8, 16, 32)), loss, data)
    assert means[1] < means[0]
    assert bool(start) == (name not in ("nst", "cat_kd"))
    optimized = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    for key, parameter in loss.named_parameters():
        assert id(parameter) in optimized and f"losses.only.{key}" in module.state_dict()
        assert not torch.equal(parameter, start[key]), key
    assert set(module.student.plain().net.state_dict()) == set(resnet(8, 5, (4, 8, 16), stem=4).state_dict())


def error_of(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("make", [OFD, AB, NST, CWD, MGD, FT, SemCKD])
def test_vectors_are_refused_where_maps_are_needed(make):
    outputs = features({"pooled": (2, 8), "pooled:norm.weight": (8,), "pooled:norm.bias": (8,)}, 0)
    name = make.__name__.lower()
    text = error_of(make(["pooled"]).build, outputs, outputs, None)
    assert text.startswith(f"loss {name} needs maps or tokens; the student's 'pooled' is a vector of shape (2, 8)")
    assert f"loss.{name}.taps" in text
    only_teacher = features({"pooled": (2, 8, 2, 2)}, 0)
    assert "the teacher's 'pooled' is a vector" in error_of(make(["pooled"]).build, only_teacher, outputs, None)


@pytest.mark.parametrize("make", [FSP, ReviewKD])
def test_one_stage_is_too_few_for_what_relates_stages(make):
    name = make.__name__.lower()
    expected = f"loss {name} needs at least 2 stages, and loss.{name}.taps names 1: stage2"
    assert error_of(make, ["stage2"]) == expected


@pytest.mark.parametrize("make", [lambda: ReviewKD(["stage1", "pooled"]), SRD, lambda: SRRL("pooled")])
def test_a_batch_of_one_is_refused_where_it_would_be_normalised(make):
    shapes = {
        "stage1": (2, 3, 2, 2),
        "stage1:pre": (2, 3, 2, 2),
        "pooled": (2, 4),
        "head:weight": (5, 4),
        "head:bias": (5,),
    }
    outputs = features(shapes, 1)
    loss = built(make(), outputs, outputs)
    one = Outputs(outputs.logits[:1], {k: v if k.startswith("head") else v[:1] for k, v in outputs.features.items()})
    assert "needs 2 images or more" in error_of(loss, one, one, None)


def test_ofd_needs_a_norm_that_belongs_to_the_map():
    outputs = features({"stage1:pre": (2, 4, 2, 2), "stage1:norm.weight": (3,), "stage1:norm.bias": (3,)}, 0)
    text = error_of(OFD(["stage1"]).build, outputs, outputs, None)
    assert "needs a batch norm of 4 channels" in text and "'stage1:norm.weight' has shape (3,)" in text


def test_cat_kd_needs_the_last_map():
    right = features({"last": (2, 4, 2, 2), "head:weight": (5, 4)}, 0)
    wrong = features({"last": (2, 3, 2, 2), "head:weight": (5, 4)}, 0)
    assert "teacher's classifier, which reads 4 channels; 'last' has 3" in error_of(CATKD().build, right, wrong, None)
    assert "loss.cat_kd.student_tap=stage4" in error_of(CATKD().build, wrong, right, None)
    vector = features({"last": (2, 4), "head:weight": (5, 4)}, 0)
    assert "loss.cat_kd.student_tap" in error_of(CATKD().build, vector, right, None)


# SimKD: a loss and a model


def simkd_config(**changes):
    cfg = OmegaConf.load(CONF / "network" / "simkd.yaml")
    cfg.body.widths, cfg.body.stem = [4, 8, 16], 4
    return OmegaConf.merge(cfg, {"checkpoint": None, **changes})


@pytest.fixture
def teacher_file(tmp_path):
    teacher = network(1, (8, 16, 32))
    save_weights(teacher.net, tmp_path / "teacher.safetensors", {})
    return teacher, str(tmp_path / "teacher.safetensors")


@pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 3, 2, 2)])
def test_simkd_is_the_mean_squared_difference(shape):
    def by_hand(student, teacher):
        return sum((s - t) ** 2 for s, t in zip(student.flat, teacher.flat, strict=True)) / student.size

    agree(simkd, by_hand, numbers(*shape, seed=1), numbers(*shape, seed=2))
    assert simkd(numbers(*shape), numbers(*shape)).item() == 0


@pytest.mark.filterwarnings("ignore")
def test_simkd_ships_the_teachers_classifier_behind_a_projector(teacher_file, data):
    teacher, file = teacher_file
    cfg = simkd_config(width=32, weights=file)
    student = build_network(cfg, 5, 16, seed=0)
    head = student.net.linear
    assert torch.equal(head.weight, teacher.net.linear.weight) and torch.equal(head.bias, teacher.net.linear.bias)
    assert not head.weight.requires_grad
    assert student.net.pool.project(torch.randn(2, 16, 4, 4)).shape == (2, 32, 4, 4)
    loss, weight = configured("simkd")
    assert weight == 1.0
    _, means = distil(student, teacher, loss, data)
    assert means[1] < means[0]
    assert torch.equal(student.net.linear.weight, teacher.net.linear.weight)
    images = torch.rand(2, 3, 16, 16)
    student.eval()
    outputs = student.record(["pool.project"])(images)
    torch.testing.assert_close(outputs.logits, head(outputs.features["pool.project"].mean((2, 3))))
    torch.testing.assert_close(student.plain()(images), outputs.logits)
    # read back without the teacher's file
    path = Path(file).with_name("student.safetensors")
    save_weights(student.net, path, {})
    again = build_network(
        OmegaConf.masked_copy(cfg, [k for k in cfg if k not in STARTING_POINT] + ["checkpoint"]), 5, 16, 0
    )
    load_weights(again.net, path)
    torch.testing.assert_close(again.plain()(images), outputs.logits)


def test_simkd_wants_the_teachers_classifier_and_a_body_that_pools(teacher_file, data):
    teacher, file = teacher_file
    text = error_of(
        connect, build_network(simkd_config(width=32), 5, 16, 0), Frozen(teacher), {"simkd": SimKD()}, data, 0
    )
    assert "its classifier is another: student=simkd student.weights=FILE" in text
    body = partial(resnet, 8, widths=(4, 8, 16), stem=4)
    assert "no classifier of 5 classes that reads 64 features" in error_of(simkd_model, body, 5, 16, 64, file)
    student = build_network(simkd_config(width=32, weights=file), 5, 16, 0)
    loss = SimKD(teacher_tap="stage2")
    assert "'pool.project' has 32, the teacher's 'stage2' 16" in error_of(
        connect, student, Frozen(teacher), {"simkd": loss}, data, 0
    )
    body = partial(torch.nn.Sequential, torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 5))
    assert "the pooling is no module" in error_of(simkd_model, body, 5, 16, 32)


@pytest.mark.parametrize("loss", ["at", "at4", "cat_kd", "ft", "nst", "dist", "channel", "spatial", "vkd"])
def test_an_image_of_zeros_has_gradients_of_the_usual_size(loss):
    compare = {
        "at": lambda s, t: at([s], [t]),
        "at4": lambda s, t: at([s], [t], 4.0),
        "channel": channel_relation,
        "spatial": spatial_relation,
        "vkd": lambda s, t: vkd(t.flatten(1), s.flatten(1)),
        "cat_kd": lambda s, t: cat_kd(s, t, 2, normalize=True),
        "ft": ft,
        "nst": lambda s, t: nst([s], [t]),
        "dist": lambda s, t: dist(s.flatten(1), t.flatten(1), 2.0, 2.0, 4.0),
    }[loss]
    torch.manual_seed(0)
    student, teacher = torch.rand(3, 4, 4, 4), torch.rand(3, 4, 4, 4)
    student[0] = 0
    student.requires_grad_()
    compare(student, teacher).backward()
    assert student.grad.abs().max() < 1e3
