"""Fine-tuning for compression steps: the run's losses on logits, once, continued when killed; and QAT on top of it."""

import copy

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from distill import types
from distill.cli import build, config
from distill.cli.roles import finetuning
from distill.compress import flows
from distill.compress.qat_int8 import qat_int8
from distill.compress.static_int8 import static_int8
from distill.errors import UsageError, UserError
from distill.files import CONF
from distill.networks.build import build_network
from distill.teachers.frozen import Frozen
from distill.training.finetune import logit_losses
from distill.training.module import Distill


def composed(*words: str):
    config.register(["train.py"])
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("train", ["name=test", "trainer.accelerator=cpu", "cache.keep=off", *words])


@pytest.fixture(scope="module")
def job():
    """A configuration, its images and its teacher."""
    cfg = composed("data=digits", "teacher=resnet8", "student=resnet8", "compress=qat_int8", "loss=[ce,kd,fitnet]")
    data = build.data(cfg.data)
    teacher = Frozen(build_network(cfg.teacher, data.num_classes, data.image_size, 1))
    cfg.loss.kd.weight = 0.0  # this teacher knows nothing
    return cfg, data, teacher


@pytest.fixture(scope="module")
def trained(job, tmp_path_factory):
    cfg, data, teacher = job
    net = build_network(cfg.student, data.num_classes, data.image_size, 0).plain()
    folder = tmp_path_factory.mktemp("base")
    return finetuning(cfg, teacher, data, folder, {})(net, "base", epochs=5, lr=0.1)


@torch.no_grad()
def accuracy(net: nn.Module, data) -> float:
    return (
        torch.cat([net(batch.images).argmax(1) == batch.labels for batch in data.test_loader()]).double().mean().item()
    )


def unbalanced(net: nn.Module) -> nn.Module:
    """The same function, but channels between two convolutions differ in size by 300: one range fits them badly."""
    net = copy.deepcopy(net)
    for block in net.modules():
        if type(block).__name__ == "BasicBlock":
            order = torch.randperm(block.bn1.num_features, generator=torch.Generator().manual_seed(0))
            factor = torch.logspace(-1.25, 1.25, len(order))[order]
            block.bn1.weight.data *= factor
            block.bn1.bias.data *= factor
            block.conv2.weight.data /= factor.view(1, -1, 1, 1)
    return net


def test_losses_on_features_are_left_out(job):
    cfg, _, _ = job
    assert list(logit_losses(cfg.loss)) == ["ce", "kd"]
    assert logit_losses({"fitnet": types.plain_values(cfg.loss.fitnet)}) == {
        "ce": {"_target_": "distill.losses.ce.CE", "weight": 1.0}
    }


def test_qat_recovers_what_static_int8_loses(job, trained, tmp_path):
    cfg, data, teacher = job
    net = unbalanced(trained)
    whole = accuracy(net, data)
    static = accuracy(static_int8(net, data=data), data)
    finetune = finetuning(cfg, teacher, data, tmp_path, {})
    small = qat_int8(net, finetune, data, lr=2e-3)
    plain = static_int8(finetune(net, "plain", epochs=2, lr=2e-3), data=data)  # what training without rounding gives
    # measured: 0.93 in float, 0.18 and, trained without rounding, 0.37 in int8, 0.90 trained under it
    assert whole > 0.9 and static < 0.5
    assert accuracy(small, data) > max(static, accuracy(plain, data)) + 0.2
    images = torch.rand(7, 3, data.image_size, data.image_size)
    assert small(images).shape == (7, 10) and small(images[:1]).shape == (1, 10)
    # a second time it is read from its file, bit by bit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distill, "training_step", None)
        again = qat_int8(net, finetune, data, lr=2e-3)
    assert torch.equal(again(images), small(images))


def test_another_configuration_trains_anew(job, tmp_path):
    cfg, data, teacher = job
    net = build_network(cfg.student, data.num_classes, data.image_size, 0).plain()
    finetune = finetuning(cfg, teacher, data, tmp_path, {})
    before = copy.deepcopy(net.state_dict())
    once = finetune(net, "prune", epochs=1, lr=0.01)
    same, other = finetune(net, "prune", epochs=1, lr=0.01), finetune(net, "prune", epochs=1, lr=0.02)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(once.net.conv1.weight, same.net.conv1.weight)
    assert not torch.equal(once.net.conv1.weight, other.net.conv1.weight)
    with pytest.MonkeyPatch.context() as patch:  # the other one did not take its place
        patch.setattr(Distill, "training_step", None)
        same = finetune(net, "prune", epochs=1, lr=0.01)
    assert torch.equal(once.net.conv1.weight, same.net.conv1.weight)


