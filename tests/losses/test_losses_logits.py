"""Each loss on logits against a calculation of its own: NumPy, float64, loops, from the paper's equation."""

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from sets import fake
from test_module import distil, network
from torch import nn

from distill.cli import build
from distill.errors import UsageError, UserError
from distill.losses.abkd import abkd
from distill.losses.ctkd import CTKD, ctkd, reversal
from distill.losses.dist import DIST, correlation, dist
from distill.losses.dkd import dkd
from distill.losses.kd import kd
from distill.losses.logit_mse import logit_mse
from distill.losses.logit_standardization import standardize
from distill.losses.logits import others, soft_cross_entropy
from distill.losses.luminet import LumiNet, luminet
from distill.losses.mlkd import MLKD, mlkd
from distill.losses.nkd import nkd
from distill.losses.rld import rld
from distill.losses.sdd import SDD, cell_logits, sdd
from distill.losses.terms import build_losses
from distill.losses.tfkd import tfkd
from distill.losses.uskd import USKD, uskd
from distill.losses.wkd_logit import WKDLogit, cka, class_cost, sinkhorn, wkd_logit
from distill.losses.wsld import wsld
from distill.losses.wttm import wttm
from distill.teachers.frozen import Frozen
from distill.training.connect import connect
from distill.types import Batch, Outputs

CONF = Path(__file__).parents[2] / "conf" / "loss"
WITHOUT_TEACHER = ("tfkd", "uskd")
NAMES = (
    "kd", "logit_standardization", "logit_mse", "dkd", "nkd", "uskd", "dist", "mlkd", "wsld", "ctkd", "tfkd",
    "wkd_logit", "sdd", "wttm", "rld", "luminet", "abkd",
)  # fmt: skip


