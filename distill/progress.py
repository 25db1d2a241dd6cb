"""What a person sees while a run works: lines of the process that leads. Never imports torch.

Lightning's rank_zero_only.rank is the same number, but importing it imports torch, and the command line's errors come
before that."""

import os
from collections.abc import Sequence

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # where Lightning looks, in its order


def leads() -> bool:
    """Whether this process is the first of its run: the one that speaks and writes where several train together."""
    return next((int(os.environ[name]) for name in RANKS if name in os.environ), 0) == 0


def say(line: str) -> None:
    if leads():
        print(line, flush=True)


def printable(text: str) -> str:
    """The text with signs that no terminal shows, or that move or hide what stands beside them, as their numbers."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def few(names: Sequence[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(map(printable, names[:shown])) + rest or "none"
