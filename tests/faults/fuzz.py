"""Readers of binary files under a fuzzer: what they are given is read, or told in a UserError, and nothing else.

    pip install atheris
    python tests/faults/fuzz.py weights -max_total_time=300        # or checkpoint, image, shard, record

Begins with tests/faults/corpus/READER, which tests/faults/test_corpus.py reads without the fuzzer, and keeps there what
reached something new.
"""

import contextlib
import json
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

CORPUS = Path(__file__).parent / "corpus"
sys.path.insert(0, str(Path(__file__).parents[2]))

from distill.data import files, webdataset  # noqa: E402
from distill.errors import UserError  # noqa: E402
from distill.files import read_json, sealed  # noqa: E402
from distill.networks import weights  # noqa: E402
from distill.training import resume  # noqa: E402


def _shard(path: Path) -> None:
    webdataset._index(path, None)


READERS = {  # name of a file's end, what reads it
    "weights": (".safetensors", weights.read_state),
    "checkpoint": (".ckpt", resume.read),
    "image": (".png", files.read),
    "shard": (".tar", _shard),
    "record": (".json", read_json),
}


def take(reader: str, content: bytes) -> None:
    """Give the reader a file with this content; UserError is an answer."""
    suffix, read = READERS[reader]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"x{suffix}")
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            read(path)


def seeds(reader: str) -> list[bytes]:
    """Small whole files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x")
        if reader == "weights":
            save_file({"a": torch.ones(2)}, path)
            plain = path.read_bytes()
            weights.save_weights(nn.Linear(1, 1), path, {"epoch": "1"})
            torch.save({"state_dict": {"a": torch.ones(2)}}, Path(folder, "y"))
            return [plain, path.read_bytes(), Path(folder, "y").read_bytes()]
        if reader == "checkpoint":
            torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 1, "global_step": 2, "loops": {}}, path)
            return [path.read_bytes()]
        if reader == "record":
            return [sealed({"a": 1, "b": [1.5, None, {"c": "d"}]}).encode(), json.dumps({"a": []}).encode()]
        images = []
        for kind, mode in (("PNG", "RGB"), ("PNG", "P"), ("JPEG", "RGB"), ("GIF", "P"), ("WEBP", "RGB"), ("TIFF", "L")):
            file = BytesIO()
            Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).convert(mode).save(file, kind)
            images.append(file.getvalue())
        if reader == "image":
            return images
        with tarfile.open(path, "w") as archive:
            for name, content in (("a.png", images[0]), ("a.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, BytesIO(content))
        return [path.read_bytes()]


def main() -> None:
    import atheris

    reader, *options = sys.argv[1:]
    folder = CORPUS / reader
    folder.mkdir(parents=True, exist_ok=True)
    for number, content in enumerate(seeds(reader)):
        (folder / f"seed{number}").write_bytes(content)
    for module in (weights, resume, files, webdataset):
        for name, each in vars(module).copy().items():
            if callable(each) and getattr(each, "__module__", None) == module.__name__ and hasattr(each, "__code__"):
                setattr(module, name, atheris.instrument_func(each))
    atheris.Setup([sys.argv[0], str(folder), "-max_len=8192", *options], lambda content: take(reader, content))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
