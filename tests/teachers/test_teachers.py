"""Ensemble, peer and moving average: what they answer, how they learn, what the checkpoint holds, exact resumes."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from sets import fake
from test_losses import batch_of, numbers, softmax
from test_module import network
from torch import nn

from distill.errors import UserError
from distill.losses.at import AT
from distill.losses.ce import CE
from distill.losses.kd import KD, kd
from distill.networks.network import Network
from distill.teachers.committee import Committee
from distill.teachers.ema import Ema
from distill.teachers.frozen import Frozen
from distill.teachers.peer import Peer
from distill.training.connect import connect
from distill.training.module import Distill
from distill.training.resume import LAST, Checkpoints, position, read
from distill.types import Outputs


@pytest.fixture(scope="module")
def data():
    return fake(num_classes=5, train_size=96, image_size=16, batch_size=16, num_workers=0)


def otherwise(seed: int, classes: int = 5) -> Network:
    """Another kind of network, with other statistics of its images."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes))
    return Network(net, {"stage1": "0"}, [0.1, 0.2, 0.3], [0.9, 0.8, 0.7])


def module_of(data, teacher, losses, weights=None, student=None) -> Distill:
    student = student or network(0)
    connect(student, teacher, losses, data, seed=0)
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    return Distill(student, teacher, losses, weights or dict.fromkeys(losses, 1.0), sgd, lambda epoch: 1.0, 5)


def fit(module: Distill, data, epochs: int, resume=None, callbacks=()) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=bool(callbacks),
        enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, use_distributed_sampler=False, callbacks=[*callbacks],
    )  # fmt: skip
    loader = data.train_loader(0)
    if resume:
        loader.sampler.resume_at(*position(read(resume)))
    trainer.fit(module, loader, data.val_loader(), ckpt_path=resume, weights_only=True)
    return trainer


def some(data, rows: int = 8):
    return data.train[torch.arange(rows), 0]


# Frozen


def test_where_no_loss_looks_inside_a_copy_without_batch_norms_answers(data):
    net = otherwise(1)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):  # statistics of a trained network
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(0.5, 2)
    teacher, batch, called = Frozen(net), some(data), []
    net.register_forward_hook(lambda *_: called.append(1))
    answers = [teacher(batch).logits for _ in range(3)]
    assert len(called) == 1  # to compare with
    with torch.no_grad():
        wanted = net(batch.images).logits
    torch.testing.assert_close(answers[2], wanted, rtol=1e-3, atol=1e-4)
    assert not torch.equal(answers[2], wanted) and torch.equal(answers[0], answers[2])
    copy = teacher.outside.quick
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in copy.modules())
    net.record(["head:weight"])  # not of an image
    assert torch.equal(teacher(batch).logits, answers[0]) and "head:weight" in teacher(batch).features
    net.record(["stage1"])
    assert torch.equal(teacher(batch).logits, wanted) and "stage1" in teacher(batch).features
    teacher.double()
    assert next(copy.parameters()).dtype == torch.float64


def test_a_copy_that_answers_otherwise_is_not_used_and_that_is_said(data, capsys):
    net, batch = network(1), some(data)
    wrong = network(2).plain()
    teacher = Frozen(net, quicken=lambda plain: wrong)
    answers = [teacher(batch).logits for _ in range(2)]
    with torch.no_grad():
        torch.testing.assert_close(answers[1], net(batch.images).logits)
    assert (
        capsys.readouterr().out == "  teacher: its faster copy does not answer alike, so the network answers as it is\n"
    )
    Frozen(net)(batch)
    assert capsys.readouterr().out == ""


def test_the_copy_can_be_made_ahead_and_moves_with_its_owner(data):
    teacher, batch = Frozen(network(1)), some(data)
    teacher.prepare(batch.images)
    copy = teacher.outside.quick
    assert torch.equal(teacher(batch).logits, copy(batch.images)) and teacher.outside.quick is copy
    assert not [*teacher.parameters()] and list(teacher.state_dict()) == ["_extra_state"]
    teacher.double()
    assert next(copy.parameters()).dtype == next(teacher.network.parameters()).dtype == torch.float64


@pytest.mark.parametrize("around", [False, True])
def test_a_teacher_computes_in_its_own_precision_whatever_its_student_does(data, around):
    net, batch = network(1), some(data)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        full, half = (Frozen(net, precision)(batch).logits for precision in ("32-true", "bf16-mixed"))
        net.record(["stage1"])
        looked_into = Frozen(net)(batch)
    assert full.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert looked_into.logits.dtype == looked_into.features["stage1"].dtype == torch.float32
    torch.testing.assert_close(full, looked_into.logits, rtol=1e-3, atol=1e-5)
    assert 1e-4 < (half - full).abs().max() / full.abs().max() < 0.1


