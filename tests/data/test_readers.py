"""Readers of what strangers give, with drawn and mutated bytes: valid images, or a UserError, and nothing else.

More examples: DISTILL_EXAMPLES=20000 python -m pytest tests/data/test_readers.py
"""

import io
import json
import os
import tarfile
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from distill.data import pack
from distill.data.files import Files, read
from distill.data.fingerprint import difference
from distill.data.survey import survey
from distill.data.webdataset import webdataset
from distill.errors import UserError

EXAMPLES = int(os.environ.get("DISTILL_EXAMPLES", 60))
quick = settings(
    max_examples=EXAMPLES,
    deadline=5000,  # ms: none hangs
    database=None,
    derandomize="DISTILL_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MOST = 200_000_000  # bytes of memory


def encoded(kind: str, mode: str = "RGB", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(256, size=(24, 20, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


SEEDS = [
    *(encoded(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000", "AVIF")),
    *(encoded("PNG", mode) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")),
    encoded("JPEG", progressive=True),
    encoded("JPEG", "CMYK"),
    encoded("TIFF", compression="tiff_lzw"),
]


@st.composite
def mutated(draw, seeds: list[bytes]) -> bytes:
    """One of the seeds with some bytes changed, cut out, doubled, or its end gone."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        change = draw(st.sampled_from(["set", "set", "number", "cut", "double", "end"]))
        if change == "set":
            content[place : place + 1] = bytes([draw(st.integers(0, 255))])
        elif change == "number":
            content[place : place + 4] = draw(st.sampled_from([bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"7777"]))
        elif change == "cut":
            del content[place : place + draw(st.integers(1, 600))]
        elif change == "double":
            content[place:place] = content[place : place + draw(st.integers(1, 600))]
        else:
            del content[place:]
    return bytes(content)


def within(call):
    """Its result, or None for a UserError in one line; no more memory than MOST is taken by Python and NumPy."""
    tracemalloc.start()
    try:
        return call()
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST


@quick
@given(st.one_of(st.binary(max_size=300), mutated(SEEDS)))
def test_images(content):
    pixels = within(lambda: read(io.BytesIO(content), 64, "it"))
    if pixels is not None:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size


def shard(members: list[tuple[str, bytes]], format=tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


PNG = encoded("PNG")
MEMBERS = [(f"{i}{part}", content) for i in range(8) for part, content in ((".png", PNG), (".cls", b"%d" % (i % 2)))]
SHARDS = [
    shard(MEMBERS),
    shard([(f"../../up/{name}", content) for name, content in MEMBERS], tarfile.PAX_FORMAT),
    shard([(f"{'long' * 60}/{name}", content) for name, content in MEMBERS]),
    shard([(f"ü{'x' * 120}/{name}", content) for name, content in MEMBERS], tarfile.PAX_FORMAT),
]
label = st.one_of(
    st.binary(max_size=30), st.integers().map(lambda n: str(n).encode()), st.text(max_size=9).map(str.encode)
)
described = st.one_of(st.floats(), st.integers(), st.text(max_size=5), st.none(), st.lists(st.integers(), max_size=2))


def read_shard(folder, content: bytes) -> None:
    for left in folder.iterdir():
        left.unlink()
    (folder / "a.tar").write_bytes(content)

    def everything():
        data = webdataset(str(folder / "a.tar"), image_size=16)
        return [split.images[torch.arange(len(split))] for split in (data.train, data.val, data.test)]

    within(everything)
    assert [each.name for each in folder.iterdir()] == ["a.tar"]  # nothing is unpacked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readers")


@quick
@given(mutated(SHARDS))
def test_shards(folder, content):
    read_shard(folder, content)


@quick
@given(
    st.lists(label, min_size=8, max_size=8), st.dictionaries(st.sampled_from(["label", "cls"]), described), st.data()
)
def test_labels_of_shards(folder, labels, described, data):
    members = [(f"{i}.png", PNG) for i in range(8)]
    members += [(f"{i}.cls", content) for i, content in enumerate(labels)]
    members.append((f"{data.draw(st.integers(0, 8))}.json", json.dumps(described).encode()))
    read_shard(folder, shard(members))


@pytest.mark.parametrize("size", [b"-0000000001\0", b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12])
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g", b"S", b"5"])
def test_sizes_that_no_file_has(folder, size, kind):
    """A header that claims a negative size, or one of gigabytes, of a file, a long name or a pax header."""
    header = bytearray(shard([("a.png", PNG)])[:512])
    header[124:136], header[156:157] = size, kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    read_shard(folder, bytes(header) + SHARDS[0])


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    for i in range(4):
        (root / f"{i}.png").write_bytes(PNG)
    images = Files(root, [f"{i}.png" for i in range(4)], 16)
    store = root / "store"
    pack.pack(images, 16, str(store))
    (path,) = store.glob("*.npy")
    survey(images, str(store))
    (surveyed,) = store.glob("*.survey.npz")
    return images, store, path, path.read_bytes(), surveyed, surveyed.read_bytes()


@quick
@given(st.data())
def test_packs(packed, data):
    images, store, path, whole, *_ = packed
    path.write_bytes(data.draw(mutated([whole[:140]])) + whole[140:])
    pixels = within(lambda: pack.pack(images, 16, str(store)))
    assert pixels.shape == (4, 3, 16, 16) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous


@quick
@given(st.data())
def test_surveys(packed, data):
    images, store, *_, path, whole = packed
    path.write_bytes(data.draw(st.one_of(mutated([whole]), st.binary(max_size=99))))
    found = within(lambda: survey(images, str(store)))
    assert len(found.digests) == len(found.kinds) == len(found.frames) == 4 and found.sizes.shape == (4, 2)


@quick
@given(st.recursive(described, lambda values: st.lists(values, max_size=3), max_leaves=5),
       st.sampled_from(["classes", "image_size", "splits", "counts", "contents", "names"]))  # fmt: skip
def test_records_of_images(value, key):
    now = {"classes": ["a"], "image_size": 8, "splits": {}, "counts": [1], "contents": ["0"], "names": "eJwDAAAAAAE="}
    told = within(lambda: difference({**now, key: value}, now))
    assert told is None or isinstance(told, str)
