"""data.image_size=[HEIGHT,WIDTH]: pixels, networks, losses, a whole run; and squares are what they were."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sets import fake, imagefolder, webdataset
from test_augment import differing, torchvision_op
from test_data_shards import make_shards
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

import distill
from benchmarks.losses import NAMES, OTHER_STUDENTS, Step, compose, networks
from distill.data import policies
from distill.data.augment import CenterCrop, Chain, Cutout, RandomResizedCrop, ShiftFlip, covering
from distill.data.color import ColorJitter
from distill.data.mix import CutMix, Mixup
from distill.data.policies import LEVELS, OPERATIONS, RandAugment, TrivialAugment
from distill.errors import UsageError, UserError
from distill.networks import deit, timm_models, torchvision_models
from distill.networks.network import Network
from distill.networks.taps import infer_taps
from distill.networks.weights import load_weights, save_weights
from distill.runs.student import read_description
from distill.types import alike, checked_size, grid, in_px, sides

SIZE = (16, 24)


def photos(root: Path, *shapes: tuple[int, int], each: int = 8) -> str:
    """Two classes of images of these heights and widths in turn."""
    for label in ("a", "b"):
        (root / label).mkdir(parents=True)
        for number in range(each):
            shape = shapes[number % len(shapes)]
            pixels = np.random.default_rng([number, ord(label)]).integers(256, size=(*shape, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{number}.png")
    return str(root)


@pytest.fixture(scope="module")
def data():
    return fake(16, 0, num_classes=10, train_size=160, image_size=[*SIZE])


# ---- the size --------------------------------------------------------------------------------------------


def test_a_size_is_a_number_or_two():
    assert checked_size(32) == checked_size([32, 32]) == checked_size((32, 32)) == 32
    assert checked_size([16, 24]) == (16, 24) == sides((16, 24)) and sides(32) == (32, 32)
    assert [in_px(32), in_px((16, 24))] == ["32 px", "16 × 24 px"]


@pytest.mark.parametrize("size", [[32], [0, 32], "abc", [32, 48, 3], 0, -1, True, 32.0, [32, 48.0], [8193, 32], {}])
def test_another_size_is_refused_before_anything_is_read(size):
    for read in (
        lambda: fake(4, 0, image_size=size),
        lambda: imagefolder("nowhere", 4, 0, image_size=size),
        lambda: imagefolder("nowhere", 4, 0, pack=size),
        lambda: webdataset("nowhere", 4, 0, image_size=size),
        lambda: webdataset("nowhere", 4, 0, pack=size),
    ):
        with pytest.raises(UsageError, match=r"^data\.(image_size|pack)=.*: expected [^\n]*$"):
            read()


@pytest.mark.parametrize("word", ["[32]", "[0,32]", "abc", "[32,48,3]"])
@pytest.mark.parametrize("group", ["fake", "imagefolder", "webdataset"])
def test_the_command_line_says_so_in_one_line(train, tmp_path, capfd, group, word):
    where = {"imagefolder": ["data.root=nowhere"], "webdataset": ["data.train=nowhere"]}.get(group, [])
    assert train(f"data={group}", f"data.image_size={word}", *where, "student=resnet8_tiny", cwd=tmp_path) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: data.image_size=") and "expected" in error[0]


def test_squares_keep_their_keys(data):
    """The constant is from before there were two numbers."""
    for size in (16, [16, 16]):
        square = fake(16, 0, train_size=40, image_size=size)
        assert type(square.image_size) is int and type(square.train.image_size) is int
        assert square.fingerprint == "1e045297580a49238b812bf5fdb5b1cb01f51de4c9ba9b013e9914a67deb4340"
    assert data.image_size == SIZE
    other = fake(16, 0, train_size=160, image_size=SIZE[::-1])
    assert data.fingerprint not in (square.fingerprint, other.fingerprint)


def test_a_square_given_by_two_numbers_is_fitted_once(train, tmp_path):
    words = ["data=fake", "data.train_size=64", "data.batch_size=16", "teacher=resnet8_tiny", "student=resnet8_tiny"]
    words += ["stages=[teacher]", "teacher.fit.epochs=1", "trainer.accelerator=cpu"]
    for number, size in enumerate((16, "[16,16]")):
        assert train(*words, f"data.image_size={size}", f"name=run{number}", cwd=tmp_path) == 0
    assert len(list((tmp_path / "outputs" / "fits").glob("teacher-*"))) == 1


# ---- pixels ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, resized", [
    ((60, 200), 55), ((200, 60), 74), ((96, 128), [55, 74]), ((100, 110), [67, 74]), ((110, 100), [81, 74]),
])  # fmt: skip
def test_evaluation_covers_the_size_and_cuts_out_its_middle(tmp_path, shape, resized):
    """55 × 74 px are covered, 8/7 of 48 × 64."""
    data = imagefolder(photos(tmp_path, shape), 4, 0, image_size=[48, 64])
    seen = next(iter(data.test_loader())).images
    photo = data.test.images[torch.tensor([0])][0]
    assert photo.shape == (3, *shape) and seen.shape[1:] == (3, 48, 64)
    theirs = v2.Compose([v2.Resize(resized, antialias=True), v2.CenterCrop((48, 64))])
    assert torch.equal((seen[0] * 255).round().byte(), theirs(photo))


@pytest.mark.parametrize("shape", [(60, 60), (33, 97), (97, 33), (224, 225), (301, 222)])
@pytest.mark.parametrize("size", [16, 48, 224])
def test_squares_are_resized_as_ever(shape, size):
    images = [torch.randint(256, (3, *shape), dtype=torch.uint8)]
    short = CenterCrop().covered(size)[0]
    assert covering(shape, (short, short)) == [*F.resize(images[0], [short]).shape[1:]]
    theirs = v2.Compose([v2.Resize(short, antialias=True), v2.CenterCrop(size)])(images[0])
    assert torch.equal(CenterCrop()(images, torch.empty(1, 0), size)[0], theirs)


def test_training_crops_parts_of_the_sets_shape(tmp_path):
    data = imagefolder(photos(tmp_path, (90, 133), (160, 70)), 4, 0, image_size=[48, 64])
    assert next(iter(data.train_loader(0))).images.shape == (4, 3, 48, 64)
    images, uniforms = data.train.images[torch.arange(6)], torch.rand(6, RandomResizedCrop.count)
    crop = RandomResizedCrop(flip=False)
    boxes = crop.boxes(torch.tensor([image.shape[1:] for image in images]), uniforms, 64 / 48)
    theirs = [F.resized_crop(image, *box, [48, 64]) for image, box in zip(images, boxes.tolist(), strict=True)]
    assert torch.equal(crop(images, uniforms, (48, 64)), torch.stack(theirs))

    boxes = crop.boxes(torch.tensor([[300, 400]]).expand(2000, 2), torch.rand(2000, RandomResizedCrop.count), 64 / 48)
    stretched = boxes[:, 3] / boxes[:, 2] / (64 / 48)  # how much wider things become
    assert 0.74 < stretched.min() < 0.76 and 1.32 < stretched.max() < 1.35


def test_small_images_are_kept_at_their_own_size(tmp_path):
    own = imagefolder(photos(tmp_path / "own", (20, 32)), 4, 0, store=str(tmp_path / "store"))
    again = imagefolder(str(tmp_path / "own"), 4, 0, store=str(tmp_path / "store"))
    assert own.image_size == again.image_size == (20, 32) and torch.equal(own.train.images, again.train.images)
    assert next(iter(own.train_loader(0))).images.shape[1:] == (3, 20, 32)
    resized = imagefolder(str(tmp_path / "own"), 4, 0, image_size=[16, 24], store=str(tmp_path / "store"))
    assert resized.train.images.shape[1:] == (3, 16, 24)
    assert imagefolder(photos(tmp_path / "mixed", (20, 32), (32, 20)), 4, 0).image_size == 224


def test_packs_are_of_any_shape(tmp_path):
    root, store = photos(tmp_path / "set", (90, 133), (160, 70)), str(tmp_path / "store")
    for pack, covered in (([64, 96], (55, 74)), (80, (55, 74)), ([50, 64], (48, 64))):
        data = imagefolder(root, 4, 0, image_size=[48, 64], pack=pack, store=store)
        assert data.test.images.pixels.shape[2:] == sides(checked_size(pack))
        assert data.test.transform.covered(data.image_size) == covered
        for loader in (data.train_loader(0), data.test_loader()):
            assert next(iter(loader)).images.shape[1:] == (3, 48, 64)
    with pytest.raises(UsageError, match=r"data.pack=64: must be at least data.image_size \(48 × 72 px\)"):
        imagefolder(root, 4, 0, image_size=[48, 72], pack=64, store=store)


def test_shards(tmp_path):
    make_shards(tmp_path / "train", 2, 6, side=80)
    data = webdataset(f"{tmp_path}/train-*.tar", 4, 0, image_size=[32, 48], val_fraction=0.2)
    assert data.image_size == (32, 48) and next(iter(data.train_loader(0))).images.shape[1:] == (3, 32, 48)
    assert next(iter(data.test_loader())).images.shape[1:] == (3, 32, 48)


@pytest.mark.parametrize("steps", [
    (ShiftFlip(),), (Cutout(),), (ColorJitter(),), (RandAugment(),), (TrivialAugment(),), (RandomResizedCrop(),),
    (ShiftFlip(), Mixup(), CutMix()),
])  # fmt: skip
def test_augmentations_keep_the_shape_and_do_not_mind_the_batch(steps):
    train = fake(16, 0, train_size=40, image_size=SIZE, augment={str(n): step for n, step in enumerate(steps)}).train
    assert isinstance(train.transform, Chain)
    rows = torch.arange(8)
    together = train[rows, 5].images
    assert together.shape == (8, 3, *SIZE) and together.min() >= 0 and together.max() <= 1
    alone = torch.cat([train[row, 5].images for row in rows.split(1)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_equal_torchvisions(name):
    images = F.resize(torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8), [24, 40])
    limits = {"shear": 0.3, "translate_x": 18, "translate_y": 11, "rotate": 30, "blend": 0.9, "posterize": 4}
    which = torch.full((64,), (OPERATIONS.index(name) + 0.5) / len(OPERATIONS))
    level = 9 / LEVELS
    made = policies._apply(images, which, torch.full((64,), level), torch.ones(64), limits)
    if name in policies.GEOMETRIC:
        strength = level * limits.get(name, limits.get(name.split("_")[0]))
        expected = torch.stack([torchvision_op(image, name, strength) for image in images])
        assert differing(made, expected) <= 0.01
    assert made.shape == images.shape


def test_crops_of_a_batch_equal_crops_of_each():
    images = F.resize(torch.randint(256, (32, 3, 8, 8), dtype=torch.uint8), [20, 44])
    numbers, crop = torch.rand(32, RandomResizedCrop.count), RandomResizedCrop(scale=(0.1, 1.0))
    batchwise, exact = crop(images, numbers, SIZE), crop(list(images.double()), numbers, SIZE)
    assert batchwise.shape == (32, 3, *SIZE)
    assert (batchwise - exact).abs().max() < 1.001


# ---- networks --------------------------------------------------------------------------------------------


def test_a_map_has_the_images_shape():
    assert all(alike(side, side, (32, 32)) for side in range(1, 40))
    assert not any(alike(side, side + 1, (32, 32)) or alike(side + 1, side, (32, 32)) for side in range(1, 40))
    for stride in (1, 2, 3, 4, 8, 16, 32):
        assert alike(160 // stride, 224 // stride, (160, 224)) and alike(
            -(-160 // stride), -(-224 // stride), (160, 224)
        )
    assert not alike(14, 14, (160, 224)) and not alike(14, 10, (160, 224))
    assert [grid(count, (32, 32)) for count in (16, 17, 24, 25)] == [(4, 4), (4, 4), (4, 4), (5, 5)]
    assert [grid(count, SIZE) for count in (24, 25, 26, 5)] == [(4, 6), (4, 6), (4, 6), (0, 0)]


def test_stages_and_stems_of_networks_that_are_not_described():
    net = torchvision_models.classifier("resnet18", 5, (48, 96))
    assert net.conv1.kernel_size == (3, 3)  # as for 48 px
    network = Network(net, infer_taps(net, (48, 96)), [0.5] * 3, [0.5] * 3, (48, 96)).eval()
    assert [*network.taps] == ["stage1", "stage2", "stage3", "stage4", "pooled"]
    shapes = [
        tuple(value.shape[2:]) for value in network.record(network.taps)(torch.rand(1, 3, 48, 96)).features.values()
    ]
    assert shapes == [(48, 96), (24, 48), (12, 24), (6, 12), ()]
    assert torchvision_models.classifier("resnet18", 5, (96, 128)).conv1.kernel_size == (7, 7)
    net = torchvision_models.classifier("swin_t", 5, (64, 96))  # maps (N, H, W, C)
    assert infer_taps(net, (64, 96))["stage1"].endswith(":nhwc")


def test_tokens_are_the_map_that_the_image_is_cut_into():
    pytest.importorskip("timm")
    net = timm_models.classifier("vit_tiny_patch16_224", 5, (64, 96))
    network = (
        Network(net, infer_taps(net, (64, 96)), [0.5] * 3, [0.5] * 3, (64, 96)).eval().record(["stage4", "pooled"])
    )
    tokens = {}
    net.blocks[-1].register_forward_hook(lambda module, inputs, output: tokens.update(last=output))
    maps = network(torch.rand(2, 3, 64, 96)).features["stage4"]
    assert maps.shape == (2, 192, 4, 6) and tokens["last"].shape == (2, 1 + 24, 192)
    assert torch.equal(maps[:, :, 1, 2], tokens["last"][:, 1 + 6 + 2])


def test_tokens_that_are_no_such_map_are_refused():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows, self.head = nn.Linear(24, 4), nn.Linear(4, 5)

        def forward(self, images):
            return self.head(self.rows(images.mean(1)).mean(1))

    network = Network(Tokens(), {"stage1": "rows"}, [0.5] * 3, [0.5] * 3, SIZE).record(["stage1"])
    with pytest.raises(
        UserError, match="'stage1' answers with 16 tokens, in which no grid of the shape of images of 16 × 24"
    ):
        network(torch.rand(2, 3, *SIZE))


def test_position_embeddings_of_squares_are_interpolated(tmp_path):
    """By timm's own reference."""
    timm = pytest.importorskip("timm")
    from timm.layers import resample_abs_pos_embed

    square = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64)
    save_weights(square, tmp_path / "square.safetensors", {})
    other = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=(64, 96))
    load_weights(other, tmp_path / "square.safetensors", image=(64, 96))
    expected = resample_abs_pos_embed(square.pos_embed, [4, 6])
    torch.testing.assert_close(other.pos_embed, expected)


