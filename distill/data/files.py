"""Encoded images, decoded when asked for: in files here, in tar shards in webdataset.py."""

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, JpegImagePlugin, UnidentifiedImageError
from simplejpeg import decode_jpeg
from torch import Tensor

from distill.errors import UserError
from distill.files import stamp, stamp_line
from distill.progress import few, printable, say

DECODED = b"decoded 2\n"  # a change of what pixels a file gives makes other images of it
WIDE = {"I": "32-bit whole numbers", "F": "floating-point values"}
SIXTEEN = ("PPM", "PNG")  # whose whole numbers have 16 bits, in whatever mode Pillow keeps them
MOST_PIXELS = 100_000_000  # of an image when it is decoded: 0.6 GB for a moment
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".heic", ".heif", ".gif", ".bmp", ".dib"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".jp2", ".jxl", ".qoi"),
)  # of files that are taken for images; what is in them is read, whatever they are called
KINDS = (  # none that starts a program (EPS, WMF), is a wrapper, or has no pixels of its own
    *("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "DIB", "PPM", "TIFF", "JPEG2000", "JXL", "QOI"),
)
PLUGINS = {  # how a file begins that Pillow may need a package for: what it is, the package, and its module
    rb".{4}ftyp(heic|heix|hevc|hevx|heim|heis|mif1|msf1)": ("HEIC", "pillow-heif", "pillow_heif"),
    rb".{4}ftypavi[fs]": ("AVIF", "pillow-avif-plugin", "pillow_avif"),
    rb"\xff\x0a|\0\0\0\x0cJXL ": ("JPEG XL", "pillow-jxl-plugin", "pillow_jxl"),
}
UPRIGHT = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Image.init()
warnings.filterwarnings("ignore", module=r"PIL\.")  # of what is odd in a file and does no harm


class ImageError(UserError):
    """An image file cannot be read.

    DataLoader replaces a worker's exception by one of the same class whose message is the whole traceback as
    text. That ends in the original message, which is cut out here, so that one line arrives.
    """

    def __init__(self, message: str):
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class CorruptImage(ImageError):
    """What is in the file is no image that can be read, and it will not be another time.

    `reason` says why, without the file's name.
    """

    reason = ""


class _Absent(Exception):
    """A package that reads such images isn't installed."""


class Look(NamedTuple):
    """What an image is, besides its pixels."""

    kind: str  # format and mode, as "PNG I;16"
    height: int  # px, as stored: not turned upright, not reduced
    width: int
    frames: bool  # whether there are several, of which the first is seen


class Encoded:
    """Images as `images[rows] -> list of (3, H, W) uint8`, decoded when asked for.

    JPEGs are decoded at a fraction of their resolution when that is still twice `largest` or more.
    """

    names: np.ndarray  # (N,), not a list: forked workers would copy it by counting references
    largest: int  # px: the longer side of what is made of them

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: Tensor) -> list[Tensor]:
        return [tensor(self.decode(row, 2 * self.largest)) for row in rows.tolist()]

    def decode(self, row: int, draft: int | None = None) -> np.ndarray:
        """(H, W, 3) uint8, see `read`."""
        with self.opened(row) as (file, name):
            return read(file, draft, name)

    def look(self, row: int) -> Look:
        """What its first bytes tell. Raises ImageError where they tell that it can't be read."""
        with self.opened(row) as (file, name):
            return header(file, 2 * self.largest, name)

    def opened(self, row: int):
        """A context with an image's encoded bytes, as a file, and what it is called.

        Raises:
            ImageError: it can't be read, or is not what it was when the set was listed.
        """
        raise NotImplementedError

    def select(self, rows: Tensor) -> "Encoded":
        """These rows alone, in this order."""
        raise NotImplementedError

    def entries(self) -> tuple[list[str], list[int]]:
        """Every image's name, which no other has, and its bytes."""
        raise NotImplementedError

    def listing(self) -> bytes:
        """Every image's name and bytes, and when its file was changed: other images have another listing, without
        reading them all. The folder is not in it: what is moved with its times stays the same."""
        raise NotImplementedError


class Files(Encoded):
    """Image files under `root`.

    Args:
        names: relative to `root`.
        stamps: (N, 2) int64, bytes and time of change (ns) of each; None: as they are now.
    """

    def __init__(self, root: Path, names: Sequence[str], largest: int, stamps: np.ndarray | None = None):
        self.root, self.names, self.largest = root, np.array(names, dtype=np.str_), largest
        self.stamps = _stamps([root / name for name in names]) if stamps is None else stamps

    @contextmanager
    def opened(self, row: int):
        path = self.root / self.names[row]
        with opened(path, self.stamps[row], printable(str(path))) as file:
            yield file, path

    def select(self, rows: Tensor) -> "Files":
        return Files(self.root, self.names[rows.numpy()], self.largest, self.stamps[rows.numpy()])

    def entries(self) -> tuple[list[str], list[int]]:
        return self.names.tolist(), self.stamps[:, 0].tolist()

    def listing(self) -> bytes:
        return DECODED + b"".join(map(stamp_line, self.names, self.stamps.tolist()))


