"""What a person sees while a run works: lines of the process that leads. Never imports torch.

Lightning's rank_zero_only.rank is the same number, but importing it imports torch, and the command line's errors come
before that."""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # where Lightning looks, in its order


def leads() -> bool:
    """Whether this process is the first of its run: the one that speaks and writes where several train together."""
    return next((int(os.environ[name]) for name in RANKS if name in os.environ), 0) == 0


def say(line: str) -> None:
    if leads():
        print(shown(str(line)), flush=True)


def shown(text: str) -> str:
    """`text`, perhaps a stranger's, for a terminal: its lines as they are, other signs as `printable` has them."""
    return text if text.isprintable() else "".join(sign if sign in "\n\t" else printable(sign) for sign in text)


def printable(text: str) -> str:
    """The text with signs that no terminal shows, or that move or hide what stands beside them, as their numbers."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def few(names: Sequence[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(map(printable, names[:shown])) + rest or "none"


def counted(chunks: Iterable[Sequence], total: int, what: str) -> Iterator:
    """The items of all chunks, with a bar on a terminal, else with a line every half minute."""
    if leads() and sys.stdout.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=f"  {what}", leave=False, file=sys.stdout) as bar:
            for chunk in chunks:
                yield from chunk
                bar.update(len(chunk))
        return
    done, told = 0, time.monotonic()
    for chunk in chunks:
        yield from chunk
        done += len(chunk)
        if time.monotonic() - told > 30:
            say(f"  {what}: {done:,} of {total:,}")
            told = time.monotonic()