# Ensemble


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_an_ensemble_answers_with_the_weighted_mean_of_logits_and_the_features_of_the_first(data, weights):
    first, second = network(1, (8, 16, 32)), otherwise(2)
    teacher = Frozen(Committee([first, second], weights))
    teacher.network.record(["stage2"])
    batch = some(data)
    answer = teacher(batch)
    with torch.no_grad():
        one, two = first.eval()(batch.images), second.eval()(batch.images)
    share = 0.5 if weights is None else 0.25
    torch.testing.assert_close(answer.logits, share * one.logits + (1 - share) * two.logits)
    torch.testing.assert_close(answer.features["stage2"], one.features["stage2"])
    torch.testing.assert_close(teacher.network.plain()(batch.images), answer.logits)
    alone = Frozen(Committee([network(1, (8, 16, 32))]))
    torch.testing.assert_close(alone(batch).logits, one.logits)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_its_softened_probabilities_are_the_geometric_mean_of_its_members_at_every_temperature(temperature):
    members = [numbers(3, 4, seed=seed) for seed in (1, 2, 3)]
    mean = Committee([nn.Identity()] * 3).mean(members)
    for row in range(3):
        together = np.prod([softmax(z[row].numpy() / temperature) for z in members], axis=0) ** (1 / 3)
        np.testing.assert_allclose(softmax(mean[row].numpy() / temperature), together / together.sum(), rtol=1e-6)


def test_an_ensemble_is_frozen_and_known_by_its_members_and_weights(data):
    module = module_of(
        data, Frozen(Committee([network(1), otherwise(2)])), {"ce": CE(), "kd": KD(), "at": AT(["stage1"])}
    )
    before = module.teacher.fingerprint
    fit(module, data, 1)
    assert [key for key in module.state_dict() if key.startswith("teacher")] == ["teacher._extra_state"]
    assert not any(part.training for part in module.teacher.network.modules())
    assert not any(parameter.requires_grad for parameter in module.teacher.network.parameters())
    assert Frozen(Committee([network(1), otherwise(2)])).fingerprint == before
    assert Frozen(Committee([network(1), otherwise(2)], [1, 2])).fingerprint != before
    assert Frozen(Committee([network(1), otherwise(3)])).fingerprint != before
    module.double()
    assert next(module.teacher.network.members[1].parameters()).dtype == torch.float64


def test_an_ensemble_refuses_wrong_weights_and_classes(data):
    for weights in ([1.0], [1.0, 0.0], [1.0, -1.0]):
        with pytest.raises(UserError, match=r"teacher.weights=.*one positive number for each of the 2 members"):
            Frozen(Committee([network(1), network(2)], weights))
    with pytest.raises(UserError, match=r"members of teacher=ensemble answer.*\(8, 5\), \(8, 7\)"):
        Frozen(Committee([network(1), otherwise(2, classes=7)]))(some(data))


# Peer


def test_a_peers_loss_is_zhangs():
    student, peer, labels = numbers(4, 5, seed=1), numbers(4, 5, seed=2), torch.tensor([0, 3, 1, 1])
    expected = 0.0
    for s, p, label in zip(student.numpy(), peer.numpy(), labels.tolist(), strict=True):
        own, other = softmax(p), softmax(s)
        expected -= math.log(own[label]) / 4
        expected += sum(b * math.log(b / a) for a, b in zip(own, other, strict=True)) / 4
    outputs = Outputs(student, {}), Outputs(peer, {})
    assert Peer(network(1)).loss(*outputs, batch_of(labels)).item() == pytest.approx(expected, rel=1e-9)
    weighed = Peer(network(1), temperature=3.0, weight=0.5).loss(*outputs, batch_of(labels))
    wanted = torch.nn.functional.cross_entropy(peer, labels) + 0.5 * kd(peer, student, 3.0)
    assert weighed.item() == pytest.approx(wanted.item())


def test_each_of_the_two_takes_the_other_as_a_constant(data):
    module = module_of(data, Peer(network(3)), {"ce": CE(), "kd": KD(1.0), "at": AT(["stage1"])})
    module.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.trainer.fit_loop.max_batches = 1
    batch = some(data)
    student, peer = module.student(batch.images), module.teacher(batch)
    total, terms = module.total(student, peer, batch, 0)
    assert len(terms) == 4
    assert total.item() == pytest.approx(sum(term.item() for term in terms), rel=1e-6)
    mine, its = ([*part.parameters()] for part in (module.student, module.teacher))
    parts = [  # of the student, of the peer
        CE()(student, None, batch) + KD(1.0)(student, peer.detach(), batch) + module.losses["at"](student, peer, batch),
        CE()(peer, None, batch) + kd(peer.logits, student.logits.detach(), 1.0),
    ]
    for part, parameters in zip(parts, (mine, its), strict=True):
        wanted = torch.autograd.grad(part, parameters, retain_graph=True)
        for got, expected in zip(torch.autograd.grad(total, parameters, retain_graph=True), wanted, strict=True):
            torch.testing.assert_close(got, expected)


