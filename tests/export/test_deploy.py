"""export/README.md: a photo becomes an input as in the test, and no file is recommended that failed."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from photos import program
from sets import fake

from distill.export import deploy
from distill.report.tables import Row

SUFFIXES = {"onnx": "onnx", "executorch": "pte", "torchscript": "pt", "lite": "ptl", "torch_export": "pt2"}


@pytest.fixture(scope="module")
def data():
    return fake(image_size=16, train_size=40, batch_size=16, num_workers=0)


@pytest.fixture
def rows(tmp_path) -> list[Row]:
    """Of every format one float and one smaller int8 file, which are there; what is in them is not read."""
    made = [Row("student")]
    for name, size in (("student", 100), ("student-int8", 30)):
        for format, suffix in SUFFIXES.items():
            (tmp_path / f"{name}.{suffix}").write_bytes(bytes(size))
            made.append(Row(f"{name}.{suffix}", format=format))
    return made


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize(
    "mode, sides",
    [("RGB", (93, 60)), ("RGBA", (40, 71)), ("P", (61, 45)), ("L", (150, 77)), ("CMYK", (90, 50)), ("I;16", (70, 50))],
)
@pytest.mark.parametrize("size", [16, (16, 28)])
def test_a_program_prepares_a_photo_as_the_toolkit_does(rows, tmp_path, monkeypatch, size, mode, sides, orientation):
    """Turned, transparent, of odd sides: like `read` and `CenterCrop`."""
    from PIL import Image

    from distill.data.augment import CenterCrop
    from distill.data.files import read, tensor

    data = fake(image_size=size, train_size=10, batch_size=16, num_workers=0)
    whole = replace(data, test=replace(data.test, transform=CenterCrop()))
    deploy.write_readme(rows, whole, tmp_path)
    rng = np.random.default_rng(0)
    waves = np.add.outer(np.sin(np.arange(sides[1]) / 5), np.cos(np.arange(sides[0]) / 7)) * 60 + 128
    image = Image.fromarray(
        (waves[..., None] + rng.normal(0, 20, (sides[1], sides[0], 3))).clip(0, 255).astype(np.uint8)
    )
    options = {"transparency": 3} if mode == "P" else {}
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256 + 99)
    else:
        image = image.convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(sides))
    exif = Image.Exif()
    exif[274] = orientation
    file = tmp_path / ("photo.jpg" if mode == "CMYK" else "photo.png")
    image.save(file, exif=exif, **options)
    prepare = program(tmp_path, "ONNX Runtime").partition("import onnxruntime")[0]
    assert "torch" not in prepare
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program.py", file.name])
    found = {}
    exec(prepare, found)
    wanted = CenterCrop()([tensor(read(file))], torch.empty(1, 0), data.image_size)
    difference = np.abs(found["images"] * 255 - wanted.numpy()).max()
    assert difference <= 2, difference  # two libraries' rounding of an antialiased resize


@pytest.mark.parametrize("wanted", [(16, 16), (28, 16), (16, 28)])
def test_the_apps_triangles_are_pillows_bilinear(wanted):
    """The Kotlin and Swift functions' arithmetic, in Python."""
    from PIL import Image

    (high, wide), (cover_high, cover_wide) = wanted, (side + 3 for side in wanted)

    def triangles(side: int, resized: int, size: int):
        scale = side / resized
        width = max(scale, 1.0)
        start = round((resized - size) / 2)
        for place in range(size):
            center = (start + place + 0.5) * scale
            first, last = max(0, int(center - width + 0.5)), min(side, int(center + width + 0.5))
            weights = np.array([max(0.0, 1 - abs(first + i + 0.5 - center) / width) for i in range(last - first)])
            yield first, weights / weights.sum()

    pixels = np.random.default_rng(0).integers(256, size=(57, 90, 3)).astype(np.uint8)
    height, width = pixels.shape[:2]
    length, own = (cover_high, height) if height * cover_wide <= width * cover_high else (cover_wide, width)
    sides = [length * side // own for side in (width, height)]
    across, down = list(triangles(width, sides[0], wide)), list(triangles(height, sides[1], high))
    narrow = np.stack([np.tensordot(pixels[:, f : f + len(w)], w, ([1], [0])) for f, w in across], 1)  # (H, wide, 3)
    found = np.stack([np.tensordot(narrow[f : f + len(w)], w, ([0], [0])) for f, w in down])
    left, top = round((sides[0] - wide) / 2), round((sides[1] - high) / 2)
    resized = Image.fromarray(pixels).resize(sides, Image.Resampling.BILINEAR)
    expected = np.asarray(resized.crop((left, top, left + wide, top + high)))
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 1.01
    for line in ("(center - width + 0.5)", "(center + width + 0.5)", "+ 0.5 - center) / width"):
        assert deploy.PIXELS.count(line) == 2


def test_a_file_that_failed_is_in_no_program(rows, data, tmp_path):
    deploy.write_readme(rows, data, tmp_path, ["student-int8.onnx: logits differ by up to 3"])
    text = (tmp_path / "README.md").read_text()
    assert "| student-int8.onnx | onnx | – | 30 | – | no: see the report |" in text
    assert '"student.onnx"' in program(tmp_path, "ONNX Runtime") and '"student-int8.pte"' in program(
        tmp_path, "ExecuTorch"
    )
    deploy.write_readme(rows, data, tmp_path, [f"{row.name}: x" for row in rows])
    assert "```" not in (tmp_path / "README.md").read_text()


def test_the_table_has_the_reports_figures_and_a_line_says_when_to_ship_each_file(data, tmp_path):
    made = []
    for name, format, top1, latency, size in (
        ("student.onnx", "onnx", 0.9, 2.0, 100),
        ("student-int8.onnx", "onnx", 0.875, 1.0, 30),
        ("student.tflite", "litert", 0.9, 1.5, 100),
        ("student.mlpackage", "coreml", None, None, 60),
        ("bad.onnx", "onnx", 0.95, 0.5, 10),
    ):
        (tmp_path / name).write_bytes(bytes(size))
        made.append(Row(name, format=format, top1=top1, latency_ms=latency, bytes=size))
    deploy.write_readme(made, data, tmp_path, ["bad.onnx: logits differ by up to 3"])
    text = (tmp_path / "README.md").read_text()
    assert "| student-int8.onnx | onnx | 87.50% | 30 | 1.00 | yes |" in text
    assert "| student.mlpackage | coreml | – | 60 | – | not executed here |" in text
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert [line.partition(":")[0] for line in lines] == [
        *("- student-int8.onnx", "- student.mlpackage", "- student.onnx", "- student.tflite")
    ]
    assert lines[0].endswith("with ONNX Runtime; of these the smallest and the fastest")
    assert lines[2].endswith("; of these the most accurate") and lines[3].endswith("that use LiteRT")


def test_every_format_has_its_program_and_its_use():
    assert deploy.SECTIONS.keys() == deploy.WHEN.keys()
    for section in deploy.SECTIONS.values():
        assert section.count("PREPARE\n") == section.count("ANSWER\n") == section.count("```python") == 1
