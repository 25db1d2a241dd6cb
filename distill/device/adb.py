"""A phone at the end of a cable, through Android's `adb`."""

import os
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from distill.errors import UserError

SOON = 30  # seconds for what takes none
COPYING = 300  # seconds for a file
HOME = "/data/local/tmp"  # where a shell may write and execute
DEBUGGING = "switch on USB debugging in its developer options; `adb devices` lists it then"


class Hung(UserError):
    """It did not end in time; `said` is what it had printed."""

    def __init__(self, line: str, said: str):
        super().__init__(line)
        self.said = said


class Phone:
    """One phone; everything that fails is a UserError."""

    def __init__(self, serial: str):
        self.serial = serial

    def shell(self, *words: str, seconds: float = SOON) -> tuple[int, str]:
        """A program on the phone: its exit code, and all that it printed."""
        return self.script(" ".join(map(shlex.quote, words)), seconds)

    def script(self, line: str, seconds: float = SOON) -> tuple[int, str]:
        """A line for the phone's shell, as it is."""
        return _adb("-s", self.serial, "shell", line, seconds=seconds)

    def property(self, name: str) -> str:
        return self._asked("getprop", name)

    def push(self, file: Path, place: str) -> None:
        code, said = _adb("-s", self.serial, "push", str(file.absolute()), place, seconds=COPYING)
        if code:
            raise UserError(f"adb can't push {file.name}: {last_line(said)}")

    def has(self, place: str) -> bool:
        """Whether there is such a program on the phone."""
        return self.shell("test", "-f", place)[0] == 0

    @contextmanager
    def folder(self) -> Iterator[str]:
        """A new folder on the phone, which is gone afterwards with all that is in it."""
        place = f"{HOME}/distill-{secrets.token_hex(4)}"
        self._asked("mkdir", "-p", place)
        try:
            yield place
        finally:
            with suppress(UserError):  # where the phone is gone, nothing can be removed
                self.shell("rm", "-rf", place)

    def _asked(self, *words: str) -> str:
        code, said = self.shell(*words)
        if code:
            raise UserError(f"adb shell {words[0]}: {last_line(said)}")
        return said.strip()


def connected(serial: str | None) -> Phone:
    """The phone of that serial number, or the only one.

    Raises:
        UserError: adb is missing, or there is no such phone, several, or one that is not ready.
    """
    serial = serial or os.environ.get("ANDROID_SERIAL") or None
    code, said = _adb("devices")
    if code:
        raise UserError(f"adb devices: {last_line(said)}")
    lines = said.partition("List of devices attached")[2].splitlines()
    found = dict(line.split(None, 1) for line in lines if len(line.split(None, 1)) == 2)
    found = {name: state.strip() for name, state in found.items()}
    if serial is not None and serial not in found:
        raise UserError(f"no phone {serial}: adb knows {', '.join(found) or 'none'}")
    wanted = {serial: found[serial]} if serial is not None else found
    ready = [name for name, state in wanted.items() if state == "device"]
    if len(ready) == 1:
        return Phone(ready[0])
    if ready:
        raise UserError(f"several phones: choose one by --serial: {', '.join(ready)}")
    if not wanted:
        raise UserError(f"no phone: connect one and {DEBUGGING}")
    name, state = next(iter(wanted.items()))
    if state.startswith("unauthorized"):
        raise UserError(
            f"the phone {name} has not allowed this computer: unlock it and accept its question, then again"
        )
    raise UserError(f"the phone {name} is not ready, adb calls it '{state}': reconnect it, or `adb kill-server`")


def last_line(said: str) -> str:
    """Of what a program printed, what most likely says why it failed: an error, else the last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1][:300]


def _adb(*words: str, seconds: float = SOON) -> tuple[int, str]:
    program = shutil.which("adb")
    if program is None:
        raise UserError("no adb on PATH: install Android's platform-tools")
    try:
        done = subprocess.run(
            [program, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise Hung(f"adb {_verb(words)}: no end within {seconds:g} s", _text(error.stdout)) from None
    except OSError as error:
        raise UserError(f"adb can't be run: {error.strerror or error}") from error
    return done.returncode, _text(done.stdout)


def _verb(words: Sequence[str]) -> str:
    return words[2] if words[0] == "-s" else words[0]


def _text(said: bytes | None) -> str:
    return (said or b"").decode(errors="replace").replace("\r\n", "\n")
