"""What this process was asked, and in which way: as a program, by its command line, or from Python. Never imports
torch."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_from_python: list[list[str]] = []  # the words of the call that is at work


def words() -> list[str]:
    """As a command line has them: options and Hydra's flags."""
    return _from_python[-1] if _from_python else sys.argv[1:]


@contextmanager
def from_python(said: list[str]) -> Iterator[None]:
    """In here these are the words, and messages name the Python interface."""
    _from_python.append(said)
    try:
        yield
    finally:
        _from_python.pop()


def program() -> str:
    """The command, as it was typed: "python train.py", "distill" or "python -m distill"."""
    path = Path(sys.argv[0])
    if path.name == "__main__.py" and path.parent.name == __package__:
        return "python -m distill"
    return "python train.py" if path.name == "train.py" and not _from_python else "distill"


def again(*said: str) -> str:
    """What to type for these words: a command, or a call from Python. Flags such as --help are a command's."""
    if _from_python and not any(word.startswith("-") for word in said):
        return f"distill.train({', '.join(map(repr, said))})"
    return " ".join([program(), *map(shlex.quote, said)])
