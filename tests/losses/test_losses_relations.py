"""Losses on relations, and DeiT's: each against a calculation of its own in NumPy, float64, loops over images."""

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
from sets import fake
from test_losses import numbers, softmax
from test_module import network

from distill.errors import UserError
from distill.losses.cc import CC, cc
from distill.losses.ce import CE
from distill.losses.crd import CRD, crd
from distill.losses.dark_rank import HardDarkRank, dark_rank
from distill.losses.deit import DeiT as DeiTLoss
from distill.losses.deit import deit as deit_loss
from distill.losses.ickd import ICKD, ickd
from distill.losses.pkt import PKT, pkt, supervised_pkt
from distill.losses.rkd import RKD, rkd
from distill.losses.sp import SP, sp
from distill.networks.deit import deit
from distill.networks.network import Network
from distill.teachers.frozen import Frozen
from distill.training.connect import connect
from distill.training.module import Distill
from distill.types import Batch, Outputs

CONF = Path(__file__).parents[2] / "conf"


def gradient_by_hand(function, point: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Central differences of `function(point) -> float`, one number at a time."""
    gradient = np.zeros_like(point)
    for place in np.ndindex(point.shape):
        moved = point.copy()
        moved[place] += step
        above = function(moved)
        moved[place] -= 2 * step
        gradient[place] = (above - function(moved)) / (2 * step)
    return gradient


def check(loss, by_hand, student: torch.Tensor, teacher: torch.Tensor) -> None:
    """Value and gradient of `loss(student, teacher)` are those of `by_hand` on the arrays."""
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    assert value.item() == pytest.approx(by_hand(student.detach().numpy(), teacher.numpy()), rel=1e-8, abs=1e-12)
    value.backward()
    expected = gradient_by_hand(lambda point: by_hand(point, teacher.numpy()), student.detach().numpy())
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max() + 1e-9)


def rotation(size: int) -> torch.Tensor:
    return torch.linalg.qr(numbers(size, size, seed=9)).Q


def outputs(features: torch.Tensor, tap: str, classes: int = 3) -> Outputs:
    return Outputs(torch.zeros(len(features), classes), {tap: features})


# RKD


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def rkd_by_hand(student: np.ndarray, teacher: np.ndarray, distance_weight: float, angle_weight: float) -> float:
    n = len(student)

    def relations(x):
        d = np.array([[math.sqrt(((x[i] - x[j]) ** 2).sum()) for j in range(n)] for i in range(n)])
        apart = [d[i, j] for i in range(n) for j in range(n) if i != j]
        angle = np.zeros((n, n, n))
        for j in range(n):
            for i in range(n):
                for k in range(n):
                    if i != j and k != j:
                        angle[j, i, k] = (x[i] - x[j]) @ (x[k] - x[j]) / (d[i, j] * d[k, j])
        return d / (sum(apart) / len(apart)), angle

    (d_s, a_s), (d_t, a_t) = relations(student), relations(teacher)
    distance = sum(huber(x) for x in (d_s - d_t).flat) / n**2
    angle = sum(huber(x) for x in (a_s - a_t).flat) / n**3
    return distance_weight * distance + angle_weight * angle


@pytest.mark.parametrize(("n", "d_s", "d_t"), [(2, 3, 3), (5, 4, 7), (6, 2, 3)])
@pytest.mark.parametrize(("distance_weight", "angle_weight"), [(25.0, 50.0), (1.0, 0.0), (0.0, 2.0)])
def test_rkd_is_parks(n, d_s, d_t, distance_weight, angle_weight):
    weights = {"distance_weight": distance_weight, "angle_weight": angle_weight}
    student, teacher = numbers(n, d_s, seed=1), numbers(n, d_t, seed=2)
    check(partial(rkd, **weights), partial(rkd_by_hand, **weights), student, teacher)


def test_rkds_mean_distance_counts_pairs_of_equal_images():
    """As in the authors' code, which clamps distances: of two equal rows it is 1e-6, not left out."""
    student, teacher = numbers(5, 4, seed=1), numbers(5, 3, seed=2)
    student[3] = student[1]

    def authors(x: torch.Tensor) -> torch.Tensor:
        square = x.pow(2).sum(1)
        distances = (square[:, None] + square[None] - 2 * x @ x.T).clamp(min=1e-12).sqrt()
        distances.fill_diagonal_(0)
        return distances / distances[distances > 0].mean()

    wanted = 25 * torch.nn.functional.smooth_l1_loss(authors(student), authors(teacher))
    assert rkd(student, teacher, 25.0, 0.0).item() == pytest.approx(wanted.item(), rel=1e-5)
    student.requires_grad_()
    rkd(student, teacher, 25.0, 50.0).backward()
    assert student.grad.abs().max() < 100


def test_rkd_ignores_rotation_shift_scale_and_order():
    student, teacher = numbers(6, 4, seed=1), numbers(6, 4, seed=2)
    assert rkd(3 * teacher @ rotation(4) + 5, teacher, 25.0, 50.0).item() == pytest.approx(0, abs=1e-12)
    value = rkd(student, teacher, 25.0, 50.0).item()
    assert value > 1
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert rkd(student[order], teacher[order], 25.0, 50.0).item() == pytest.approx(value)


# SP


def sp_by_hand(student: np.ndarray, teacher: np.ndarray) -> float:
    n = len(student)

    def similarities(x):
        g = np.array([[(x[i] * x[j]).sum() for j in range(n)] for i in range(n)])
        return np.array([g[i] / math.sqrt((g[i] ** 2).sum()) for i in range(n)])

    return ((similarities(teacher) - similarities(student)) ** 2).sum() / n**2


@pytest.mark.parametrize(("n", "s", "t"), [(2, (3,), (5,)), (5, (2, 3, 3), (4, 2, 2)), (4, (6,), (6,))])
def test_sp_is_tungs_with_rows_of_length_one(n, s, t):
    student, teacher = numbers(n, *s, seed=1), numbers(n, *t, seed=2)
    check(lambda a, b: sp(a.flatten(1), b.flatten(1)), sp_by_hand, student, teacher)


def test_sp_ignores_rotation_scale_and_order_and_tells_rows_from_columns():
    student, teacher = numbers(5, 4, seed=1), numbers(5, 6, seed=2)
    assert sp(2 * teacher @ rotation(6), teacher).item() == pytest.approx(0, abs=1e-12)
    value, order = sp(student, teacher).item(), torch.tensor([4, 2, 0, 1, 3])
    assert sp(student[order], teacher[order]).item() == pytest.approx(value)
    # hand numbers: the student's images are orthogonal, the teacher's are parallel, both of lengths 1 and 2:
    # G̃_t = [[1, 2], [2, 4]] has rows (1, 2)/√5 twice; G_s is the identity; ‖·‖² = 2 + 2 - 2·(1 + 2)/√5
    student, teacher = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0], [2.0]])
    assert sp(student, teacher).item() == pytest.approx((4 - 6 / math.sqrt(5)) / 4)


