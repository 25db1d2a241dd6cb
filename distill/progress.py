"""What a person sees while a run works: lines of the process that leads. Never imports torch.

Lightning's rank_zero_only.rank is the same number, but importing it imports torch, and the command line's errors come
before that."""

import os
import unicodedata

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # where Lightning looks, in its order


def leads() -> bool:
    """Whether this process is the first of its run: the one that speaks and writes where several train together."""
    return next((int(os.environ[name]) for name in RANKS if name in os.environ), 0) == 0


def say(line: str) -> None:
    if leads():
        print(shown(str(line)), flush=True)


TURNS = {*map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A)))}  # the direction of what follows


def shown(text: str) -> str:
    """`text`, perhaps a stranger's, for a terminal: signs that steer one, or hide what comes after, are written out."""
    if text.isprintable():
        return text
    steers = (sign for sign in {*text} if sign not in "\n\t" and (unicodedata.category(sign) == "Cc" or sign in TURNS))
    return text.translate({ord(sign): sign.encode("unicode_escape").decode() for sign in steers})
