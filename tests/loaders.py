"""Artifacts' `load` functions for tests: what a process that serves a file imports."""

import os
import signal
import time

import torch

from distill.errors import UserError


def crash(path):
    os.kill(os.getpid(), signal.SIGKILL)


def chatty(path):
    print("hello from a runtime", flush=True)
    assert torch.get_num_threads() == 1
    return lambda images: images.flatten(1)[:, :2]


def failing(path):
    raise UserError("cannot load it")


def hangs(path):
    """Loads, and then gives no answer."""
    time.sleep(1000)


def two_only(path):
    """A file that answers two images, whatever it is asked about."""

    def answer(images):
        if len(images) != 2:
            raise RuntimeError("static tensor of shape (2, 10)")
        return images.flatten(1)[:, :10]

    return answer