def test_sp_sums_over_its_stages_and_joins_differently_named_ones():
    maps = {"a": numbers(4, 2, 3, 3, seed=1), "b": numbers(4, 5, seed=2), "c": numbers(4, 6, seed=3)}
    everything = Outputs(torch.zeros(4, 3), maps)
    flat = {name: value.flatten(1) for name, value in maps.items()}
    loss = SP({"a": "b", "b": "c"})
    assert loss.student_taps == ("a", "b")
    assert loss.teacher_taps == ("b", "c")
    expected = sp(flat["a"], flat["b"]) + sp(flat["b"], flat["c"])
    assert loss(everything, everything, None).item() == pytest.approx(expected.item())


# CC


def cc_by_hand(student: np.ndarray, teacher: np.ndarray, gamma: float, order: int) -> float:
    n = len(student)

    def kernel(x):
        x = [row / math.sqrt((row**2).sum()) for row in x]
        c = np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                for p in range(order + 1):
                    c[i, j] += math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * (x[i] @ x[j]) ** p
        return c

    return ((kernel(student) - kernel(teacher)) ** 2).sum() / n**2


@pytest.mark.parametrize(("n", "d_s", "d_t"), [(2, 3, 3), (5, 4, 7)])
@pytest.mark.parametrize(("gamma", "order"), [(0.4, 2), (1.0, 1), (0.1, 4)])
def test_cc_is_pengs(n, d_s, d_t, gamma, order):
    options = {"gamma": gamma, "order": order}
    check(partial(cc, **options), partial(cc_by_hand, **options), numbers(n, d_s, seed=1), numbers(n, d_t, seed=2))


