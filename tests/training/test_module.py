"""The teacher stays as it is; the student, its losses and its average are what trains and is kept."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from sets import fake
from torch import nn
from torch.ao.quantization import FakeQuantize
from torch.optim.swa_utils import AveragedModel

from distill.cli import config
from distill.errors import UsageError, UserError
from distill.files import CONF
from distill.losses.at import AT
from distill.losses.ce import CE
from distill.losses.fitnet import FitNet
from distill.losses.kd import KD
from distill.losses.terms import build_losses
from distill.networks.build import build_network
from distill.networks.network import Network
from distill.networks.resnet_cifar import resnet
from distill.networks.weights import content_hash
from distill.teachers.frozen import Frozen
from distill.training.connect import connect
from distill.training.module import Distill, moving_average
from distill.training.precision import precision, teaching
from distill.training.schedules import cosine

TAPS = {"stage1": "layer1", "stage2": "layer2", "stage3": "layer3", "pooled": "linear:in"}


def network(seed: int, widths=(4, 8, 16)) -> Network:
    torch.manual_seed(seed)
    return Network(resnet(8, 5, widths, stem=widths[0]), TAPS, [0.5] * 3, [0.25] * 3)


@pytest.fixture(scope="module")
def data():
    return fake(num_classes=5, train_size=120, image_size=16, batch_size=16, num_workers=0)


def distil(data, losses, weights=None, teacher=True, epochs=1, **options) -> Distill:
    student, taught_by = network(0), Frozen(network(1, (8, 16, 32))) if teacher else None
    connect(student, taught_by, losses, data, seed=0)
    module = Distill(
        student,
        taught_by,
        losses,
        weights or dict.fromkeys(losses, 1.0),
        partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        lambda epoch: 1.0,
        num_classes=5,
        **options,
    )
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data.train_loader(0), data.val_loader())
    return module


def test_the_teacher_gets_no_gradient_and_keeps_its_weights_and_statistics(data):
    before = content_hash(network(1, (8, 16, 32)).requires_grad_(False))
    module = distil(data, {"ce": CE(), "kd": KD(), "at": AT(["stage1"]), "fitnet": FitNet()}, epochs=2)
    teacher = module.teacher.network
    assert content_hash(teacher) == before == module.teacher.fingerprint
    assert not teacher.training
    assert not any(part.training for part in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert module.train().teacher.network.training is False


def test_the_teacher_is_in_neither_checkpoint_nor_optimizer_and_moves_along(data):
    module = distil(data, {"ce": CE(), "kd": KD()})
    assert [key for key in module.state_dict() if key.startswith("teacher")] == ["teacher._extra_state"]
    optimized = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in module.student.parameters()}
    module.double()
    assert next(module.teacher.network.parameters()).dtype == torch.float64


def test_another_teacher_is_refused_at_resume(data):
    module = distil(data, {"kd": KD()})
    state = module.state_dict()
    module.teacher = Frozen(network(7, (8, 16, 32)))
    with pytest.raises(UserError, match="taught by another teacher"):
        module.load_state_dict(state)


def test_every_student_parameter_and_every_learned_part_of_a_loss_is_trained(data):
    losses = {"ce": CE(), "fitnet": FitNet()}
    start = {name: p.clone() for name, p in network(0).named_parameters()}
    module = distil(data, losses)
    assert all(not torch.equal(p, start[name]) for name, p in module.student.named_parameters())
    optimized = {id(p) for group in module.trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in losses["fitnet"].parameters()} <= optimized
    assert any(key.startswith("losses.fitnet.project") for key in module.state_dict())
    assert not any("project" in key for key in module.student.plain().state_dict())


def test_the_total_is_the_weighted_sum_of_the_terms_it_logs(data):
    weights = {"ce": 0.5, "kd": [[0, 0.0], [10, 10.0]]}
    module = distil(data, {"ce": CE(), "kd": KD()}, weights)
    logged = {name: module.trainer.callback_metrics[f"train/{name}"].item() for name in ("ce", "kd", "loss")}
    batch = data.train[torch.arange(8), 0]
    module.eval()
    student, teacher = module.student(batch.images), module.teacher(batch)
    total, (ce, kd) = module.total(student, teacher, batch, batch_idx=0)
    assert module.current_epoch == 1  # one epoch is done
    assert total.item() == pytest.approx(0.5 * ce.item() + 1.0 * kd.item(), rel=1e-6)
    assert logged["ce"] > 0
    assert logged["kd"] > 0


def test_a_teacher_that_no_loss_needs_is_asked_about_validation_images_only(data, monkeypatch):
    asked, answer = [], Frozen.forward
    monkeypatch.setattr(Frozen, "forward", lambda self, batch: asked.append(len(batch.index)) or answer(self, batch))
    module = distil(data, {"ce": CE()}, epochs=2)
    dry_run, validation = 2, [len(batch.index) for batch in data.val_loader()]
    assert asked == [dry_run, *validation]  # once, not every epoch
    assert "val/agreement" in module.trainer.callback_metrics
    distil(data, {"ce": CE(), "kd": KD()})
    assert len(asked) > 2 * (1 + len(validation)) + 5  # and every training batch where a loss needs it


def test_losses_lower_themselves(data):
    for loss in (KD(), AT(["stage1", "stage2", "stage3"]), FitNet()):
        first = distil(data, {"only": loss}, epochs=1)
        start = first.trainer.callback_metrics["train/only"].item()
        last = distil(data, {"only": loss}, epochs=4).trainer.callback_metrics["train/only"].item()
        assert last < start, type(loss).__name__


def test_the_average_is_the_exponential_moving_average_of_the_steps(data):
    module = distil(data, {"ce": CE()}, teacher=False, ema=0.5)
    assert module.shipped is module.average.module
    # replay: plain SGD steps, averaged by hand
    replay = distil(data, {"ce": CE()}, teacher=False)
    assert torch.equal(replay.student.net.linear.weight, module.student.net.linear.weight)
    average, weights = None, []

    class Recording(CE):
        def forward(self, student, teacher, batch):
            weights.append(module_box[0].net.linear.weight.detach().clone())
            return super().forward(student, teacher, batch)

    module_box = []
    student = network(0)
    module_box.append(student)
    losses = {"ce": Recording()}
    connect(student, None, losses, data, seed=0)
    recorded = Distill(
        student, None, losses, {"ce": 1.0}, partial(torch.optim.SGD, lr=0.05, momentum=0.9), lambda e: 1.0, 5
    )
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(recorded, data.train_loader(0), data.val_loader())
    for n, step in enumerate([*weights[1:], student.net.linear.weight.detach()]):
        kept = min(0.5, (1 + n) / (10 + n))
        average = step.clone() if average is None else kept * average + (1 - kept) * step
    torch.testing.assert_close(module.average.module.net.linear.weight, average)
    assert not torch.equal(average, student.net.linear.weight)


def test_a_diverged_loss_ends_the_run_with_its_name(data):
    class Broken(CE):
        def forward(self, student, teacher, batch):
            return super().forward(student, teacher, batch) * float("nan")

    with pytest.raises(UserError, match=r"diverged in epoch 0 \(broken is not finite\).*optimizer.lr"):
        distil(data, {"ce": CE(), "broken": Broken()})


def test_mismatched_classes_are_told(data):
    student = Network(resnet(8, 7, (4, 8, 16), stem=4), TAPS, [0.5] * 3, [0.25] * 3)
    with pytest.raises(UserError, match=r"student answers with \(2, 7\), expected \(images, 5\)"):
        connect(student, None, {"ce": CE()}, data, seed=0)
    teacher = Frozen(Network(resnet(8, 7, (4, 8, 16), stem=4), TAPS, [0.5] * 3, [0.25] * 3))
    with pytest.raises(UserError, match=r"teacher answers with \(2, 7\)"):
        connect(network(0), teacher, {"kd": KD()}, data, seed=0)


def test_an_unknown_tap_is_told_with_those_that_exist(data):
    with pytest.raises(UserError, match=r"loss at, student: no tap or layer 'stage9'.*stage1, stage2, stage3, pooled"):
        connect(network(0), Frozen(network(1)), {"at": AT(["stage9"])}, data, seed=0)


def test_a_loss_that_needs_a_teacher_says_so_without_one(data):
    with pytest.raises(UserError, match="loss kd needs a teacher"):
        connect(network(0), None, {"kd": KD()}, data, seed=0)


def test_a_loss_on_features_refuses_a_teacher_that_answers_with_logits_only(data, monkeypatch):
    answer = Frozen.forward
    monkeypatch.setattr(Frozen, "forward", lambda self, batch: answer(self, batch)._replace(features={}))
    with pytest.raises(
        UserError, match=r"loss fitnet reads the teacher's stage2, and this teacher answers with logits"
    ):
        connect(network(0), Frozen(network(1)), {"fitnet": FitNet()}, data, seed=0)


def test_a_transformer_teaches_a_convnet_by_its_tokens(data):
    config.register(["train.py"])
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", ["teacher=vit_b_16", "student=mobilenet", "loss=[ce,kd,fitnet]", "name=test"])
    student = build_network(cfg.student, data.num_classes, 32, seed=0)
    teacher = Frozen(build_network(cfg.teacher, data.num_classes, 32, seed=0))
    images = fake(num_classes=5, train_size=20, image_size=32, batch_size=4, num_workers=0)
    losses, _ = build_losses(cfg.loss)
    connect(student, teacher, losses, images, seed=0)
    batch = images.train[torch.arange(4), 0]
    outputs, taught = student(batch.images), teacher(batch)
    assert taught.features["stage2"].dim() == 3
    total = sum(loss(outputs, taught, batch) for loss in losses.values())
    total.backward()
    assert torch.isfinite(total)
    assert losses["fitnet"].project.convolution.weight.grad.abs().sum() > 0


class Doubling(nn.Module):
    """Not a network of ours: its only layer is called by a path."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

    def forward(self, x):
        return self.body(x)