def test_both_learn_in_one_optimizer_both_are_kept_and_the_student_ships(data):
    module = module_of(data, Peer(otherwise(3)), {"ce": CE(), "kd": KD(1.0)})
    untouched = {name: value.clone() for name, value in otherwise(3).state_dict().items()}
    statistics = network(4).state_dict()
    trainer = fit(module, data, 1)
    first = trainer.callback_metrics["train/teacher"].item()
    peer = module.teacher.network
    assert all(not torch.equal(value, untouched[name]) for name, value in peer.named_parameters())
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for part in (module.student, peer) for p in part.parameters()}
    assert {f"teacher.network.{name}" for name in peer.state_dict()} <= set(module.state_dict())
    assert module.shipped is module.student
    assert peer.training
    again = module_of(data, Peer(network(4)), {"ce": CE(), "kd": KD(1.0)})  # the dry run leaves batch norm alone
    torch.testing.assert_close(again.teacher.network.state_dict(), statistics)
    last = fit(module_of(data, Peer(otherwise(3)), {"ce": CE(), "kd": KD(1.0)}), data, 4).callback_metrics
    assert last["train/teacher"].item() < first


def test_several_peers_each_learn_from_the_mean_divergence_to_all_others():
    temperature, weight, labels = 2.0, 0.5, torch.tensor([0, 3, 1, 1])
    everyone = [numbers(4, 5, seed=seed).requires_grad_() for seed in (1, 2, 3, 4)]  # the student, three peers
    arrays = [logits.detach().numpy() for logits in everyone]
    peer = Peer(network(1), temperature, weight, peers=3, another=lambda number: network(1 + number))

    def divergence(p: int, rows: np.ndarray) -> float:
        total = 0.0
        for other in (each for number, each in enumerate(arrays) if number != p):
            for mine, theirs in zip(rows, other, strict=True):
                a, b = softmax(theirs / temperature), softmax(mine / temperature)
                total += temperature**2 * sum(x * math.log(x / y) for x, y in zip(a, b, strict=True)) / (4 * 3)
        return total

    def by_hand(p: int, rows: np.ndarray) -> float:
        entropy = -sum(math.log(softmax(row)[label]) for row, label in zip(rows, labels.tolist(), strict=True)) / 4
        return entropy + weight * divergence(p, rows)

    answer = Outputs(torch.zeros(4, 5), {"peers": torch.stack(everyone[1:])})
    value = peer.loss(Outputs(everyone[0].detach(), {}), answer, batch_of(labels))
    assert value.item() == pytest.approx(sum(by_hand(p, arrays[p]) for p in (1, 2, 3)), rel=1e-9)
    value.backward()
    assert everyone[0].grad is None
    for p in (1, 2, 3):
        slope = slopes(lambda rows, p=p: by_hand(p, rows), arrays[p])
        np.testing.assert_allclose(everyone[p].grad.numpy(), slope, rtol=1e-5, atol=1e-8)
    # the student's side: KL to the mean of the probabilities has the gradient of the mean of the KLs
    mean = torch.stack([logits.detach().div(temperature).softmax(1) for logits in everyone[1:]]).mean(0)
    kd(everyone[0], temperature * mean.log(), temperature).backward()
    slope = slopes(lambda rows: divergence(0, rows), arrays[0])
    np.testing.assert_allclose(everyone[0].grad.numpy(), slope, rtol=1e-5, atol=1e-8)


def slopes(function, point: np.ndarray) -> np.ndarray:
    found = np.zeros_like(point)
    for place in np.ndindex(point.shape):
        step = np.zeros_like(point)
        step[place] = 1e-5
        found[place] = (function(point + step) - function(point - step)) / 2e-5
    return found


def test_several_peers_answer_with_their_mean_and_all_learn(data):
    peer = Peer(otherwise(3), peers=3, another=lambda number: otherwise(3 + number))
    start = copy.deepcopy(peer.state_dict())
    module = module_of(data, peer, {"ce": CE(), "kd": KD(1.0)})
    answer, images = module.teacher.eval()(some(data)), some(data).images
    members = [module.teacher.network, *module.teacher.others]
    wanted = torch.stack([member(images).logits.softmax(1) for member in members]).mean(0)
    torch.testing.assert_close(answer.logits.softmax(1), wanted)
    assert len(members) == 3 and not torch.equal(*(member(images).logits for member in members[1:]))
    module.teacher.train()
    trainer = fit(module, data, 1)
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    for name, parameter in module.teacher.named_parameters():
        assert id(parameter) in optimized and not torch.equal(parameter, start[name]), name


# Ema


