"""Modules that can be called, as the function that a person means by their name."""

import inspect
from collections.abc import Callable
from pkgutil import resolve_name
from types import ModuleType


class Called(ModuleType):
    """A module whose call is that of the function with the name `__called__`, "package.module:function"."""

    __called__: str

    def __call__(self, *args, **kwargs):
        return self._function()(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function())

    def _function(self) -> Callable:
        return resolve_name(self.__called__)


def called_as(module: ModuleType, function: str) -> None:
    """Let `module` be called as "package.module:function", which is imported then."""
    module.__called__ = function
    module.__class__ = Called
