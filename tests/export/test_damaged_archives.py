"""The archives that torch's formats are, damaged: each bit of a member's entry in the directory is told or harmless."""

import zipfile

import pytest
import torch
from torch import nn

from distill.errors import UserError
from distill.export import pt2, torch_export, torchscript

IMAGES = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    stem = tmp_path_factory.mktemp("archives") / "student"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    written = torchscript.export(net, IMAGES, stem, {"classes": ["a", "b", "c"]})
    written += torch_export.export(net, IMAGES, stem, {"classes": ["a", "b", "c"]})
    return {file.path.suffix: file.path for file in written}


def members_or_answer(path):
    """A .pt2 takes long to load: its sanitized members, where they are all there."""
    with zipfile.ZipFile(pt2.sanitized(path)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    return members if len(members) == 13 else torch_export.load(path)(IMAGES).tolist()


READERS = {
    ".pt": (lambda path: torchscript.load_script(path)(IMAGES).tolist(), "/constants/0"),
    ".ptl": (lambda path: torchscript.load_lite(path)(IMAGES).tolist(), "/constants/0"),
    ".pt2": (members_or_answer, "/weight_0"),
    "a .pt's metadata": (torchscript.read_metadata, "/extra/metadata.json"),
    "a .ptl's metadata": (torchscript.read_metadata, "/extra/metadata.json"),
    "a .pt2's metadata": (torch_export.read_metadata, "metadata.json"),
}


@pytest.mark.parametrize("kind", READERS)
def test_each_flipped_bit_in_the_directory_is_told_or_harmless(files, kind, tmp_path):
    read, member = READERS[kind]
    suffix = kind.removeprefix("a ").partition("'")[0]
    path, content, found = tmp_path / f"changed{suffix}", files[suffix].read_bytes(), 0
    good = read(files[suffix])
    start = content.rindex(b"PK\1\2", 0, content.rindex(member.encode()))
    for place in range(start, content.index(b"PK", start + 4)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            try:
                assert read(path) == good, (place - start, bit)
            except UserError as error:
                assert str(path) in str(error)
                found += 1
    assert found > 100
