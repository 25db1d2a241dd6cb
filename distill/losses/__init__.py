"""Losses: one published method a file, each a pure function of tensors and the class around it.

    distill.losses.dkd(student_logits, teacher_logits, labels, alpha=1.0, beta=8.0, temperature=4.0)
    distill.losses.DKD(temperature=2.0)

A file's module can be called: it is the function of its own name. docs/methods.md lists them.
"""

import sys
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from distill.called import called_as

SHARED = ("base", "logits", "project", "relations", "stages", "terms", "weight")  # files that are no method


def methods() -> list[str]:
    """The names of the files that are a method."""
    return sorted(each.name for each in iter_modules(__path__) if each.name not in SHARED)


class _Losses(ModuleType):
    """The package: every file of a method that is imported becomes callable."""

    def __setattr__(self, name: str, value) -> None:  # by which the import system binds them
        if isinstance(value, ModuleType) and name not in SHARED and callable(getattr(value, name, None)):
            called_as(value, f"{value.__name__}:{name}")
        super().__setattr__(name, value)

    def __getattr__(self, name: str):
        """A method's file, or a class of one of them, imported when it is asked for."""
        if name in methods() or name in SHARED:
            return import_module(f"{self.__name__}.{name}")
        if name[:1].isupper():
            from distill.losses.base import Loss

            modules = (import_module(f"{self.__name__}.{each}") for each in ("base", *methods()))
            for found in (getattr(module, name, None) for module in modules):
                if isinstance(found, type) and issubclass(found, Loss):
                    return found
        raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *methods()})


sys.modules[__name__].__class__ = _Losses