def numbers(*shape, seed=0, scale=3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_labels(n: int, k: int) -> torch.Tensor:
    return torch.randint(k, (n,), generator=torch.Generator().manual_seed(n * 100 + k))


def batch_of(labels) -> Batch:
    rows = torch.arange(len(labels))
    return Batch(torch.zeros(len(labels), 3, 4, 4), labels, rows, 0)


# The equations. `s`, `t` are logits (N, K), `y` labels; `at` is the student where a stopped gradient holds it.


pairs = partial(zip, strict=True)


def softmax(row) -> np.ndarray:
    powers = [math.exp(value - max(row)) for value in row]
    return np.array([power / sum(powers) for power in powers])


def kl(p, q) -> float:
    return sum(a * math.log(a / b) for a, b in pairs(p, q))


def without(row, label) -> np.ndarray:
    return np.array([value for k, value in enumerate(row) if k != label])


def z_score(row) -> np.ndarray:
    mean = sum(row) / len(row)
    return (row - mean) / math.sqrt(sum((x - mean) ** 2 for x in row) / (len(row) - 1))


def kd_by_hand(s, t, y, at, temperature):
    return np.mean([temperature**2 * kl(softmax(b / temperature), softmax(a / temperature)) for a, b in pairs(s, t)])


def standardized_kd_by_hand(s, t, y, at, temperature):
    return kd_by_hand([z_score(row) for row in s], [z_score(row) for row in t], y, at, temperature)


def logit_mse_by_hand(s, t, y, at):
    return sum((a - b) ** 2 for a, b in pairs(s.flatten(), t.flatten())) / s.size


def dkd_by_hand(s, t, y, at, alpha, beta, temperature):
    total = 0.0
    for a, b, label in pairs(s, t, y):
        q, p = softmax(a / temperature), softmax(b / temperature)
        target = kl((p[label], sum(without(p, label))), (q[label], sum(without(q, label))))
        p_hat, q_hat = (without(r, label) / sum(without(r, label)) for r in (p, q))
        total += temperature**2 * (alpha * target + beta * kl(p_hat, q_hat))
    return total / len(s)


def nkd_by_hand(s, t, y, at, gamma, temperature):
    total = 0.0
    for a, b, label in pairs(s, t, y):
        total -= softmax(b)[label] * math.log(softmax(a)[label])
        p, q = softmax(without(b, label) / temperature), softmax(without(a, label) / temperature)
        total -= gamma * temperature**2 * sum(p_k * math.log(q_k) for p_k, q_k in pairs(p, q))
    return total / len(s)


def uskd_by_hand(s, weak, y, at, alpha, beta, mu):
    n, k = s.shape
    squares = [softmax(row)[label] ** 2 for row, label in pairs(at, y)]
    total = 0.0
    for i, label in enumerate(y):
        soft = 1 + squares[i] - sum(squares) / n
        total -= alpha * soft * math.log(softmax(s[i])[label])
        p, w = softmax(at[i]), softmax(weak[i])
        score = [w[c] / (1 - w[label] + 1e-6) + p[c] / (1 - p[label] + 1e-6) for c in range(k)]
        zipf = {c: 1 / (rank + 1) for rank, c in enumerate(sorted(range(k), key=lambda c: -score[c]))}
        rest = sum(zipf[c] for c in range(k) if c != label)
        log_q = dict(pairs([c for c in range(k) if c != label], np.log(softmax(without(s[i], label)))))
        total -= beta * sum(zipf[c] / rest * log_q[c] for c in log_q)
        total -= mu * sum(((c == label) * 0.9 + 0.1 / k) * math.log(w[c]) for c in range(k))
    return total / n


def pearson(a, b) -> float:
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (math.sqrt((a**2).sum()) * math.sqrt((b**2).sum()) + 1e-8)  # the released code's 1e-8


def dist_by_hand(s, t, y, at, beta, gamma, temperature):
    q, p = (np.array([softmax(row / temperature) for row in z]) for z in (s, t))
    images = 1 - np.mean([pearson(q[i], p[i]) for i in range(len(s))])
    classes = 1 - np.mean([pearson(q[:, k], p[:, k]) for k in range(s.shape[1])])
    return temperature**2 * (beta * images + gamma * classes)


def mlkd_by_hand(s, t, y, at, temperatures, instance, batch, classes):
    total, (n, k) = 0.0, s.shape
    for temperature in temperatures:
        q, p = (np.array([softmax(row / temperature) for row in z]) for z in (s, t))
        total += instance * kd_by_hand(s, t, y, at, temperature)
        total += batch * sum((q[i] @ q[j] - p[i] @ p[j]) ** 2 for i in range(n) for j in range(n)) / n
        total += classes * sum((q[:, i] @ q[:, j] - p[:, i] @ p[:, j]) ** 2 for i in range(k) for j in range(k)) / k
    return total


def wsld_by_hand(s, t, y, at, temperature):
    total = 0.0
    for a, b, label, held in pairs(s, t, y, at):
        weight = 1 - math.exp(math.log(softmax(held)[label]) / (1e-7 - math.log(softmax(b)[label])))  # their 1e-7
        p, q = softmax(b / temperature), softmax(a / temperature)
        total -= temperature**2 * weight * sum(p_k * math.log(q_k) for p_k, q_k in pairs(p, q))
    return total / len(s)


def tfkd_by_hand(s, t, y, at, temperature, correct):
    total, k = 0.0, s.shape[1]
    for row, label in pairs(s, y):
        made = np.array([correct if c == label else (1 - correct) / (k - 1) for c in range(k)])
        total += kl(softmax(made / temperature), softmax(row))
    return total / len(s)


def wkd_by_hand(s, t, y, at, cost, gamma, temperature, entropy, iterations):
    total = 0.0
    for a, b, label in pairs(s, t, y):
        total -= softmax(b)[label] * math.log(softmax(a)[label])
        source, target = (softmax(without(row, label) / temperature) for row in (a, b))
        c = np.delete(np.delete(cost, label, 0), label, 1)
        kernel = np.exp(-c / entropy)
        u = np.ones(len(source)) / len(source)
        for _ in range(iterations):
            v = target / (kernel.T @ u + 1e-8)
            u = source / (kernel @ v + 1e-8)
        plan = np.diag(u) @ kernel @ np.diag(v)
        total += gamma * (plan * c).sum()
    return total / len(s)


def wttm_by_hand(s, t, y, at, gamma):
    total = 0.0
    for a, b in pairs(s, t):
        powers = softmax(b) ** gamma
        total += powers.sum() * kl(powers / powers.sum(), softmax(a))
    return total / len(s)


def rld_by_hand(s, t, y, at, alpha, beta, temperature, alpha_temperature):
    total = 0.0
    for a, b, label in pairs(s, t, y):
        q, p = softmax(a / alpha_temperature), softmax(b / alpha_temperature)
        top = int(np.argmax(b))
        sure = kl((p[top], sum(without(p, top))), (q[label], sum(without(q, label))))
        total += alpha * alpha_temperature**2 * sure
        below = [k for k in range(len(b)) if b[k] < b[label]]
        if below:
            q, p = softmax(a[below] / temperature), softmax(b[below] / temperature)
            total += beta * temperature**2 * kl(p, q)
    return total / len(s)


def luminet_by_hand(s, t, y, at, alpha, temperature):
    def perceived(z):
        out = np.zeros_like(z)
        for k in range(z.shape[1]):
            mean = sum(z[:, k]) / len(z)
            variance = sum((x - mean) ** 2 for x in z[:, k]) / len(z)
            out[:, k] = (z[:, k] - mean) / math.sqrt(variance + 1e-5)
        return out

    rows = pairs(perceived(s), perceived(t))
    return alpha**2 * np.mean([kl(softmax(b / temperature), softmax(a / temperature)) for a, b in rows])


def abkd_by_hand(s, t, y, at, alpha, beta, temperature):
    """The general formula, and the limits as Cichocki et al. state them."""
    total = 0.0
    for a, b in pairs(s, t):
        for q, p in pairs(softmax(a / temperature), softmax(b / temperature)):
            if alpha and beta:
                both = alpha + beta
                term = p**alpha * q**beta - alpha / both * p**both - beta / both * q**both
                total -= term / (alpha * beta)
            elif alpha:
                total += (p**alpha * math.log(p**alpha / q**alpha) - p**alpha + q**alpha) / alpha**2
            elif beta:
                total += (q**beta * math.log(q**beta / p**beta) - q**beta + p**beta) / beta**2
            else:
                total += 0.5 * (math.log(p) - math.log(q)) ** 2
    return total / len(s)


def fixed_cost(k: int) -> torch.Tensor:
    return class_cost(numbers(k, 4, seed=9), 1.0)


# name, function of (s, t, y), the same by hand of (s, t, y, at), shapes (N, K)
BATCHES = [(1, 2), (1, 6), (4, 3), (3, 7)]
CASES = [
    ("kd", lambda s, t, y, T: kd(s, t, T), kd_by_hand, [{"T": 1.0}, {"T": 4.0}], BATCHES),
    (
        "logit_standardization", lambda s, t, y, T: kd(standardize(s), standardize(t), T), standardized_kd_by_hand,
        [{"T": 1.0}, {"T": 2.0}], [(1, 3), (3, 7)],
    ),
    ("logit_mse", lambda s, t, y: logit_mse(s, t), logit_mse_by_hand, [{}], BATCHES),
    ("dkd", dkd, dkd_by_hand, [{"a": 1.0, "b": 8.0, "T": 4.0}, {"a": 0.5, "b": 1.0, "T": 1.0}], BATCHES),
    ("nkd", nkd, nkd_by_hand, [{"g": 1.5, "T": 1.0}, {"g": 3.5, "T": 3.0}], BATCHES),
    ("uskd", uskd, uskd_by_hand, [{"a": 1.0, "b": 0.1, "m": 0.005}, {"a": 0.1, "b": 2.0, "m": 0.1}], BATCHES),
    (
        "dist", lambda s, t, y, *o: dist(s, t, *o), dist_by_hand,
        [{"b": 2.0, "g": 2.0, "T": 4.0}, {"b": 1.0, "g": 0.5, "T": 1.0}], [(4, 3), (3, 7)],
    ),
    (
        "mlkd", lambda s, t, y, *o: mlkd(s, t, *o), mlkd_by_hand,
        [{"T": (2.0, 3.0), "i": 1.5, "b": 0.5, "c": 0.5}, {"T": (4.0,), "i": 1.0, "b": 2.0, "c": 3.0}], BATCHES,
    ),
    ("wsld", wsld, wsld_by_hand, [{"T": 4.0}, {"T": 1.0}], BATCHES),
    ("tfkd", lambda s, t, y, *o: tfkd(s, y, *o), tfkd_by_hand, [{"T": 20.0, "a": 0.99}, {"T": 0.2, "a": 0.8}], BATCHES),
    (
        "wkd_logit", lambda s, t, y, *o: wkd_logit(s, t, y, fixed_cost(s.shape[1]), *o),
        lambda s, t, y, at, *o: wkd_by_hand(s, t, y, at, fixed_cost(s.shape[1]).numpy(), *o),
        [{"g": 800.0, "T": 8.0, "e": 0.05, "i": 10}, {"g": 3.0, "T": 1.0, "e": 0.2, "i": 3}], BATCHES,
    ),
    ("wttm", lambda s, t, y, g: wttm(s, t, g), wttm_by_hand, [{"g": 0.2}, {"g": 1.0}, {"g": 1.7}], BATCHES),
    (
        "rld", rld, rld_by_hand,
        [{"a": 1.0, "b": 8.0, "T": 4.0, "aT": 1.0}, {"a": 0.5, "b": 1.0, "T": 1.0, "aT": 3.0}], BATCHES,
    ),
    (
        "luminet", lambda s, t, y, *o: luminet(s, t, *o), luminet_by_hand,
        [{"a": 31.0, "T": 4.0}, {"a": 2.0, "T": 1.0}], [(2, 4), (4, 3), (3, 7)],
    ),
    (
        "abkd", lambda s, t, y, *o: abkd(s, t, *o), abkd_by_hand,
        [{"a": a, "b": b, "T": T} for a, b, T in
         ((0.8, 0.3, 4.0), (1.0, 0.0, 1.0), (0.0, 1.0, 2.0), (0.5, 0.0, 1.0), (0.0, 0.7, 1.0), (0.0, 0.0, 3.0))],
        [(1, 2), (3, 7)],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "by_hand", "options", "shape"),
    [
        pytest.param(function, by_hand, tuple(options.values()), shape, id=f"{name}-{i}-{shape[0]}x{shape[1]}")
        for name, function, by_hand, variants, shapes in CASES
        for i, options in enumerate(variants)
        for shape in shapes
    ],
)
def test_value_and_gradient_are_those_of_the_equation(function, by_hand, options, shape):
    student, teacher = numbers(*shape, seed=1).requires_grad_(), numbers(*shape, seed=2)
    labels = some_labels(*shape)
    value = function(student, teacher, labels, *options)
    value.backward()
    s, t, y = student.detach().numpy(), teacher.numpy(), labels.tolist()
    assert value.item() == pytest.approx(by_hand(s, t, y, s, *options), rel=1e-8, abs=1e-12)
    slopes = np.zeros_like(s)
    for place in np.ndindex(*shape):
        step = np.zeros_like(s)
        step[place] = 1e-5
        slopes[place] = (by_hand(s + step, t, y, s, *options) - by_hand(s - step, t, y, s, *options)) / 2e-5
    np.testing.assert_allclose(student.grad.numpy(), slopes, rtol=1e-5, atol=1e-7 * max(1.0, abs(slopes).max()))


def test_uskd_trains_its_weak_classifier_by_smoothed_labels_alone():
    weak, labels = numbers(3, 5, seed=4).requires_grad_(), torch.tensor([0, 2, 4])
    uskd(numbers(3, 5), weak, labels, 1.0, 1.0, 0.2).backward()
    for i, label in enumerate(labels.tolist()):
        smoothed = np.array([(k == label) * 0.9 + 0.02 for k in range(5)])
        np.testing.assert_allclose(weak.grad[i].numpy(), 0.2 * (softmax(weak[i].tolist()) - smoothed) / 3, rtol=1e-9)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_ctkd_is_kd_at_its_temperature_whose_gradient_is_reversed(strength):
    student, teacher = numbers(3, 5, seed=1).requires_grad_(), numbers(3, 5, seed=2)
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def by_hand(value: float) -> float:
        temperature = 1 + 20 / (1 + math.exp(-value))
        return kd_by_hand(student.detach().numpy(), teacher.numpy(), None, None, temperature)

    value = ctkd(student, teacher, theta, strength, 1.0, 20.0)
    assert value.item() == pytest.approx(by_hand(0.7), rel=1e-9)
    value.backward()
    slope = (by_hand(0.7 + 1e-5) - by_hand(0.7 - 1e-5)) / 2e-5
    assert theta.grad.item() == pytest.approx(-strength * slope, rel=1e-6, abs=1e-12)
    plain = student.detach().clone().requires_grad_()
    kd(plain, teacher, 1 + 20 / (1 + math.exp(-0.7))).backward()
    torch.testing.assert_close(student.grad, plain.grad)


def test_ctkds_reversal_grows_by_half_a_cosine_over_the_images_seen():
    assert [round(reversal(epoch, 10).item(), 6) for epoch in (0, 5, 10, 25)] == [0, 0.5, 1, 1]
    loss = CTKD(epochs=4)
    loss.rows = 6
    outputs, batch = (Outputs(numbers(3, 5, seed=s).float(), {}) for s in (1, 2)), batch_of(torch.zeros(3).long())
    student, teacher = outputs
    loss.eval()(student, teacher, batch)
    assert loss.seen == 0
    loss.train()
    slopes = []
    for _ in range(4):  # the epochs 1, 1, 2, 2
        slopes.append(torch.autograd.grad(loss(student, teacher, batch), loss.theta)[0].item())
    assert loss.seen == 12
    assert slopes[0] == slopes[1]
    assert slopes[2] / slopes[0] == pytest.approx(0.5 / (0.5 * (1 - math.cos(math.pi / 4))), rel=1e-4)
    assert set(loss.state_dict()) == {"theta", "seen"}


def cells_by_hand(maps, weight, bias, scales):
    """Every cell of maps (N, C, H, W) whose sides every scale divides, in the order of the scales: (N, M, K)."""
    answers = []
    for image in maps:
        cells = []
        for scale in scales:
            h, w = image.shape[1] // scale, image.shape[2] // scale
            for i in range(scale):
                for j in range(scale):
                    mean = image[:, i * h : (i + 1) * h, j * w : (j + 1) * w].mean((1, 2))
                    cells.append([sum(weight[k] * mean) + bias[k] for k in range(len(bias))])
        answers.append(cells)
    return np.array(answers)


@pytest.mark.parametrize(("n", "shape", "scales"), [(1, (3, 4, 4), (1, 2, 4)), (3, (2, 8, 4), (1, 2))])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_sdd_is_kd_of_every_cell_doubled_where_the_teacher_contradicts_itself(n, shape, scales, temperature):
    maps = [numbers(n, *shape, seed=s).requires_grad_() for s in (1, 2)]
    heads = [(numbers(4, shape[0], seed=s).requires_grad_(), numbers(4, seed=s + 5)) for s in (3, 4)]
    labels = some_labels(n, 4)

    def by_hand(student_maps, student_weight) -> float:
        s = cells_by_hand(student_maps, student_weight, heads[0][1].numpy(), scales)
        t = cells_by_hand(maps[1].detach().numpy(), heads[1][0].detach().numpy(), heads[1][1].numpy(), scales)
        total = 0.0
        for i, label in enumerate(labels.tolist()):
            for m in range(s.shape[1]):
                contradicts = (t[i, m].argmax() == label) != (t[i, 0].argmax() == label)
                total += (2 if contradicts else 1) * kd_by_hand(s[i, m : m + 1], t[i, m : m + 1], 0, 0, temperature)
        return total / (n * s.shape[1])

    value = sdd(*(cell_logits(m, w, b, scales) for m, (w, b) in pairs(maps, heads)), labels, temperature, 2.0)
    value.backward()
    m, w = maps[0].detach().numpy(), heads[0][0].detach().numpy()
    assert value.item() == pytest.approx(by_hand(m, w), rel=1e-9)
    for array, gradient, change in [
        (m, maps[0].grad, lambda step: by_hand(m + step, w)),
        (w, heads[0][0].grad, lambda step: by_hand(m, w + step)),
    ]:
        for place in list(np.ndindex(*array.shape))[::3]:
            step = np.zeros_like(array)
            step[place] = 1e-5
            slope = (change(step) - change(-step)) / 2e-5
            assert gradient[place].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("form", ["kd", "dkd", "nkd"])
def test_sdd_takes_each_form_of_every_cell(form):
    s, t, y = numbers(3, 5, 4, seed=1), numbers(3, 5, 4, seed=2), some_labels(3, 4)
    row = {
        "kd": lambda a, b, label: kd_by_hand(a, b, 0, 0, 4.0),
        "dkd": lambda a, b, label: dkd_by_hand(a, b, [label], 0, 0.5, 3.0, 4.0),
        "nkd": lambda a, b, label: nkd_by_hand(a, b, [label], 0, 1.5, 4.0),
    }[form]

    def by_hand(student) -> float:
        total = 0.0
        for i, label in enumerate(y.tolist()):
            for m in range(5):
                contradicts = (int(t[i, m].argmax()) == label) != (int(t[i, 0].argmax()) == label)
                total += (2 if contradicts else 1) * row(student[i, m : m + 1], t[i, m : m + 1].numpy(), label)
        return total / 15

    s.requires_grad_()
    value = sdd(s, t, y, 4.0, 2.0, form=form, alpha=0.5, beta=3.0, gamma=1.5)
    value.backward()
    array = s.detach().numpy()
    assert value.item() == pytest.approx(by_hand(array), rel=1e-9)
    for place in list(np.ndindex(*array.shape))[::4]:
        step = np.zeros_like(array)
        step[place] = 1e-5
        slope = (by_hand(array + step) - by_hand(array - step)) / 2e-5
        assert s.grad[place].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_sdd_is_built_from_a_teacher_that_computes_in_bfloat16(data):
    loss, teacher = made("sdd"), Frozen(network(1, (8, 16, 32)), "bf16-mixed")
    seen = connect(network(0), teacher, {"sdd": loss}, data, seed=0)
    assert seen.logits.dtype == torch.bfloat16


def test_cka_is_kornbliths():
    features = numbers(3, 6, 4)

    def hsic(x, y) -> float:
        middle = np.eye(6) - np.ones((6, 6)) / 6
        return np.trace((x @ x.T) @ middle @ (y @ y.T) @ middle)

    found = cka(features).numpy()
    for i, x in enumerate(features.numpy()):
        for j, y in enumerate(features.numpy()):
            assert found[i, j] == pytest.approx(hsic(x, y) / math.sqrt(hsic(x, x) * hsic(y, y)), rel=1e-9)
    rotated = features @ torch.linalg.qr(numbers(4, 4, seed=5)).Q
    torch.testing.assert_close(cka(torch.stack([features[0], 3 * rotated[0] + 1])), torch.ones(2, 2).double())
    assert torch.isfinite(cka(torch.zeros(2, 5, 3))).all()


def test_wkds_cka_cost_comes_from_the_teachers_maps_of_training_images(data):
    loss = made("wkd_logit", cost="cka", samples=3)
    teacher = Frozen(network(1, (8, 16, 32)))
    connect(network(0), teacher, {"wkd_logit": loss}, data, seed=0)
    assert teacher.network.record(()) and loss.teacher_taps == ()
    teacher.network.record(["last"])
    features = []
    for label in range(5):
        rows = [row for row in range(len(data.train)) if data.train.labels[row] == label][:3]
        images = torch.as_tensor(data.train.images[torch.tensor(rows)]).float() / 255
        with torch.no_grad():
            maps = teacher.network(images).features["last"]
        features.append(maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1]))
    expected = 1 - torch.exp(-(1 - cka(torch.stack(features)))) + 1e-8
    torch.testing.assert_close(loss.cost, expected, rtol=1e-3, atol=1e-4)
    assert loss.cost.diagonal().abs().max() < 1e-3 < loss.cost.max()
    assert "cost" not in loss.state_dict()
    short = SimpleNamespace(labels=torch.tensor([0, 1, 1]))
    with pytest.raises(UserError, match="cost=cka needs 2 training images or more of each class, and cat has 1"):
        loss.survey(None, SimpleNamespace(train=short, num_classes=2, classes=["cat", "dog"]))
    with pytest.raises(UserError, match=r"loss.wkd_logit.cost=cosine: choose fc or cka"):
        WKDLogit(cost="cosine")


