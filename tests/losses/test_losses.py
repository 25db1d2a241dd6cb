"""Each loss against a calculation of its own: NumPy, float64, loops, from the paper's equation."""

import math

import numpy as np
import pytest
import torch

from distill.errors import UserError
from distill.losses.at import AT, at
from distill.losses.ce import CE
from distill.losses.fitnet import FitNet, fitnet
from distill.losses.kd import KD, kd
from distill.losses.project import Projector, as_map, to_same_space
from distill.types import Batch, Outputs


def numbers(*shape, seed=0, scale=3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(labels) -> Batch:
    rows = torch.arange(len(labels))
    return Batch(torch.zeros(len(labels), 3, 4, 4), labels, rows, 0)


def softmax(row: np.ndarray) -> np.ndarray:
    powers = [math.exp(value - row.max()) for value in row]
    return np.array([power / sum(powers) for power in powers])


def kd_by_hand(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    total = 0.0
    for s_row, t_row in zip(student, teacher, strict=True):
        p, q = softmax(t_row / temperature), softmax(s_row / temperature)
        total += sum(p_k * math.log(p_k / q_k) for p_k, q_k in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


@pytest.mark.parametrize(("n", "k"), [(1, 2), (5, 10), (3, 100)])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_kd_is_hintons(n, k, temperature):
    student, teacher = numbers(n, k, seed=1), numbers(n, k, seed=2)
    expected = kd_by_hand(student.numpy(), teacher.numpy(), temperature)
    assert kd(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-9)


def test_kd_gradient_is_t_times_the_difference_of_the_softened_probabilities():
    # dL/dz_s = T (q - p) / N, from Hinton's eq. 2 with the factor T²
    student, teacher, temperature = numbers(4, 6, seed=1).requires_grad_(), numbers(4, 6, seed=2), 3.0
    kd(student, teacher, temperature).backward()
    for row in range(4):
        q = softmax(student.detach().numpy()[row] / temperature)
        p = softmax(teacher.numpy()[row] / temperature)
        np.testing.assert_allclose(student.grad[row].numpy(), temperature * (q - p) / 4, rtol=1e-9)


def test_kd_is_zero_at_the_teacher_and_ignores_a_constant_per_row():
    logits = numbers(4, 7)
    assert kd(logits, logits, 4.0).item() == pytest.approx(0, abs=1e-12)
    assert kd(logits + numbers(4, 1, seed=3), logits, 4.0).item() == pytest.approx(0, abs=1e-12)
    assert kd(logits.flip(1), logits, 4.0).item() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kd_and_ce_stay_finite_at_extreme_logits(dtype):
    student = torch.tensor([[100.0, -100.0, 0.0], [-100.0, 100.0, 0.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-100.0, 100.0, 0.0], [-100.0, 100.0, 0.0]], dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs = Outputs(student, {}).float()
        total = KD(1.0)(outputs, Outputs(teacher, {}).float(), None) + CE()(
            outputs, None, batch_of(torch.tensor([1, 0]))
        )
    total.backward()
    assert total.dtype == torch.float32
    assert torch.isfinite(total)
    assert torch.isfinite(student.grad).all()
    assert total.item() == pytest.approx(300.0, rel=1e-3)  # KD: 200 over 2 rows; CE: 200 in both


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ce_is_the_cross_entropy_with_smoothed_labels(smoothing):
    logits, labels = numbers(5, 4), torch.tensor([0, 3, 1, 1, 2])
    expected = 0.0
    for row, label in zip(logits.numpy(), labels.tolist(), strict=True):
        for k, probability in enumerate(softmax(row)):
            target = (1 - smoothing) * (k == label) + smoothing / 4
            expected -= target * math.log(probability) / 5
    value = CE(smoothing)(Outputs(logits, {}), None, batch_of(labels))
    assert value.item() == pytest.approx(expected, rel=1e-9)


def attention_by_hand(maps: np.ndarray, p: float = 2) -> np.ndarray:
    """(C, H, W) to Q / ‖Q‖₂ with Q = Σ_c |A_c|^p."""
    channels, height, width = maps.shape
    q = np.zeros(height * width)
    for c in range(channels):
        for h in range(height):
            for w in range(width):
                q[h * width + w] += abs(maps[c, h, w]) ** p
    return q / math.sqrt((q**2).sum())


@pytest.mark.parametrize(
    ("n", "student_shape", "teacher_shape"), [(1, (2, 3, 3), (5, 3, 3)), (4, (3, 4, 5), (3, 4, 5))]
)
def test_at_is_the_mean_squared_difference_of_normalised_attention(n, student_shape, teacher_shape):
    pairs = [(numbers(n, *student_shape, seed=s), numbers(n, *teacher_shape, seed=s + 1)) for s in (1, 5)]
    expected = 0.0
    for student, teacher in pairs:
        differences = [
            (attention_by_hand(s) - attention_by_hand(t)) ** 2
            for s, t in zip(student.numpy(), teacher.numpy(), strict=True)
        ]
        expected += np.mean(differences)
    value = at([s for s, _ in pairs], [t for _, t in pairs])
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_at_ignores_scale_and_pools_the_larger_map():
    student, teacher = numbers(2, 3, 4, 4, seed=1), numbers(2, 5, 4, 4, seed=2)
    assert at([7 * student], [teacher]).item() == pytest.approx(at([student], [teacher]).item(), rel=1e-9)
    assert at([student], [student]).item() == 0
    larger = teacher.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert at([student], [larger]).item() == pytest.approx(at([student], [teacher]).item(), rel=1e-9)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 4.0])
def test_at_raises_activations_to_the_power_p(p):
    student, teacher = numbers(2, 3, 2, 3, seed=1).requires_grad_(), numbers(2, 5, 2, 3, seed=2)

    def by_hand(maps) -> float:
        pairs = zip(maps, teacher.numpy(), strict=True)
        return np.mean([(attention_by_hand(s, p) - attention_by_hand(t, p)) ** 2 for s, t in pairs])

    value = at([student], [teacher], p)
    value.backward()
    array = student.detach().numpy()
    assert value.item() == pytest.approx(by_hand(array), rel=1e-9)
    for place in np.ndindex(array.shape):
        step = np.zeros_like(array)
        step[place] = 1e-5
        slope = (by_hand(array + step) - by_hand(array - step)) / 2e-5
        assert student.grad[place].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)
    loss = AT({"ours": "theirs"}, p=p)
    outputs = (Outputs(student, {"ours": student}), Outputs(student, {"theirs": teacher}))
    assert loss(*outputs, None).item() == pytest.approx(value.item())


def test_at_refuses_vectors():
    loss = AT(["pooled"])
    outputs = Outputs(torch.zeros(2, 3), {"pooled": torch.zeros(2, 8)})
    with pytest.raises(UserError, match=r"loss at needs maps.*student's 'pooled'.*\(2, 8\)"):
        loss.build(outputs, outputs, None)


@pytest.mark.parametrize("rectified", [True, False])
def test_fitnet_is_the_mean_squared_difference_after_a_learned_regressor(rectified):
    student, teacher = numbers(3, 2, 4, 4, seed=1).float(), numbers(3, 5, 4, 4, seed=2).float()
    teacher = teacher.relu() if rectified else teacher
    loss = FitNet("stage2", "stage3")
    s, t = (
        Outputs(student[:, :2, 0, 0], {"stage2": student}),
        Outputs(student[:, :2, 0, 0], {"stage3": teacher}),
    )
    torch.manual_seed(0)
    loss.build(s, t, None)
    weight = loss.project.convolution.weight.detach().double().numpy()[:, :, 0, 0]  # (5, 2)
    bias = loss.project.convolution.bias.detach().double().numpy()
    pixels = student.double().numpy().transpose(0, 2, 3, 1).reshape(48, 2)
    regressed = np.array([weight @ pixel + bias for pixel in pixels])  # (48, 5)
    normal = (regressed - regressed.mean(0)) / np.sqrt(regressed.var(0) + 1e-5)
    if rectified:
        normal = np.maximum(normal, 0)
    hint = teacher.double().numpy().transpose(0, 2, 3, 1).reshape(48, 5)
    assert loss(s, t, None).item() == pytest.approx(((normal - hint) ** 2).sum() / (48 * 5), rel=1e-5)
    assert {name for name, _ in loss.named_parameters()} == {
        "project.convolution.weight",
        "project.convolution.bias",
        "scale.0.weight",
        "scale.0.bias",
    }
    assert fitnet(teacher, teacher).item() == 0


@pytest.mark.parametrize(
    ("ours", "theirs", "kind", "kernel", "stride"),
    [
        ((8, 8), (4, 4), torch.nn.Conv2d, (3, 3), (2, 2)),
        ((4, 6), (8, 12), torch.nn.ConvTranspose2d, (4, 4), (2, 2)),
        ((7, 7), (14, 14), torch.nn.ConvTranspose2d, (4, 4), (2, 2)),
        ((7, 9), (4, 4), torch.nn.Conv2d, (4, 6), (1, 1)),
        ((5, 5), (5, 5), torch.nn.Conv2d, (1, 1), (1, 1)),
        ((4, 4), (7, 7), torch.nn.Conv2d, (3, 3), (1, 1)),  # neither half nor larger: the hint is pooled
        ((8, 3), (4, 5), torch.nn.Conv2d, (3, 3), (1, 1)),
    ],
)
def test_fitnets_regressor_strides_or_transposes_as_the_sizes_ask(ours, theirs, kind, kernel, stride):
    student, teacher = numbers(3, 2, *ours, seed=1), numbers(3, 4, *theirs, seed=2)
    loss = FitNet("a", "b", resize="convolve")
    s, t = Outputs(student, {"a": student}), Outputs(teacher, {"b": teacher})
    torch.manual_seed(0)
    loss.build(s, t, None)
    layer = loss.double().project.convolution
    assert (type(layer), layer.kernel_size, layer.stride) == (kind, kernel, stride)
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    pad = layer.padding[0]
    size = [min(pair) for pair in zip(ours, theirs, strict=True)] if kernel == (3, 3) and stride == (1, 1) else theirs
    inner = np.pad(student.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    if kind is torch.nn.ConvTranspose2d:
        regressed = np.zeros((3, 4, 2 * ours[0] + 2, 2 * ours[1] + 2))
        for h, w in np.ndindex(*ours):
            patch = np.einsum("nc,cdij->ndij", student.numpy()[:, :, h, w], weight)
            regressed[:, :, 2 * h : 2 * h + 4, 2 * w : 2 * w + 4] += patch
        regressed = regressed[:, :, 1:-1, 1:-1]
    else:
        rows, columns = ((side + 2 * pad - k) // stride[0] + 1 for side, k in zip(ours, kernel, strict=True))
        regressed = np.zeros((3, 4, rows, columns))
        for h, w in np.ndindex(rows, columns):
            top, left = h * stride[0], w * stride[0]
            patch = inner[:, :, top : top + kernel[0], left : left + kernel[1]]
            regressed[:, :, h, w] = np.einsum("ncij,dcij->nd", patch, weight)
    regressed += bias[:, None, None]
    regressed, hint = (torch.nn.functional.adaptive_avg_pool2d(torch.as_tensor(x), size).numpy()
                       for x in (regressed, teacher))  # fmt: skip
    mean, variance = regressed.mean((0, 2, 3), keepdims=True), regressed.var((0, 2, 3), keepdims=True)
    normal = (regressed - mean) / np.sqrt(variance + 1e-5)
    assert normal.shape == hint.shape == (3, 4, *size)
    assert loss(s, t, None).item() == pytest.approx(((normal - hint) ** 2).mean(), rel=1e-6)


def test_fitnet_refuses_an_unknown_way_to_resize():
    with pytest.raises(UserError, match=r"loss.fitnet.resize=stretch: choose pool or convolve"):
        FitNet(resize="stretch")


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ((2, 4, 8, 8), (2, 6, 4, 4), (2, 6, 4, 4)),  # larger source: pooled
        ((2, 4, 4, 4), (2, 6, 8, 8), (2, 6, 4, 4)),  # larger target: pooled
        ((2, 17, 12), (2, 6, 7, 7), (2, 6, 4, 4)),  # tokens with a class token → map
        ((2, 6, 7, 7), (2, 16, 12), (2, 12, 4, 4)),  # map → tokens without one
        ((2, 5), (2, 9), (2, 9, 1, 1)),  # vectors
    ],
)
def test_a_projector_joins_any_two_features(source, target, expected):
    source, target = numbers(*source).float(), numbers(*target).float()
    projected, pooled = Projector(source, target)(source, target)
    assert projected.shape == pooled.shape == torch.Size(expected)


def test_tokens_become_a_map_row_by_row():
    tokens = torch.arange(1 + 4).float()[None, :, None]  # a class token, then four patches
    assert as_map(tokens).flatten().tolist() == [1, 2, 3, 4]
    assert as_map(tokens).shape == (1, 1, 2, 2)
    small, large = torch.zeros(1, 1, 2, 2), torch.arange(16.0).view(1, 1, 4, 4)
    assert to_same_space(small, large)[1].flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
