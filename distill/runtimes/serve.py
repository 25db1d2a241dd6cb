"""A file answers in a process of its own, which loads the file and its runtime and nothing else of the run.

python -m distill.runtimes.serve LOADER PATH   LOADER: the dotted name of an Artifact's `load`

Requests come on stdin: a line of JSON {"shape": [N, C, H, W]}, then the images as float32. Answers go to stdout: a
line {"shape": [N, K], "ms": …}, then the logits as float32; or a line {"error": …}, which is the last.
"""

import ctypes
import gc
import json
import math
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

if __name__ == "__main__":
    gc.disable()  # until the runtime is imported: there is nothing to collect (1.8 → 1.1 s)

import torch
from torch import Tensor

from distill.errors import UserError
from distill.own import place_of
from distill.runtimes.artifact import Artifact

ROOT = str(Path(__file__).parents[2])  # where `import distill` finds the package

LIMIT = 300  # seconds for an answer, and one more for each image: loading takes some, a file that hangs all
SOON = 10  # seconds for a process that sent half an answer to end
LONGEST = 65536  # bytes of an answer's first line
MOST = 10_000_000  # classes


def _found_in(load: Callable) -> list[str]:
    """The folder from which the user's own module of a `load` was imported here, whatever put it on Python's path."""
    module = sys.modules.get(load.__module__)
    if place_of(load) is None or module is None or not module.__file__:
        return []
    inside = load.__module__.count(".") + Path(module.__file__).stem.count("__init__")
    return [str(Path(module.__file__).resolve().parents[inside])]


class Served:
    """`artifact` in a fresh process, on one thread: `served(images)` answers, `served.time(images)` measures.

    Both raise UserError when the file can't be loaded or run, the process died, what it answers is no logits of these
    images and as many classes, or it gave no answer within LIMIT seconds, after which it is ended.

    Args:
        classes: how many logits an image has; None: any number.
    """

    def __init__(self, artifact: Artifact, classes: int | None = None):
        self.name, self.classes = artifact.path.name, classes
        self.said = tempfile.TemporaryFile()  # noqa: SIM115  what the runtime prints, closed by close()
        loader = f"{artifact.load.__module__}.{artifact.load.__qualname__}"
        given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        search = os.pathsep.join([ROOT, *map(os.path.abspath, given), *_found_in(artifact.load)])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distill.runtimes.serve", loader, str(artifact.path.resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,  # Python looks for modules there: in the user's folder might be a stranger's
        )

    def __call__(self, images: Tensor) -> Tensor:
        """images (N, C, H, W) in [0, 1] to logits (N, K) float32."""
        return self._ask(images)[0]

    def time(self, images: Tensor) -> float:
        """Milliseconds of one answer, without the transport."""
        return self._ask(images)[1]

    def _ask(self, images: Tensor) -> tuple[Tensor, float]:
        hung = threading.Event()
        watch = threading.Timer(LIMIT + len(images), lambda: (hung.set(), self.process.kill()))
        watch.daemon = True
        watch.start()
        try:
            with suppress(OSError):  # a process that is gone may have left its reason
                _send(self.process.stdin, {"shape": list(images.shape)}, images)
            head = _head(self.process.stdout)
            if "error" in head:
                raise UserError(f"{self.name}: {str(head['error'])[:LONGEST]}")
            self._check(head.get("shape"), len(images))
            logits, milliseconds = _tensor(self.process.stdout, head["shape"]), float(head["ms"])
        except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
            if hung.is_set():
                raise UserError(
                    f"{self.name}: no answer within {LIMIT + len(images)} s: its process was ended"
                ) from error
            raise UserError(f"{self.name}: its process {self._cause()}") from error
        finally:
            watch.cancel()
        return logits, milliseconds

    def _check(self, shape, images: int) -> None:
        """Raises UserError, and ends the process, where it is not that of logits."""
        whole = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int for size in shape)
        if not whole or shape[0] != images or not 0 < shape[1] <= MOST or self.classes not in (None, shape[1]):
            self.process.kill()  # the rest of its answer is not read
            raise UserError(
                f"{self.name}: it answers {images} images with {str(shape)[:100]}, expected logits "
                f"[{images}, {self.classes or 'classes'}]"
            )

    def _cause(self) -> str:
        try:
            code = self.process.wait(timeout=SOON)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return "answers what can't be read"
        last = next((line.strip() for line in reversed(self.log().split("\n")) if line.strip()), "it said nothing")
        return f"died ({f'signal {-code}' if code < 0 else f'exit code {code}: {last}'})"

    def log(self) -> str:
        """What the process and its runtime have said so far."""
        self.said.seek(0)
        return self.said.read().decode(errors="replace")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.said):
            with suppress(OSError):  # unsent bytes for a process that is gone
                stream.close()


@contextmanager
def serve(artifacts: Mapping[str, Artifact], classes: int | None = None) -> Iterator[dict[str, Served]]:
    """All of them at once, each in its process; they end with the block."""
    served: dict[str, Served] = {}
    try:
        for name, artifact in artifacts.items():
            served[name] = Served(artifact, classes)
        yield served
    finally:
        for each in served.values():
            each.close()


def main(loader: str, path: str) -> None:
    """The process's side."""
    _end_with_parent()
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a runtime prints is no answer
    torch.set_num_threads(1)
    try:
        model = pkgutil.resolve_name(loader)(Path(path))
        gc.freeze()
        gc.enable()
        while True:
            images = _tensor(requests, _head(requests)["shape"])
            start = time.perf_counter()
            logits = model(images)
            milliseconds = (time.perf_counter() - start) * 1000
            _send(answers, {"shape": list(logits.shape), "ms": milliseconds}, logits)
    except EOFError:  # the run has ended
        return
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        _send(answers, {"error": reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"})


def _send(stream, head: dict, tensor: Tensor | None = None) -> None:
    stream.write(json.dumps(head).encode() + b"\n")
    if tensor is not None:
        stream.write(memoryview(tensor.detach().float().contiguous().numpy()).cast("B"))
    stream.flush()


def _end_with_parent() -> None:
    """Also when a file hangs and the run is killed, where the system can do that (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def _head(stream) -> dict:
    """Raises EOFError or ValueError where there is no such line."""
    line = stream.readline(LONGEST)
    if not line:
        raise EOFError
    head = json.loads(line)
    if not isinstance(head, dict):
        raise ValueError(f"expected an object, not a {type(head).__name__}")
    return head


def _tensor(stream, shape: list[int]) -> Tensor:
    size = 4 * math.prod(shape)
    data = bytearray(stream.read(size))
    if len(data) < size:
        raise EOFError
    return torch.frombuffer(data, dtype=torch.float32).view(shape)


if __name__ == "__main__":
    main(*sys.argv[1:])
