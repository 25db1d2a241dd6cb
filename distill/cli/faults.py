"""What a machine does to a run: memory, disks and processes that fail, each in a line with the way on."""

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from distill.asked import again
from distill.errors import UserError

MEMORY = ("OutOfMemoryError", "can't allocate memory", "not enough memory", "MemoryError", "Cannot allocate memory")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FAILING = {errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOTCONN}


@contextlib.contextmanager
def told(cfg: DictConfig, folder: Path) -> Iterator[None]:
    """Around the work of a run: what the machine did to it becomes a UserError that says how to go on."""
    try:
        yield
    except Exception as error:
        goes_on = f"{again(f'run={folder}')} goes on"
        if found := re.search(r"(\S+) does not have a deterministic implementation", _said(error)):
            raise UserError(
                f"deterministic=true: {found[1]} has no such form here: do without the loss, network or augmentation "
                "that uses it, or without deterministic=true"
            ) from error
        if exhausted(error):
            raise UserError(f"{memory(error)}: free some, and {goes_on}{_smaller(cfg)}") from error
        if worker(error):
            raise UserError(f"{worker(error)}; {goes_on}") from error
        if line := disk(error):
            raise UserError(f"{line}, and {goes_on}") from error
        raise


def chain(error: BaseException) -> list[BaseException]:
    """The error, its cause, the cause of that …"""
    links = [error]
    while (cause := links[-1].__cause__ or links[-1].__context__) is not None and cause not in links:
        links.append(cause)
    return links


def exhausted(error: BaseException) -> bool:
    """Whether memory has run out, of whatever kind."""
    return any(word in said for said in map(_said, chain(error)) for word in MEMORY)


def memory(error: BaseException) -> str:
    """An error that says that memory is `exhausted`, with how much was asked for."""
    asked = next(
        filter(None, (re.search(r"allocate ([\d.]+ ?(?:[KMGT]i?B|bytes))", _said(e)) for e in chain(error))), 0
    )
    return f"memory has run out{f' ({asked[1]} more were asked for)' if asked else ''}"


def worker(error: BaseException) -> str | None:
    """What became of a process that loads images; None where the error is not one's."""
    for said in map(_said, chain(error)):
        if "DataLoader worker" in said and ("killed by signal" in said or "exited unexpectedly" in said):
            ended = " ".join(said[said.index("DataLoader worker") :].split())[:120].rstrip(" .")
            return f"{ended}: probably memory has run out: lower data.num_workers (0 needs the least)"
        if found := re.search(r"DataLoader timed out after (\d+)", said):
            return f"no images came for {found[1]} s: a process that loads them hangs, or the disk that it reads"
    return None


def disk(error: BaseException) -> str | None:
    """Which file could not be written or read, why, and what is to be done about it; None where no disk is at fault."""
    links = chain(error)
    code = next(filter(None, map(_code, links)), None)
    if code not in FULL | FAILING:
        return None
    known = next((str(link) for link in links if isinstance(link, UserError)), None)
    failed = next((link for link in links if isinstance(link, OSError)), error)
    place = getattr(failed, "filename", None)
    line = known or f"{getattr(failed, 'strerror', None) or failed}{f': {place}' if place else ''}"
    return f"{line}: {'make room' if code in FULL else 'mend that'}"


def _code(error: BaseException) -> int | None:
    """The number of the operating system's error: safetensors and tokens of Rust's say it at their end."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    if "inline_container" in str(error) and "unexpected pos" in str(error):  # torch's writer says no more than this
        return errno.ENOSPC
    return int(found[1]) if found else None


def _smaller(cfg: DictConfig) -> str:
    """Which batch to try instead, in a run of its own: another one changes the result."""
    size, steps = cfg.data.get("batch_size"), cfg.trainer.get("accumulate_grad_batches") or 1
    if not isinstance(size, int) or size < 2:
        return "; or start anew with a smaller network or data.image_size"
    return (
        f"; or start anew with data.batch_size={size // 2} instead of {size} (trainer.accumulate_grad_batches="
        f"{2 * steps} beside it keeps the images of a step)"
    )


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
