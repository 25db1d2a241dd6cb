"""export.NAME.resize=true: the file makes of a photo of any size what the toolkit makes of it, before its network."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx.parser import parse_model
from photos import photos, program, says_what_the_toolkit_says
from sets import fake
from torch import nn

from distill import export as exporting
from distill.compress import flows
from distill.data.augment import CenterCrop
from distill.data.files import read, tensor
from distill.data.prepare import Preparation
from distill.errors import UserError
from distill.export import deploy, onnx, resize, torchscript
from distill.report.tables import Row
from distill.runtimes.artifact import Artifact, describe

SIZE, SHORT, CLASSES = 16, 19, 4
EXPORTERS = {"onnx": onnx, "torchscript": torchscript}
# height and width: wide, high, odd, smaller than what is wanted, lines, longer than 32 times their short side, nearly
# the network's own size, and its short side's
SHAPES = [(60, 93), (93, 60), (224, 225), (7, 5), (1, 1), (1, 100), (900, 3), (12, 700), (16, 17), (17, 16), (19, 19)]
SETS = {  # (the network's size, how it is prepared, what its metadata says)
    "photos": (SIZE, Preparation(SIZE), {"short_side": SHORT}),
    "not squares": ((16, 28), Preparation((16, 28)), {"covered": [19, 32]}),
    "packed": (SIZE, Preparation(SIZE, 20 / 16, 25), {"short_side": 20, "pack": [25, 25]}),
    "small": (SIZE, Preparation(SIZE, None), {}),
}


class Pixels(nn.Module):
    """Its answer is what it was given."""

    def forward(self, images):
        return images.flatten(1) * 255


def pixels_of(name: str, folder: Path, kind: str) -> list[Artifact]:
    """Files that answer with the pixels that they make of a photo, in levels of 255; of ONNX without torch.onnx."""
    size, _, said = SETS[kind]
    example = torch.rand(2, 3, *((size, size) if isinstance(size, int) else size))
    if name == "torchscript":
        return torchscript.export(Pixels().eval(), example, folder / "net", {"input": said}, resize=True)
    height, width = example.shape[2:]
    model = parse_model(
        f"""<ir_version: 10, opset_import: ["": 18]>
        pixels (float[batch, 3, {height}, {width}] {resize.PREPARED}) => (float[batch, n] logits) {{
            one = Constant <value_float = 255.0> ()
            levels = Mul ({resize.PREPARED}, one)
            logits = Flatten (levels)
        }}"""
    )
    described = resize.described_with(describe(example, {"input": said}), True)
    resize.put_before(model, resize.cuts(described["input"]))
    (folder / "net.onnx").write_bytes(model.SerializeToString())
    return onnx.reload(folder / "net")


def noise(height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8"""
    return np.random.default_rng(height * width).integers(256, size=(height, width, 3)).astype(np.uint8)


