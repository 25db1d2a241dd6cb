"""Photos of the kinds that phones, scanners and printers make, and what export/README.md's programs say of them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from distill.data.augment import CenterCrop
from distill.data.files import read, tensor


def photos(folder: Path) -> list[Path]:
    """An upright one, one that is turned by its EXIF, a grey, a CMYK and a 16-bit one, none of them square."""
    rng = np.random.default_rng(0)
    waves = np.add.outer(np.sin(np.arange(60) / 5), np.cos(np.arange(93) / 7)) * 60 + 128
    image = Image.fromarray((waves[..., None] + rng.normal(0, 20, (60, 93, 3))).clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    image.save(folder / "plain.png")
    image.save(folder / "turned.jpg", exif=exif, quality=95)
    image.convert("L").save(folder / "grey.jpg", quality=95)
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    wide = np.asarray(image.convert("L")).astype(np.uint16) * 256 + 99
    Image.fromarray(wide).save(folder / "sixteen.png")
    return [folder / name for name in ("plain.png", "turned.jpg", "grey.jpg", "cmyk.jpg", "sixteen.png")]


def program(folder: Path, title: str) -> str:
    text = (folder / "README.md").read_text()
    (section,) = (part for part in text.split("\n## ")[1:] if part.startswith(f"{title}\n"))
    return section.partition("```python\n")[2].partition("```")[0]


def said(folder: Path, program: str, files: list[Path]) -> list[tuple[str, float]]:
    """What the program prints of each photo: a class and its probability. All in one process, which starts once."""
    each = f"import sys\nfor sys.argv[1:] in {[[str(file)] for file in files]!r}:\n    exec({program!r}, {{}})\n"
    done = subprocess.run([sys.executable, "-c", each], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line.rsplit(" ", 1) for line in done.stdout.splitlines() if line]
    return [(name, float(probability)) for name, probability in lines]


@torch.no_grad()
def wanted(answer, file: Path, size, classes: list[str]) -> tuple[str, float]:
    """What `answer`, images to logits, says of a photo that the toolkit reads and prepares."""
    pixels = CenterCrop()([tensor(read(file))], torch.empty(1, 0), size)
    odds = answer(pixels.float() / 255)[0].softmax(0)
    return classes[odds.argmax()], odds.max().item()


def says_what_the_toolkit_says(folder: Path, program: str, files: list[Path], answer, size, classes: list[str]) -> None:
    """Of every photo the program tells the class that `answer` has for it, as the toolkit prepares it."""
    for photo, (found, probability) in zip(files, said(folder, program, files), strict=True):
        label, expected = wanted(answer, photo, size, classes)
        assert found == label, photo.name
        assert abs(probability - expected) <= 0.05, photo.name  # two libraries' resize: a level of 255
