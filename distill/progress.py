"""What a person sees while a run works: lines of the process that leads. Never imports torch.

Lightning's rank_zero_only.rank is the same number, but importing it imports torch, and the command line's errors come
before that."""

import codecs
import os
import shutil
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext

# numbers of this process among all, among those of its machine, and of its machine among all, as torchrun, srun,
# Lightning and jsrun set them; which of them are set, and which by hand, differs
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "NODE_RANK", "GROUP_RANK")


def leads() -> bool:
    """Whether this process is the first of its run: the one that speaks and writes where several train together."""
    return all(int(os.environ.get(name) or 0) == 0 for name in RANKS)


def say(line: str) -> None:
    """A line, above the bar where one is shown."""
    if leads():
        bars = sys.modules.get("tqdm")
        with bars.tqdm.external_write_mode(sys.stdout) if bars else nullcontext():
            print(shown(str(line)), flush=True)


TURNS = {*map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A)))}  # the direction of what follows


def shown(text: str) -> str:
    """`text`, perhaps a stranger's, for a terminal: signs that steer one, or hide what comes after, are written out."""
    if text.isprintable():
        return text
    steers = (sign for sign in {*text} if sign not in "\n\t" and (unicodedata.category(sign) == "Cc" or sign in TURNS))
    return text.translate({ord(sign): sign.encode("unicode_escape").decode() for sign in steers})


PLAIN = {  # for a terminal or file that lacks the sign
    **{"–": "-", "—": "-", "─": "-", "·": ".", "×": "x", "Δ": "d", "“": '"', "”": '"', "’": "'"},
    **{"→": "->", "±": "+-", "…": "...", "≤": "<=", "≥": ">="},
}


def plain(text: str) -> str:
    """The text as stdout can show it: what a table's columns are measured by."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
        return text
    except (UnicodeEncodeError, LookupError):
        return text.encode(sys.stdout.encoding, PLAINLY).decode(sys.stdout.encoding)


PLAINLY = "distill.plain"  # how encoders treat a sign that they lack
codecs.register_error(PLAINLY, lambda error: (PLAIN.get(error.object[error.start], "?"), error.start + 1))


def on_a_terminal() -> bool:
    """Whether stdout is one on which a line can be written anew."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def screen_width(otherwise: int) -> int:
    """Columns of the terminal; `otherwise` where there is none, or none that says."""
    return shutil.get_terminal_size((otherwise, 24)).columns


def printable(text: str) -> str:
    """The text with signs that no terminal shows, or that move or hide what stands beside them, as their numbers."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def markdown(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of texts, its heads first."""
    head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in table)
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def few(names: Sequence[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(map(printable, names[:shown])) + rest or "none"


def counted(chunks: Iterable[Sequence], total: int, what: str) -> Iterator:
    """The items of all chunks, with a bar on a terminal, else with a line every half minute."""
    if leads() and on_a_terminal():
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
