"""Images as the world has them: each is read right, or told in one line before training."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sets import imagefolder
from test_data import make_folder, one_line

from distill.data import files
from distill.data.augment import CenterCrop, RandomResizedCrop
from distill.data.files import CorruptImage, ImageError, header, read
from distill.errors import UserError

RED = (255, 0, 0)


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plain(mode="RGB", colour=RED, size=(50, 40)) -> Image.Image:
    return Image.new(mode, size, colour)


def turned(orientation: int) -> bytes:
    """Red at the left as the camera kept it."""
    image, exif = plain(colour=(0, 0, 255)), Image.Exif()
    image.paste(RED, (0, 0, 25, 40))
    exif[274] = orientation
    return saved(image, "PNG", exif=exif)


def png(depth: int, colour_type: int, *values: int, size=(5, 4), rows: int | None = None) -> bytes:
    """Of one colour; `rows` of it are there."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    row = b"\0" + struct.pack(">" + {8: "B", 16: "H"}[depth] * len(values), *values) * min(size[0], 1000)
    head = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(row * (size[1] if rows is None else rows)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def frames(kind: str) -> bytes:
    first, *others = (plain(colour=colour) for colour in ("red", "blue", "green"))
    return saved(first, kind, save_all=True, append_images=others, duration=50)


def clear(mode: str, colour) -> bytes:
    return saved(plain(mode, colour), "PNG")


def broken_exif() -> bytes:
    return saved(plain(), "JPEG", exif=b"Exif\0\0" + b"II*\0\xff\xff\xff\xff" * 3)


def jpeg(**options) -> bytes:
    return saved(plain(size=(500, 400)), "JPEG", **options)


READ = {  # name, content: the colour at the upper left
    "cmyk": ("x.jpg", lambda: saved(plain("CMYK", (0, 255, 255, 0)), "JPEG"), RED),
    "cmyk tiff": ("x.tif", lambda: saved(plain("CMYK", (0, 255, 255, 0)), "TIFF"), RED),
    "lab": ("x.tif", lambda: saved(plain("LAB", (255, 0, 0)), "TIFF"), None),
    "grey": ("x.jpg", lambda: saved(plain("L", 90), "JPEG"), (90,) * 3),
    "one bit": ("x.png", lambda: saved(plain("1", 1), "PNG"), (255,) * 3),
    "16-bit grey": ("x.png", lambda: png(16, 0, 40_000), (156,) * 3),
    "16-bit colour": ("x.png", lambda: png(16, 2, 65_535, 0, 255), RED),
    "16-bit alpha": ("x.png", lambda: png(16, 6, 0, 0, 0, 0), (255,) * 3),
    "16-bit tiff": ("x.tiff", lambda: saved(Image.fromarray(np.full((4, 5), 40_000, np.uint16)), "TIFF"), (156,) * 3),
    "clear": ("x.png", lambda: clear("RGBA", (0, 0, 0, 0)), (255,) * 3),
    "half clear": ("x.png", lambda: clear("RGBA", (255, 0, 0, 128)), (255, 127, 127)),
    "clear grey": ("x.png", lambda: clear("LA", (0, 0)), (255,) * 3),
    "clear palette": ("x.png", lambda: saved(plain("P", 0), "PNG", transparency=0), (255,) * 3),
    "clear gif": ("x.gif", lambda: saved(plain("RGBA", (0, 0, 0, 0)), "GIF"), (255,) * 3),
    "animated gif": ("x.gif", lambda: frames("GIF"), RED),
    "animated webp": ("x.webp", lambda: frames("WEBP"), RED),
    "animated png": ("x.png", lambda: frames("PNG"), RED),
    "pages": ("x.tif", lambda: frames("TIFF"), RED),
    "progressive": ("x.jpg", lambda: jpeg(progressive=True), RED),
    "wrong suffix": ("x.jpg", lambda: saved(plain(), "PNG"), RED),
    "capital suffix": ("x.JPEG", lambda: saved(plain(), "JPEG"), RED),
    "avif": ("x.avif", lambda: saved(plain(), "AVIF"), RED),
    "jpeg 2000": ("x.jp2", lambda: saved(plain(), "JPEG2000"), RED),
    "broken exif": ("x.jpg", broken_exif, RED),
    "upside down": ("x.png", lambda: turned(3), (0, 0, 255)),
    "a line": ("x.png", lambda: saved(plain(size=(1, 4000)), "PNG"), RED),
    "a row": ("x.png", lambda: saved(plain(size=(20_000, 1)), "PNG"), RED),
    "a point": ("x.png", lambda: saved(plain(size=(1, 1)), "PNG"), RED),
    "large jpeg": ("x.jpg", lambda: saved(plain("L", 90, (20_000, 9000)), "JPEG"), (90,) * 3),
}
REFUSED = {  # why, and whether it is what is in the file
    "empty": ("x.png", lambda: b"", "it is empty"),
    "a page": ("x.jpg", lambda: b"<html>not found</html>", "cannot identify image file"),
    "cut short": ("x.jpg", lambda: jpeg()[:-600], "truncated"),
    "cut short png": ("x.png", lambda: saved(plain(size=(900, 900)), "PNG")[:-900], ""),
    "a program": ("x.jpg", lambda: saved(plain(), "EPS"), "cannot identify image file"),
    "floats": ("x.tif", lambda: saved(Image.new("F", (5, 5)), "TIFF"), "no range that is agreed on"),
    "32 bits": ("x.tif", lambda: saved(Image.new("I", (5, 5)), "TIFF"), "no range that is agreed on"),
    "20,000 px a side": ("x.png", lambda: png(8, 0, 1, size=(20_000, 20_000), rows=1),
                         "its 400,000,000 px are more than 100 million: scale it down"),
    "large progressive": ("x.jpg", lambda: saved(plain("L", 0, (20_000, 5001)), "JPEG", progressive=True),
                          "px are more than 100 million"),
    "a bomb": ("x.png", lambda: png(8, 2, 0, 0, 0, size=(2**31 - 1, 2**31 - 1), rows=1), ""),
    "no pixels": ("x.bmp", lambda: saved(plain(), "BMP").replace(struct.pack("<ii", 50, 40), struct.pack("<ii", 0, 40)),
                  ""),
}  # fmt: skip


@pytest.mark.parametrize("what", READ)
def test_what_is_read(tmp_path, what):
    name, content, colour = READ[what]
    (tmp_path / name).write_bytes(content())
    header(tmp_path / name, 448)
    pixels = read(tmp_path / name, 448)
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.size <= 3 * 2500 * 1125
    if colour is not None:
        assert np.abs(pixels[0, 0].astype(int) - colour).max() <= 3


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(tmp_path, what):
    name, content, why = REFUSED[what]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(CorruptImage, match=why) as raised:
        read(tmp_path / name, 448)
    assert str(tmp_path / name) in one_line(raised) and "data.corrupt=skip" in str(raised.value)


def test_every_orientation_is_upright(tmp_path):
    upright = [(50, 40)] * 4 + [(40, 50)] * 4
    seen = {}
    for orientation in range(1, 9):
        (tmp_path / "x.png").write_bytes(turned(orientation))
        pixels = read(tmp_path / "x.png")
        assert pixels.shape[1::-1] == upright[orientation - 1]
        seen[orientation] = tuple(np.argwhere((pixels == RED).all(2)).min(0))
    assert seen == {1: (0, 0), 2: (0, 25), 3: (0, 25), 4: (0, 0), 5: (0, 0), 6: (0, 0), 7: (25, 0), 8: (25, 0)}


def noise(mode: str, size: tuple[int, int]) -> Image.Image:
    pixels = torch.rand(6, 5, 3, generator=torch.Generator().manual_seed(0)).mul(255).byte().numpy()
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).convert(mode)