def test_cc_approaches_the_gaussian_kernel_and_ignores_rotation_scale_and_order():
    x = numbers(4, 3, seed=1)
    directions = x / x.norm(dim=1, keepdim=True)
    gaussian = torch.exp(-0.4 * torch.cdist(directions, directions) ** 2)
    other = numbers(4, 5, seed=2)
    units = other / other.norm(dim=1, keepdim=True)
    expected = (gaussian - torch.exp(-0.4 * torch.cdist(units, units) ** 2)).pow(2).mean()
    assert cc(x, other, 0.4, 20).item() == pytest.approx(expected.item(), rel=1e-6)
    assert cc(7 * x @ rotation(3), x, 0.4, 2).item() == pytest.approx(0, abs=1e-12)
    order = torch.tensor([2, 0, 3, 1])
    assert cc(x[order], other[order], 0.4, 2).item() == pytest.approx(cc(x, other, 0.4, 2).item())


# PKT


def pkt_by_hand(student: np.ndarray, teacher: np.ndarray) -> float:
    n = len(student)

    def probabilities(x):
        k = np.zeros((n, n))
        for i in range(n):
            for j in range(n):
                k[i, j] = (x[i] @ x[j] / math.sqrt((x[i] @ x[i]) * (x[j] @ x[j])) + 1) / 2
        return np.array([row / row.sum() for row in k])

    p, q = probabilities(teacher), probabilities(student)
    pairs = [(p[i, j], q[i, j]) for i in range(n) for j in range(n)]
    return sum(a * math.log((a + 1e-7) / (b + 1e-7)) for a, b in pairs) / n**2


@pytest.mark.parametrize(("n", "d_s", "d_t"), [(2, 3, 3), (5, 4, 7), (7, 6, 2)])
def test_pkt_is_passalis_with_the_mean_of_their_code(n, d_s, d_t):
    check(pkt, pkt_by_hand, numbers(n, d_s, seed=1), numbers(n, d_t, seed=2))


def test_pkt_is_least_at_the_teacher_and_ignores_rotation_scale_and_order():
    student, teacher = numbers(5, 4, seed=1), numbers(5, 6, seed=2)
    assert pkt(2 * teacher @ rotation(6), teacher).item() == pytest.approx(0, abs=1e-9)
    value, order = pkt(student, teacher).item(), torch.tensor([4, 2, 0, 1, 3])
    assert value > 1e-4
    assert pkt(student[order], teacher[order]).item() == pytest.approx(value)
    assert pkt(student * numbers(5, 1, seed=3).abs(), teacher).item() == pytest.approx(value)


def supervised_by_hand(student: np.ndarray, labels: list[int]) -> float:
    n = len(student)
    k = np.array([[(a @ b / math.sqrt((a @ a) * (b @ b)) + 1) / 2 for b in student] for a in student])
    total = 0.0
    for i in range(n):
        alike = sum(label == labels[i] for label in labels)
        for j in range(n):
            p, q = (labels[i] == labels[j]) / alike, k[i, j] / k[i].sum()
            total += p * math.log((p + 1e-7) / (q + 1e-7))
    return total / n**2


def test_pkts_supervised_term_takes_the_labels_for_the_teacher():
    student, teacher = numbers(5, 4, seed=1), numbers(5, 3, seed=2)
    labels = torch.tensor([0, 1, 0, 2, 1])
    check(lambda a, _: supervised_pkt(a, labels), lambda a, _: supervised_by_hand(a, labels.tolist()), student, teacher)
    batch = Batch(torch.zeros(5, 3, 2, 2), labels, labels, labels)
    both = PKT(supervised_weight=0.001)(outputs(student, "pooled"), outputs(teacher, "pooled"), batch)
    assert both.item() == pytest.approx((pkt(student, teacher) + 0.001 * supervised_pkt(student, labels)).item())


# DarkRank


def dark_rank_by_hand(student: np.ndarray, teacher: np.ndarray, alpha: float, beta: float, permute_len: int) -> float:
    n, total = len(student), 0.0
    for i in range(n):

        def score(x, j, i=i):
            return -alpha * math.sqrt(((x[i] - x[j]) ** 2).sum()) ** beta

        nearest = sorted((j for j in range(n) if j != i), key=lambda j, i=i: -score(teacher, j, i))[:permute_len]
        ranked = [score(student, j) for j in nearest]
        for k in range(len(ranked)):
            total -= ranked[k] - math.log(sum(math.exp(each) for each in ranked[k:]))
    return total / n


