"""The command line: Hydra's, with errors of one line and exit codes (1: it failed, 2: wrong usage)."""

import contextlib
import functools
import gc
import os
import re
import signal
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser  # which flags are Hydra's: it says so nowhere else
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from distill import __version__, asked, signals
from distill.cli import clusters, config, faults, help, launcher, search, seeds, streams, sweep, words
from distill.cli.hints import meant
from distill.errors import Pruned, UsageError, UserError
from distill.files import CONF, config_dirs
from distill.own import is_placed, place_in
from distill.progress import leads, say, shown
from distill.runs.moved import present
from distill.runs.records import forced
from distill.runs.sweeps import again, is_done, note_error
from distill.schema.values import nearest

TRACEBACK = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")


def command(job):
    """Make `job(cfg)` the program: `@command def main(cfg)`, then `main()`."""

    @functools.wraps(job)
    def guarded(cfg):
        try:
            if _done_before():
                return None
            prepare(cfg)
            return job(cfg)
        except signals.Ended as end:
            signals.leave()
            requeued = f"; {said}" if end.number == signal.SIGUSR1 and (said := _requeue()) else ""
            if leads():
                print(f"{end}; {asked.again(*_going_on())} goes on{requeued}", file=sys.stderr, flush=True)
            sys.exit(end.code)
        except Pruned as end:
            say(str(end))
        except Exception as error:
            if TRACEBACK:
                raise
            code = _tell(error)
            folder = Path(HydraConfig.get().runtime.output_dir)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                if leads() and not (folder / "run.json").exists():
                    note_error(folder, _line(_told(error)))
                return None  # the sweep goes on; its table shows the failure and sets the exit code
            with contextlib.suppress(OSError):  # a folder in which nothing was begun
                folder.rmdir()
            sys.exit(code)

    @functools.wraps(job)
    def main():
        streams.last()
        if not leads() or os.environ.get(signals.PARENT) == str(os.getppid()):
            signals.end_with_parent()
        if "--version" in sys.argv[1:]:
            print(f"distill {__version__}")
            return
        if (group := _asked_about(sys.argv[1:])) is not None:
            return _explain(group)
        config.register()
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing; the telling is done here
        try:
            with signals.handled():
                sys.argv[1:] = forced(seeds.spread(words.spelled(sys.argv[1:])))
                refuse_words(sys.argv[1:])
                sys.argv[1:] = _flags_first(sweep.placed(sys.argv[1:]))
                try:
                    if sweep.FLAGS & {*sys.argv}:
                        launcher.register(launcher.Processes, "hydra/launcher", "processes", side_by_side=None)
                        for name, (plugin, options) in clusters.LAUNCHERS.items():
                            launcher.register(plugin, "hydra/launcher", name, **options)
                        launcher.register(search.Search, "hydra/sweeper", "search", **search.OPTIONS)
                    hydra.main(config_path=CONF, config_name="train", version_base="1.3")(guarded)()
                finally:
                    sweep.abandoned(sys.argv[1:])
        except signals.Ended as end:  # before there was a run
            folder = sweep.folder_of(sys.argv[1:])
            goes_on = f"; {asked.again(*again(folder))} goes on" if folder and folder.is_dir() else ""
            print(f"{end}{goes_on}", file=sys.stderr)
            sys.exit(end.code)
        except Exception as error:
            if TRACEBACK:
                raise
            sys.exit(_tell(error))

    return main


def prepare(cfg: DictConfig) -> None:
    """All that is known to be wrong before work begins, told; names of earlier versions become the present ones.

    Raises:
        UserError: a package is not installed, or the configuration is wrong.
    """
    _need("torch", "torchvision")
    present(cfg)
    config.check(cfg, list(HydraConfig.get().overrides.task))


@contextlib.contextmanager
def importing():
    """Around the imports of a program: the garbage collector looks for nothing in the million objects that torch and
    what comes with it are made of, neither while they are imported nor later (5.3 → 2.7 s for importing and ending)."""
    first = "torch" not in sys.modules
    if first:
        gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
            gc.enable()


def _requeue() -> str | None:
    """Ask SLURM to start this job again, with the same command, which goes on; what came of it. What submitit started
    it queues again itself."""
    job, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{job}_{task}" if job and task else os.environ.get("SLURM_JOB_ID")
    if job is None or not leads() or signals.SUBMITIT in os.environ:
        return None
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"job {job} is not queued again: {error}"
    return f"job {job} is not queued again: {done.stderr.strip()}" if done.returncode else f"job {job} is queued again"


def _asked_about(argv: list[str]) -> str | None:
    """The group of `--help GROUP`."""
    if not {"--help", "-h"} & {*argv}:
        return None
    words = [word for word in argv if not word.startswith("-") and "=" not in word and word not in config_dirs(argv)]
    return words[0] if words else None


def _explain(group: str) -> None:
    try:
        print(help.page(group, [CONF, *config_dirs()]), flush=True)
    except UserError as error:
        sys.exit(_tell(error))


def _done_before() -> bool:
    """Whether this is a sweep's job that an earlier command finished: said, and not done again."""
    job = HydraConfig.get()
    done = job.mode == RunMode.MULTIRUN and is_done(Path(job.runtime.output_dir), job.overrides.task)
    if done:
        say(f"done before: {job.runtime.output_dir}")
    return done


def _going_on() -> list[str]:
    """The words that continue this run, or its sweep."""
    job = HydraConfig.get()
    if job.mode != RunMode.MULTIRUN:
        return [f"run={job.runtime.output_dir}"]
    return again(Path(job.sweep.dir))


