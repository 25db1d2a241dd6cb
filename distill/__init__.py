"""Distill: from a big image classifier to a small measured mobile file.

    run = distill.train("teacher=resnet50", "student=mobilenet", data="photos/")
    run.report
    run.student.predict("photo.jpg")

docs/python.md tells all of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from distill import losses, runs
    from distill.api.model import compress, evaluate, export
    from distill.api.module import DistillModule
    from distill.api.run import Run, load, train
    from distill.errors import UsageError, UserError
    from distill.networks.student import Student
    from distill.runs.student import load_student

_HOMES = {
    "train": "distill.api.run",
    "load": "distill.api.run",
    "Run": "distill.api.run",
    "load_student": "distill.runs.student",
    "Student": "distill.networks.student",
    "evaluate": "distill.api.model",
    "compress": "distill.compress",
    "export": "distill.export",
    "DistillModule": "distill.api.module",
    "UserError": "distill.errors",
    "UsageError": "distill.errors",
    "losses": "distill.losses",
    "runs": "distill.runs",
}
__all__ = [
    "DistillModule",
    "Run",
    "Student",
    "UsageError",
    "UserError",
    "compress",
    "evaluate",
    "export",
    "load",
    "load_student",
    "losses",
    "runs",
    "train",
]


def __getattr__(name: str):  # torch is imported only when work starts
    if name not in _HOMES:
        raise AttributeError(f"module 'distill' has no attribute '{name}'")
    home = import_module(_HOMES[name])
    return home if home.__name__ == f"distill.{name}" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
