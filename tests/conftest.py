"""Shared by the tests: one CPU thread for each of pytest's processes, and `train`, which runs the command line here."""

import contextlib
import os
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several processes would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # also of the processes that tests start
import torch

from distill.cli import command

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # train.py


SLOW = {
    name: int(seconds)
    for line in (ROOT / "tests" / "slow.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
    for seconds, _, name in [line.partition(" ")]
}


def pytest_collection_modifyitems(items):
    """Tests of tests/slow.txt, and those that aren't run by default, are slow. Files of long tests come first, so that
    two processes end together."""
    files: dict[str, int] = {}
    for item in items:
        name = item.nodeid.partition("[")[0]
        if name in SLOW or item.get_closest_marker("faults") or item.get_closest_marker("matrix"):
            item.add_marker("slow")
    for name, seconds in SLOW.items():
        file = name.partition("::")[0]
        files[file] = files.get(file, 0) + seconds
    items.sort(key=lambda item: -files.get(item.nodeid.partition("::")[0], 0))


@pytest.fixture(scope="session", autouse=True)
def _two_threads():
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def train():
    """`train("student=resnet8", ..., cwd=FOLDER)` -> exit code of train.py with these words."""
    import train as program

    def run(*words: str, cwd: Path) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", ["train.py", *words])
            patch.setattr(command, "TRACEBACK", False)
            patch.setenv("HYDRA_FULL_ERROR", "0")  # main() sets it; put back at the end
            try:
                program.main()
            except SystemExit as end:
                return end.code or 0
        return 0

    return run


@pytest.fixture
def quick() -> list[str]:
    """Words that make a run of seconds: small made images, tiny networks, two epochs."""
    return QUICK


QUICK = [
    "data=fake",
    "data.image_size=16",
    "data.train_size=120",
    "data.batch_size=16",
    "teacher=resnet8",
    "student=resnet8_tiny",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
]


class Here:
    """A file's answers from this process: what its own would cost is tested elsewhere."""

    def __init__(self, artifact):
        self.answer = artifact.run

    def __call__(self, images):
        return self.answer(images)

    def time(self, images) -> float:
        self.answer(images)
        return 1.0


@pytest.fixture
def served_here(monkeypatch):
    """Exported files answer in this process, not each in one of its own."""

    @contextlib.contextmanager
    def serve(artifacts, classes):
        yield {name: Here(artifact) for name, artifact in artifacts.items()}

    monkeypatch.setattr("distill.report.evaluate.serve", serve)