def _tell(error: Exception) -> int:
    """Print the error as one line and return the exit code."""
    told = _told(error)
    print("error: " + shown(_line(told)), file=sys.stderr, flush=True)
    return 2 if isinstance(told, UsageError) else 1


def _told(error: Exception) -> UserError:
    return explained(error) or UserError(f"{type(error).__name__}: {error} (HYDRA_FULL_ERROR=1 shows where)")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def explained(error: Exception) -> UserError | None:
    """What a user is told of an error; None where nothing is known of it."""
    chain = faults.chain(error)
    known = next((link for link in chain if isinstance(link, UserError)), None)
    place = next(filter(None, map(place_in, reversed(chain))), None)  # in a file of the user's
    if known:
        return known if place is None or is_placed(str(known)) else type(known)(f"{place}: {known}")
    if place and not (faults.exhausted(error) or faults.disk(error)):
        return UserError(f"{place}: {_not_installed(chain[-1]) or _said(chain)}")
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        text = _hydra_text(chain)
    elif absent := next(filter(None, map(_not_installed, chain)), None):
        text = absent
    elif said := faults.worker(error) or faults.disk(error):
        text = said
    elif faults.exhausted(error):
        text = f"{faults.memory(error)}: lower data.batch_size or data.image_size, or choose a smaller network"
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    else:
        return None
    usage = isinstance(error, (HydraException, OmegaConfBaseException))
    return (UsageError if usage else UserError)(text)


def _said(chain: list[Exception]) -> str:
    """What the user's own code raised."""
    raised = next(link for link in reversed(chain) if place_in(link))
    text = str(raised.msg if isinstance(raised, SyntaxError) else raised)
    return f"{type(raised).__name__}: {text}" if text else type(raised).__name__


def _need(*packages: str) -> None:
    """Raises UserError where one is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise UserError(_install(package))


def _install(package: str) -> str:
    names = {"torch": "torch torchvision", "sklearn": "scikit-learn", "PIL": "pillow"}
    return f"{package} is not installed: pip install {names.get(package, package.replace('_', '-'))}"


def _not_installed(error: Exception) -> str | None:
    """The command that brings a package that is missing, or torch and torchvision that belong together."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return _install(error.name.partition(".")[0])
    if isinstance(error, RuntimeError) and "operator torchvision::" in str(error):
        pair = " and ".join(f"{package} {version(package)}" for package in ("torch", "torchvision"))
        return f"{pair} don't belong together: pip install --upgrade torch torchvision"
    return None


def _hydra_text(chain: list[Exception]) -> str:
    """Hydra's error in one line, with the nearest thing that exists."""
    absent = next((link for link in chain if isinstance(link, MissingConfigException) and link.missing_cfg_file), None)
    if absent is not None:
        group, _, choice = absent.missing_cfg_file.rpartition("/")
        places = [group, "network"] if group in ("teacher", "student") else [group]
        folders = [Path(folder, place) for folder in (CONF, *config_dirs()) for place in places]
        choices = sorted(
            {*(absent.options or ()), *(file.stem for folder in folders for file in folder.glob("*.yaml"))}
        )
        return f"no {group} '{choice}'{nearest(choice, choices) or '.'} There are: {', '.join(choices)}"
    unknown = next((link for link in chain if isinstance(link, (ConfigKeyError, ConfigAttributeError))), None)
    if unknown is not None and isinstance(chain[0], ConfigCompositionException):
        near = meant(unknown.full_key, _known_keys())
        hint = f"; did you mean {near}?" if near else "."
        return f"no option '{unknown.full_key}'{hint} {asked.again('--help')} lists them"
    # what a target of ours said of its arguments is at the end
    return str(chain[-1] if isinstance(chain[0], InstantiationException) else chain[0]).partition("\nSee https")[0]


def refuse_words(argv: list[str]) -> None:
    """Raises UsageError for what Hydra doesn't tell in a line: a flag that is not its own, such as `--epochs 3`, a
    group that is to be null or a number, and what only several jobs have."""
    for word in argv:
        if re.match(r"\+?hydra/(launcher|sweeper)=", word) and not sweep.FLAGS & {*argv}:
            raise UsageError(f"{word} is for several jobs, and this is one: add -m, and what varies (seed=0,1)")
        if config.is_group(word, config.groups()) and re.fullmatch(r"[^=]*=(null|true|false|-?[\d.]+)?", word):
            raise UsageError(f"{word}: expected the name of a choice; {asked.again('--help')} lists them")
    _, unknown = get_args_parser().parse_known_intermixed_args(argv)
    for flag in (word for word in unknown if word.startswith("-")):
        name, _, value = flag.partition("=")
        after = argv[argv.index(flag) + 1 :]
        if not value and after and "=" not in after[0] and not after[0].startswith("--"):
            value = after[0]
        near = meant(name, _known_keys()) or "KEY"
        raise UsageError(f"no option '{flag}'; options are words without dashes: {near}={value or 'VALUE'}")


def _flags_first(argv: list[str]) -> list[str]:
    """Hydra's flags before the words: its parser takes no words on both sides of one (`seed=0,1 -m name=x`)."""
    plain = get_args_parser().parse_known_intermixed_args(argv)[0].overrides
    flags = list(argv)
    for word in reversed(plain):  # the last of equal ones: a flag's own value stands before
        del flags[len(flags) - 1 - flags[::-1].index(word)]
    return [*flags, *plain]


def _known_keys() -> list[str]:
    """All option names under the groups chosen on this command line."""
    from hydra import compose, initialize_config_dir

    chosen = [word for word in asked.words() if config.is_group(word, config.groups())]
    try:
        with initialize_config_dir(CONF, version_base="1.3"):
            return config.keys(compose("train", chosen))
    except Exception:  # a second mistake: the first one is told without a suggestion
        return []
