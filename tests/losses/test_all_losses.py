"""Every loss of conf/loss as its file describes it: it trains itself, it goes with every other, it comes back from a
checkpoint, and it stays finite."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from sets import digits

from benchmarks.losses import NAMES as ALL
from benchmarks.losses import OTHER_STUDENTS, compose, networks
from distill.errors import UserError
from distill.losses.terms import build_losses
from distill.teachers.frozen import Frozen
from distill.training.connect import connect
from distill.training.module import Distill
from distill.types import Batch, Outputs

# those of OTHER_STUDENTS belong to one student: deit to a distillation head, simkd to the teacher's classifier
NAMES = [name for name in ALL if name not in OTHER_STUDENTS]

# CRD's banks hold noise in the first epoch and the images from the second on, so its epochs are compared from there
EPOCHS = {"crd": (1, 3)}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def cfg():
    return compose("teacher=resnet8", "student=resnet8_tiny")


@pytest.fixture(scope="module")
def data():
    """160 real digits, at half of their usual size."""
    full = digits(batch_size=32, num_workers=0)
    rows = torch.arange(160)

    def small(split):
        images = torch.nn.functional.avg_pool2d(split.images[rows].float(), 2).byte()
        return replace(split, images=images, labels=split.labels[rows], image_size=16)

    return replace(full, image_size=16, **{name: small(getattr(full, name)) for name in ("train", "val", "test")})


@pytest.fixture(scope="module")
def pair(cfg, data):
    """A fresh student, and a teacher that knows these digits: under one that doesn't, WSLD's weight rises."""
    teacher, fitting = networks(cfg, data)[1].network.requires_grad_(True), trainer(epochs=15)
    fitting.fit(distil(cfg, data, ["ce"], teacher, None), data.train_loader(0))
    return networks(cfg, data)[0], Frozen(teacher)


@pytest.fixture
def fresh(pair):
    """The pair for one test alone."""
    return copy.deepcopy(pair)


@pytest.fixture(scope="module")
def batch(data):
    return data.train[torch.arange(8), 0]


def distil(cfg, data, names, student, teacher, seed: int = 0) -> Distill:
    """The module that train.py makes for 'loss=NAMES', beside a trainer that has not begun."""
    described = OmegaConf.to_container(cfg.loss, resolve=True)
    terms, weights = build_losses({name: described[name] for name in names})
    connect(student, teacher, terms, data, seed)
    adam = partial(torch.optim.Adam, lr=0.003)
    module = Distill(student, teacher, terms, weights, adam, lambda epoch: 1.0, data.num_classes)
    module.trainer = trainer()
    return module


def trainer(*callbacks, epochs: int = 2) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False, callbacks=list(callbacks),
    )  # fmt: skip


class Means(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_epoch_end(self, trainer, module):
        self.seen.append({name: mean.item() for name, mean in module.means().items()})


def gradients(module: Distill, total: torch.Tensor) -> list[torch.Tensor]:
    """Of all that is learned."""
    learned = [p for part in (module.student, module.losses) for p in part.parameters() if p.requires_grad]
    return torch.autograd.grad(total, learned, allow_unused=True)


def test_the_list_is_complete():
    assert set(OTHER_STUDENTS) < set(ALL)
    assert len(NAMES) == len(ALL) - len(OTHER_STUDENTS)


@pytest.mark.parametrize("name", NAMES)
def test_two_epochs_lower_it_and_a_checkpoint_brings_back_what_it_learned(name, cfg, data, fresh, tmp_path):
    first, last = EPOCHS.get(name, (0, 1))
    untrained, means = copy.deepcopy(fresh), Means()
    module, fitting = distil(cfg, data, [name], *fresh), trainer(means, epochs=last + 1)
    start = {key: value.clone() for key, value in module.losses.state_dict().items()}
    fitting.fit(module, data.train_loader(0))
    assert means.seen[last][name] < means.seen[first][name]

    optimized = {id(p) for group in fitting.optimizers[0].param_groups for p in group["params"]}
    for key, parameter in module.losses.named_parameters():
        assert id(parameter) in optimized, key
        assert not torch.equal(parameter, start[key]), f"{key} did not learn"
    shipped = {key.removeprefix("net.") for key in module.student.plain().state_dict()}
    assert shipped == set(module.student.net.state_dict())

    fitting.save_checkpoint(tmp_path / "last.ckpt")
    again, resumed = distil(cfg, data, [name], *untrained, seed=1), trainer(epochs=last + 1)
    resumed.fit(again, data.train_loader(0), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert resumed.global_step == fitting.global_step
    assert again.state_dict().keys() == module.state_dict().keys()
    for key, value in module.state_dict().items():
        if key.startswith(("losses.", "student.")):
            assert torch.equal(again.state_dict()[key], value), f"{key} is not restored"


@pytest.mark.parametrize("name", NAMES)
def test_it_goes_with_every_other(name, cfg, data, pair, batch):
    for other in NAMES[NAMES.index(name) + 1 :]:
        module = distil(cfg, data, [name, other], *pair)
        total = module.training_step(batch, 0)
        assert torch.isfinite(total), other
        found = gradients(module, total)
        assert all(each is None or torch.isfinite(each).all() for each in found), other
        assert any(each is not None and each.abs().sum() > 0 for each in found), other


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_under_bf16_stay_finite(name, cfg, data, fresh, batch):
    module = distil(cfg, data, [name], *fresh)
    module.student.net.linear.weight.data.mul_(1e3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = module.training_step(batch, 0)
    assert total.dtype == torch.float32
    assert torch.isfinite(total)
    assert all(each is None or torch.isfinite(each).all() for each in gradients(module, total))


@pytest.mark.parametrize("name", NAMES)
def test_one_image_is_enough_or_refused_by_name(name, cfg, data, pair, batch):
    module = distil(cfg, data, [name], *pair)
    try:
        total = module.training_step(Batch(*(part[:1] for part in batch[:3]), batch.view), 0)
    except UserError as error:
        assert f"loss {name} " in str(error)
    else:
        assert torch.isfinite(total)
        assert all(each is None or torch.isfinite(each).all() for each in gradients(module, total))


@pytest.mark.parametrize("name", NAMES)
def test_dead_and_equal_images_have_gradients_of_the_usual_size(name, cfg, data, fresh, batch):
    """One image all of whose activations are zero, in the student, in the teacher or in both; two that are equal."""
    module = distil(cfg, data, [name], *fresh)
    with torch.no_grad():
        ours, theirs = module.student.eval()(batch.images).float(), module.teacher(batch).float()
    constants = {**module.student.tensors(), **module.teacher.network.tensors()}

    def changed(outputs: Outputs, change) -> Outputs:
        values = {"logits": outputs.logits, **outputs.features}
        for key in values.keys() - constants.keys():
            value = values[key].clone().contiguous()
            change(value)
            values[key] = value
        values = {key: value.detach().requires_grad_() for key, value in values.items()}
        return Outputs(values.pop("logits"), values)

    def largest(change_ours, change_theirs) -> float:
        student, teacher = changed(ours, change_ours), changed(theirs, change_theirs)
        total = copy.deepcopy(module.losses[name])(student, teacher, batch)
        assert torch.isfinite(total)
        leaves = [student.logits, *student.features.values()]
        found = [each for each in torch.autograd.grad(total, leaves, allow_unused=True) if each is not None]
        assert all(torch.isfinite(each).all() for each in found)
        return max(each.abs().max().item() for each in found)

    def as_it_is(value):
        pass

    def dead(value):
        value[0] = 0

    def equal(value):
        value[1] = value[0]

    usual = largest(as_it_is, as_it_is)
    for change in (dead, equal):
        for pair in ((change, as_it_is), (as_it_is, change), (change, change)):
            assert largest(*pair) <= 1e3 * max(usual, 1e-3), [each.__name__ for each in pair]
