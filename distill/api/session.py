"""A configuration composed in somebody else's process, which is left as it was found. Never imports torch by itself."""

import contextlib
import copy
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.basecontainer import BaseContainer

from distill import asked, signals
from distill.cli import command, config, words
from distill.errors import UsageError
from distill.files import CONF
from distill.runs.records import forced

CHILD = (signal.SIGCHLD,)  # torch's loaders listen to their processes
CUBLAS = "CUBLAS_WORKSPACE_CONFIG"  # Lightning sets it for deterministic=true
ONE_EACH = "a sweep is a loop in Python, or the command line's: distill -m …, distill seeds=0,1,2 …"


@contextlib.contextmanager
def session(said: Sequence[str], config_dir: str | Path | None = None) -> Iterator[DictConfig]:
    """The configuration of these words, checked, as the command line composes it; Hydra is in force in here.

    Args:
        said: words of Hydra's grammar.
        config_dir: a folder of the caller's own configuration.

    Raises:
        UserError: what the command line would have told, in the same words.
        KeyboardInterrupt: Ctrl-C, once what is trained is saved.
    """
    flags = [] if config_dir is None else ["--config-dir", str(Path(config_dir).expanduser())]
    ended = None
    with _told(), as_it_was(), asked.from_python([*flags, *said]):
        try:
            with signals.handled(alone=False):
                said = forced(words.spelled(_plain(said)))
                command.refuse_words(said)
                with _composed(said, flags[1:]) as cfg:
                    command.prepare(cfg)
                    yield cfg
        except signals.Ended as end:
            ended = end
    if ended:
        signal.raise_signal(ended.number)  # to whoever answers to it here: Ctrl-C is KeyboardInterrupt
        raise KeyboardInterrupt(str(ended))


def configured(said: Sequence[str]) -> dict:
    """The configuration of these words in plain values, where no run is to begin: without `name`.

    Raises:
        UsageError: a word is wrong.
    """
    with _told(), _own_hydra(), asked.from_python(list(said)):
        config.register()
        with initialize_config_dir(CONF, version_base="1.3"):
            cfg = compose("train", list(said))
            cfg.name = "none"
            return OmegaConf.to_container(cfg, resolve=True)


def _plain(said: Sequence[str]) -> list[str]:
    for word in said:
        if not isinstance(word, str):
            raise UsageError(f"{word!r}: expected words such as 'student=resnet8', or options by name (student=…)")
        if word in ("-m", "--multirun") or word.startswith("seeds="):
            raise UsageError(f"{word}: {ONE_EACH}")
    return list(said)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Errors that a user can cause as UserErrors, whatever library raised them."""
    try:
        yield
    except Exception as error:
        told = command.explained(error)
        if told is None or told is error:
            raise
        raise told from error


@contextlib.contextmanager
def _composed(said: list[str], own: list[str]) -> Iterator[DictConfig]:
    with _own_hydra():
        config.register()
        with initialize_config_dir(CONF, version_base="1.3"):
            search = [f"hydra.searchpath=[{','.join(words.quoted(f'file://{Path(each).absolute()}') for each in own)}]"]
            whole = compose("train", [*(search if own else []), *said], return_hydra_config=True)
            hydra = HydraConfig.instance()
            hydra.set_config(whole)
            folder = Path(whole.hydra.run.dir)
            with read_write(whole.hydra), open_dict(whole.hydra):
                whole.hydra.overrides.task = said
                whole.hydra.runtime.output_dir, whole.hydra.runtime.cwd = str(folder.absolute()), str(Path.cwd())
            hydra.set_config(whole)
            cfg = copy.deepcopy(whole)
            with read_write(cfg), open_dict(cfg):
                del cfg["hydra"]
            folder.mkdir(parents=True, exist_ok=True)
            try:
                yield cfg
            finally:
                with contextlib.suppress(OSError):  # a folder in which nothing was begun
                    folder.rmdir()
                    folder.parent.rmdir()


@contextlib.contextmanager
def _own_hydra() -> Iterator[None]:
    """A Hydra of its own in here; the caller's, and OmegaConf's resolvers, are there again afterwards."""
    Plugins.instance()  # finds what sources of configuration there are
    instances, resolvers, store = Singleton._instances, BaseContainer._resolvers, ConfigStore.instance()
    ours = ConfigStore.__new__(ConfigStore)
    ours.repo = copy.deepcopy(store.repo)
    own = {kind: each for kind, each in instances.items() if kind not in (GlobalHydra, HydraConfig, VersionBase)}
    Singleton._instances = {**own, ConfigStore: ours}
    BaseContainer._resolvers = dict(resolvers)
    try:
        yield
    finally:
        Singleton._instances, BaseContainer._resolvers = instances, resolvers


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """What a run sets in its process is put back afterwards: random states, torch's threads, precision and
    determinism, signal handlers, hooks for errors, warnings' filters, loggers' levels."""
    with command.importing():
        import numpy as np
        import torch

        from distill.training.lightning import LOGGERS

    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (*signals.SAID, *CHILD)} if main else {}
    for name in LOGGERS:
        logging.getLogger(name)  # there from now on
    hooks = sys.excepthook, threading.excepthook
    loggers = {name: each for name, each in logging.root.manager.loggerDict.items() if hasattr(each, "level")}
    levels = {name: (each.level, each.propagate, each.handlers[:]) for name, each in loggers.items()}
    root = logging.root.level, logging.root.handlers[:]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    threads, dtype, precision = torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
    fixed = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn, engine = (
        (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        torch.backends.quantized.engine,
    )
    grad, cublas = torch.is_grad_enabled(), os.environ.get(CUBLAS)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")  # as distill.data.files has it for a process of its own
            torch.set_grad_enabled(True)
            yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
        sys.excepthook, threading.excepthook = hooks
        for name, (level, propagate, own) in levels.items():
            loggers[name].setLevel(level)
            loggers[name].propagate, loggers[name].handlers = propagate, own
        logging.root.setLevel(root[0])
        logging.root.handlers = root[1]
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(fixed[0], warn_only=fixed[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        torch.backends.quantized.engine = engine
        torch.set_grad_enabled(grad)
        os.environ.pop(CUBLAS, None)
        if cublas is not None:
            os.environ[CUBLAS] = cublas
