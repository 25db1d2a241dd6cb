"""Every network: logits, taps, size, tracing; what it refuses; and what real weights score."""

import inspect
import io
import os
import pickle
import sys
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import get_object, instantiate
from PIL import Image
from torch import nn

from distill.errors import UserError
from distill.networks import timm_models, torchvision_models
from distill.networks.network import Network
from distill.networks.resnet_cifar import PadShortcut, ResNet, resnet
from distill.networks.taps import heads, infer_taps
from distill.networks.vgg_cifar import vgg
from distill.networks.weights import load_weights
from distill.networks.wrn_cifar import wrn

FILES = {file.stem: file for file in sorted(Path(__file__).parents[2].glob("conf/network/*.yaml"))}
OPEN = {"torchvision": "mnasnet0_5", "timm": "resnet10t", "custom": None}  # files that ask for a name
BIG = ("convnext_tiny", "resnet50", "resnet101", "resnet34", "vit_b_16")


def build(file, image_size, classes=10):
    """The network of a conf/network file, wrapped as the toolkit wraps it."""
    described = yaml.safe_load(FILES[file].read_text())
    if file in OPEN:
        described["name"] = OPEN[file]
    taps, mean, std = (described.pop(key) for key in ("taps", "mean", "std"))
    accepted = inspect.signature(get_object(described["_target_"])).parameters
    described["num_classes"] = classes
    if "image_size" in accepted:
        described["image_size"] = image_size
    torch.manual_seed(0)
    net = instantiate(described, _convert_="all")
    return Network(net, taps if taps is not None else infer_taps(net, image_size), mean, std).eval()