@pytest.mark.parametrize(("n", "d_s", "d_t"), [(2, 3, 3), (4, 2, 5), (7, 4, 3)])
@pytest.mark.parametrize(("alpha", "beta", "permute_len"), [(3.0, 3.0, 4), (1.0, 1.0, 2), (0.5, 2.0, 9)])
def test_dark_rank_is_the_likelihood_of_the_teachers_order(n, d_s, d_t, alpha, beta, permute_len):
    options = {"alpha": alpha, "beta": beta, "permute_len": permute_len}
    student, teacher = numbers(n, d_s, seed=1, scale=0.7), numbers(n, d_t, seed=2)
    check(partial(dark_rank, **options), partial(dark_rank_by_hand, **options), student, teacher)


def test_dark_rank_ignores_rotation_and_order_and_is_lower_for_the_teachers_own_order():
    student, teacher = numbers(6, 4, seed=1), numbers(6, 3, seed=2)
    rank = partial(dark_rank, alpha=3.0, beta=1.0, permute_len=4)
    value = rank(student, teacher).item()
    assert rank(student @ rotation(4) + 3, teacher).item() == pytest.approx(value)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert rank(student[order], teacher[order]).item() == pytest.approx(value)
    assert rank(teacher, 9 * teacher).item() < value
    loss = HardDarkRank(normalize=True)
    lengths = torch.tensor([1.0, 5.0, 0.2, 3.0, 2.0, 9.0])[:, None]
    scaled, plain = outputs(lengths * student, "pooled"), outputs(student, "pooled")
    given = outputs(teacher, "pooled")
    assert loss(scaled, given, None).item() == pytest.approx(loss(plain, given, None).item())
    directions = [x / x.norm(dim=1, keepdim=True) for x in (student, teacher)]
    assert loss(plain, given, None).item() == pytest.approx(
        dark_rank_by_hand(*(x.numpy() for x in directions), 3, 3, 4)
    )


def test_dark_rank_of_equal_images_is_even_and_has_a_finite_gradient():
    student, teacher = torch.ones(4, 3).double().requires_grad_(), numbers(4, 3)
    for beta in (1.0, 3.0):
        value = dark_rank(student, teacher, 3.0, beta, 3)
        assert value.item() == pytest.approx(math.log(6))  # all 3! orders alike
        assert torch.autograd.grad(value, student)[0].abs().max() == 0


# ICKD


def ickd_by_hand(student: np.ndarray, teacher: np.ndarray) -> float:
    n, channels = teacher.shape[:2]
    total = 0.0
    for i in range(n):
        rows = []
        for maps in (student[i], teacher[i]):
            g = np.array([[(a * b).sum() for b in maps] for a in maps])
            rows.append(np.array([row / math.sqrt((row**2).sum()) for row in g]))
        total += ((rows[0] - rows[1]) ** 2).sum() / channels
    return total / n


@pytest.mark.parametrize(
    ("n", "s", "t"), [(1, (3, 2, 2), (3, 2, 2)), (3, (4, 2, 3), (4, 3, 3)), (2, (2, 4, 4), (2, 1, 2))]
)
def test_ickd_is_lius_with_the_rows_of_their_code(n, s, t):
    check(ickd, ickd_by_hand, numbers(n, *s, seed=1), numbers(n, *t, seed=2))


def test_ickd_ignores_scale_and_the_order_of_pixels():
    maps = numbers(2, 3, 4, 4)
    pixels = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = maps.flatten(2)[:, :, pixels].unflatten(2, (4, 4))
    assert ickd(3 * shuffled, maps).item() == pytest.approx(0, abs=1e-12)
    assert ickd(maps.flip(1), maps).item() > 0.1


def test_ickd_projects_the_student_by_learned_layers_and_takes_tokens():
    loss = ICKD("stage3", "stage4")
    student = Outputs(torch.zeros(2, 3), {"stage3": numbers(2, 5, 4, 4).float()})
    teacher = Outputs(torch.zeros(2, 3), {"stage4": numbers(2, 10, 6, seed=2).float()})  # 9 patches, a class token
    loss.build(student, teacher, None)
    names = {name for name, _ in loss.named_parameters()}
    assert names == {"project.0.weight", "project.1.weight", "project.1.bias"}
    projected = loss.project(student.features["stage3"])
    patches = teacher.features["stage4"][:, 1:].transpose(1, 2).unflatten(2, (3, 3))
    expected = ickd_by_hand(projected.detach().double().numpy(), patches.double().numpy())
    assert loss(student, teacher, None).item() == pytest.approx(expected, rel=1e-5)