def test_wkds_gamma_alone_falls_by_half_a_cosine():
    loss = made("wkd_logit", gamma=[[150, 600.0], [240, 0.0, "cosine"]])
    s, t = (outputs_of(numbers(3, 5, seed=seed).float(), seed) for seed in (1, 2))
    batch = batch_of(some_labels(3, 5))
    loss.build(s, t, Rows())
    for epoch, gamma in ((0, 600.0), (150, 600.0), (180, 450.0), (195, 300.0), (240, 0.0), (300, 0.0)):
        loss.epoch = epoch
        expected = wkd_logit(s.logits, t.logits, batch.labels, loss.cost, gamma, 8.0, 0.05, 10)
        assert loss(s, t, batch).item() == pytest.approx(expected.item(), rel=1e-9)
    with pytest.raises(UsageError, match=r"loss.wkd_logit.gamma=\[\[5, 1\], \[3, 0\]\]: expected .* in rising epochs"):
        WKDLogit(gamma=[[5, 1], [3, 0]])


def test_the_cost_between_classes_comes_from_the_cosine_of_their_weights():
    weight = numbers(4, 3)
    cost = class_cost(weight, 2.0).numpy()
    for i, a in enumerate(weight.numpy()):
        for j, b in enumerate(weight.numpy()):
            cosine = a @ b / math.sqrt((a @ a) * (b @ b))
            assert cost[i, j] == pytest.approx(1 - math.exp(-2 * (1 - cosine)), abs=2e-8)


