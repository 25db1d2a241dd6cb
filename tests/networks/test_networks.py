"""Networks as the world has them: what they answer with, hooks and computed weights of their own, shared weights."""

import io
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import pytest
import torch
import torchvision
from conftest import QUICK
from hydra import compose, initialize_config_dir
from sets import fake
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from distill.cli import config, roles
from distill.errors import UserError
from distill.export import executorch, onnx, torch_export, torchscript
from distill.files import CONF
from distill.losses.terms import build_losses
from distill.networks import answers, timm_models, torchvision_models
from distill.networks.build import build_network
from distill.networks.deit import deit
from distill.networks.fold import folded
from distill.networks.network import Network
from distill.networks.taps import heads, infer_taps
from distill.networks.weights import load_weights, save_weights, serialised_bytes
from distill.runtimes import measure
from distill.teachers.committee import Committee
from distill.teachers.ema import Ema
from distill.teachers.frozen import Frozen
from distill.training import fit
from distill.training.connect import connect
from distill.types import Batch

SIZE, CLASSES = 16, 5
EXPORTERS = {"torchscript": torchscript, "onnx": onnx, "executorch": executorch, "torch_export": torch_export}


@pytest.fixture(scope="module")
def data():
    return fake(num_classes=CLASSES, train_size=60, image_size=SIZE, batch_size=20, num_workers=0)


@pytest.fixture
def cfg(tmp_path):
    config.register()
    with initialize_config_dir(CONF, version_base="1.3"):
        found = compose("train", [*QUICK, "loss=[ce]", "trainer.precision=32-true", f"store={tmp_path}", "name=n"])
    return found


def error_of(call, *arguments, **options):
    """The UserError's text, which must be one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def body(wrap=lambda layer: layer, channels=3) -> nn.Sequential:
    torch.manual_seed(0)
    layers = OrderedDict(
        first=wrap(nn.Conv2d(channels, 8, 3, padding=1)),
        norm=nn.BatchNorm2d(8),
        relu=nn.ReLU(),
        pool=nn.MaxPool2d(2),
        second=wrap(nn.Conv2d(8, 8, 3, padding=1)),
        flat=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        head=wrap(nn.Linear(8, CLASSES)),
    )
    return nn.Sequential(layers)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


def larger(module, inputs, output):
    return 2 * output + 1


def with_hooks():
    net = body()
    net.second.register_forward_hook(larger)
    net.first.register_forward_pre_hook(lambda module, given, named: ((given[0] * 0.5,), named), with_kwargs=True)
    net.first.register_forward_hook(lambda module, given, named, output: output - 1, with_kwargs=True)
    net.head.register_forward_hook(lambda module, given, output: output * 3, always_call=True)
    return net


class Bound(nn.Sequential):
    """Its hooks are on containers and on itself, and read its own parameter."""

    def __init__(self):
        super().__init__(*body()[:-1], nn.Sequential(nn.Linear(8, CLASSES)))
        self.first, self.second = self[0], self[4]
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.second.register_forward_hook(self.scaled)
        self[7].register_forward_hook(self.scaled)
        self.register_forward_pre_hook(lambda module, inputs: inputs[0] * module.factor)

    def forward(self, images):
        for number in range(8):
            images = self[number](images)
        return images

    def scaled(self, module, inputs, output):
        return output * self.factor


OF_THEIR_OWN = {
    "spectral_norm": partial(body, old_spectral_norm),
    "weight_norm": partial(body, old_weight_norm),
    "parametrized spectral_norm": partial(body, parametrizations.spectral_norm),
    "parametrized weight_norm": partial(body, parametrizations.weight_norm),
    "orthogonal": partial(
        body, lambda layer: parametrizations.orthogonal(layer) if isinstance(layer, nn.Linear) else layer
    ),
    "pruning masks": partial(body, pruned),
    "masks twice": partial(body, lambda layer: pruned(pruned(layer))),
    "hooks": with_hooks,
    "hooks of containers": Bound,
}


def wrapped(net, **options) -> Network:
    return Network(net, {"stage1": "first", "stage2": "second"}, [0.5] * 3, [0.25] * 3, image_size=SIZE, **options)


def train_a_little(network: Network) -> None:
    """Until the weights are far from where hooks were registered."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    images, labels = torch.rand(16, 3, SIZE, SIZE), torch.arange(16) % CLASSES
    network.train()
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images).logits, labels).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", OF_THEIR_OWN)
def test_what_ships_answers_as_the_trained_network(kind, tmp_path):
    network = wrapped(OF_THEIR_OWN[kind]()).record(["stage1", "stage2"])
    train_a_little(network)
    plain = network.plain()  # right after a step with gradients, whose computed weights torch would refuse to copy
    network.eval()
    images = torch.rand(4, 3, SIZE, SIZE)
    with torch.no_grad():
        wanted = network(images)
        torch.testing.assert_close(plain(images), wanted.logits, rtol=1e-6, atol=1e-6)
        assert list(wanted.features) == ["stage1", "stage2"]  # the taps of the network itself are still there
        left = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in plain.modules())
        assert left == (2 if kind == "hooks of containers" else 0)  # those of layers are modules now
        if "hooks" not in kind:
            assert plain.net.state_dict().keys() == body().state_dict().keys()  # ordinary layers
        # a file and a rebuilt network: the same bits
        save_weights(network.net, tmp_path / "a.safetensors", {})
        again = wrapped(OF_THEIR_OWN[kind]())
        load_weights(again.net, tmp_path / "a.safetensors")
        assert torch.equal(again.eval()(images).logits, wanted.logits)
        again.net.load_state_dict(network.net.state_dict())
        assert torch.equal(again.plain()(images), plain(images))