def test_the_average_follows_by_hand(data):
    student = network(0)
    teacher = Ema(student, decay=0.7)
    average = {name: value.double().clone() for name, value in student.state_dict().items()}
    for step in range(1, 5):
        with torch.no_grad():
            for value in student.parameters():
                value.add_(numbers(*value.shape, seed=step).float())
        student.train()(some(data).images)  # moves batch norm's statistics
        teacher.after_step(student)
        alpha = min(0.7, 1 - 1 / (step + 1))
        for name, value in student.state_dict().items():
            kept = alpha * average[name] + (1 - alpha) * value.double()
            average[name] = kept if value.is_floating_point() else value.double()
    for name, value in teacher.network.state_dict().items():
        torch.testing.assert_close(value.double(), average[name], rtol=1e-4, atol=1e-5, msg=name)
    teacher.train()
    assert not any(part.training for part in teacher.network.modules())
    answer = teacher(some(data)).logits
    assert not answer.requires_grad
    torch.testing.assert_close(answer, teacher.network(some(data).images).logits)
    with pytest.raises(UserError, match=r"teacher.decay=1: expected a number from 0 to below 1"):
        Ema(student, decay=1)


def test_the_average_is_taken_after_every_step_and_is_in_the_checkpoint_but_not_in_the_optimizer(data):
    student = network(0)
    module = module_of(data, Ema(student, 0.9), {"ce": CE(), "kd": KD(), "at": AT(["stage2"])}, student=student)
    trainer = fit(module, data, 2)
    assert module.teacher.steps == trainer.global_step == 12
    average, now = module.teacher.network.net.linear.weight, module.student.net.linear.weight
    assert not torch.equal(average, now)
    assert torch.dist(average, now) < torch.dist(network(0).net.linear.weight, now)
    assert {"teacher.steps", "teacher.network.net.linear.weight"} <= set(module.state_dict())
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in module.student.parameters()}
    assert all(p.grad is None for p in module.teacher.parameters())


# Both


def learning(kind: str, data) -> Distill:
    student = network(0)
    teacher = Peer(network(3)) if kind == "peer" else Ema(student, 0.9)
    return module_of(data, teacher, {"ce": CE(), "kd": KD(1.0)}, student=student)


class Kill(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 10:
            raise RuntimeError("killed")


@pytest.mark.parametrize("kind", ["peer", "ema"])
def test_a_resume_in_mid_epoch_goes_on_exactly(data, kind, tmp_path):
    straight, first, second = (learning(kind, data) for _ in range(3))
    fit(straight, data, 3)
    with pytest.raises(RuntimeError, match="killed"):
        fit(first, data, 3, callbacks=[Checkpoints(tmp_path, every=8), Kill()])
    fit(second, data, 3, resume=tmp_path / LAST)
    torch.testing.assert_close(second.state_dict(), straight.state_dict(), rtol=0, atol=0)
    assert not torch.equal(first.teacher.network.net.linear.weight, second.teacher.network.net.linear.weight)


@pytest.mark.parametrize("kind", ["peer", "ema"])
def test_agreement_is_with_the_teacher_as_it_is_now(data, kind):
    module = learning(kind, data)
    trainer = fit(module, data, 3)
    module.eval()
    agree = []
    for batch in data.val_loader():
        student, teacher = module.student(batch.images).logits, module.teacher(batch).logits
        agree += (student.argmax(1) == teacher.argmax(1)).tolist()
    assert trainer.callback_metrics["val/agreement"].item() == pytest.approx(sum(agree) / len(agree))


def test_a_frozen_teacher_is_asked_once_for_each_validation_batch(data):
    calls = []

    class Counting(Frozen):
        def forward(self, batch):
            calls.append(tuple(batch.index[:1].tolist()))
            return super().forward(batch)

    module = module_of(data, Counting(network(1)), {"kd": KD()})
    calls.clear()
    fit(module, data, 3)
    assert sum(call == (-1,) for call in calls) == len(data.val_loader())


@pytest.mark.parametrize(
    "words",
    [
        ["teacher=ema", "teacher.decay=0.9"],
        ["teacher=peer", "student@teacher.network=resnet8", "loss.kd.temperature=1"],
        ["teacher=ensemble", "teacher@teacher.members.first=resnet8", "teacher@teacher.members.second=vgg8",
         "+teacher@teacher.members.third=resnet8_tiny", "teacher.weights=[1,1,2]"],
    ],
    ids=["ema", "peer", "ensemble"],
)  # fmt: skip
def test_from_the_command_line(train, quick, tmp_path, words):
    words = [*(word for word in quick if not word.startswith("teacher=")), *words]
    assert train(*words, "baseline=false", "stages=[distill]", cwd=tmp_path) == 0
    assert len(list(tmp_path.rglob("student.safetensors"))) == 1
