"""Code of the user's own: where in it something stands, or went wrong. Never imports torch."""

import inspect
import os
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from traceback import walk_tb

from distill.errors import UsageError

PACKAGE = os.path.join(os.path.dirname(os.path.realpath(__file__)), "")
_PATHS = sysconfig.get_paths()
INSTALLED = tuple(os.path.join(os.path.realpath(_PATHS[name]), "") for name in ("stdlib", "platstdlib"))
FOLDERS = ("site-packages", "dist-packages")


def place_of(thing) -> str | None:
    """Where a function, a class, or an object's class is defined: "mine.py:12"; None where that isn't the user's."""
    thing = getattr(thing, "func", thing)
    if not (inspect.isfunction(thing) or inspect.ismethod(thing) or inspect.isclass(thing)):
        thing = type(thing)
    try:
        file, (_, line) = inspect.getsourcefile(thing), inspect.getsourcelines(thing)
    except (OSError, TypeError):
        return None
    return f"{_short(file)}:{line}" if file and is_own(file) else None


def place_in(error: BaseException) -> str | None:
    """The user's line that raised it, or that called what did, if one did on our behalf: "mine.py:12"."""
    if isinstance(error, SyntaxError) and error.filename and is_own(error.filename):
        return f"{_short(error.filename)}:{error.lineno}"
    found, called = None, False
    for frame, line in walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        called = called or os.path.realpath(file).startswith(PACKAGE) or "hydra" in Path(file).parts
        if called and is_own(file):
            found = f"{_short(file)}:{line}"
    return found


def refuse_other_arguments(function: Callable, *given: str) -> None:
    """Raises UsageError, with its place, where a function of the user's can't be called with these arguments."""
    try:
        inspect.signature(function).bind(*given)
    except TypeError as error:
        line = f"{function.__qualname__} is called with ({', '.join(given)}): {error}"
        raise UsageError(prefixed(place_of(function), line)) from error


def is_own(file: str) -> bool:
    """Whether a file of Python is neither this package's nor an installed one's."""
    if file.startswith("<") or not file.endswith(".py"):
        return False
    path = os.path.realpath(file)
    return not path.startswith((PACKAGE, *INSTALLED)) and not {*Path(path).parts} & {*FOLDERS}


def _short(file: str) -> str:
    path = os.path.realpath(file)
    inside = os.path.join(os.path.realpath(os.curdir), "")
    return path.removeprefix(inside)


def prefixed(place: str | None, line: str) -> str:
    """`line` behind the place, unless it begins with one."""
    return line if place is None or is_placed(line) else f"{place}: {line}"


def is_placed(line: str) -> bool:
    """Whether a line begins with a place in a file: "mine.py:12: "."""
    return bool(re.match(r"\S+\.py:\d+: ", line))