def test_sinkhorn_with_little_entropy_finds_the_cost_of_moving_the_difference():
    source, target = torch.tensor([[0.7, 0.3, 0.0]]).double(), torch.tensor([[0.2, 0.8, 0.0]]).double()
    cost = torch.tensor([[0.0, 0.4, 9.0], [0.4, 0.0, 9.0], [9.0, 9.0, 0.0]]).double()
    start = torch.tensor([[0.5, 0.5, 0.0]]).double()
    assert sinkhorn(source, target, start, cost, 0.04, 100).item() == pytest.approx(0.5 * 0.4, rel=1e-3)


# Properties


def test_losses_that_are_distances_are_zero_at_the_teacher_and_positive_elsewhere():
    t, y = numbers(4, 6, seed=2), some_labels(4, 6)
    flipped = t.flip(1)
    for distance in (
        lambda s: logit_mse(s, t),
        lambda s: dkd(s, t, y, 1.0, 8.0, 4.0),
        lambda s: dist(s, t, 2.0, 2.0, 4.0),
        lambda s: mlkd(s, t, (2.0, 3.0), 1.0, 1.0, 1.0),
        lambda s: ctkd(s, t, torch.ones(()), 1.0, 1.0, 20.0),
        lambda s: sdd(s[:, None], t[:, None], y, 4.0, 2.0),
        lambda s: kd(standardize(s), standardize(t), 2.0),
        lambda s: rld(s, t, t.argmax(1), 1.0, 8.0, 4.0, 1.0),
        lambda s: luminet(s, t, 31.0, 4.0),
        lambda s: abkd(s, t, 0.8, 0.3, 4.0),
        lambda s: wttm(s, t, 1.0),
    ):
        assert distance(t).item() == pytest.approx(0, abs=1e-3)  # DIST: its 1e-8
        assert distance(flipped).item() > 0.01


