"""The command line: Hydra's, with errors of one line and exit codes (1: it failed, 2: wrong usage)."""

import contextlib
import functools
import os
import re
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException

from distill.cli import config
from distill.errors import UsageError, UserError
from distill.files import CONF
from distill.runs.moved import present

TRACEBACK = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")


def command(job):
    """Make `job(cfg)` the program: `@cli.command def main(cfg)`, then `main()`."""

    @functools.wraps(job)
    def guarded(cfg):
        try:
            hydra_cfg = HydraConfig.get()
            present(cfg)
            config.check(cfg, list(hydra_cfg.overrides.task), hydra_cfg.runtime.choices)
            return job(cfg)
        except KeyboardInterrupt:
            folder = HydraConfig.get().runtime.output_dir
            print(f"interrupted; python train.py run={folder} goes on", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            if TRACEBACK:
                raise
            code = _tell(error)
            with contextlib.suppress(OSError):  # a folder in which nothing was begun
                os.rmdir(HydraConfig.get().runtime.output_dir)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                return None  # the sweep goes on; its table shows the failure and sets the exit code
            sys.exit(code)

    @functools.wraps(job)
    def main():
        for stream in (sys.stdout, sys.stderr):  # a terminal or file that lacks a sign gets "?" for it
            with contextlib.suppress(AttributeError, ValueError):  # replaced by something simpler
                stream.reconfigure(errors="replace")
        config.register()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing; the telling is done here
        try:
            hydra.main(config_path=CONF, config_name="train", version_base="1.3")(guarded)()
        except Exception as error:
            if TRACEBACK:
                raise
            sys.exit(_tell(error))

    return main


def _tell(error: Exception) -> int:
    """Print the error as one line and return the exit code."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    known = next((link for link in chain if isinstance(link, UserError)), None)
    usage = isinstance(known or error, (UsageError, HydraException, OmegaConfBaseException))
    if known:
        text = str(known)
    elif isinstance(error, (HydraException, OmegaConfBaseException)):
        text = _hydra_text(str(chain[-1] if "Error in call to target" in str(error) else error))
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    elif memory := next(filter(None, map(_memory, chain)), None):
        text = memory
    else:
        text = f"{type(error).__name__}: {error} (HYDRA_FULL_ERROR=1 shows where)"
    print("error: " + " ".join(text.split()), file=sys.stderr, flush=True)
    return 2 if usage else 1


def _memory(error: Exception) -> str | None:
    """What to do where memory has run out, of whatever kind; None where it hasn't."""
    said = f"{type(error).__name__}: {error}"
    if "DataLoader worker" in said and ("killed by signal" in said or "exited unexpectedly" in said):
        return f"{' '.join(said.split())[:120]}: probably memory has run out; lower data.num_workers or data.batch_size"
    words = ("OutOfMemoryError", "can't allocate memory", "not enough memory", "MemoryError", "Cannot allocate memory")
    if not any(word in said for word in words):
        return None
    asked = re.search(r"allocate ([\d.]+ ?(?:[KMGT]i?B|bytes))", said)
    return (
        f"memory has run out{f' ({asked[1]} more were asked for)' if asked else ''}: lower data.batch_size or "
        "data.image_size, choose a smaller network, or drop a loss on features; run= goes on from the last checkpoint"
    )


def _hydra_text(text: str) -> str:
    """Hydra's message in one line, with the nearest thing that exists."""
    if missing := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text):
        group, choice = missing.groups()
        folders = re.findall(r"path=file://(.*)", text)
        places = [group, "network"] if group in ("teacher", "student") else [group]
        choices = sorted(
            {file.stem for path in folders for place in places for file in Path(path, place).glob("*.yaml")}
        )
        return f"no {group} '{choice}'{config.nearest(choice, choices)} There are: {', '.join(choices)}"
    if missing := re.search(r"Could not (?:override|append.*?to) '([^']+)'", text):
        return f"no option '{missing[1]}'{config.nearest(missing[1], _known_keys())} python train.py --help lists them"
    return text.partition("\nSee https")[0]


def _known_keys() -> list[str]:
    """All option names under the groups chosen on this command line."""
    from hydra import compose, initialize_config_dir

    groups = {entry.name for entry in os.scandir(CONF) if entry.is_dir()} | {"teacher", "student"}
    chosen = [word for word in sys.argv[1:] if config.is_group(word, groups)]
    try:
        with initialize_config_dir(CONF, version_base="1.3"):
            return config.keys(compose("train", chosen))
    except Exception:  # a second mistake: the first one is told without a suggestion
        return []
