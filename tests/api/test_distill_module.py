"""DistillModule in a Trainer and in a loop; every loss as a function."""

import importlib
import inspect

import pytest
import pytorch_lightning as pl
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import distill
from distill.losses.base import Loss

IMAGES, LABELS = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 3


def net() -> nn.Module:
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def loader():
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8)


def test_the_loss_is_the_weighted_sum_of_the_functions():
    student, teacher = net(), net()
    module = distill.DistillModule(student, teacher, ["ce", "kd"], weights={"kd": [[0, 2.0], [1, 4.0]]})
    total, terms = module.loss(IMAGES, LABELS, epoch=0.5)
    logits, soft = student(IMAGES), teacher.eval()(IMAGES)
    ce, kd = F.cross_entropy(logits, LABELS), distill.losses.kd(logits, soft, 4.0)
    assert [terms[name].item() for name in ("ce", "kd")] == pytest.approx([ce.item(), kd.item()])
    assert total.item() == pytest.approx(0.1 * ce.item() + 3 * kd.item(), rel=1e-5)


def test_a_trainer_trains_the_student_and_nothing_of_the_teacher(tmp_path):
    student, teacher = net(), net()
    before = [value.clone() for value in (*student.parameters(), *teacher.state_dict().values())]
    module = distill.DistillModule(student, teacher, ["ce", "kd", "fitnet"], example=IMAGES[:2])
    trainer = pl.Trainer(
        max_epochs=2,
        logger=False,
        default_root_dir=tmp_path,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(), loader())
    after = [*student.parameters(), *teacher.state_dict().values()]
    count = len([*student.parameters()])
    assert not any(torch.equal(*pair) for pair in zip(before[:count], after[:count], strict=True))
    assert all(torch.equal(*pair) for pair in zip(before[count:], after[count:], strict=True))
    assert not teacher.training and not any(value.requires_grad for value in teacher.parameters())
    assert {"train/ce", "train/kd", "train/fitnet", "train/loss", "val/accuracy", "val/agreement"} <= {
        *trainer.callback_metrics
    }
    [file] = tmp_path.rglob("*.ckpt")
    kept = torch.load(file, weights_only=True)["state_dict"]
    assert {key.partition(".")[0] for key in kept} == {"network", "losses", "teacher"}
    assert [key for key in kept if key.startswith("teacher")] == ["teacher._extra_state"]
    assert any(key.startswith("losses.fitnet") for key in kept)  # its projector is learned
    again = distill.DistillModule(net(), teacher, ["ce", "kd", "fitnet"], example=IMAGES[:2])
    again.load_state_dict(kept)
    with pytest.raises(distill.UserError, match="taught by another teacher"):
        distill.DistillModule(net(), net(), ["ce", "kd", "fitnet"], example=IMAGES[:2]).load_state_dict(kept)


@pytest.mark.parametrize(
    ("given", "options", "told"),
    [
        ([["ce", "kd"]], {}, "loss kd needs a teacher"),
        ([["ce", "hint"]], {}, "no loss 'hint'"),
        ([{"kd": nn.Linear(1, 1)}], {}, r"expected \{name: Loss\}"),
        ([["ce"]], {"weights": {"kd": 1}}, "weights: there is no loss 'kd', but ce"),
        ([["ce"]], {"weights": {"ce": -1}}, "expected a number of at least 0"),
    ],
)
def test_what_is_wrong_is_told_when_it_is_made(given, options, told):
    with pytest.raises(distill.UsageError, match=told):
        distill.DistillModule(net(), None, *given, **options)


def test_losses_that_look_inside_want_an_example_and_no_training_set():
    with pytest.raises(distill.UsageError, match="loss fitnet reads features: give example="):
        distill.DistillModule(net(), net(), ["ce", "fitnet"])
    with pytest.raises(distill.UsageError, match=r"only distill\.train knows"):
        distill.DistillModule(net(), net(), ["ce", "crd"], example=IMAGES[:2])
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(distill.UsageError, match=r"answers with \(2, 3\), the teacher with \(2, 5\)"):
        distill.DistillModule(net(), other, ["ce", "kd"], example=IMAGES[:2])


@pytest.mark.parametrize("batch", [(IMAGES, LABELS), [IMAGES, LABELS, 3], {"image": IMAGES, "label": LABELS}])
def test_batches_come_as_loaders_make_them(batch):
    module = distill.DistillModule(net(), None, ["ce"])
    module.log = lambda *args, **options: None
    module.validation_step(batch, 0)
    with pytest.raises(distill.UsageError, match="a batch must be"):
        module.validation_step({"pixels": IMAGES}, 0)


def test_every_loss_file_is_called_by_its_name():
    assert len(distill.losses.methods()) > 40
    for name in distill.losses.methods():
        module = importlib.import_module(f"distill.losses.{name}")
        assert getattr(distill.losses, name) is module
        function = getattr(module, name)
        assert inspect.signature(getattr(distill.losses, name)) == inspect.signature(function)
        assert function.__doc__ and function.__module__ == module.__name__
        classes = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, Loss)]
        for each in classes:
            if each.__module__ == module.__name__:
                assert getattr(distill.losses, each.__name__) is each
    logits = torch.randn(4, 5), torch.randn(4, 5)
    from distill.losses.wttm import wttm

    assert distill.losses.wttm(*logits, gamma=0.5) == wttm(*logits, gamma=0.5)
    with pytest.raises(AttributeError, match="no attribute 'hint'"):
        distill.losses.hint  # noqa: B018


def test_a_type_checker_sees_every_loss():
    stub = (ROOT / "distill" / "losses" / "__init__.pyi").read_text()
    for name in distill.losses.methods():
        assert f" {name} as {name}" in stub, name
        module = importlib.import_module(f"distill.losses.{name}")
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, Loss) and kind.__module__ == module.__name__:
                assert f" {kind.__name__} as {kind.__name__}" in stub
    assert (ROOT / "distill" / "py.typed").is_file()


def test_the_functions_that_came_last():
    student, teacher = torch.randn(6, 4), torch.randn(6, 4)
    labels, partner, share = torch.arange(6) % 4, torch.arange(6).flip(0) % 4, torch.rand(6)
    targets = share[:, None] * F.one_hot(labels, 4) + (1 - share[:, None]) * F.one_hot(partner, 4)
    assert torch.allclose(distill.losses.ce(student, labels, 0.0, partner, share), F.cross_entropy(student, targets))
    scores = [(each - each.mean(1, keepdim=True)) / each.std(1, keepdim=True) for each in (student, teacher)]
    wanted = 4 * F.kl_div((scores[0] / 2).log_softmax(1), (scores[1] / 2).softmax(1), reduction="batchmean")
    assert torch.allclose(distill.losses.logit_standardization(student, teacher, 2.0), wanted)
