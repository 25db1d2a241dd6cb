"""What the optimizer decays and how fast each part learns: by default all of it alike."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from sets import fake
from torch import fx, nn

from distill.errors import UserError
from distill.losses.ce import CE
from distill.losses.fitnet import FitNet
from distill.networks.deit import deit
from distill.networks.network import Network
from distill.networks.resnet_cifar import resnet
from distill.runs import tables
from distill.teachers.frozen import Frozen
from distill.teachers.peer import Peer
from distill.training.fit import fit
from distill.training.parameters import DEFAULTS, grouped, rate, scale
from distill.training.recipe import Recipe
from distill.training.schedules import cosine

TAPS = {"stage1": "layer1", "stage2": "layer2", "stage3": "layer3", "pooled": "linear:in"}


def network(seed: int = 0, **options) -> Network:
    torch.manual_seed(seed)
    return Network(resnet(8, 5, (4, 8, 16), stem=4), TAPS, [0.5] * 3, [0.25] * 3, 16, **options)


def shares(net: nn.Module, groups: list[dict]) -> dict[str, tuple[float, bool]]:
    """By a parameter's name: its share of the rate, and whether it decays."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    return {
        names[parameter]: (group["lr_scale"], "weight_decay" not in group)
        for group in groups
        for parameter in group["params"]
        if parameter in names
    }