def test_taps_record_outputs_inputs_and_module_paths_and_pool_what_is_pooled():
    net = Network(Doubling().eval(), {"stage1": "body.0", "pooled": "body.1:in"}, [0.0] * 3, [1.0] * 3)
    images = torch.rand(2, 3, 4, 4)
    features = net.record(["stage1", "pooled", "body.3"])(images).features
    maps = net.net.body[0](images)
    torch.testing.assert_close(features["stage1"], maps)
    torch.testing.assert_close(features["pooled"], maps.mean((2, 3)))
    assert features["body.3"].shape == (2, 5)
    assert net.record([])(images).features == {}


def test_the_plain_network_normalises_and_is_a_copy_without_hooks():
    net = Network(Doubling(), {"stage1": "body.0"}, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]).record(["stage1"])
    images = torch.rand(2, 3, 4, 4)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    plain = net.plain()
    torch.testing.assert_close(plain(images), net.net((images - mean) / std))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    with torch.no_grad():
        net.net.body[3].bias.add_(1)
    assert not torch.equal(plain[1].body[3].bias, net.net.body[3].bias)


@pytest.fixture
def traced(monkeypatch) -> list:
    """Dynamo's part of torch.compile; its code generation takes a minute. What was compiled."""
    compiled, compile = [], torch.compile

    def trace(network, **options):
        compiled.append(network)
        return compile(network, backend="eager")

    monkeypatch.setattr(torch, "compile", trace)
    return compiled