def furthest(file: Artifact, prepared: Preparation, images: list[np.ndarray]) -> float:
    """Levels of 255 between what a file makes of an image and what the toolkit makes of it."""
    found = [file.run(tensor(image)[None].float() / 255)[0] for image in images]
    expected = [prepared(image).flatten() * 255 for image in images]
    return max((one - other).abs().max().item() for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("name", EXPORTERS)
def test_a_file_makes_of_every_photo_what_the_toolkit_makes_of_it(tmp_path, name, kind):
    """But for the toolkit's rounding to whole levels, once for each side of each resize."""
    images = [noise(*shape) for shape in SHAPES] + [read(photo) for photo in photos(tmp_path)]
    _, prepared, _ = SETS[kind]
    for file in pixels_of(name, tmp_path, kind):
        assert furthest(file, prepared, images) <= (2.2 if prepared.pack else 1.1), file.path.name


MUTANTS = [
    ("photos", "_CUT", "antialias = 1, exclude_outside = 1", "antialias = 0"),
    ("photos", "_CUT", "half_pixel", "asymmetric"),
    ("small", "_CUT", "exclude_outside = 1", "exclude_outside = 0"),
    ("photos", "_CUT", "grown{n} = Max (covered{n}, other{n})", "grown{n} = Identity (covered{n})"),
    ("photos", "_CUT", "every{n} = ReduceMin", "every{n} = ReduceMax"),
    ("photos", "_MIDDLE", "start{n} = Div (even{n}, two)", "start{n} = Sub (down{n}, half{n})"),
    ("photos", "_MIDDLE", "even{n} = Add (down{n}, odd{n})", "even{n} = Identity (down{n})"),
]


@pytest.mark.parametrize(("kind", "part", "right", "wrong"), MUTANTS)
def test_what_is_wrong_by_a_pixel_would_be_seen(tmp_path, monkeypatch, kind, part, right, wrong):
    """Not antialiased, borders repeated, out of place by one, out of shape, one side taken for both …"""
    _, prepared, _ = SETS[kind]
    images, text = [noise(*shape) for shape in SHAPES], getattr(resize, part)
    assert right in text and furthest(*pixels_of("onnx", tmp_path, kind), prepared, images) <= 1.1
    monkeypatch.setattr(resize, part, text.replace(right, wrong))
    assert furthest(*pixels_of("onnx", tmp_path, kind), prepared, images) > 3


def test_a_file_that_resizes_otherwise_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(resize, "_CUT", resize._CUT.replace("half_pixel", "asymmetric"))
    with pytest.raises(UserError, match=r"net.onnx is not kept: .*otherwise than the network"):
        onnx.export(Pixels().eval(), torch.rand(2, 3, SIZE, SIZE), tmp_path / "net", {}, resize=True)
    assert not list(tmp_path.iterdir())


# Networks, float and int8


@pytest.fixture(scope="module")
def nets() -> dict[str, dict[str, nn.Module]]:
    torch.manual_seed(0)
    head = nn.Linear(64, CLASSES)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), head).eval()
    head.weight.data *= 20
    small, images = {}, torch.rand(64, 3, SIZE, SIZE)
    for flow in ("onnx", "fx"):
        prepared = flows.prepare(net, images[:2], flow)
        with torch.no_grad():
            prepared(images)
        small[flow] = flows.convert(prepared, flow)
    return {"student": dict.fromkeys(("onnx", "fx"), net), "student-int8": small}


@pytest.fixture(scope="module")
def data():
    made = fake(num_classes=CLASSES, image_size=SIZE, train_size=40, batch_size=16, num_workers=0)
    return replace(made, test=replace(made.test, transform=CenterCrop()))


@pytest.fixture(scope="module")
def exported(nets, data, tmp_path_factory):
    """(folder, {resize: {name: files}})"""
    folders = {resizing: tmp_path_factory.mktemp("export") for resizing in (False, True)}
    files = {}
    for resizing, folder in folders.items():
        exporters = {name: partial(module.export, resize=resizing) for name, module in EXPORTERS.items()}
        made, failures = exporting.export(nets, exporters, folder, data, {})
        assert failures == []
        files[resizing] = {file.path.name: file for several in made.values() for file in several}
    return folders[True], files


FILES = [f"student{kind}.{suffix}" for kind in ("", "-int8") for suffix in ("onnx", "pt", "ptl")]