def test_all_but_mse_ignore_a_constant_per_row():
    s, t, y, shift = numbers(4, 6, seed=1), numbers(4, 6, seed=2), some_labels(4, 6), numbers(4, 1, seed=3)
    for loss in (
        lambda s: dkd(s, t, y, 1.0, 8.0, 4.0),
        lambda s: nkd(s, t, y, 1.5, 1.0),
        lambda s: dist(s, t, 2.0, 2.0, 4.0),
        lambda s: mlkd(s, t, (2.0, 3.0), 1.0, 1.0, 1.0),
        lambda s: wsld(s, t, y, 4.0),
        lambda s: tfkd(s, y, 20.0, 0.99),
        lambda s: wkd_logit(s, t, y, fixed_cost(6), 800.0, 8.0, 0.05, 10),
        lambda s: uskd(s, t, y, 1.0, 1.0, 1.0),
        lambda s: wttm(s, t, 0.3),
        lambda s: rld(s, t, y, 1.0, 8.0, 4.0, 1.0),
        lambda s: abkd(s, t, 0.8, 0.3, 4.0),
    ):
        assert loss(s + shift).item() == pytest.approx(loss(s).item(), rel=1e-9)


def test_dkd_is_kd_where_beta_is_the_teachers_doubt():
    s, t, label, temperature = numbers(1, 6, seed=1), numbers(1, 6, seed=2), torch.tensor([3]), 3.0
    doubt = 1 - softmax(t[0].numpy() / temperature)[3]
    assert dkd(s, t, label, 1.0, doubt, temperature).item() == pytest.approx(kd(s, t, temperature).item(), rel=1e-9)