@pytest.mark.parametrize("make", [
    lambda: deit.deit(5, SIZE), lambda: torchvision_models.classifier("vit_b_16", 5, (64, 96)),
])  # fmt: skip
def test_networks_that_need_squares_say_so(make):
    with pytest.raises(UserError, match=r"takes square images only, not \d+ × \d+ px: give data.image_size one number"):
        make()


# ---- losses ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cfg():
    return compose("teacher=resnet8", "student=resnet8_tiny")


@pytest.fixture(scope="module")
def pair(cfg, data):
    return networks(cfg, data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "deit"])  # its student needs squares
def test_every_loss_teaches(name, cfg, pair, data, tmp_path):
    if name in OTHER_STUDENTS:
        save_weights(pair[1].network.net, tmp_path / "teacher.safetensors", {})
        words = [word.format(teacher=tmp_path / "teacher.safetensors") for word in OTHER_STUDENTS[name]]
        cfg = compose("teacher=resnet8", *words)
    step = Step(cfg, [name], *networks(cfg, data), data)
    total = step.total(data.train[torch.arange(16), 0])
    total.backward()
    gradients = [parameter.grad for parameter in step.student.parameters() if parameter.grad is not None]
    assert total.isfinite() and gradients and all(gradient.isfinite().all() for gradient in gradients)