def tall(content: bytes) -> bytes:
    """A 4:2:2 JPEG as 4:4:0: its first channel's blocks are above each other, not side by side."""
    at = content.index(b"\xff\xc0") + 11
    assert content[at] == 0x21
    return content[:at] + b"\x12" + content[at + 1 :]


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1", "4:4:0"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}, {"quality": 100}], ids=str)
def test_jpegs_have_the_pixels_that_pillow_reads(subsampling, options):
    """They are decoded by another library: what earlier versions kept stays right."""
    for size in ((64, 64), (61, 43), (1, 1), (17, 200)):
        options = {"subsampling": "4:2:2" if subsampling == "4:4:0" else subsampling, **options}
        content = saved(noise("RGB", size), "JPEG", **options)
        if subsampling == "4:4:0":
            if size != (64, 64) or "progressive" in options:
                continue
            content = tall(content)
        assert (read(io.BytesIO(content)) == np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCbCr"])
def test_jpegs_of_every_orientation_and_mode_have_the_pixels_that_pillow_reads(mode):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        content = saved(noise(mode, (60, 40)), "JPEG", exif=exif)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
        assert (read(io.BytesIO(content)) == np.asarray(upright)).all()


def test_jpegs_with_something_odd_are_read_as_pillow_does():
    content = saved(noise("RGB", (200, 100)), "JPEG", quality=95)
    for odd in (content + b"more", content[:400] + b"\xff\x00\x11" + content[403:], content[:-2]):
        try:
            expected = np.asarray(Image.open(io.BytesIO(odd)).convert("RGB"))
        except OSError:
            with pytest.raises(CorruptImage):
                read(io.BytesIO(odd))
        else:
            assert (read(io.BytesIO(odd)) == expected).all()


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300)


def test_a_kind_that_needs_a_package_is_named_with_it(tmp_path, monkeypatch):
    """It is not damaged: it isn't left out by data.corrupt=skip, either."""
    root = make_folder(tmp_path, {"a": 10, "b": 10}, size=(80, 80))
    (root / "a" / "photo.HEIC").write_bytes(HEIC)
    monkeypatch.setattr(files, "_plugged", lambda module: False)
    for corrupt in ("stop", "skip"):
        with pytest.raises(ImageError, match=r"photo\.HEIC .it is HEIC: pip install pillow-heif") as raised:
            imagefolder(str(root), 4, 0, corrupt=corrupt)
        one_line(raised)
        assert not isinstance(raised.value, CorruptImage)