@pytest.mark.parametrize("name", FILES)
def test_an_image_of_the_networks_own_size_is_taken_as_it_is(exported, name):
    _, files = exported
    for batch in (1, 7):
        images = torch.rand(batch, 3, SIZE, SIZE)
        torch.testing.assert_close(files[True][name].run(images), files[False][name].run(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", FILES)
def test_photos_in_every_batch_size_reach_the_network_as_prepared(exported, name):
    _, files = exported
    (cut,) = resize.cuts({"height": SIZE, "width": SIZE, "short_side": SHORT, "resize": True})
    for batch, shape in ((1, (50, 71)), (3, (44, 31)), (5, (8, 9))):
        images = torch.rand(batch, 3, *shape)
        expected = files[False][name].run(cut(images))
        bound = 0.02 * expected.abs().max().item() if "int8" in name else 1e-4  # another level where it is near two
        torch.testing.assert_close(files[True][name].run(images), expected, rtol=1e-4, atol=bound)


class Gated(nn.Module):
    """A block of MobileNetV3, which ONNX Runtime fuses where it knows that the shapes on both sides are the same."""

    def __init__(self):
        super().__init__()
        self.first, self.wide, self.gate, self.narrow = (
            nn.Conv2d(*channels, 1) for channels in ((3, 16), (16, 32), (32, 32), (32, 16))
        )

    def forward(self, images):
        maps = self.first(images)
        wide = self.wide(maps)
        return (maps + self.narrow(wide * self.gate(wide.mean((2, 3), keepdim=True)).sigmoid())).mean((2, 3))


def test_onnx_runtime_fuses_the_networks_layers_as_without(exported, tmp_path):
    example, both = torch.rand(2, 3, SIZE, SIZE), (False, True)
    int8 = [exported[1][flag]["student-int8.onnx"] for flag in both]
    gated = [onnx.export(Gated().eval(), example, tmp_path / f"{flag}", {}, resize=flag)[0] for flag in both]
    for pair in (int8, gated):
        without, resizing = (operators(file, tmp_path / "optimized.onnx") for file in pair)
        resizing["Add"] -= 4  # a cut's own
        for kind in ("Add", "Conv", "Gemm", "QLinearConv", "QGemm"):
            assert resizing[kind] == without[kind], kind
        assert without["Conv"] + without["QLinearConv"] in (1, 4) and not without["Add"]


def operators(file: Artifact, optimized: Path) -> Counter:
    """How many of each kind ONNX Runtime makes of it."""
    import onnx as onnx_package
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(file.path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx_package.load(optimized).graph.node)


def test_the_file_says_that_it_resizes_and_the_readmes_programs_leave_it_to_it(exported, data, tmp_path):
    folder, files = exported
    for module in EXPORTERS.values():
        for file in module.reload(folder / "student"):
            given = module.read_metadata(file.path)["input"]
            assert (given["resize"], given["short_side"], given["height"]) == (True, SHORT, SIZE)
        assert "resize" not in json.dumps(
            module.read_metadata(module.reload(files[False]["student.pt"].path.parent / "student")[0].path)
        )
    rows = [Row(name, format=file.format) for name, file in files[True].items()]
    deploy.write_readme(rows, data, folder)
    text = (folder / "README.md").read_text()
    shown = photos(tmp_path)
    for title, name in {
        "ONNX Runtime": "onnx",
        "PyTorch Mobile's lite interpreter": "lite",
    }.items():
        program_text = program(folder, title)
        assert ".resize(" not in program_text and "exif_transpose" in program_text
        (file,) = (one for one in files[True].values() if f'"{one.path.name}"' in program_text)
        assert file.format == name
        answer = files[False][file.path.name].run
        says_what_the_toolkit_says(folder, program_text, shown, answer, data.image_size, data.classes)
    assert "import torch" not in program(folder, "ONNX Runtime")
    assert "take one of exactly\n16 × 16 px as it is: student-int8.onnx, " in text
    assert "## A whole photo in an app" in text and "## Preparing a photo in an app" not in text
    assert "pixels(photo)" not in text and "1, 3, 16, 16" not in text
    for line in (
        "val image = planes(photo)\nval input = OnnxTensor.createTensor(environment, FloatBuffer.wrap(image.values), "
        "longArrayOf(1, 3, image.height, image.width))",
        "let image = planes(photo)\nlet values = image.values\n",
        "val input = Tensor.fromBlob(image.values, longArrayOf(1, 3, image.height, image.width))",
    ):
        assert line in text


def test_what_a_users_own_code_does_to_images_is_refused(data, nets, tmp_path):
    def sharpened(images, uniforms, size):
        return images

    sharpened.count = 0
    own = replace(data, test=replace(data.test, transform=sharpened))
    exporters = {"onnx": partial(onnx.export, resize=True)}
    with pytest.raises(UserError, match=r"^export.onnx.resize=true: the test images .* prepared by function, .*$"):
        exporting.export(nets, exporters, tmp_path, own, {})
    assert not list(tmp_path.iterdir())
    exporters = {"onnx": onnx.export}
    assert exporting.refuse_resize(exporters, own) is None
    deploy.write_readme([], own, tmp_path)
    assert "its short side is resized to 16 px" in (tmp_path / "README.md").read_text()
