"""Where metrics go besides the CSV files: Weights & Biases, TensorBoard."""

import os
from pathlib import Path

from distill.errors import UserError
from distill.progress import say

INIT_TIMEOUT = 10  # seconds a login may take before the run goes on offline


def wandb(folder: Path, name: str, cfg: dict, project: str = "distill"):
    """A WandbLogger that never asks and never waits: offline unless there is a key and the server answers."""
    try:
        import wandb as w
    except ModuleNotFoundError as error:
        raise UserError("logger=wandb needs Weights & Biases: pip install wandb") from error
    from pytorch_lightning.loggers import WandbLogger

    mode = os.environ.get("WANDB_MODE") or ("online" if w.login(prompt=False, verify=False) else "offline")
    options = {"dir": folder, "name": name, "project": project, "config": cfg, "reinit": "create_new"}
    settings = {"silent": True, "init_timeout": INIT_TIMEOUT}
    try:
        experiment = w.init(mode=mode, settings=w.Settings(**settings), **options)
    except w.errors.Error as error:
        say(f"  wandb: no answer ({' '.join(str(error).split())[:80]}); logging offline")
        w.teardown()
        experiment = w.init(mode="offline", settings=w.Settings(**settings), **options)
    return WandbLogger(experiment=experiment)


def tensorboard(folder: Path, name: str, cfg: dict):
    """A TensorBoardLogger in the run's folder."""
    from pytorch_lightning.loggers import TensorBoardLogger

    try:
        return TensorBoardLogger(folder, name="tensorboard", version="")
    except ModuleNotFoundError as error:
        raise UserError("logger=tensorboard needs TensorBoard: pip install tensorboard") from error
