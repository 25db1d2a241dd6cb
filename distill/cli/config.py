"""Where the configuration lives, and what Hydra doesn't check by itself. Never imports torch."""

import difflib
import itertools
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from distill.errors import UsageError
from distill.files import CONF, config_dirs
from distill.losses.weight import check_weight
from distill.progress import leads

NULLABLE = ("cache.views",)  # numbers that null may stand for, whatever their default
PRECISIONS = (
    *("auto", "32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "16-true", "32", "64", "16", "bf16"),
)
TRAINER = (  # options of Lightning's Trainer that are honoured
    *("accelerator", "strategy", "devices", "num_nodes", "precision", "max_epochs", "min_epochs"),
    *("limit_train_batches", "limit_val_batches", "accumulate_grad_batches", "gradient_clip_val"),
    *("gradient_clip_algorithm", "deterministic", "benchmark", "inference_mode", "detect_anomaly", "profiler"),
    *("sync_batchnorm", "log_every_n_steps", "default_root_dir"),
)
_VALIDATED = "validation follows every epoch, because it chooses what ships"
_OURS = "training here has its own, which make that it can be killed anywhere"
REFUSED = {  # and why others are not
    "callbacks": f"{_OURS}; logger=[wandb] and logger=[tensorboard] take the figures elsewhere",
    "logger": "choose logger=[wandb] or logger=[tensorboard]; CSV files are always written",
    "plugins": _OURS,
    "max_steps": "give trainer.max_epochs, the schedule's length; +trainer.limit_train_batches=N shortens an epoch",
    "min_steps": "give trainer.max_epochs",
    "max_time": "a run is as long as its trainer.max_epochs; it can be stopped anywhere and continued by run=",
    "fast_dev_run": "try a run with trainer.max_epochs=1 +trainer.limit_train_batches=2",
    "overfit_batches": "give +trainer.limit_train_batches=N, which takes other images in each epoch, or fewer images",
    "check_val_every_n_epoch": _VALIDATED,
    "val_check_interval": _VALIDATED,
    "num_sanity_val_steps": "everything is tried on two images before training",
    "enable_checkpointing": _OURS,
    "enable_progress_bar": "there is one on a terminal, and lines elsewhere",
    "enable_model_summary": "the report has the figures of every network",
    "use_distributed_sampler": _OURS,
    "reload_dataloaders_every_n_epochs": _OURS,
    "limit_test_batches": "the test set is measured whole, once",
    "limit_predict_batches": "the test set is measured whole, once",
    "barebones": _OURS,
}
OPSETS = range(18, 24)  # of ONNX's operators: distill.export.onnx.OPSETS, which loads torch
STAGES = ["teacher", "cache", "distill", "compress", "export", "report"]


def register(argv: list[str] | None = None) -> None:
    """Offer every conf/network/NAME.yaml, the user's own included, as `teacher=NAME` and `student=NAME`."""
    OmegaConf.register_new_resolver("run_dir", run_dir, replace=True)
    folders = [CONF, *config_dirs(argv)]
    for file in sorted(file for folder in folders for file in Path(folder, "network").glob("*.yaml")):
        for role in ("teacher", "student"):
            defaults = [{"/role@_here_": role}, {"/network@_here_": file.stem}, "_self_"]
            ConfigStore.instance().store(group=role, name=file.stem, node={"defaults": defaults})


def run_dir(run: str | None, new: str) -> str:
    """The folder of the run to continue, or of the new one: outputs/NAME. Hydra makes it, so a wrong one is refused
    first; where no name is given and another run began in the same second, the new one gets a number behind its name.

    Raises:
        UsageError: `run` is no run's folder; a name that is none, or leads out of outputs/.
    """
    if run is not None:
        if not Path(run, "run.json").is_file():
            raise UsageError(f"run={run} is not the folder of a run (no run.json in it)")
        return run
    name = new.partition("/")[2]
    if not name or any(part in ("", ".", "..") or not part.isprintable() for part in name.split("/")):
        raise UsageError(f"name={name!r}: expected the name of a folder in outputs/, such as name=first")
    given = any(word.startswith("name=") for word in sys.argv[1:])
    return _unused(new) if leads() and not given else new


@cache
def _unused(folder: str) -> str:
    """`folder`, made; where it is there already the first of folder-2, folder-3 … that isn't. Once a process."""
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        made = folder if number == 1 else f"{folder}-{number}"
        with suppress(FileExistsError):
            Path(made).mkdir()
            return made


def is_group(override: str, choices) -> bool:
    """Whether a command line word chooses from a group (`loss=[ce,kd]`) rather than setting a value."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0] in choices


def check(cfg: DictConfig, overrides: list[str], choices) -> None:
    """Refuse values that no default allows: stages, and a word where the default is a number.

    Raises:
        UsageError: names the option, what it takes and what came.
    """
    from hydra import compose

    missing = OmegaConf.missing_keys(cfg)
    if missing:
        key = sorted(missing)[0]
        raise UsageError(f"{key} must be given: {key}=VALUE")
    unknown = [stage for stage in cfg.stages if stage not in STAGES]
    if unknown:
        raise UsageError(f"stages={list(cfg.stages)}: no stage '{unknown[0]}'; there are {', '.join(STAGES)}")
    if cfg.select not in ("best", "last"):
        raise UsageError(f"select={cfg.select}: choose best or last")
    _check_trainer(cfg)
    for name, options in cfg.loss.items():
        check_weight(name, OmegaConf.to_container(options, resolve=True)["weight"])
    opset = OmegaConf.select(cfg, "export.onnx.opset")
    if opset is not None and opset not in OPSETS:
        raise UsageError(f"export.onnx.opset={opset} is none that is written: choose {OPSETS[0]} to {OPSETS[-1]}")
    values = [word for word in overrides if not is_group(word, choices) and word[0] not in "+~"]
    defaults = compose("train", [word for word in overrides if word not in values])
    for word in values:
        key = word.partition("=")[0]
        default, value = OmegaConf.select(defaults, key), OmegaConf.select(cfg, key)
        expected = _kind(default)
        may_be_listed = key.endswith(".weight") or key == "data.image_size"  # a schedule; height and width
        listed = may_be_listed and OmegaConf.is_list(value)
        if value is None and key in NULLABLE:
            continue
        if expected and _kind(value) != expected and not listed and not (expected == "number" and _whole(value)):
            raise UsageError(f"{word}: expected a {expected}, such as {default}")


def _check_trainer(cfg: DictConfig) -> None:
    """Refuse options of Lightning's Trainer that training here cannot honour, and numbers that train nothing."""
    for key, value in cfg.trainer.items():
        if key != "_target_" and key not in TRAINER:
            reason = REFUSED.get(key, f"it is none of those that training here honours: {', '.join(TRAINER)}")
            raise UsageError(f"trainer.{key}={value}: {reason}")
    epochs = {"trainer.max_epochs": cfg.trainer.max_epochs}
    fits = {"teacher": cfg.teacher, **{f"teacher.members.{k}": v for k, v in cfg.teacher.get("members", {}).items()}}
    epochs |= {f"{name}.fit.epochs": part.fit.epochs for name, part in fits.items() if "fit" in part}
    for key, value in epochs.items():
        least = 1 if key == "trainer.max_epochs" else 0
        if value is not None and not (_whole(value) and value >= least):
            raise UsageError(f"{key}={value}: expected at least {least}; stages= leaves training out")
    if cfg.trainer.get("limit_val_batches", 1) == 0:
        raise UsageError("trainer.limit_val_batches=0: what ships is chosen on validation images")
    precision = str(cfg.trainer.precision)
    if precision not in PRECISIONS:
        raise UsageError(f"trainer.precision={precision}: choose one of {', '.join(PRECISIONS)}")
    if precision in ("16-true", "bf16-true") and (
        cfg.ema is not None or cfg.teacher._target_ == "distill.teachers.ema.Ema"
    ):
        raise UsageError(
            f"trainer.precision={precision} has too few digits for a moving average of weights: choose "
            "trainer.precision=bf16-mixed, or leave ema out"
        )


def _kind(value) -> str | None:
    """What a default tells of the values it may be replaced by; None: anything."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int):
        return "whole number"
    return "number" if isinstance(value, float) else None


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def keys(cfg, prefix: str = "") -> list[str]:
    """Every dotted key of a configuration."""
    found = []
    for name in cfg:
        found.append(f"{prefix}{name}")
        if OmegaConf.is_dict(cfg) and not OmegaConf.is_missing(cfg, name) and OmegaConf.is_dict(cfg._get_node(name)):
            found += keys(cfg[name], f"{prefix}{name}.")
    return found


def nearest(word: str, known: list[str]) -> str:
    """'; did you mean X?' where something known is near, else '.'."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else "."