def test_wttm_is_kd_that_softens_only_the_teacher_and_weighs_by_its_doubt():
    s, t = numbers(1, 6, seed=1), numbers(1, 6, seed=2)
    weight = (softmax(t[0].numpy()) ** 0.25).sum()
    assert wttm(s, t, 0.25).item() == pytest.approx(weight * kd(s, 0.25 * t, 1.0).item(), rel=1e-9)


def test_rld_ignores_classes_that_the_teacher_puts_above_the_label():
    s, t = numbers(1, 6, seed=1), torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]]).double()
    order = partial(rld, alpha=0.0, beta=1.0, temperature=2.0, alpha_temperature=1.0)
    label = torch.tensor([2])
    raised = s + torch.tensor([[9.0, -7.0, 5.0, 0.0, 0.0, 0.0]])
    assert order(raised, t, label).item() == pytest.approx(order(s, t, label).item(), rel=1e-9)
    last = s.clone().requires_grad_()
    value = order(last, t, torch.tensor([5]))
    value.backward()
    assert value.item() == 0 and last.grad.abs().max() == 0


def test_abkd_contains_kl_its_reverse_and_distances():
    s, t = numbers(3, 6, seed=1), numbers(3, 6, seed=2)
    q, p = s.softmax(1), t.softmax(1)
    assert abkd(s, t, 1.0, 0.0, 1.0).item() == pytest.approx(kd(s, t, 1.0).item(), rel=1e-9)
    assert abkd(s, t, 0.0, 1.0, 1.0).item() == pytest.approx(kd(t, s, 1.0).item(), rel=1e-9)
    assert abkd(s, t, 1.0, 1.0, 1.0).item() == pytest.approx(0.5 * (p - q).pow(2).sum(1).mean().item(), rel=1e-9)
    hellinger = 0.5 * (p.sqrt() - q.sqrt()).pow(2).sum(1).mean().item()
    assert abkd(s, t, 0.5, 0.5, 1.0).item() == pytest.approx(4 * hellinger, rel=1e-9)
    near = abkd(s, t, 0.7, 1e-6, 1.0).item()
    assert near == pytest.approx(abkd(s, t, 0.7, 0.0, 1.0).item(), rel=1e-4)


def test_luminet_ignores_the_scale_and_shift_of_every_class():
    s, t = numbers(5, 6, seed=1), numbers(5, 6, seed=2)
    moved = s * numbers(1, 6, seed=3).abs() * 50 + numbers(1, 6, seed=4)
    assert luminet(moved, t, 31.0, 4.0).item() == pytest.approx(luminet(50 * s, t, 31.0, 4.0).item(), rel=1e-5)


def test_the_cross_entropies_are_least_at_the_teacher():
    t = numbers(4, 6, seed=2)
    for temperature in (1.0, 4.0):
        s = t.clone().requires_grad_()
        soft_cross_entropy(s, t, temperature).sum().backward()
        torch.testing.assert_close(s.grad, torch.zeros_like(s))


def test_tfkd_is_zero_at_its_hand_made_teacher():
    made = torch.tensor([[0.99, 0.005, 0.005], [0.005, 0.005, 0.99]]).double() / 20
    assert tfkd(made + 3.0, torch.tensor([0, 2]), 20.0, 0.99).item() == pytest.approx(0, abs=1e-12)