def error_of(call, *arguments, **options):
    """The UserError's text, which must be one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights_of(net):
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("file", [file for file in FILES if file != "custom"])
@torch.no_grad()
def test_every_file_gives_logits_and_taps(file):
    if file == "timm":
        pytest.importorskip("timm")
    cifar = "_cifar" in FILES[file].read_text()
    for size in (32,) if file in BIG else (32, 64):
        network = build(file, size)
        taps = list(network.taps)
        assert taps[-1] == "pooled" and len(taps) == (4 if cifar else 5)
        outputs = network.record(taps)(torch.rand(1, 3, size, size))
        assert outputs.logits.shape == (1, 10) and outputs.logits.isfinite().all()
        assert list(outputs.features) == taps
        head = network.net.get_submodule(heads(network.net, size)[0])
        width = head.in_features if isinstance(head, nn.Linear) else head.in_channels
        assert outputs.features["pooled"].shape == (1, width)
        stages = [outputs.features[tap] for tap in taps[:-1]]
        if stages[0].dim() == 4:
            sizes = [stage.shape[-1] for stage in stages]
            assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
            assert sizes[-1] >= (2 if file in ("convnext_tiny", "timm") else 4)
        else:
            assert all(stage.shape == stages[0].shape for stage in stages)
            assert stages[0].shape[1] in (65, 66)  # 8 × 8 patches and the class token


@pytest.mark.parametrize("file", [file for file in FILES if file not in (*OPEN, *BIG)] + ["vit_b_16"])
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_trace_takes_any_batch(file):
    plain = build(file, 32).plain()
    traced = torch.jit.trace(plain, torch.rand(2, 3, 32, 32), check_trace=False)
    for batch in (1, 7):
        images = torch.rand(batch, 3, 32, 32)
        torch.testing.assert_close(traced(images), plain(images), atol=1e-4, rtol=1e-4)


def test_files_are_documented_and_take_imagenet_statistics():
    assert {"resnet20", "resnet8_tiny", "mobilenet", "torchvision", "timm", "custom"} <= set(FILES)
    for file in FILES.values():
        text = file.read_text()
        assert text.startswith("# ") and f"={file.stem}" in text.partition("\n")[0]
        described = yaml.safe_load(text)
        assert described["mean"] == [0.485, 0.456, 0.406] and described["std"] == [0.229, 0.224, 0.225]


# With 10 classes: He et al. 2015 to the last weight; with 100: the CRD benchmark's published counts.
@pytest.mark.parametrize(
    ("file", "classes", "expected"),
    [
        ("resnet20", 10, 269_722),
        ("resnet32", 10, 464_154),
        ("resnet44", 10, 658_586),
        ("resnet56", 10, 853_018),
        ("resnet8x4", 100, 1_233_540),
        ("resnet32x4", 100, 7_433_860),
        ("wrn_16_2", 100, 703_284),
        ("wrn_40_2", 100, 2_255_156),
        ("vgg8", 100, 3_965_028),
        ("vgg13", 100, 9_462_180),
    ],
)
def test_cifar_networks_have_the_published_number_of_weights(file, classes, expected):
    assert weights_of(build(file, 32, classes).net) == expected


def test_option_a_takes_every_second_pixel_and_pads_channels():
    x = torch.arange(2 * 16, dtype=torch.float32).view(1, 2, 4, 4)
    out = PadShortcut(2, 5, stride=2)(x)
    assert out.shape == (1, 5, 2, 2)
    assert out[0, 1].tolist() == [[0, 2], [8, 10]] and out[0, 2].tolist() == [[16, 18], [24, 26]]
    assert out[0, [0, 3, 4]].abs().sum() == 0


@torch.no_grad()
def test_a_block_without_its_residual_is_its_shortcut():
    for net in (resnet(14, 10).eval(), wrn(16, 2, 10).eval()):
        first, second = net.layer2
        for block in (first, second):
            block.conv2.weight.zero_()  # and the bn2 behind it, new, keeps zeros
        x = torch.randn(2, first.conv1.in_channels, 8, 8)
        if isinstance(net, ResNet):
            assert torch.equal(first(x), first.shortcut(x).relu())
            y = torch.randn(2, second.conv1.in_channels, 4, 4)
            assert torch.equal(second(y), y.relu())
        else:  # before the activation: the identity is not rectified, the projection's input is
            assert torch.equal(first(x), first.shortcut(first.bn1(x).relu()))
            y = torch.randn(2, second.conv1.in_channels, 4, 4)
            assert torch.equal(second(y), y)


@torch.no_grad()
def test_taps_see_tensors_that_no_activation_has_overwritten():
    images = torch.rand(2, 3, 64, 64)
    for net, conv, norm in (
        (torchvision_models.classifier("resnet18", 10, 64), "conv1", "bn1"),
        (torchvision_models.classifier("mobilenet_v2", 10, 64), "features.0.0", "features.0.1"),
        (resnet(8, 10), "conv1", "bn1"),
        (wrn(10, 1, 10), "conv1", "layer1.0.bn1"),
        (vgg(8, 10, 64), "blocks.0.0", "blocks.0.1"),
    ):
        network = Network(net, {}, [0.5] * 3, [0.5] * 3).eval().record([norm])
        modules = dict(net.named_modules())
        expected = modules[norm](modules[conv](network.normalize(images)))
        assert expected.min() < 0
        assert torch.equal(network(images).features[norm], expected)


@torch.no_grad()
def test_inferred_taps_are_those_a_person_would_write():
    for file in (
        "resnet18",
        "mobilenet",
        "efficientnet_b0",
        "mobilenet_v3_small",
        "shufflenet_v2",
        "convnext_tiny",
    ):
        network = build(file, 64)
        by_hand = dict(network.taps)
        inferred = infer_taps(network.net, 64)
        assert [inferred[f"stage{n}"] for n in (1, 2, 3)] == [by_hand[f"stage{n}"] for n in (1, 2, 3)]
        images = torch.rand(1, 3, 64, 64)
        last = network.record(["stage4"])(images).features["stage4"]
        assert torch.equal(network.record([inferred["stage4"]])(images).features[inferred["stage4"]], last)


def test_inferred_taps_of_a_transformer_are_its_quarters_and_the_dry_run_leaves_no_trace():
    block = nn.TransformerEncoderLayer
    encoder = nn.TransformerEncoder(block(8, 2, 16, batch_first=True), 8, enable_nested_tensor=False)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.norm = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8)
            self.encoder, self.head = encoder, nn.Linear(8, 10)

        def forward(self, x):
            return self.head(self.encoder(self.norm(self.patches(x)).flatten(2).transpose(1, 2)).mean(1))

    net = Tokens()
    net.norm.eval()
    taps = infer_taps(net, 32)
    assert taps == {
        "stage1": "encoder.layers.1",
        "stage2": "encoder.layers.3",
        "stage3": "encoder.layers.5",
        "stage4": "encoder.layers.7",
        "pooled": "head:in",
    }
    assert net.training and net.encoder.training and not net.norm.training
    assert not any(module._forward_hooks for module in net.modules())


def test_small_images_keep_pretrained_kernels_where_the_shape_allows():
    small = torchvision_models.classifier("mobilenet_v2", 10, 32).state_dict()
    large = torchvision_models.classifier("mobilenet_v2", 10, 224).state_dict()
    assert {key: value.shape for key, value in small.items()} == {key: v.shape for key, v in large.items()}
    net = torchvision_models.classifier("resnet18", 10, 32)
    assert net.conv1.weight.shape == (64, 3, 3, 3) and isinstance(net.maxpool, nn.Identity)
    assert net.layer2[0].conv1.stride == (2, 2)
    assert torchvision_models.classifier("resnet18", 10, 65).conv1.weight.shape == (64, 3, 7, 7)


def test_what_the_cifar_family_refuses():
    assert "6n + 2" in error_of(resnet, 18, 10) and "18" in error_of(resnet, 18, 10)
    assert "three" in error_of(resnet, 8, 10, widths=(16, 32))
    assert "'C'" in error_of(resnet, 8, 10, shortcut="C")
    assert "narrow" in error_of(resnet, 8, 10, widths=(8, 16, 32))
    assert resnet(8, 10, widths=(8, 16, 32), shortcut="B")(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert "6n + 4" in error_of(wrn, 20, 2, 10)
    assert "8 or 13" in error_of(vgg, 16, 10, 32)
    assert "at least 8 px" in error_of(vgg, 8, 10, 4)


def test_what_torchvision_refuses():
    classifier = torchvision_models.classifier
    assert "nearest: resnet50" in error_of(classifier, "resnet5O", 10, 32)
    assert "nearest" in error_of(classifier, "fasterrcnn_resnet50_fpn", 10, 224)
    assert "IMAGENET1K_V1" in error_of(classifier, "resnet18", 10, 32, weights="V9")
    assert "take images of 224 px, not 32" in error_of(classifier, "vit_b_16", 10, 32, weights="DEFAULT")
    assert "not a multiple" in error_of(classifier, "vit_b_16", 10, 100)
    assert "cannot take RGB images of 8 px" in error_of(classifier, "alexnet", 10, 8)
    assert "cannot take RGB images of 32 px" in error_of(classifier, "maxvit_t", 10, 32)


def test_torchvision_weights_offline_name_the_way_out(tmp_path, monkeypatch):
    def no_network(*arguments, **options):
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    message = error_of(torchvision_models.classifier, "resnet18", 10, 224, weights="DEFAULT")
    assert str(tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth") in message
    assert "checkpoint=PATH" in message


class Payload:
    """Unpickled, it makes a file: the proof that code ran."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_torchvision_weights_in_its_folder_are_used_and_never_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "shufflenetv2_x0.5-f707e7126e.pth"
    file.parent.mkdir(parents=True)
    torch.manual_seed(1)
    original = torchvision_models.classifier("shufflenet_v2_x0_5", 1000, 224)
    torch.save(original.state_dict(), file)
    net = torchvision_models.classifier("shufflenet_v2_x0_5", 10, 32, weights="DEFAULT")
    assert torch.equal(net.conv1[0].weight, original.conv1[0].weight) and net.conv1[0].stride == (1, 1)
    assert net.fc.weight.shape == (10, 1024)
    whole = torchvision_models.classifier("shufflenet_v2_x0_5", 1000, 224, weights="IMAGENET1K_V1")
    assert torch.equal(whole.fc.weight, original.fc.weight)

    file.write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol=2))
    assert str(file) in error_of(torchvision_models.classifier, "shufflenet_v2_x0_5", 10, 32, weights="DEFAULT")
    assert not (tmp_path / "ran").exists()