@pytest.mark.parametrize("kind", ["spectral_norm", "hooks", "hooks of containers"])
@pytest.mark.filterwarnings("ignore")
def test_every_file_answers_as_the_network_with_hooks(kind, tmp_path):
    network = wrapped(OF_THEIR_OWN[kind]()).record(["stage1"])
    train_a_little(network)
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        wanted = network.eval()(images).logits
    for name, exporter in EXPORTERS.items():
        for file in exporter.export(
            network.plain(), images, tmp_path / name, {"classes": ["a"] * CLASSES, "input": {}}
        ):
            torch.testing.assert_close(file.run(images), wanted, rtol=1e-4, atol=1e-5, msg=f"{file.path}")


def test_teachers_keep_the_hooks_of_their_own():
    images = torch.rand(4, 3, SIZE, SIZE)
    rows = torch.arange(4)
    batch = Batch(images, rows, rows, 0)
    networks = [wrapped(with_hooks()), wrapped(body(old_spectral_norm))]
    for network in networks:
        train_a_little(network)
        network.record(["stage1"]).eval()
    with torch.no_grad():
        wanted = [network(images).logits for network in networks]
        for network, logits in zip(networks, wanted, strict=True):
            network.record(())
            torch.testing.assert_close(Frozen(network)(batch).logits, logits, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(Ema(network)(batch).logits, logits)
        mean = (wanted[0] + wanted[1]) / 2
        torch.testing.assert_close(Frozen(Committee(networks))(batch).logits, mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(Committee(networks).plain()(images), mean, rtol=1e-5, atol=1e-5)


# ---- branches that are merged for deployment


@pytest.mark.parametrize(("name", "share"), [("mobileone_s0", 0.3), ("repvgg_a0", 0.95), ("repghostnet_050", 0.999)])
def test_branches_are_merged_before_shipping(name, share):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm_models.classifier(name, CLASSES, 64).train()
    with torch.no_grad():
        for _ in range(2):
            net(torch.randn(8, 3, 64, 64))  # batch norms with statistics
        network = Network(net, {}, [0.5] * 3, [0.25] * 3, image_size=64).eval()
        plain, images = network.plain(), torch.rand(2, 3, 64, 64)
        before = network(images).logits
        assert (plain(images) - before).abs().max() <= 1e-4 * before.abs().max()
    assert measure.parameters(plain) < share * measure.parameters(net)
    assert measure.macs(plain, images) <= share * measure.macs(nn.Sequential(net), images) or name == "repghostnet_050"


class Branches(nn.Module):
    """Two convolutions that could be one; merged wrongly where `error` is not 0."""

    def __init__(self, error):
        super().__init__()
        self.one, self.two, self.error = nn.Conv2d(3, CLASSES, 3), nn.Conv2d(3, CLASSES, 3), error

    def forward(self, images):
        answer = self.one(images)
        return (answer if self.two is None else answer + self.two(images)).mean((2, 3))

    def switch_to_deploy(self):
        with torch.no_grad():
            self.one.weight += self.two.weight + self.error
            self.one.bias += self.two.bias
        self.two = None

    def fuse(self, first, second):
        """Not what merges: it needs arguments."""
        return first + second


@pytest.mark.parametrize(("error", "merged"), [(0.0, True), (0.1, False)])
def test_a_merge_that_answers_otherwise_is_not_taken(error, merged, capsys):
    network = Network(Branches(error), {}, [0.5] * 3, [0.25] * 3, image_size=SIZE).eval()
    plain, images = network.plain(), torch.rand(2, 3, SIZE, SIZE)
    assert (plain.net.two is None) == merged
    assert ("answers otherwise" in capsys.readouterr().out) == (not merged)
    torch.testing.assert_close(plain(images), network(images).logits)
    assert network.net.two is not None  # the network itself goes on training


# ---- answers that are more than a tensor


@dataclass
class ModelOutput(OrderedDict):
    """As transformers' class of that name: a dict of what is not None, with attributes."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple | None = None

    def __post_init__(self):
        for name in ("loss", "logits", "hidden_states"):
            if (value := getattr(self, name)) is not None:
                OrderedDict.__setitem__(self, name, value)


@dataclass
class Both:
    features: torch.Tensor
    logits: torch.Tensor
    note: list = field(default_factory=list)


Pair = namedtuple("Pair", "features logits")
ANSWERS = {
    "tuple": lambda logits, features: (logits, features),
    "list": lambda logits, features: [logits, features],
    "nested": lambda logits, features: ((None, logits), features),
    "logits": lambda logits, features: {"features": features, "logits": logits},
    "out": lambda logits, features: OrderedDict(aux=features, out=logits),
    "first of a dict": lambda logits, features: {"prediction": logits, "features": features},
    "named tuple": lambda logits, features: Pair(features, logits),
    "dataclass": lambda logits, features: Both(features, logits),
    "model output": lambda logits, features: ModelOutput(logits=logits, hidden_states=(features,)),
}


class Answering(nn.Module):
    """A network whose forward returns what `kind` makes of logits and features; "training" a tuple in training only."""

    def __init__(self, kind):
        super().__init__()
        self.body, self.kind = body(), kind

    def forward(self, images):
        features = images
        for layer in list(self.body)[:-1]:
            features = layer(features)
        logits = self.body.head(features)
        if self.kind == "training":
            return (logits, features) if self.training else logits
        return ANSWERS[self.kind](logits, features)


@pytest.mark.parametrize("kind", [*ANSWERS, "training"])
def test_the_logits_are_found_in_what_a_network_answers(kind):
    network = Network(Answering(kind), {"stage1": "body.second"}, [0.5] * 3, [0.25] * 3, image_size=SIZE)
    images = torch.rand(2, 3, SIZE, SIZE)
    network.record(["stage1", "head:weight"])
    for mode in (True, False):
        outputs = network.train(mode)(images)
        assert isinstance(outputs.logits, torch.Tensor) and outputs.logits.shape == (2, CLASSES)
        assert torch.equal(outputs.features["head:weight"], network.net.body.head.weight)
    plain = network.plain()
    with torch.no_grad():
        assert torch.equal(plain(images), network(images).logits)
        graph = torch.fx.symbolic_trace(plain)
        assert torch.equal(graph(images), plain(images))
        program = torch.export.export(plain, (images,))
        torch.testing.assert_close(program.module()(images), plain(images))


def made(kind):  # a target of a configuration
    return Answering(kind)


@pytest.mark.parametrize("kind", ["tuple", "model output"])
def test_such_a_network_is_trained_and_teaches(kind, data, cfg, tmp_path):
    student = Network(Answering(kind), {"stage1": "body.second"}, [0.5] * 3, [0.25] * 3, image_size=SIZE)
    teacher = Frozen(Network(Answering("training"), {}, [0.5] * 3, [0.25] * 3, image_size=SIZE))
    terms = {
        "ce": {"_target_": "distill.losses.ce.CE", "weight": 1.0},
        "kd": {"_target_": "distill.losses.kd.KD", "temperature": 4.0, "weight": 1.0},
    }
    before = student.net.body.first.weight.clone()
    fit.fit(student, teacher, terms, data, roles.recipe(cfg).changed(0.05, epochs=1), tmp_path / "run")
    assert not torch.equal(student.net.body.first.weight, before)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_classifiers_answer_in_training_and_are_no_heads(name):
    net = torchvision.models.get_model(name, weights=None, num_classes=CLASSES, aux_logits=True, init_weights=False)
    network = Network(net, {}, [0.5] * 3, [0.25] * 3, image_size=96)
    images = torch.rand(2, 3, 96, 96)
    assert heads(net, 96) == ["fc"]
    assert network.eval()(images).logits.shape == (2, CLASSES)
    outputs = answers.logits_of(namedtuple("Outputs", "logits aux")(images, None))
    assert outputs is images


# ---- heads and stages


class HeadFirst(nn.Module):
    """Registers a layer that the logits do not come from directly last, and the one that they do first."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, CLASSES)
        self.body = body()[:-1]
        self.hidden = nn.Linear(8, 8)

    def forward(self, images):
        return self.fc(self.hidden(self.body(images)).relu())


class Matrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.matrix = nn.Linear(3, 8), nn.Parameter(torch.ones(8, CLASSES))

    def forward(self, images):
        return self.hidden(images.mean((2, 3))) @ self.matrix


def test_a_head_is_where_the_logits_come_from():
    assert heads(HeadFirst(), SIZE) == ["fc"]
    assert heads(HeadFirst().requires_grad_(False), SIZE) == ["fc"]
    assert infer_taps(HeadFirst(), SIZE)["pooled"] == "fc:in"
    assert heads(nn.Sequential(body(), nn.BatchNorm1d(CLASSES), nn.Dropout()), SIZE) == ["0.head"]
    assert heads(body(old_weight_norm), SIZE) == heads(body(parametrizations.weight_norm), SIZE) == ["head"]
    assert heads(deit(CLASSES, SIZE, width=12, depth=1), SIZE) == ["heads", "dist_head"]
    network = Network(HeadFirst(), {}, [0.5] * 3, [0.25] * 3, image_size=SIZE).record(["head:weight"])
    assert network.tensors()["head:weight"] is network.net.fc.weight
    assert heads(Matrix(), SIZE) == [] and "pooled" not in infer_taps(Matrix(), SIZE)
    network = Network(Matrix(), {}, [0.5] * 3, [0.25] * 3, image_size=SIZE)
    assert "come from no layer" in error_of(network.record, ["head:weight"])


STAGES = {  # by name: the size of images, and where the last stage is
    "timm": {
        "xcit_nano_12_p16_224": (64, "blocks.11"),
        "vit_tiny_patch16_224": (64, "blocks.11"),
        "swin_tiny_patch4_window7_224": (64, "layers.3:nhwc"),
        "levit_128s": (224, "stages.2"),
        "convit_tiny": (224, "blocks.11"),
        "efficientnet_lite0": (96, "blocks.6"),
        "mobileone_s0": (96, "final_conv"),
        "pit_ti_224": (64, "transformers.2"),
        "mambaout_femto": (96, "stages.3:nhwc"),
        "mixer_s32_224": (64, "blocks.7"),
    },
    "torchvision": {
        "swin_t": (64, "norm:nhwc"),
        "swin_v2_t": (64, "norm:nhwc"),
        "densenet121": (64, "features"),
        "googlenet": (96, "inception5b"),
        "mnasnet0_5": (96, "layers"),
        "regnet_y_400mf": (96, "trunk_output"),
        "efficientnet_v2_s": (96, "features"),
    },
}


@pytest.mark.parametrize(("library", "name"), [(library, name) for library in STAGES for name in STAGES[library]])
@torch.no_grad()
def test_stages_cover_the_depth(library, name):
    if library == "timm":
        pytest.importorskip("timm")
    size, last = STAGES[library][name]
    net = (timm_models if library == "timm" else torchvision_models).classifier(name, CLASSES, size)
    taps = infer_taps(net, size)
    stages = [tap for tap in taps if tap.startswith("stage")]
    assert taps[stages[-1]] == last and len(stages) >= 2
    network = Network(net, taps, [0.5] * 3, [0.25] * 3, image_size=size).eval().record([*stages, "pooled"])
    order = []
    hooks = [
        net.get_submodule(taps[stage].partition(":")[0]).register_forward_hook(
            lambda *_, stage=stage: order.append(stage)
        )
        for stage in stages
    ]
    features = network(torch.rand(2, 3, size, size)).features
    for hook in hooks:
        hook.remove()
    assert list(dict.fromkeys(order)) == stages  # one after the other
    maps = [features[stage].shape for stage in stages if features[stage].dim() == 4]
    assert all(fine[2] >= coarse[2] and fine[2] == fine[3] for fine, coarse in pairwise(maps))
    assert features["pooled"].shape[0] == 2 and features["pooled"].dim() == 2


class Spread(nn.Module):
    """Maps only at its beginning, then layers on a vector's positions: no stages that cover it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.mix = nn.ModuleList(nn.Conv1d(8 + number, 9 + number, 1) for number in range(12))
        self.head = nn.Linear(20, CLASSES)

    def forward(self, images):
        x = self.second(self.first(images)).flatten(2)
        for layer in self.mix:
            x = layer(x)
        return self.head(x.mean(2))


def test_stages_that_end_early_are_refused_where_a_loss_wants_them():
    taps = infer_taps(Spread(), SIZE)
    assert taps == {"pooled": "head:in"}
    network = Network(Spread(), taps, [0.5] * 3, [0.25] * 3, image_size=SIZE, role="teacher")
    text = error_of(network.record, ["stage2"])
    assert "no stages were found that cover Spread" in text and "teacher.taps=" in text
    assert network.record(["pooled"])(torch.rand(2, 3, SIZE, SIZE)).features["pooled"].shape == (2, 20)


# ---- weights that are shared, channels, batches of one


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.third.weight = self.second.weight
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images):
        return self.head(self.third(self.second(self.first(images).relu()).relu()).mean((2, 3)))


def test_shared_weights_are_saved_and_counted_once(tmp_path):
    net, other = Tied(), Tied()
    save_weights(net, tmp_path / "a.safetensors", {})
    load_weights(other, tmp_path / "a.safetensors")
    images = torch.rand(2, 3, SIZE, SIZE)
    assert torch.equal(net(images), other(images)) and other.third.weight is other.second.weight
    plain = Network(net, {}, [0.5] * 3, [0.25] * 3, image_size=SIZE).plain()
    untied = Tied()
    untied.third.weight = nn.Parameter(net.second.weight.clone())
    shared = net.second.weight.numel()
    assert measure.parameters(plain) == measure.parameters(untied) - shared
    assert serialised_bytes(untied) - serialised_bytes(plain.net) == pytest.approx(4 * shared, abs=200)


class Counting(nn.Module):
    """With a state besides its tensors."""

    def __init__(self, state=None):
        super().__init__()
        self.body, self.state = body(), state

    def forward(self, images):
        return self.body(images)

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


@pytest.mark.parametrize("state", [{"calls": 3, "scale": torch.ones(2)}, None, torch.arange(3), "text"])
def test_extra_state_is_saved_and_read(state, tmp_path):
    net = Counting(state)
    save_weights(net, tmp_path / "a.safetensors", {})
    torch.save({"state_dict": net.state_dict()}, tmp_path / "a.pt")
    for file in ("a.safetensors", "a.pt"):
        other = Counting("nothing")
        load_weights(other, tmp_path / file)
        assert str(other.state) == str(state)
        assert torch.equal(other.body.head.weight, net.body.head.weight)
    assert serialised_bytes(net) > 0


def test_extra_state_that_would_have_to_be_unpickled_is_refused(tmp_path):
    text = error_of(save_weights, Counting({"io": io.BytesIO}), tmp_path / "a.safetensors", {})
    assert "_extra_state" in text and "cannot be saved" in text


def test_a_network_for_grey_images_takes_colour_ones():
    network = Network(body(channels=1), {}, [0.2], [0.4], image_size=SIZE).eval()
    images = torch.rand(2, 3, SIZE, SIZE)
    red, green, blue = images.split(1, 1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601
    wanted = network.net((grey - 0.2) / 0.4)
    torch.testing.assert_close(network(images).logits, wanted)
    torch.testing.assert_close(network.plain()(images), wanted)
    torch.testing.assert_close(network.plain()(grey.expand(-1, 3, -1, -1)), wanted)
    assert heads(network.net, SIZE, channels=1) == ["head"]
    assert "student.mean=[0.5]" in error_of(infer_taps, network.net, SIZE)


def test_a_batch_of_one_image_is_refused_where_a_batch_norm_would_see_one_number():
    alone = fake(num_classes=CLASSES, train_size=60, image_size=SIZE, batch_size=1, num_workers=0)
    terms, _ = build_losses({"ce": {"_target_": "distill.losses.ce.CE", "weight": 1.0}})
    net = nn.Sequential(body()[:-1], nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    text = error_of(connect, Network(net, {}, [0.5] * 3, [0.25] * 3), None, terms, alone, 0)
    assert "1 of Sequential" in text and "data.batch_size to 2" in text
    fine = Network(body(), {}, [0.5] * 3, [0.25] * 3)  # its batch norm sees a map of 16 × 16
    assert connect(fine, None, terms, alone, 0) is None


def test_errors_name_the_role_that_the_configuration_gives(data, cfg):
    teacher = build_network(cfg.teacher, CLASSES + 1, SIZE, 0)  # fitted, it is what is trained: the place of a student
    terms, _ = build_losses(cfg.loss)
    text = error_of(connect, teacher, None, terms, data, 0)
    assert "the teacher answers with (2, 6), expected (images, 5)" in text and "set teacher.num_classes" in text
    student = build_network(cfg.student, CLASSES + 1, SIZE, 0)
    assert "the student answers with (2, 6)" in error_of(connect, student, None, terms, data, 0)


def test_folding_leaves_the_original_its_parametrizations():
    network = wrapped(body(parametrizations.weight_norm)).eval()
    plain = network.plain()
    assert not hasattr(plain.net.first, "parametrizations") and type(plain.net.first) is nn.Conv2d
    images = torch.rand(2, 3, SIZE, SIZE)
    torch.testing.assert_close(network(images).logits, plain(images))
    assert "parametrizations.weight.original0" in network.net.first.state_dict()
    assert folded(plain, SIZE) is plain