def test_wsld_does_not_teach_where_the_student_is_certain():
    t, y = numbers(2, 4), torch.tensor([0, 1])
    certain = torch.zeros(2, 4).double().scatter(1, y[:, None], 80.0)
    assert wsld(certain, t, y, 4.0).item() == pytest.approx(0, abs=1e-12)


def test_correlation_ignores_scale_and_shift():
    a, b = numbers(3, 6, seed=1), numbers(3, 6, seed=2)
    torch.testing.assert_close(correlation(7 * a - 2, 0.5 * b + 3), correlation(a, b))
    torch.testing.assert_close(correlation(a, 2 * a + 1), torch.ones(3).double())


def test_batch_and_class_order_do_not_matter():
    s, t, y = numbers(4, 6, seed=1), numbers(4, 6, seed=2), some_labels(4, 6)
    rows, columns = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 2, 0, 1, 4, 3])
    weight, place = numbers(6, 4, seed=9), columns.argsort()
    for loss in (
        lambda s, t, y, w: dist(s, t, 2.0, 1.0, 4.0),
        lambda s, t, y, w: mlkd(s, t, (2.0, 3.0), 1.0, 2.0, 3.0),
        lambda s, t, y, w: dkd(s, t, y, 1.0, 8.0, 4.0),
        lambda s, t, y, w: uskd(s, t, y, 1.0, 2.0, 3.0),
        lambda s, t, y, w: wkd_logit(s, t, y, class_cost(w, 1.0), 800.0, 8.0, 0.05, 10),
        lambda s, t, y, w: rld(s, t, y, 1.0, 8.0, 4.0, 1.0),
        lambda s, t, y, w: luminet(s, t, 31.0, 4.0),
    ):
        expected = pytest.approx(loss(s, t, y, weight).item(), rel=1e-9)
        assert loss(s[rows], t[rows], y[rows], weight).item() == expected
        assert loss(s[:, columns], t[:, columns], place[y], weight[columns]).item() == expected


def test_others_leaves_out_the_label_and_keeps_the_order():
    assert others(torch.arange(8.0).view(2, 4), torch.tensor([1, 3])).tolist() == [[0, 2, 3], [4, 5, 6]]


def test_z_scores_have_mean_zero_and_unbiased_deviation_one_whatever_the_scale():
    logits = numbers(3, 7)
    scores = standardize(logits)
    for row, expected in pairs(scores.numpy(), logits.numpy()):
        np.testing.assert_allclose(row, z_score(expected), rtol=1e-9)
    torch.testing.assert_close(standardize(100 * logits - 5), scores)


def test_a_constant_row_has_zero_scores_and_no_gradient():
    logits = torch.tensor([[2.0, 2.0, 2.0], [0.0, 1.0, 2.0]], requires_grad=True)
    scores = standardize(logits)
    (scores * torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    assert scores[0].tolist() == [0, 0, 0]
    assert logits.grad[0].tolist() == [0, 0, 0]
    assert 0 < logits.grad[1].abs().max() < 10


# The modules, as their YAML makes them


def made(name: str, **changes):
    """The loss of conf/loss/NAME.yaml."""
    cfg = OmegaConf.load(CONF / f"{name}.yaml")
    cfg[name].update(changes)
    return build_losses(cfg)[0][name]


def outputs_of(logits: torch.Tensor, seed: int) -> Outputs:
    """Outputs whose features agree with the logits, for the losses that look at them."""
    k = logits.shape[1]
    maps = logits[:, :, None, None] + numbers(1, 1, 4, 4, seed=seed).to(logits) * torch.tensor([1.0, -1.0] * 8).view(
        4, 4
    )
    maps = maps - maps.mean((2, 3), keepdim=True) + logits[:, :, None, None]
    features = {"stage2": maps, "last": maps, "head:weight": torch.eye(k).to(logits), "head:bias": torch.zeros(k)}
    return Outputs(logits, {name: value.to(logits) for name, value in features.items()})


class Rows:
    train = range(6)


def built(name: str, student: Outputs, teacher: Outputs, **changes):
    loss = made(name, **changes)
    torch.manual_seed(0)
    loss.build(
        *(Outputs(o.logits.detach(), {k: v.detach() for k, v in o.features.items()}) for o in (student, teacher)),
        Rows(),
    )
    return loss


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("temperature", [None, 1.0])
def test_value_and_gradient_stay_finite_at_extreme_logits(name, standardize, temperature):
    changes = {}
    if name not in WITHOUT_TEACHER:
        changes["standardize"] = standardize
    elif standardize:
        pytest.skip("has no second scale of logits")
    if temperature and "temperature" in OmegaConf.load(CONF / f"{name}.yaml")[name]:
        changes["temperature"] = temperature
    rows = [[100.0, -100.0, 0.0], [-100.0, 100.0, 0.0], [100.0, 100.0, 100.0], [-100.0, -100.0, 100.0]]
    logits = torch.tensor(rows, requires_grad=True)
    for teacher_rows in (rows, rows[::-1]):
        student, teacher = outputs_of(logits, 1), outputs_of(torch.tensor(teacher_rows), 2)
        for labels in ([0, 1, 2, 2], [1, 0, 0, 1]):
            loss = built(name, student, teacher, **changes)
            value = loss(student, teacher, batch_of(torch.tensor(labels)))
            (gradient,) = torch.autograd.grad(value, logits, retain_graph=True)
            assert value.dtype == torch.float32
            assert value.dim() == 0
            assert torch.isfinite(value)
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*WITHOUT_TEACHER, "mlkd", "sdd")])
def test_standardize_is_the_loss_of_z_scores(name):
    student, teacher = outputs_of(numbers(4, 5, seed=1).float(), 1), outputs_of(numbers(4, 5, seed=2).float(), 2)
    batch = batch_of(some_labels(4, 5))
    scored = [outputs_of(standardize(o.logits), 1)._replace(features=o.features) for o in (student, teacher)]
    value = built(name, student, teacher, standardize=True)(student, teacher, batch)
    assert value.item() == pytest.approx(built(name, student, teacher, standardize=False)(*scored, batch).item())


