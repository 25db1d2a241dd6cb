"""Lightning's Trainer as it is used here."""

import logging
import warnings
from collections.abc import Callable

from hydra.utils import instantiate
from pytorch_lightning import Trainer

from distill.networks.network import Network
from distill.training.precision import precision
from distill.training.recipe import Recipe
from distill.training.resume import AtomicCheckpoints

LOGGERS = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning")


def optimizer(recipe: Recipe, precision: str) -> Callable:
    """Parameters to optimizer. A fused one steps before Lightning can clip what mixed precision has scaled."""
    clips = recipe.trainer.get("gradient_clip_val") and precision.endswith("-mixed")
    options = {"fused": False} if clips and recipe.optimizer.get("fused") else {}
    return instantiate({**recipe.optimizer, **options}, _convert_="all")


def trainer(recipe: Recipe, network: Network, callbacks: list, loggers: list) -> Trainer:
    """The Trainer that trains `network`."""
    quiet()
    return instantiate(
        dict(recipe.trainer),
        _convert_="all",
        precision=precision(recipe.trainer["precision"], recipe.trainer["accelerator"], network),
        max_epochs=recipe.epochs,
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpoints()],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=False,  # there is one in Lines
    )


def quiet() -> None:
    """Lightning's remarks about hardware, workers and tips are not for our users."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for pattern in (
        ".*does not have many workers.*",
        ".*in eval mode at the start of training.*",  # a moving average that teaches
        ".*dataloader is not resumable.*",
        ".*smaller than the logging interval.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*lr_scheduler.step.*before.*optimizer.step.*",
        ".*LeafSpec.*",
        ".*sync_dist=True.*",  # what is logged is the same on every process already
        ".*Experiment logs directory.*",
        ".*predict returned None.*",
    ):
        warnings.filterwarnings("ignore", pattern)
