"""Every file that the fuzzer found worth keeping is read, or told in a line (see tests/faults/fuzz.py)."""

import struct

import pytest
from fuzz import CORPUS, READERS, take

from distill.errors import DamagedError
from distill.networks.weights import read_state

FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())


def test_every_reader_has_a_corpus():
    assert {path.parent.name for path in FILES} == {*READERS}


@pytest.mark.parametrize("reader", READERS)
def test_the_corpus_is_read_or_told(reader):
    for path in FILES:
        if path.parent.name == reader:
            take(reader, path.read_bytes())


@pytest.mark.parametrize(
    "content",
    [b"\x2e\x00\xeb\x00p\xff\xff\xff\x00\r", b".", b"\x80\x02.", b"\x80\x02K\x01\x85R.", struct.pack("<Q", 9)],
)
def test_bytes_that_are_no_weights_are_told(tmp_path, content):
    """The first was found by the fuzzer: torch's reader pops from its empty stack."""
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(DamagedError, match="broken, or neither safetensors nor a torch file"):
        read_state(tmp_path / "x.pt")