def _stamps(paths: Sequence[Path]) -> np.ndarray:
    return np.array([stamp(os.stat(path)) for path in paths], dtype=np.int64).reshape(len(paths), 2)


@contextmanager
def opened(path: Path, before: Sequence[int], name: str):
    """The file, if it still is as it was.

    Raises:
        ImageError: it can't be opened or read, or has changed: the run's images would be others.
    """
    try:
        with open(path, "rb") as file:
            if stamp(os.fstat(file.fileno())) != tuple(before):
                raise ImageError(f"{name} has changed since this run began: put the former back, or start a new run")
            yield file
    except FileNotFoundError:
        raise ImageError(f"{name} was there when this run began and is gone: put it back, or start a new run") from None
    except OSError as error:
        raise ImageError(f"cannot read {name} ({error.strerror}): allow it, or mend the disk") from None


def read(file: Path | BinaryIO, draft: int | None = None, name: Path | str | None = None) -> np.ndarray:
    """The image upright in RGB, (H, W, 3) uint8; with `draft`, a JPEG may come reduced to sides no shorter.

    Of several frames the first is taken; what is transparent is seen on white; 16 bits keep their upper eight.

    Raises:
        CorruptImage: it is damaged, not an image, or has values of an unknown range; says `name` where `file` is not a
            path.
        ImageError: a package is needed to read it.
        OSError: the file system has an error.
    """
    return read_and_look(file, draft, name)[0]


def header(file: Path | BinaryIO, draft: int | None = None, name: Path | str | None = None) -> Look:
    """What the first bytes of the file tell. Raises as `read` does where they tell that it can't be read."""
    with _image(file, draft, name) as image:
        return look(image)


def read_and_look(file: Path | BinaryIO, draft: int | None, name: Path | str | None) -> tuple[np.ndarray, Look]:
    """Both of them."""
    with _image(file, draft, name) as image:
        found = look(image)
        return _pixels(image), found


def from_pillow(image: Image.Image) -> np.ndarray:
    """An image that Pillow holds, upright in RGB, as `read` gives it: (H, W, 3) uint8.

    Raises:
        ImageError: its pixels can't be read, or have no range.
    """
    try:
        _ranged(image)
        return np.array(_rgb(_upright(image)))
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"cannot read the image ({error})") from error


@contextmanager
def _image(file: Path | BinaryIO, draft: int | None, name: Path | str | None):
    """The image, its pixels not read yet: at a fraction of its size where `draft` allows it."""
    try:
        with _identified(file) as image:
            image.stored = image.size
            if draft:
                image.draft(None, (draft, draft))
            _bound(image)
            yield image
    except (ImageError, MemoryError):
        raise
    except _Absent as error:
        raise ImageError(
            f"cannot read the image {_called(name or file)} ({error}; or save it as JPEG or PNG)"
        ) from None
    except OSError as error:
        if error.errno is None:  # Pillow's own
            raise _corrupt(name or file, error) from None
        raise ImageError(f"cannot read the image {_called(name or file)} ({error.strerror})") from None
    except Exception as error:  # Pillow raises nearly everything, SyntaxError included
        raise _corrupt(name or file, error) from None


def _identified(file: Path | BinaryIO) -> Image.Image:
    """Raises ValueError where it is no image, _Absent where there is no package for it."""
    kinds = [kind for kind in KINDS if kind in Image.OPEN]
    try:
        return Image.open(file, formats=kinds)
    except Image.DecompressionBombError as error:
        _rewind(file)
        with suppress(SyntaxError):  # a JPEG may be reduced while it is decoded; `_bound` decides
            return JpegImagePlugin.jpeg_factory(file)
        raise ValueError(_large(f"{int(re.search('[0-9]+', str(error))[0]):,}")) from None
    except UnidentifiedImageError:
        begin = _begin(file)
        kind, package, module = next((PLUGINS[one] for one in PLUGINS if re.match(one, begin, re.DOTALL)), (None,) * 3)
        if kind is None:
            raise ValueError("cannot identify image file" if begin else "it is empty") from None
        if not _plugged(module):
            raise _Absent(f"it is {kind}: pip install {package}") from None
        _rewind(file)
        return Image.open(file, formats=[kind for kind in KINDS if kind in Image.OPEN])


def _plugged(module: str) -> bool:
    """Whether a package that reads another kind of images was there, and is used from now on."""
    try:
        plugin = import_module(module)
    except ImportError:
        return False
    before = len(Image.OPEN)
    getattr(plugin, "register_heif_opener", lambda: None)()
    return len(Image.OPEN) > before


