"""One at a time: what several processes, on this machine or on others, may want to make at once.

Who holds a lock says so in a file beside it: LOCK.owner, which only one can create (O_EXCL, also over NFS) and whose
time of change it renews every few seconds. The operating system's lock on LOCK makes that quick and sure where it
works: it ends with its process. On network file systems it may be missing, or be granted to everybody; then the owner's
file alone decides. Should both fail, what is written is whole all the same (`distill.files.atomic`): the last one wins.
"""

import contextlib
import errno
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from distill.errors import UserError
from distill.files import MACHINE, lives, read_json, started
from distill.progress import say

POLL = 0.1  # seconds
BEAT = 5  # seconds between an owner's signs of life
GONE = 60  # seconds without one, after which an owner on another machine is taken to be dead
SOON = 1  # seconds of waiting that nobody needs to be told of
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # of file systems that have none

run = ""  # this process's run, as others are told of it


class Held(UserError):
    """Another process holds a lock; `owner` says which, where that is known."""

    def __init__(self, path: Path, owner: str):
        super().__init__(f"{path} is held by {owner}")
        self.owner = owner


@contextlib.contextmanager
def alone(path: Path, what: str, patience: float | None = None) -> Iterator[None]:
    """Hold the lock `path` in the block, after waiting for whoever holds it.

    Args:
        path: in a folder that is there.
        what: is waited for, as a person is told: "the teacher", "the images' pack".
        patience: seconds; None: however long it takes.

    Raises:
        Held: it was not free within `patience`.
        OSError: the folder can't be written.
    """
    owner, begun, told = path.with_name(f"{path.name}.owner"), time.monotonic(), False
    lock = FileLock(path, timeout=0)
    while not _taken(lock, path, owner):
        waited = time.monotonic() - begun
        if patience is not None and waited > patience:
            raise Held(path, _said(owner))
        if waited > SOON and not told:
            told = True
            say(f"{what}: waiting for {_said(owner)}")
        time.sleep(POLL)
    ended = threading.Event()
    threading.Thread(target=_live, args=(owner, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        owner.unlink(missing_ok=True)
        lock.release()


def held(path: Path) -> bool:
    """Whether another process holds the lock `path` at this moment."""
    try:
        with alone(path, "", 0):
            return False
    except Held:
        return True
    except OSError:  # a folder that can't be written: nobody works there
        return False


def _taken(lock: FileLock, path: Path, owner: Path) -> bool:
    """Whether both the lock and the owner's file are ours now."""
    try:
        lock.acquire()
    except Timeout:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        if _claimed(owner) or (not _owned(owner, path) and _claimed(owner)):
            return True
    except OSError:
        lock.release()
        raise
    lock.release()
    return False


def _claimed(owner: Path) -> bool:
    try:
        descriptor = os.open(owner, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    about = {
        "run": run or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
        "host": MACHINE,
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(about, file)
    except OSError:  # a full disk
        owner.unlink(missing_ok=True)
        raise
    return True


def _owned(owner: Path, path: Path) -> bool:
    """Whether its owner lives; the file of one that is gone is removed."""
    try:
        about = _about(owner)
        path.touch()  # now, by the clock of the file system
        silent = path.stat().st_mtime - owner.stat().st_mtime
        if about.get("host") == MACHINE and isinstance(about.get("pid"), int):
            gone = not lives(about["pid"], about.get("started"))
        else:
            gone = silent > GONE
        if gone and about == _about(owner):
            owner.unlink()
        return not gone
    except FileNotFoundError:  # it has just ended
        return False


def _about(owner: Path) -> dict:
    """What the owner said; nothing where it is only about to."""
    if not owner.exists():
        raise FileNotFoundError(owner)
    try:
        return read_json(owner, 10_000)
    except UserError:
        return {}


def _said(owner: Path) -> str:
    try:
        about = _about(owner)
    except FileNotFoundError:
        about = {}
    if not about:
        return "another process"
    host = str(about.get("host")).rpartition("-")[0]
    return f"{about.get('run')} (process {about.get('pid')} on {host}, since {about.get('since')})"


def _live(owner: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(owner)
