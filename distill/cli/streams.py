"""The program's own output: a run doesn't end because nobody reads its lines."""

import io
import os
import sys

from distill.progress import PLAINLY


class Lasting(io.FileIO):
    """A stream whose lines go nowhere once its reader is gone (`| head`) or its disk is full."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError:
            _nowhere(self.fileno())
            return memoryview(data).nbytes


def last() -> None:
    """Make stdin, stdout and stderr such that using them never fails. One that was closed is opened on nothing: else
    the next file to be opened would have its number, and what is printed would be written into that."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            _nowhere(number)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  the process's own
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper and stream.fileno() in (1, 2):  # not replaced by somebody's own
            stream.flush()
            raw = Lasting(stream.fileno(), "w", closefd=False)
            lasting = io.TextIOWrapper(
                io.BufferedWriter(raw),
                stream.encoding,
                PLAINLY,  # a terminal or file that lacks a sign gets another for it
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, lasting)


def _nowhere(number: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing != number:
        os.dup2(nothing, number)
        os.close(nothing)
    else:
        os.set_inheritable(number, True)