class Three(nn.Module):
    """Three layers, two of them stages."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1), nn.Linear(2, 2)

    def forward(self, images):
        return self.head(self.two(self.one(images)).mean((2, 3)))


def test_by_default_there_is_one_group_in_the_order_of_ever():
    student, losses = network(), nn.ModuleDict({"fitnet": FitNet()})
    losses["fitnet"].layer = nn.Linear(2, 2)
    [group] = grouped([student, losses])
    ever = [*student.parameters(), *losses.parameters()]
    assert [id(p) for p in group["params"]] == [id(p) for p in ever]
    assert group.keys() == {"params", "lr_scale"} and group["lr_scale"] == 1.0


def test_three_layers_step_by_hand():
    net = Three()
    student = Network(net, {"stage1": "one", "stage2": "two"}, [0.0] * 3, [1.0] * 3, 4)
    optimizer = torch.optim.SGD(grouped([student], head_lr=10.0, layer_decay=0.5), lr=0.1)
    scale(optimizer)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, step in {"one": 0.1 / 4, "two": 0.1 / 2, "head": 0.1 * 10}.items():
        for part in ("weight", "bias"):
            moved = before[f"{name}.{part}"] - net.get_parameter(f"{name}.{part}")
            torch.testing.assert_close(moved, torch.full_like(moved, step))
    assert rate(optimizer) == pytest.approx(0.1)


def test_stages_count_from_the_head_and_the_stem_goes_with_the_first():
    net = (student := network()).net
    found = shares(net, grouped([student], head_lr=4.0, layer_decay=0.5))
    expected = {"conv1": 1 / 8, "bn1": 1 / 8, "layer1": 1 / 8, "layer2": 1 / 4, "layer3": 1 / 2, "linear": 4.0}
    assert {name: share for name, (share, _) in found.items()} == {
        name: expected[name.partition(".")[0]] for name, _ in net.named_parameters()
    }


def test_what_no_module_call_shows_belongs_to_what_is_around_it():
    """A transformer's tokens and positions are its first stage's; attention's projection is its block's."""
    torch.manual_seed(0)
    net = deit(num_classes=5, image_size=16, width=16, depth=4, heads=2)
    layers = [f"encoder.layers.encoder_layer_{n}" for n in range(4)]
    student = Network(net, {f"stage{n + 1}": path for n, path in enumerate(layers)}, [0.5] * 3, [0.5] * 3, 16)
    found = {name: share for name, (share, _) in shares(net, grouped([student], layer_decay=0.5)).items()}
    for name in ("class_token", "dist_token", "encoder.pos_embedding", "conv_proj.weight"):
        assert found[name] == 0.5**4, name
    for n, path in enumerate(layers):
        assert {share for name, share in found.items() if name.startswith(f"{path}.")} == {0.5 ** (4 - n)}
    assert found["encoder.ln.weight"] == found["heads.weight"] == found["dist_head.bias"] == 1.0


def test_norms_and_biases_do_not_decay_as_timm_groups_them():
    student, losses = network(), nn.ModuleDict({"ce": CE()})
    losses["ce"].variance = nn.Parameter(torch.ones(3))
    losses["ce"].project = nn.Linear(2, 2)
    found = shares(student.net, grouped([student, losses], decay_norms=False))
    for name, parameter in student.net.named_parameters():
        assert found[name] == (1.0, parameter.ndim > 1), name
    found = shares(losses["ce"], grouped([student, losses], decay_norms=False))
    assert {name: decays for name, (_, decays) in found.items()} == {
        "variance": False, "project.weight": True, "project.bias": False,
    }  # fmt: skip


def test_what_a_network_of_timms_excludes_does_not_decay(monkeypatch):
    monkeypatch.setattr(Three, "no_weight_decay", lambda self: {"two.weight"}, raising=False)
    net = Three()
    found = shares(net, grouped([Network(net, {}, [0.0] * 3, [1.0] * 3)], decay_norms=False))
    assert {name for name, (_, decays) in found.items() if decays} == {"one.weight", "head.weight"}


def test_what_losses_learn_goes_as_the_head_and_a_peer_as_the_student():
    peer, losses = Peer(network(1)), nn.ModuleDict({"ce": CE()})
    losses["ce"].project = nn.Linear(2, 2)
    groups = grouped([network(), losses, peer], head_lr=3.0, layer_decay=0.5)
    assert shares(losses["ce"], groups) == dict.fromkeys(("project.weight", "project.bias"), (3.0, True))
    found = shares(peer.network.net, groups)
    assert (found["linear.weight"][0], found["layer3.0.conv1.weight"][0], found["conv1.weight"][0]) == (3, 0.5, 0.125)


def test_a_captured_graph_learns_at_one_rate_and_says_so(capsys):
    graph = fx.symbolic_trace(network().net)
    [group] = grouped([Network(graph, {}, [0.0] * 3, [1.0] * 3, 16)], head_lr=3.0, layer_decay=0.5)
    assert group["lr_scale"] == 1.0
    assert "no head and no stages found in" in capsys.readouterr().out
    groups = grouped([Network(graph, {}, [0.0] * 3, [1.0] * 3, 16)], decay_norms=False)
    assert len(groups) == 2 and capsys.readouterr().out == ""


def test_a_pruned_network_has_its_head_and_stages_found():
    found = shares(
        (net := network().net), grouped([Network(net, {}, [0.0] * 3, [1.0] * 3, 16)], head_lr=3.0, layer_decay=0.5)
    )
    assert found["linear.weight"][0] == 3.0 and found["conv1.weight"][0] == 0.125


def test_a_network_of_the_configuration_without_stages_is_told():
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    with pytest.raises(UserError, match=r"no stages found in Sequential.*student.taps=\{stage1: LAYER, …\}"):
        grouped([Network(net, {}, [0.0] * 3, [1.0] * 3, 4, role="student")], layer_decay=0.5)


# in a training


@pytest.fixture(scope="module")
def data():
    return fake(num_classes=5, train_size=120, image_size=16, batch_size=16, num_workers=0)


ALL = {"decay_norms": False, "head_lr": 3.0, "layer_decay": 0.5}
LOSSES = {
    "ce": {"_target_": "distill.losses.ce.CE", "weight": 1.0},
    "fitnet": {"_target_": "distill.losses.fitnet.FitNet", "weight": 1.0},
}


class Killed(Exception):
    pass


class Rates(pl.Callback):
    """Those of each group at each optimizer step; the process "dies" where epoch `dies` begins."""

    def __init__(self, dies: int | None = None):
        self.rates, self.dies = [], dies

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == self.dies:
            raise Killed

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def train(data, folder, epochs=1, parameters=None, schedule=None, teacher=None, rates=None, compile=False, **trainer):
    """`fit` of a small network on a CPU: the student and what `rates` saw."""
    recipe = Recipe(
        epochs,
        {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        {"_target_": "distill.training.schedules.cosine", "_partial_": True, **(schedule or {})},
        {"_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "precision": "32-true", **trainer},
        select="last",
        compile=compile,
        parameters=parameters or {},
    )
    student, rates = network(), rates or Rates()
    fit(student, teacher or Frozen(network(1)), LOSSES, data, recipe, folder, callbacks=[rates])
    return student, rates.rates


def test_all_groups_follow_the_schedule_and_the_rate_that_is_told_is_the_base(data, tmp_path):
    _, rates = train(data, tmp_path, parameters=ALL)
    assert {round(value, 9) for value in rates[0]} == {0.0125, 0.025, 0.05, 0.3}
    for step, seen in enumerate(rates):
        assert [a / b for a, b in zip(seen, rates[0], strict=True)] == pytest.approx([cosine(step / 7, 1)] * len(seen))
    assert tables.curves(tmp_path)["lr"].tolist() == pytest.approx([0.0])


def test_groups_go_on_after_a_kill_with_the_same_bits(data, tmp_path):
    whole, _ = train(data, tmp_path / "whole", 2, ALL, teacher=Peer(network(1)))
    with pytest.raises(Killed):
        train(data, tmp_path / "killed", 2, ALL, teacher=Peer(network(1)), rates=Rates(dies=1))
    again, _ = train(data, tmp_path / "killed", 2, ALL, teacher=Peer(network(1)))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    plain, _ = train(data, tmp_path / "plain", 2, teacher=Peer(network(1)))
    assert not torch.equal(plain.net.conv1.weight, whole.net.conv1.weight)


def test_a_compiled_student_is_grouped_alike(data, tmp_path, monkeypatch):
    usual, rates = train(data, tmp_path / "usual", parameters=ALL)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # code generation takes a minute
    compiled, same = train(data, tmp_path / "compiled", parameters=ALL, compile=True)
    assert same == rates
    for one, other in zip(compiled.parameters(), usual.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("warmup", "accumulate"), [(1.0, 1), (0.5, 1), (0.05, 1), (1.0, 2), (0.3, 3)])
def test_the_first_step_of_any_warm_up_moves(data, tmp_path, warmup, accumulate):
    """And none is above the rate that was asked for, nor zero."""
    _, seen = train(data, tmp_path, 2, schedule={"warmup": warmup}, accumulate_grad_batches=accumulate)
    rates, an_epoch = [step[0] / 0.1 for step in seen], -(-7 // accumulate)  # of 7 batches
    assert len(rates) == 2 * an_epoch
    ends = [[cosine((step + after) / an_epoch, 2, warmup) for after in (0, 1)] for step in range(len(rates))]
    assert rates == pytest.approx([max(both) for both in ends])
    assert all(0 < rate <= 1 for rate in rates)


def test_a_key_names_groups_only_where_there_are_some():
    plain = Recipe(1, {}, {}, {})
    assert "parameters" not in plain.decides() and plain.decides() == plain.changed(parameters=DEFAULTS).decides()
    assert plain.changed(parameters={**DEFAULTS, "decay_norms": False}).decides() != plain.decides()