def test_a_compiled_student_learns_the_same_under_the_same_names(data, traced, capsys):
    losses = {"ce": CE(), "kd": KD(), "fitnet": FitNet()}
    usual = distil(data, losses)
    module = distil(data, {"ce": CE(), "kd": KD(), "fitnet": FitNet()}, compile=True)
    assert traced == [module.student]
    assert "compiled with 0 graph breaks" in capsys.readouterr().out
    assert module.state_dict().keys() == usual.state_dict().keys()
    for one, other in zip(module.student.parameters(), usual.student.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_compiled_graph_is_not_reused_for_other_taps(data, traced):
    """A baseline's graph has no taps; the student's has those of its losses, and a third network's others."""
    distil(data, {"ce": CE()}, teacher=False, compile=True)
    distil(data, {"ce": CE(), "fitnet": FitNet()}, compile=True)
    third = distil(data, {"ce": CE(), "at": AT(["stage1", "stage3"])}, compile=True)
    assert third.student.record(["stage3"])(data.val[[0], 0].images).features.keys() == {"stage3"}  # the network itself
    assert len(traced) == 3


def test_the_moving_average_forgets_the_first_weights():
    """A constant 0.999 leaves 86 % of the first weights after 150 steps."""
    net = nn.Linear(1, 1, bias=False)
    average = AveragedModel(net, multi_avg_fn=moving_average(0.999), use_buffers=True)
    for step in range(150):
        net.weight.data.fill_(float(step == 0))
        average.update_parameters(net)
    assert average.module.weight.item() < 1e-4
    for n in (0, 9, 150, 10**6):  # α = min(decay, (1 + n) / (10 + n))
        averages, values = [torch.ones(1), torch.ones(2)], [torch.zeros(1), torch.zeros(2)]
        moving_average(0.99)(averages, values, torch.tensor(n))
        assert averages[0].item() == pytest.approx(min(0.99, (1 + n) / (10 + n)))
    with pytest.raises(UsageError, match=r"ema=1\.5"):
        moving_average(1.5)


def test_the_first_step_of_a_warm_up_moves_and_the_last_of_a_decay_too(data):
    module, rates = network(0), []

    class Rates(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    connect(module, None, {"ce": CE()}, data, seed=0)
    sgd = partial(torch.optim.SGD, lr=1.0)
    module = Distill(module, None, {"ce": CE()}, {"ce": 1.0}, sgd, lambda epoch: cosine(epoch, 2, warmup=1), 5)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False, callbacks=[Rates()],
    )  # fmt: skip
    trainer.fit(module, data.train_loader(0), data.val_loader())
    n = len(data.train_loader(0))
    assert rates[:n] == pytest.approx([(step + 1) / n for step in range(n)])
    assert rates[n:] == pytest.approx([cosine(1 + step / n, 2, warmup=1) for step in range(n)])
    assert all(rate > 0 for rate in rates)


def test_calibration_is_of_probabilities(data):
    """All-zero logits say 1/5 for each of 5 balanced classes: calibrated. As probabilities they would say 0."""
    module = distil(data, {"ce": CE()}, teacher=False)
    module.log_dict = module.log = lambda name, value=None, **options: (
        logged.update({name: value}) if value is not None else None
    )
    logged = {}
    labels = torch.arange(5).repeat(4)
    batch = data.val[torch.arange(20), 0]._replace(labels=labels)
    module.student.net.linear.weight.data.zero_()
    module.student.net.linear.bias.data.zero_()
    module.validation_step(batch, 0)
    module.on_validation_epoch_end()
    assert logged["val/ece"].item() == pytest.approx(0, abs=1e-6)


def test_processes_draw_their_own_and_sums_are_no_buffer(data, monkeypatch):
    module = distil(data, {"ce": CE()}, teacher=False)
    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr(Distill, "global_rank", rank)
        module.on_train_batch_start(None, 3)
        drawn.append(torch.rand(4))
    assert not torch.equal(*drawn)
    assert "sums" not in dict(module.named_buffers())  # DDP gives every process the first one's buffers


def precision_on(monkeypatch, bf16: bool, net: nn.Module, asked="auto", accelerator="cpu") -> str:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16})
    return precision(asked, accelerator, net)


