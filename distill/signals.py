"""Signals that end a run. Training saves first, everything else stops where it is; the exit code is a shell's.

SIGTERM and SIGINT (Ctrl-C) ask once; a second SIGINT leaves at once. SIGUSR1 is SLURM's word that time is up
(`--signal=B:USR1@60`): the run saves, and the job is queued again. SIGUSR2 is submitit's word for that, which queues
the job again itself. Never imports torch.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

SAID = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted", signal.SIGUSR1: "out of time"}
SAID[signal.SIGUSR2] = SAID[signal.SIGUSR1]
SUBMITIT = "SUBMITIT_EXECUTOR"  # set in its jobs
PARENT = "DISTILL_PARENT"  # the process that a sweep's job ends with
SECONDS = 3  # that a loader's process works on


class Ended(BaseException):
    """A signal ends the run; `status` is a word for run.json, `code` the exit code, 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(SAID[number])
        self.number, self.status, self.code = number, SAID[number], 128 + number


class _Asked:
    """What has been asked of this process so far."""

    process: int = 0  # the one that handles signals; its forks leave that to it
    by: int | None = None  # the first signal
    held = False  # training: it asks `asked()` when it can be left
    leaving = False
    alone = True


@contextmanager
def handled(alone: bool = True) -> Iterator[None]:
    """In here these signals raise Ended in the main thread, or wait for the end of a step where they are `held`.

    Args:
        alone: the process is this run's: a second SIGINT ends it. Else it raises KeyboardInterrupt.
    """
    if threading.current_thread() is not threading.main_thread():  # only that one can
        yield
        return
    before = {number: signal.getsignal(number) for number in SAID}
    _Asked.process, _Asked.by, _Asked.held, _Asked.leaving = os.getpid(), None, False, False
    _Asked.alone = alone
    take_back()
    try:
        yield
    finally:
        _Asked.process = 0
        for number, handler in before.items():
            signal.signal(number, handler)


def asked() -> int | None:
    """The signal that has asked this process to end."""
    return _Asked.by


def end() -> NoReturn:
    """Raises Ended by the signal that asked for it, here or in a process that trains beside this one."""
    raise Ended(_Asked.by or signal.SIGTERM)


@contextmanager
def held() -> Iterator[None]:
    """Signals wait in here until somebody asks for them. At the end, and where an error is theirs (they reach loader
    processes too), Ended is raised. Handlers that somebody else has set in here are set back."""
    if _Asked.process != os.getpid():  # nobody handles signals
        yield
        return
    _Asked.held = True
    try:
        yield
    except Exception:
        if _Asked.by is None:
            raise
    finally:
        _Asked.held = False
        take_back()
    if _Asked.by is not None:
        raise Ended(_Asked.by)


def take_back() -> None:
    """Handlers of our own again, where a library has set others."""
    if _Asked.process == os.getpid():
        for number in SAID:
            signal.signal(number, _received)


def left_to_parent(_worker: int = 0) -> None:
    """In a loader's process: signals that reach a whole group are its parent's to answer, which needs it for the rest
    of a step; then it ends, as it does when its parent ends it."""
    for number in SAID:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS))


def end_with_parent() -> None:
    """This process, one of several that train together, ends with the one that started it: killed, that one can't end
    it, and a rendezvous waits for half an hour for those that are gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def leave() -> None:
    """The run is being left: what else asks for that is not listened to, but for a second Ctrl-C."""
    _Asked.leaving = True


def _received(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _Asked.process:  # a fork that has not set its own
        if number == signal.SIGTERM:
            os._exit(128 + number)
        return
    if number == signal.SIGINT and _Asked.by == signal.SIGINT:
        if not _Asked.alone:
            raise KeyboardInterrupt
        os._exit(128 + number)
    first, _Asked.by = _Asked.by is None, number if _Asked.by is None else _Asked.by
    if _Asked.held or _Asked.leaving:
        if first and _Asked.held:
            os.write(2, f"{SAID[number]}: saving\n".encode())
        return
    raise Ended(_Asked.by)