def test_a_package_that_is_there_is_used(tmp_path, monkeypatch):
    (tmp_path / "x.heic").write_bytes(HEIC)

    class Heif(Image.Image):
        """As pillow-heif registers one."""

    def plug(module):
        assert module == "pillow_heif"
        monkeypatch.setitem(Image.OPEN, "HEIF", (lambda file, name: plain(), lambda prefix: prefix[4:8] == b"ftyp"))
        return True

    monkeypatch.setattr(files, "_plugged", plug)
    assert tuple(read(tmp_path / "x.heic")[0, 0]) == RED


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (3, 60_000), (30, 4000)])
def test_lines_become_squares_in_little_memory(shape):
    """Resized to cover 224 px, a line of 20,000 would be of 1.3 billion pixels."""
    line = torch.full((3, *shape), 7, dtype=torch.uint8)
    for transform, count in ((CenterCrop(), 0), (RandomResizedCrop(), RandomResizedCrop.count)):
        assert (transform([line], torch.rand(1, count), 224) == 7).all()


def test_the_middle_of_a_line_is_seen():
    line = torch.zeros(3, 1, 20_001, dtype=torch.uint8)
    line[:, :, 10_000] = 200
    seen = CenterCrop(resize=1.0)([line], torch.empty(1, 0), 33)[0]
    assert seen.max() > 100 and seen.float().mean() < 110


LITTER = ("a/Thumbs.db", "a/thumbs.DB", "b/.DS_Store", "desktop.ini", "a/desktop.ini", "__MACOSX/a/x.png",
          "a/.ipynb_checkpoints/000-checkpoint.png", "a/__MACOSX/000.png", ".hidden/x.png", "@eaDir/a/x.png",
          "a/._000.png", "b/notes.txt")  # fmt: skip


def test_what_systems_leave_is_no_image(tmp_path):
    root = make_folder(tmp_path, {"a": 10, "b": 10})
    for name in LITTER:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((root / "a/000.png").read_bytes())
    (root / "a" / "folder.jpg").mkdir()
    (root / "b" / "itself.png").symlink_to(root / "b" / "itself")
    (root / "b" / "itself").symlink_to(root / "b" / "itself.png")
    with pytest.raises(UserError, match=r"itself\.png .Too many levels of symbolic links") as raised:
        imagefolder(str(root), 4, 0)
    one_line(raised)
    (root / "b" / "itself.png").unlink()
    data = imagefolder(str(root), 4, 0)
    assert data.classes == ["a", "b"] and len(data.train) + len(data.val) + len(data.test) == 20


def test_a_pipe_is_not_waited_for(tmp_path):
    root = make_folder(tmp_path, {"a": 10, "b": 10})
    os.mkfifo(root / "a" / "pipe.jpg")
    with pytest.raises(UserError, match=r"pipe\.jpg .it is no file"):
        imagefolder(str(root), 4, 0)


@pytest.mark.parametrize("size", [20, 80], ids=["small", "large"])
def test_names_of_any_signs(tmp_path, size):
    names = [
        "with blank.png",
        "😀.png",
        "שלום.png",
        "\u202egnp.gpj.png",
        "a\nb.png",
        "\x1b[31mred.png",
        "=,[]{}'\".png",
    ]
    root = make_folder(tmp_path / "set", {"a": 10, "b ü 😀": 10, "שלום": 10}, size=(size, size), vary=1)
    content = (root / "a/000.png").read_bytes()
    for name in [*map(os.fsencode, names), b"\xff\xfe.png"]:
        Path(os.fsdecode(os.fsencode(root / "a") + b"/" + name)).write_bytes(content)
    options = {
        "store": str(tmp_path / "store"),
        "corrupt": "skip",
        "pack": 80 if size == 80 else None,
        "image_size": size,
    }
    data = imagefolder(str(root), 4, 0, **options)
    assert len(data.train) + len(data.val) + len(data.test) == 38 and len(data.fingerprint) == 64
    assert len(list(data.train_loader(0))) > 1
    broken = Path(os.fsdecode(os.fsencode(root / "a") + b"/\xff\xfe.png"))
    broken.write_bytes(b"none")
    with pytest.raises(CorruptImage, match=r"\\udcff\\udcfe\.png") as raised:
        imagefolder(str(root), 4, 0)
    one_line(raised)
    assert str(raised.value).isprintable()


def test_a_file_that_may_not_be_read_is_not_left_out(tmp_path, monkeypatch):
    root, real = make_folder(tmp_path, {"a": 10, "b": 10}, size=(80, 80)), open

    def refuse(path, *args, **kwargs):
        if str(path).endswith("003.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    for corrupt in ("stop", "skip"):
        with pytest.raises(ImageError, match=r"cannot read .*003\.png .Permission denied") as raised:
            imagefolder(str(root), 4, 0, corrupt=corrupt)
        one_line(raised)