def test_precision_is_bfloat16_where_the_machine_and_the_network_gain(monkeypatch):
    usual, depthwise = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
    assert precision_on(monkeypatch, True, usual) == "bf16-mixed"
    assert precision_on(monkeypatch, False, usual) == "32-true"
    assert precision_on(monkeypatch, True, nn.Sequential(usual, depthwise)) == "32-true"
    assert precision_on(monkeypatch, True, nn.Sequential(usual, FakeQuantize())) == "32-true"
    assert precision_on(monkeypatch, True, usual, asked="32-true") == "32-true"
    assert precision_on(monkeypatch, False, usual, asked="16-mixed") == "16-mixed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        found = precision_on(monkeypatch, False, depthwise, accelerator="gpu")
        assert found == ("bf16-mixed" if native else "32-true")
    assert precision(32, "cpu", usual) == "32-true" and precision("bf16", "cpu", usual) == "bf16-mixed"


def test_a_teacher_computes_in_what_suits_it_or_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    usual, depthwise = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=4)
    auto = {"precision": "auto", "accelerator": "cpu"}
    assert teaching("auto", auto, usual) == "bf16-mixed" and teaching("auto", auto, depthwise) == "32-true"
    assert teaching("auto", auto | {"precision": "16-mixed"}, usual) == "16-mixed"
    assert teaching("auto", auto | {"precision": "64-true"}, usual) == "64-true"
    assert teaching("int8", auto, usual) == "int8" and teaching(32, auto, usual) == "32-true"
    for asked, trainer, message in [
        ("int4", auto, "teacher.precision=int4: choose one of auto, "),
        ("bf16-mixed", auto | {"precision": "bf16-true"}, "trainer.precision=bf16-true converts the teacher too"),
        ("int8", auto | {"accelerator": "gpu"}, "teacher.precision=int8 computes on a CPU"),
    ]:
        with pytest.raises(UsageError, match=message):
            teaching(asked, trainer, usual)