def _rewind(file: Path | BinaryIO) -> None:
    if hasattr(file, "seek"):
        file.seek(0)


def _begin(file: Path | BinaryIO) -> bytes:
    if not hasattr(file, "read"):
        with open(file, "rb") as opened:
            return opened.read(16)
    file.seek(0)
    return file.read(16)


def _bound(image: Image.Image) -> None:
    """Raises ValueError where decoding would take too much memory, or gives nothing. A progressive JPEG is kept whole
    whatever fraction of it is wanted."""
    width, height = image.stored if "progressive" in image.info else image.size
    if width * height > MOST_PIXELS:
        raise ValueError(_large("{:,} × {:,}".format(*image.stored)))
    if not width * height:
        raise ValueError("it has no pixels")


def _large(pixels: str) -> str:
    return f"its {pixels} px are more than {MOST_PIXELS // 10**6} million: scale it down"


def look(image: Image.Image) -> Look:
    """Raises ValueError where its values have no range."""
    _ranged(image)
    width, height = image.stored
    return Look(f"{image.format} {image.mode}", height, width, getattr(image, "is_animated", False))


def _ranged(image: Image.Image) -> None:
    if image.mode in WIDE and not (image.mode == "I" and image.format in SIXTEEN):
        raise ValueError(f"its {WIDE[image.mode]} have no range that is agreed on; save it with 8 or 16 bits")


def _pixels(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8, upright."""
    jpeg = image.format in ("JPEG", "MPO") and image.mode == "RGB"
    if jpeg and image.size == image.stored and _turned(image) is None:
        with suppress(ValueError):  # damaged, or odd: Pillow reads it, or says what is wrong
            image.fp.seek(0)
            return decode_jpeg(image.fp.read())  # the same library and bits, without Pillow's copies
    return np.array(_rgb(_upright(image)))


def _turned(image: Image.Image) -> Image.Transpose | None:
    """What turns it upright; None: it is."""
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged, or of another kind than it says: the pixels are what they are
        return None


def _upright(image: Image.Image) -> Image.Image:
    turn = _turned(image)
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")  # convert() alone would clip
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def check(images: Encoded, evaluated: Tensor, store: str | None) -> None:
    """See before training that every image can be read: the headers of all, and the pixels of those `evaluated`, which
    training doesn't see. Once for a set of files, which `store` remembers.

    Args:
        evaluated: (n,) int64, rows of validation and test images.

    Raises:
        ImageError: names the first that can't, and says how many there are.
    """
    seen = None
    if store is not None:
        key = hashlib.sha256(images.listing() + evaluated.numpy().tobytes()).hexdigest()[:16]
        seen = Path(store).expanduser().absolute() / f"{key}.checked"
        if seen.exists():
            return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tried = {row: error for row, error in enumerate(pool.map(_trying(images.look), range(len(images)))) if error}
        wanted = [row for row in evaluated.tolist() if row not in tried]
        decode = _trying(lambda row: images.decode(row, 2 * images.largest).shape)
        tried |= {row: error for row, error in zip(wanted, pool.map(decode, wanted), strict=True) if error}
    if tried:
        first, *others = sorted(tried)
        more = few([str(images.names[row]) for row in others])
        raise CorruptImage(str(tried[first]) + (f" ({len(others):,} more can't be read: {more})" if others else ""))
    if seen is not None:
        with suppress(OSError):  # a full disk: it is checked again
            seen.parent.mkdir(parents=True, exist_ok=True)
            seen.touch()


def _trying(read: Callable[[int], object]) -> Callable[[int], CorruptImage | None]:
    def tried(row: int) -> CorruptImage | None:
        try:
            read(row)
        except CorruptImage as error:
            return error
        return None

    return tried


def _corrupt(name, error: Exception) -> CorruptImage:
    reason = re.sub(r" (<_io\..*?>|'.*'$)", "", str(error).splitlines()[0]) if str(error) else type(error).__name__
    reason = printable(reason)
    corrupt = CorruptImage(
        f"cannot read the image {_called(name)} ({reason}): mend or remove it, or leave such out by data.corrupt=skip"
    )
    corrupt.reason = reason
    return corrupt


def _called(name) -> str:
    return printable(str(name))


def read_arrays(path: Path, *keys: str) -> tuple[np.ndarray, ...] | None:
    """Arrays that were kept in an .npz file; None where it isn't there, or is damaged, which is said."""
    try:
        with np.load(path) as found:  # arrays only: NumPy doesn't unpickle unless asked to
            return tuple(found[key] for key in keys)
    except FileNotFoundError:
        return None
    except Exception:  # of a damaged file zipfile, zlib and NumPy raise nearly everything
        say(f"{path} is damaged; it is made anew")
        return None


def tensor(image: np.ndarray) -> Tensor:
    """(H, W, 3) → (3, H, W), the same memory."""
    return torch.from_numpy(image).permute(2, 0, 1)