def test_ickd_refuses_vectors():
    vectors = outputs(torch.zeros(2, 8), "pooled")
    with pytest.raises(UserError, match=r"loss ickd needs maps.*student's 'pooled'.*\(2, 8\).*loss.ickd.student_tap"):
        ICKD("pooled", "pooled").build(vectors, vectors, None)


# CRD


def contrast_by_hand(scores: np.ndarray, z: float, rows: int) -> float:
    """eq. 17–18 from cosines over τ, (N, 1 + M)."""
    noise, total = (scores.shape[1] - 1) / rows, 0.0
    for row in scores:
        p = [math.exp(score) / z for score in row]
        total -= math.log(p[0] / (p[0] + noise))
        total -= sum(math.log(1 - negative / (negative + noise)) for negative in p[1:])
    return total / len(scores)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 6), (3, 50)])
def test_crd_is_tians_contrast(n, m):
    z = 37.0
    check(
        lambda scores, _: crd(scores, torch.tensor(z, dtype=torch.float64).log(), 20),
        lambda scores, _: contrast_by_hand(scores, z, 20),
        numbers(n, 1 + m, scale=2.0),
        numbers(1),
    )


LABELS = torch.arange(24) % 3


def crd_data(labels=LABELS):
    return SimpleNamespace(train=SimpleNamespace(labels=labels), num_classes=3)


def built_crd(**options) -> CRD:
    options = {"feature_dim": 4, "negatives": 7, **options}
    loss = CRD(**options)
    torch.manual_seed(0)
    loss.build(outputs(torch.zeros(2, 5), "pooled"), outputs(torch.zeros(2, 6), "pooled"), crd_data())
    return loss


def crd_batch(step: int, n: int = 5):
    """Student, teacher and batch of a step, whose rows follow each other."""
    rows = (torch.arange(n) + n * step) % len(LABELS)
    batch = Batch(torch.zeros(n, 3, 2, 2), LABELS[rows], rows, 0)
    student, teacher = numbers(n, 5, seed=2 * step + 1).float(), numbers(n, 6, seed=2 * step + 2).float()
    return outputs(student, "pooled"), outputs(teacher, "pooled"), batch


@pytest.mark.parametrize("n", [1, 5])
def test_crd_contrasts_both_ways_then_moves_its_banks(n):
    loss, twin = built_crd(), built_crd()
    temperature, momentum, rows = 0.07, 0.5, len(LABELS)
    banks = [loss.student_bank.double().numpy().copy(), loss.teacher_bank.double().numpy().copy()]
    z = None
    for step in range(3):
        student, teacher, batch = crd_batch(step, n)
        twin.batches.fill_(step)
        drawn = twin.draw(batch.index, batch.labels).numpy()
        embedded = []
        for layer, given in ((loss.embed_student, student), (loss.embed_teacher, teacher)):
            weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
            x = np.array([weight @ row + bias for row in given.features["pooled"].double().numpy()])
            embedded.append(np.array([row / math.sqrt(row @ row) for row in x]))
        scores = [
            np.array([[bank[row] @ anchor / temperature for row in drawn[i]] for i, anchor in enumerate(anchors)])
            for anchors, bank in ((embedded[0], banks[1]), (embedded[1], banks[0]))
        ]
        if z is None:
            z = [np.exp(each).mean() * rows for each in scores]
        expected = sum(contrast_by_hand(each, constant, rows) for each, constant in zip(scores, z, strict=True))
        assert loss(student, teacher, batch).item() == pytest.approx(expected, rel=1e-4)
        for bank, new in zip(banks, embedded, strict=True):
            for i, row in enumerate(batch.index.tolist()):
                moved = momentum * bank[row] + (1 - momentum) * new[i]
                bank[row] = moved / math.sqrt(moved @ moved)
        np.testing.assert_allclose(loss.student_bank.numpy(), banks[0], atol=1e-5)
        np.testing.assert_allclose(loss.teacher_bank.numpy(), banks[1], atol=1e-5)


