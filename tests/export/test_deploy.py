"""export/README.md: a photo becomes an input as in the test, and no file is recommended that failed."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
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


def program(folder: Path, title: str) -> str:
    text = (folder / "README.md").read_text()
    (section,) = (part for part in text.split("\n## ")[1:] if part.startswith(f"{title}\n"))
    return section.partition("```python\n")[2].partition("```")[0]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("mode, sides", [("RGB", (93, 60)), ("RGBA", (40, 71)), ("P", (61, 45)), ("L", (150, 77))])
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
    image = image.convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(sides))
    exif = Image.Exif()
    exif[274] = orientation
    image.save(tmp_path / "photo.png", exif=exif, **options)
    prepare = program(tmp_path, "ONNX Runtime").partition("import onnxruntime")[0]
    assert "torch" not in prepare
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program.py", "photo.png"])
    found = {}
    exec(prepare, found)
    wanted = CenterCrop()([tensor(read(tmp_path / "photo.png"))], torch.empty(1, 0), data.image_size)
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
    assert "| student-int8.onnx | onnx | 30 | no: see the report |" in text
    assert '"student.onnx"' in program(tmp_path, "ONNX Runtime") and '"student-int8.pte"' in program(
        tmp_path, "ExecuTorch"
    )
    deploy.write_readme(rows, data, tmp_path, [f"{row.name}: x" for row in rows])
    assert "```" not in (tmp_path / "README.md").read_text()