class Stop(Exception):
    pass


def test_a_killed_finetuning_ends_with_the_same_bits(job, trained, tmp_path, monkeypatch):
    cfg, data, teacher = job
    cfg = copy.deepcopy(cfg)
    cfg.checkpoint_every = 2
    cfg.trainer.precision = "bf16-mixed"  # fake quantization computes in float32 all the same
    whole = qat_int8(trained, finetuning(cfg, teacher, data, tmp_path / "whole", {}), data)
    steps, plain_step = [], Distill.training_step

    def killed(self, batch, batch_idx):
        steps.append(batch_idx)
        if len(steps) == 21:  # inside the second epoch, where ranges and statistics are frozen
            raise Stop
        return plain_step(self, batch, batch_idx)

    monkeypatch.setattr(Distill, "training_step", killed)
    with pytest.raises(Stop):
        qat_int8(trained, finetuning(cfg, teacher, data, tmp_path / "killed", {}), data)
    small = qat_int8(trained, finetuning(cfg, teacher, data, tmp_path / "killed", {}), data)
    assert len(steps) > 21
    images = torch.rand(7, 3, data.image_size, data.image_size)
    assert torch.equal(small(images), whole(images))


@pytest.mark.parametrize("flow", ["fx", "xnnpack"])
def test_ranges_and_statistics_are_frozen_late_and_in_validation(flow):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(64, 2))
    net.insert(1, nn.BatchNorm2d(4))
    prepared = flows.prepare(net, torch.rand(2, 3, 6, 6), flow, qat=True)
    prepared(torch.rand(8, 3, 6, 6))

    def moved(images: torch.Tensor) -> set[str]:
        before = copy.deepcopy(prepared.state_dict())
        prepared(images)
        after = prepared.state_dict()
        names = {name.rpartition(".")[2] for name in after if not torch.equal(after[name], before[name])}
        return {{"running_mean": "statistics", "scale": "ranges"}.get(name) for name in names} - {None}

    flows.freeze(prepared.train(), observers=False, statistics=False)
    assert moved(5 * torch.rand(8, 3, 6, 6)) == {"statistics", "ranges"}
    flows.freeze(prepared.eval(), observers=True, statistics=False)
    assert moved(9 * torch.rand(7, 3, 6, 6)) == set()
    flows.freeze(prepared.train(), observers=True, statistics=True)
    assert moved(9 * torch.rand(7, 3, 6, 6)) == set()
    images = torch.rand(7, 3, 6, 6)
    assert not torch.equal(prepared(images), prepared(images))  # dropout still drops
    small = flows.convert(prepared, flow)
    step = max(module.scale.max().item() for module in prepared.modules() if hasattr(module, "fake_quant_enabled"))
    torch.testing.assert_close(small(images), prepared.eval()(images), rtol=0, atol=1.01 * step)
    assert torch.equal(copy.deepcopy(prepared)(images), prepared(images))


def test_a_captured_batch_norm_follows_the_mode():
    net = nn.Sequential(nn.BatchNorm2d(3)).train()
    images = 3 + torch.rand(8, 3, 4, 4)
    captured = flows.Captured(torch.export.export(copy.deepcopy(net), (images,)).module())
    torch.testing.assert_close(captured.train()(images), net(images))
    captured.training = False  # as Lightning does it
    torch.testing.assert_close(captured(images), net.eval()(images))
    captured.training, captured.frozen = True, True
    torch.testing.assert_close(captured(images), net(images))
    torch.testing.assert_close(captured.graph.get_buffer("0.running_mean"), net[0].running_mean)


def test_qat_without_a_run_is_refused(job):
    _, data, _ = job
    with pytest.raises(UserError, match="needs a run"):
        qat_int8(nn.Flatten(), data=data)
    with pytest.raises(UsageError, match="freeze=2"):
        qat_int8(nn.Flatten(), data=data, freeze=2)
    with pytest.raises(UsageError, match="skip=auto"):
        qat_int8(nn.Flatten(), data=data, skip="auto")


def test_labels_that_are_left_alone_weigh_one():
    ce = {"_target_": "distill.losses.ce.CE", "label_smoothing": 0.1, "weight": 0.1}
    kd = {"_target_": "distill.losses.kd.KD", "temperature": 4.0, "weight": 0.9}
    assert logit_losses({"ce": ce, "kd": kd}, taught=False) == {"ce": {**ce, "weight": 1.0}}
    assert logit_losses({"ce": ce, "kd": kd}) == {"ce": ce, "kd": kd}