# ---- a run -----------------------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")
def test_a_run_from_end_to_end(train, tmp_path):
    words = ["data=fake", "data.image_size=[16,24]", "data.train_size=96", "data.batch_size=16", "name=run"]
    words += ["teacher=resnet8_tiny", "student=resnet8_tiny", "loss=[ce,kd,at]", "export=[torchscript,onnx]"]
    words += ["compress=dynamic_int8", "trainer.max_epochs=1", "trainer.accelerator=cpu"]
    assert train(*words, cwd=tmp_path) == 0
    folder = tmp_path / "outputs" / "run"
    rows = {row["name"]: row for row in json.loads((folder / "report.json").read_text())["rows"]}
    assert {"student.pt", "student.onnx", "student-dynamic_int8.pt", "student-dynamic_int8.onnx"} <= rows.keys()
    assert rows["student"]["macs"] == rows["student.onnx"]["macs"] > 0

    images = torch.rand(3, 3, *SIZE)
    student = distill.load_student(folder)
    with torch.no_grad():
        logits = student(images)
        torch.testing.assert_close(
            torch.jit.load(folder / "export" / "student.pt")(images), logits, rtol=1e-3, atol=1e-3
        )
    assert read_description(folder / "student.safetensors")["image_size"] == SIZE
    readme = (folder / "export" / "README.md").read_text()
    assert "float32 (N, 3, 16, 24)" in readme and "its middle 16 × 24 px" in readme


@pytest.mark.parametrize(
    "size", ["[16]", "[16,0]", "[16,24,3]", "[16,9000]", "[16,24.0]", "true", "null", '"16"', "{}"]
)
def test_a_students_file_says_a_size_that_makes_sense(tmp_path, size):
    described = {"network": '{"a": 1}', "classes": '["a"]'}
    save_weights(nn.Linear(1, 1), tmp_path / "odd.safetensors", {**described, "image_size": size})
    with pytest.raises(UserError, match="is damaged: what it says of its image_size can't be read"):
        read_description(tmp_path / "odd.safetensors")
