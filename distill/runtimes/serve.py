"""A file answers in a process of its own, which loads the file and its runtime and nothing else of the run.

python -m distill.runtimes.serve LOADER PATH   LOADER: the dotted name of an Artifact's `load`

Requests come on stdin: a line of JSON {"shape": [N, C, H, W]}, then the images as float32. Answers go to stdout: a
line {"shape": [N, K], "ms": …}, then the logits as float32; or a line {"error": …}, which is the last.
"""

import json
import math
import os
import pkgutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from distill.errors import UserError
from distill.runtimes.artifact import Artifact

ROOT = str(Path(__file__).parents[2])  # where `import distill` finds the package

LIMIT = 300  # seconds for an answer, and one more for each image: loading takes some, a file that hangs all


class Served:
    """`artifact` in a fresh process, on one thread: `served(images)` answers, `served.time(images)` measures.

    Both raise UserError when the file can't be loaded or run, the process died, or it gave no answer within LIMIT
    seconds, after which it is ended.
    """

    def __init__(self, artifact: Artifact):
        self.name = artifact.path.name
        self.said = tempfile.TemporaryFile()  # noqa: SIM115  what the runtime prints, closed by close()
        loader = f"{artifact.load.__module__}.{artifact.load.__qualname__}"
        given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        search = os.pathsep.join([ROOT, *map(os.path.abspath, given)])
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
            head, logits = _receive(self.process.stdout)
        except (OSError, EOFError, ValueError) as error:
            if hung.is_set():
                raise UserError(
                    f"{self.name}: no answer within {LIMIT + len(images)} s: its process was ended"
                ) from error
            raise UserError(f"{self.name}: its process died ({self._cause()})") from error
        finally:
            watch.cancel()
        if logits is None:
            raise UserError(f"{self.name}: {head['error']}")
        return logits, head["ms"]

    def _cause(self) -> str:
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "it lives, but what it answers can't be read"
        last = next((line.strip() for line in reversed(self.log().split("\n")) if line.strip()), "it said nothing")
        return f"signal {-code}" if code < 0 else f"exit code {code}: {last}"

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
def serve(artifacts: Mapping[str, Artifact]) -> Iterator[dict[str, Served]]:
    """All of them at once, each in its process; they end with the block."""
    served: dict[str, Served] = {}
    try:
        for name, artifact in artifacts.items():
            served[name] = Served(artifact)
        yield served
    finally:
        for each in served.values():
            each.close()


def main(loader: str, path: str) -> None:
    """The process's side."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a runtime prints is no answer
    torch.set_num_threads(1)
    try:
        model = pkgutil.resolve_name(loader)(Path(path))
        while True:
            _, images = _receive(requests)
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


def _receive(stream) -> tuple[dict, Tensor | None]:
    line = stream.readline()
    if not line:
        raise EOFError
    head = json.loads(line)
    if "shape" not in head:
        return head, None
    size = 4 * math.prod(head["shape"])
    data = bytearray(stream.read(size))
    if len(data) < size:
        raise EOFError
    return head, torch.frombuffer(data, dtype=torch.float32).view(head["shape"])


if __name__ == "__main__":
    main(*sys.argv[1:])
