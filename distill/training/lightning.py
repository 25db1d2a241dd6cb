"""Lightning's Trainer as it is used here."""

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from hydra.utils import instantiate
from pytorch_lightning import Trainer

from distill.errors import UsageError, UserError
from distill.networks.network import Network
from distill.progress import leads
from distill.training.precision import on_cpu, precision
from distill.training.recipe import Recipe
from distill.training.resume import AtomicCheckpoints

LOGGERS = ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning")


def optimizer(recipe: Recipe, precision: str) -> Callable:
    """Parameters to optimizer. A fused one steps before Lightning can clip what mixed precision has scaled."""
    clips = recipe.trainer.get("gradient_clip_val") and precision.endswith("-mixed")
    options = {"fused": False} if clips and recipe.optimizer.get("fused") else {}
    return instantiate({**recipe.optimizer, **options}, _convert_="all")


def trainer(recipe: Recipe, network: Network, callbacks: list, loggers: list) -> Trainer:
    """The Trainer that trains `network`.

    Raises:
        UserError: a number of processes that what started this one doesn't allow.
        UsageError: batch norms are to be exchanged between CPUs.
    """
    quiet()
    if recipe.trainer.get("sync_batchnorm") and on_cpu(recipe.trainer["accelerator"]):
        raise UsageError(
            "trainer.sync_batchnorm=true: torch exchanges batch norms' statistics between GPUs only: leave it out, or "
            "choose trainer.accelerator=gpu"
        )
    made = instantiate(
        {**recipe.trainer, **_processes(recipe.trainer)},
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
    if made.world_size == 1 and not leads():
        raise UserError(
            "this process is not the first of its run, and the run trains on one: start it once, or with "
            "trainer=ddp, or trainer=multinode"
        )
    return made


def _processes(options: Mapping) -> dict:
    """Devices and nodes where "auto" leaves them to what started this process: srun, or torchrun."""
    around, found = os.environ, {}
    torchrun = {"WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= {*around}
    if options.get("num_nodes") == "auto":
        if torchrun:
            found["num_nodes"] = int(around["WORLD_SIZE"]) // int(around["LOCAL_WORLD_SIZE"])
        elif "SLURM_NNODES" in around:
            found["num_nodes"] = int(around["SLURM_NNODES"])
        else:
            raise UserError(
                "trainer.num_nodes=auto: neither torchrun nor srun started this process: start it by one of them, or "
                "say how many nodes there are (trainer.num_nodes=2, and NODE_RANK, MASTER_ADDR, MASTER_PORT on each)"
            )
    local = around.get("LOCAL_WORLD_SIZE") if torchrun else around.get("SLURM_NTASKS_PER_NODE")
    if local and options["devices"] == "auto" and on_cpu(options["accelerator"]) and options["strategy"] != "auto":
        found["devices"] = int(local)  # a processor is one device, whoever shares it
    return found


def waits_for_all(options: Mapping) -> bool:
    """Whether processes that train together wait for a gradient of every parameter, as DDP does by itself."""
    strategy, devices, nodes = options["strategy"], options["devices"], options.get("num_nodes", 1)
    if strategy != "auto":
        return strategy.startswith("ddp") and not strategy.endswith("_true")
    if isinstance(devices, str) and "," in devices:
        devices = devices.strip(",").split(",")
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        devices = len(devices)
    if devices == "auto" and not on_cpu(options["accelerator"]):
        devices = torch.cuda.device_count()
    return nodes not in (None, 1) or devices not in (0, 1, "1", "auto")


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