def test_the_weights_of_a_vit_take_images_of_another_size(monkeypatch):
    make = torchvision_models.get_model
    torch.manual_seed(0)
    original = make("vit_b_32", weights=None)
    monkeypatch.setattr(
        torchvision_models, "get_model", lambda name, weights, **o: original if weights else make(name, **o)
    )
    net = torchvision_models.classifier("vit_b_32", 10, 96, weights="DEFAULT").eval()
    assert net.encoder.pos_embedding.shape == (1, 1 + 3 * 3, 768) and net(torch.rand(2, 3, 96, 96)).shape == (2, 10)
    assert torch.equal(net.conv_proj.weight, original.conv_proj.weight)
    assert torch.equal(net.encoder.pos_embedding[:, 0], original.encoder.pos_embedding[:, 0])
    mean = original.encoder.pos_embedding[:, 1:].mean()
    torch.testing.assert_close(net.encoder.pos_embedding[:, 1:].mean(), mean, rtol=0, atol=2e-3)


def test_a_pretrained_squeezenet_gets_a_new_convolution_as_head():
    net = torchvision_models.classifier("squeezenet1_1", 1000, 64)
    torchvision_models._fit_heads(net, 7, 64)
    assert net.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 7)


def test_timm(monkeypatch):
    timm = pytest.importorskip("timm")
    network = timm_models.classifier("vit_tiny_patch16_224", 7, 64)
    assert network.eval()(torch.rand(2, 3, 64, 64)).shape == (2, 7)
    assert "nearest: resnet18" in error_of(timm_models.classifier, "resnet1B", 10, 32)
    assert "cannot take RGB images of 8 px" in error_of(timm_models.classifier, "vit_tiny_patch16_224", 10, 8)

    def no_network(*arguments, **options):
        raise OSError("We cannot find the requested files\nPlease check your connection")

    monkeypatch.setattr(timm, "create_model", no_network)
    assert "checkpoint=PATH" in error_of(timm_models.classifier, "resnet18", 10, 32, pretrained=True)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in error_of(timm_models.classifier, "resnet18", 10, 32)


IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
IMAGENETTE = torch.tensor([0, 217, 482, 491, 497, 566, 569, 571, 574, 701])  # its classes among ImageNet's


def pictures(archive, every=1):
    """uint8 images (N, 3, H, W) and labels (N,) of each `every`th picture of an archived ImageFolder."""
    images, folders = [], []
    with tarfile.open(archive) as tar:
        for number, member in enumerate(member for member in tar if member.isfile()):
            if number % every == 0:
                picture = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGB")
                images.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
                folders.append(member.name.split("/")[-2])
    classes = sorted(set(folders))
    return torch.stack(images), torch.tensor([classes.index(folder) for folder in folders])


@torch.no_grad()
def answers(net, images, mean, std, batch):
    network = Network(net, {}, mean, std).eval()
    return torch.cat([network(part / 255).logits for part in images.split(batch)])


@pytest.fixture
def shared_data():
    folder = os.environ.get("DISTILL_SHARED_DATA")
    if not folder:
        pytest.skip("DISTILL_SHARED_DATA is not set: the folder of the real images and weights")
    return Path(folder)


def test_cifar_weights_score_what_is_known(shared_data):
    images, labels = pictures(shared_data / "cifar10" / "test.tar.xz")
    for depth, every, expected in ((20, 1, 8_103), (32, 20, 404), (56, 20, 415)):
        net = resnet(depth, 10)
        load_weights(net, shared_data / "cifar10" / "weights" / f"resnet{depth}.safetensors")
        correct = answers(net, images[::every], *IMAGENET, 500).argmax(1) == labels[::every]
        assert correct.sum().item() == pytest.approx(expected, abs=2)  # two near ties may fall either way


@pytest.mark.parametrize(  # of 125 images; all 1,000 give the known 70.6 and 98.1 %, 61.0 and 95.7 %
    ("name", "file", "statistics", "of_1000", "of_10"),
    [
        ("mobilenet_v2", "mobilenet_v2_1.0_224", ([0.5] * 3, [0.5] * 3), 91, 124),
        ("squeezenet1_1", "squeezenet1_1", IMAGENET, 68, 116),
    ],
)
def test_imagenet_weights_score_what_is_known(shared_data, name, file, statistics, of_1000, of_10):
    images, labels = pictures(shared_data / "imagenette-subset" / "val.tar.xz", every=8)
    net = torchvision_models.classifier(name, 1000, 224)
    load_weights(net, shared_data / "imagenet-weights" / f"{file}.safetensors")
    logits = answers(net, images, *statistics, 25)
    correct = (logits.argmax(1) == IMAGENETTE[labels]).sum().item()
    among_ten = (logits[:, IMAGENETTE].argmax(1) == labels).sum().item()
    assert (correct, among_ten) == pytest.approx((of_1000, of_10), abs=1)


def test_a_squeezenet_can_answer_below_zero():
    images = torch.rand(4, 3, 64, 64)
    for relu_head, below in ((True, False), (False, True)):
        torch.manual_seed(0)
        net = torchvision_models.squeezenet("squeezenet1_1", 10, 64, relu_head=relu_head).eval()
        with torch.no_grad():
            logits = net(images)
        assert logits.shape == (4, 10)
        assert bool((logits < 0).any()) == below