def test_standardize_of_mlkd_is_of_the_instance_level_and_of_sdd_is_of_each_cell():
    s, t, y = numbers(4, 5, seed=1), numbers(4, 5, seed=2), some_labels(4, 5)
    expected = kd(standardize(s), standardize(t), 2.0) + mlkd(s, t, (2.0,), 0.0, 1.0, 1.0)
    batch = batch_of(y)
    loss = MLKD((2.0,), 1.0, 1.0, 1.0, standardize=True)
    assert loss(Outputs(s, {}), Outputs(t, {}), batch).item() == pytest.approx(expected.item(), rel=1e-9)
    cells = [outputs_of(logits.float(), i) for i, logits in enumerate((s, t))]
    loss = built("sdd", *cells, standardize=True)
    plain = [cell_logits(*(o.features[tap] for tap in loss.student_taps), (1, 2, 4)) for o in cells]
    expected = sdd(standardize(plain[0]), standardize(plain[1]), y, 4.0, 2.0)
    assert loss(*cells, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_defaults_of_the_code_are_those_of_the_yaml():
    for name in NAMES:
        cfg = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))[name]
        given, default = made(name), build.get_object(cfg["_target_"])()
        if name != "logit_standardization":
            state = [{k: v for k, v in vars(loss).items() if k[0] != "_"} for loss in (given, default)]
            assert state[0] == state[1], name


def test_what_a_loss_cannot_use_is_told_in_one_line():
    one = Outputs(torch.zeros(1, 3), {})
    with pytest.raises(UserError, match="loss dist needs at least 2 images in a batch, this one has 1"):
        DIST()(one, one, batch_of(torch.tensor([0])))
    with pytest.raises(UserError, match="loss luminet needs at least 2 images in a batch, this one has 1"):
        LumiNet()(one, one, batch_of(torch.tensor([0])))
    with pytest.raises(UserError, match=r"loss.sdd.form=ckd: choose kd, dkd, nkd"):
        SDD(form="ckd")
    wrong = Outputs(torch.zeros(2, 3), {"head:weight": torch.zeros(8, 3)})
    with pytest.raises(UserError, match=r"loss wkd_logit needs .*'head:weight' .* 3 classes, not the shape \(8, 3\)"):
        WKDLogit().build(wrong, wrong, None)
    good = outputs_of(numbers(2, 3).float(), 1)
    vector = good._replace(features=good.features | {"last": good.logits})
    with pytest.raises(UserError, match=r"loss sdd needs maps .* teacher's .* 'last' of shape \(2, 3\)"):
        SDD().build(good, vector, None)
    other = good._replace(features=good.features | {"last": good.features["last"] + 9})
    with pytest.raises(UserError, match=r"loss sdd needs maps .* student's .*loss.sdd.student_tap"):
        SDD().build(other, good, None)


def test_uskd_pools_maps_and_tokens_and_learns_its_classifier():
    loss = USKD(tap="stage2")
    outputs = Outputs(torch.zeros(2, 3), {"stage2": numbers(2, 5, 4, 4).float()})
    loss.build(outputs, None, None)
    assert isinstance(loss.weak, nn.Linear)
    assert loss.weak.weight.shape == (3, 5)
    assert set(loss.state_dict()) == {"weak.weight", "weak.bias"}
    loss.build(Outputs(torch.zeros(2, 3), {"stage2": numbers(2, 17, 6).float()}), None, None)
    assert loss.weak.weight.shape == (3, 6)


@pytest.fixture(scope="module")
def data():
    return fake(num_classes=5, train_size=96, image_size=16, batch_size=16, num_workers=0)


@pytest.mark.parametrize("name", NAMES)
def test_two_epochs_lower_the_loss_and_train_its_parts(name, data):
    loss = made(name)
    taught = name not in WITHOUT_TEACHER
    # a step of one size for all: the gradient's scale is the loss's own
    module = distil(data, {"only": loss}, {"only": min(1.0, 0.9 / SCALE.get(name, 1.0))}, teacher=taught, epochs=2)
    batch = data.train[torch.arange(48), 0]
    loss.eval()

    def value(student) -> float:
        student.record(loss.student_taps).train()
        teacher = module.teacher(batch) if taught else None
        with torch.no_grad():
            return loss(student(batch.images), teacher, batch).item()

    start = value(network(0))
    assert value(module.student) < start
    optimized = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in loss.parameters()} <= optimized
    for key, saved in module.state_dict().items():
        if key.startswith("losses."):
            assert not torch.equal(saved, made_state(name, data, taught)[key.removeprefix("losses.only.")])


SCALE = {
    "dist": 10.0, "mlkd": 10.0, "wkd_logit": 100.0, "dkd": 8.0, "nkd": 30.0, "wsld": 16.0, "rld": 8.0, "luminet": 100.0,
    "wttm": 5.0,
}  # fmt: skip


def made_state(name: str, data, taught: bool) -> dict:
    """The state of the loss as it is before training."""
    loss = made(name)
    connect(network(0), Frozen(network(1, (8, 16, 32))) if taught else None, {"only": loss}, data, seed=0)
    return loss.state_dict()
