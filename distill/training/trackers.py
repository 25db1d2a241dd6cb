"""What a tracker is told: metrics while a run trains, what it made at its end; beside the run, which never waits."""

import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger

from distill.progress import say

PATIENCE = 10  # seconds that a tracker may delay a run, in all


@dataclass(frozen=True)
class Made:
    """What a run has made, in its `folder`.

    Attributes:
        figures: by model or file, what was measured of it: numbers.
        head, table: of the report, texts.
        confused: [class, answer, images] of the student on the test images, the most frequent where classes are many.
        worst: PNG or JPEG and a caption of the images that the student got wrong, being most sure.
        files: the student's weights, and what was exported.
        teacher: hash of the weights; None: it learned along.
        taught_by: files of the teacher's weights.
    """

    folder: Path
    figures: Mapping[str, Mapping[str, float]]
    head: Sequence[str]
    table: Sequence[Sequence[str]]
    confused: Sequence[tuple[str, str, int]]
    worst: Sequence[tuple[bytes, str]]
    files: Sequence[Path]
    teacher: str | None
    taught_by: Sequence[Path]


class Tracker(Logger):
    """A logger for Lightning that hands everything on to `make(tell)`, in a thread: what fails there is told, and what
    hangs is waited for at most PATIENCE seconds, once, at the end.

    Args:
        called: "wandb", for a person.
        make: what it returns has log_metrics(values, step), report(Made) and close(failed); `tell` takes a line for a
            person.
    """

    def __init__(self, called: str, make: Callable[[Callable[[str], None]], Any]):
        super().__init__()
        self.called = called
        self._told: queue.SimpleQueue = queue.SimpleQueue()  # said once the run's own thread comes by
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._follow, args=(make,), daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return self.called

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._hand_on("log_metrics", dict(metrics), step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: a run's configuration is known before it begins."""

    def report(self, made: Made) -> None:
        self._hand_on("report", made)

    def close(self, failed: bool = False) -> None:
        self._hand_on("close", failed)
        self._work.put(None)
        self._thread.join(PATIENCE)
        self._say()
        if self._thread.is_alive():
            say(f"  warning: {self.called} has not answered for {PATIENCE} s: it may lack what was logged last")

    def _hand_on(self, method: str, *args: Any) -> None:
        self._say()
        self._work.put((method, args))

    def _say(self) -> None:
        while not self._told.empty():
            say(f"  {self._told.get()}")

    def _follow(self, make: Callable[[Callable[[str], None]], Any]) -> None:
        """The thread's work, to its end or its first failure."""
        try:
            logger = make(self._told.put)
            for method, args in iter(self._work.get, None):
                getattr(logger, method)(*args)
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self._told.put(f"warning: {self.called}: {reason}; nothing more is logged there")


def flat(values: Mapping, prefix: str = "", sign: str = ".") -> Iterable[tuple[str, Any]]:
    """(key, value) of nested values, keys joined by `sign`; lists are texts, null is left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}{sign}", sign)
        elif value is not None:
            yield f"{prefix}{key}", value if isinstance(value, (bool, int, float, str)) else str(value)