def test_crds_gradient_is_that_of_the_banks_before_they_move():
    loss = built_crd().double()
    student, teacher, batch = crd_batch(0)
    features = student.features["pooled"].double().requires_grad_()
    double = outputs(teacher.features["pooled"].double(), "pooled")
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    loss.batches.fill_(1)  # so that Z is what is set here
    loss.log_z.fill_(math.log(50.0))
    state["batches"], state["log_z"] = loss.batches.clone(), loss.log_z.clone()

    def value(point: np.ndarray) -> float:
        loss.load_state_dict(state)
        return loss(outputs(torch.from_numpy(point), "pooled"), double, batch).item()

    loss(outputs(features, "pooled"), double, batch).backward()
    expected = gradient_by_hand(value, features.detach().numpy())
    np.testing.assert_allclose(features.grad.numpy(), expected, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())


@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_crd_draws_negatives_of_other_classes_evenly(mode):
    labels = torch.tensor([0] * 3 + [1] * 8 + [2] * 5)[torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    loss = CRD(feature_dim=4, negatives=20_000, mode=mode)
    loss.build(outputs(torch.zeros(2, 5), "pooled"), outputs(torch.zeros(2, 6), "pooled"), crd_data(labels))
    index = torch.arange(16)
    drawn = loss.draw(index, labels)
    assert drawn.shape == (16, 1 + 20_000)
    assert (labels[drawn[:, 0]] == labels).all()
    assert torch.equal(drawn[:, 0], index) is (mode == "exact")
    for row in range(16):
        counts = drawn[row, 1:].bincount(minlength=16)
        others = labels != labels[row]
        assert (counts[~others] == 0).all()
        share = 20_000 / int(others.sum())
        assert (counts[others] - share).abs().max() < 6 * math.sqrt(share)


def test_crd_goes_on_exactly_from_a_checkpoint_and_its_seed_decides_the_negatives():
    straight, first, second = built_crd(), built_crd(), built_crd()
    values = [straight(*crd_batch(step)).item() for step in range(4)]
    halves = [first(*crd_batch(step)).item() for step in range(2)]
    second.load_state_dict(first.state_dict())
    halves += [second(*crd_batch(step)).item() for step in range(2, 4)]
    assert values == halves
    assert torch.equal(straight.student_bank, second.student_bank)
    index, labels = torch.arange(5), LABELS[:5]
    assert not torch.equal(straight.draw(index, labels), built_crd().draw(index, labels))  # each batch has its own
    _, _, batch = crd_batch(0)
    draw = [built_crd(seed=seed).draw(batch.index, batch.labels)[:, 1:] for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_crds_banks_are_buffers_by_row_without_a_graph():
    loss = built_crd()
    loss(*crd_batch(0)).backward()
    banks = {name: value for name, value in loss.state_dict().items() if "bank" in name}
    assert {name: tuple(value.shape) for name, value in banks.items()} == {
        "student_bank": (24, 4),
        "teacher_bank": (24, 4),
    }
    assert not any(buffer.requires_grad or buffer.grad_fn for buffer in loss.buffers())
    assert {name for name, _ in loss.named_parameters()} == {
        "embed_student.weight", "embed_student.bias", "embed_teacher.weight", "embed_teacher.bias",
    }  # fmt: skip


def test_crd_tells_what_it_needs():
    with pytest.raises(UserError, match=r"loss.crd.mode=loose: choose exact or relax"):
        CRD(mode="loose")
    loss = built_crd()
    student, teacher, batch = crd_batch(0)
    with pytest.raises(UserError, match=r"loss crd keeps an embedding of every training image.*batch.index is -1"):
        loss(student, teacher, batch._replace(index=torch.full_like(batch.index, -1)))
    with pytest.raises(UserError, match=r"loss crd contrasts images of different classes.*all of one class"):
        loss.build(student, teacher, crd_data(torch.zeros(6, dtype=torch.int64)))


def in_a_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)  # a forked process can't use OpenMP's threads
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    loss = built_crd()
    for step in range(2):
        loss(*crd_batch(2 * step + rank))
    torch.save({**loss.state_dict(), "drawn": loss.draw(*crd_batch(0)[2][2:0:-1])}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_write_both_their_embeddings_into_the_same_banks(tmp_path):
    # forked: a spawned process would import everything anew
    torch.multiprocessing.start_processes(in_a_process, (str(tmp_path),), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name in ("student_bank", "teacher_bank", "log_z", "batches"):
        assert torch.equal(ranks[0][name], ranks[1][name]), name
    alone = built_crd()
    for step in range(2):  # one process with both batches at once
        parts = [crd_batch(2 * step + rank) for rank in (0, 1)]
        student, teacher = (
            outputs(torch.cat([part[side].features["pooled"] for part in parts]), "pooled") for side in (0, 1)
        )
        alone(
            student,
            teacher,
            Batch(*(torch.cat(both) for both in zip(*(part[2][:3] for part in parts), strict=True)), 0),
        )
    torch.testing.assert_close(ranks[0]["student_bank"], alone.student_bank)
    torch.testing.assert_close(ranks[0]["teacher_bank"], alone.teacher_bank)
    assert not torch.equal(ranks[0]["drawn"], ranks[1]["drawn"])


# DeiT


def deit_by_hand(dist: np.ndarray, teacher: np.ndarray, hard: bool, temperature: float) -> float:
    total = 0.0
    for s, t in zip(dist, teacher, strict=True):
        if hard:
            total -= math.log(softmax(s)[int(np.argmax(t))])
        else:
            p, q = softmax(t / temperature), softmax(s / temperature)
            total += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(dist)


@pytest.mark.parametrize(("n", "k"), [(1, 2), (5, 10)])
@pytest.mark.parametrize(("hard", "temperature"), [(True, 3.0), (False, 3.0), (False, 1.0)])
def test_deit_is_touvrons(n, k, hard, temperature):
    options = {"hard": hard, "temperature": temperature}
    dist, teacher = numbers(n, k, seed=1), numbers(n, k, seed=2)
    check(partial(deit_loss, **options), partial(deit_by_hand, **options), dist, teacher)
    assert deit_loss(teacher, teacher, False, temperature).item() == pytest.approx(0, abs=1e-12)


def tiny_deit(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    taps = yaml.safe_load((CONF / "network" / "deit_tiny.yaml").read_text())["taps"]
    depths = {f"encoder_layer_{old}": f"encoder_layer_{new}" for old, new in ((11, 3), (8, 2), (5, 1), (2, 0))}
    for tap, path in taps.items():
        head, _, layer = path.rpartition(".")
        taps[tap] = f"{head}.{depths[layer]}" if layer in depths else path
    return Network(deit(5, 16, width=24, depth=4), taps, [0.5] * 3, [0.25] * 3)


def test_a_deit_student_answers_with_its_class_head_in_training_and_the_mean_in_eval():
    student = tiny_deit().record(["dist_head", "heads", "stage1", "pooled", "encoder.ln", "dist_head:in"])
    images = torch.rand(3, 3, 16, 16)
    training, answering = student.train()(images), student.eval()(images)
    torch.testing.assert_close(training.logits, training.features["heads"])
    mean = (answering.features["heads"] + answering.features["dist_head"]) / 2
    torch.testing.assert_close(answering.logits, mean)
    torch.testing.assert_close(student.plain()(images), mean)
    assert not torch.allclose(answering.features["heads"], answering.features["dist_head"])
    torch.testing.assert_close(answering.features["pooled"], answering.features["encoder.ln"][:, 0])
    torch.testing.assert_close(answering.features["dist_head:in"], answering.features["encoder.ln"][:, 1])
    assert answering.features["stage1"].shape == (3, 2 + 16, 24)  # class, distillation, 4 × 4 patches
    assert answering.features["pooled"].shape == (3, 24)
    # the published DeiT-Ti with its token has 5.9 million weights
    assert sum(p.numel() for p in deit(1000, 224).parameters()) == 5_910_800


@pytest.mark.parametrize(("options", "told"), [({"image_size": 18}, "patches of 4 px, and 18"), ({"heads": 5}, "192")])
def test_deit_refuses_what_does_not_divide(options, told):
    with pytest.raises(UserError, match=told):
        deit(5, **{"image_size": 16, **options})


def test_the_deit_loss_refuses_a_student_without_a_distillation_head():
    given = Outputs(torch.zeros(2, 5), {"pooled": torch.zeros(2, 8)})
    with pytest.raises(
        UserError, match=r"loss deit needs the logits.*\(2, 5\).*'pooled' is \(2, 8\).*student=deit_tiny"
    ):
        DeiTLoss(student_tap="pooled").build(given, given, None)


# All of them


@pytest.mark.parametrize("name", ["rkd", "sp", "cc", "pkt", "dark_rank"])
def test_a_relation_refuses_a_batch_of_one(name):
    loss = {"rkd": RKD(), "sp": SP(["pooled"]), "cc": CC(), "pkt": PKT(), "dark_rank": HardDarkRank()}[name]
    one = outputs(torch.ones(1, 4), "pooled")
    with pytest.raises(UserError, match=f"loss {name} relates the images.*at least 2.*has 1: raise data.batch_size"):
        loss(one, one, None)


EXTREME = torch.tensor([[100.0, -100.0, 0.0], [0.0, 0.0, 0.0], [-100.0, 100.0, 0.0], [100.0, -100.0, 0.0]])


@pytest.mark.parametrize(
    "loss",
    [
        partial(rkd, distance_weight=25.0, angle_weight=50.0),
        sp,
        partial(cc, gamma=0.4, order=2),
        pkt,
        lambda a, b: supervised_pkt(a, torch.tensor([0, 1, 1, 0])),
        lambda a, b: HardDarkRank(normalize=True)(outputs(a, "pooled"), outputs(b, "pooled"), None),
        lambda a, b: ickd(a[:, :, None, None], b[:, :, None, None]),
        lambda a, b: crd(a, torch.tensor(4.0), 100),
        partial(deit_loss, hard=True, temperature=3.0),
        partial(deit_loss, hard=False, temperature=1.0),
    ],
    ids=["rkd", "sp", "cc", "pkt", "pkt-supervised", "dark_rank", "ickd", "crd", "deit-hard", "deit-soft"],
)
@pytest.mark.parametrize("student", [EXTREME, torch.zeros(4, 3)], ids=["extreme", "all equal"])
def test_value_and_gradient_stay_finite_and_bounded(loss, student):
    student = student.clone().requires_grad_()
    value = loss(student, EXTREME.flip(0))
    value.backward()
    assert torch.isfinite(value)
    assert student.grad.abs().max() < 1e3


@pytest.fixture(scope="module")
def data():
    return fake(num_classes=5, train_size=120, image_size=16, batch_size=16, num_workers=0)


@pytest.fixture(scope="module")
def teacher(data) -> Network:
    """Three epochs of training make its relations worth learning."""
    net = network(1, (8, 16, 32))
    fit(net, None, {"ce": CE()}, {"ce": 1.0}, data, epochs=3)
    return net


def fit(student, teacher, losses, weights, data, epochs: int) -> tuple[Distill, list]:
    """The trained module, and the epochs' means of the first loss."""
    connect(student, teacher, losses, data, seed=0)
    means = []

    class Noting(Distill):
        def on_train_epoch_end(self):
            means.append(next(iter(self.means().values())).item())

    module = Noting(student, teacher, losses, weights, partial(torch.optim.Adam, lr=0.01), lambda epoch: 1.0, 5)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data.train_loader(0))
    return module, means


def from_yaml(name: str, **changes):
    """The loss as its conf/loss file makes it, and its weight."""
    (key, options), *more = yaml.safe_load((CONF / "loss" / f"{name}.yaml").read_text()).items()
    assert key == name
    assert not more
    options |= changes
    return instantiate({key: value for key, value in options.items() if key != "weight"}), options["weight"]


@pytest.mark.parametrize("name", ["rkd", "sp", "cc", "pkt", "dark_rank", "ickd", "crd", "deit"])
def test_every_loss_lowers_itself_and_trains_what_it_has(data, teacher, name):
    # CRD's banks are random in its first epoch, whose loss is lower for that; an order is harder to learn than values
    changes, epochs = {"crd": ({"negatives": 32, "seed": 0}, 4), "dark_rank": ({}, 8)}.get(name, ({}, 2))
    loss, weight = from_yaml(name, **changes)
    student = tiny_deit() if name == "deit" else network(0)
    connect(student, Frozen(teacher), {name: loss}, data, seed=0)
    start = {key: value.clone() for key, value in loss.named_parameters()}  # the same seed as in fit's connect
    module, means = fit(student, Frozen(teacher), {name: loss}, {name: weight}, data, epochs)
    assert means[-1] < 0.95 * means[1 if name == "crd" else 0], means
    optimized = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    for key, parameter in loss.named_parameters():
        assert id(parameter) in optimized, key
        assert not torch.equal(parameter, start[key]), key
        assert f"losses.{name}.{key}" in module.state_dict()
    assert not set(student.plain().state_dict()) & set(loss.state_dict())
