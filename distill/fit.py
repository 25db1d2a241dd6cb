"""Training: Lightning's Trainer, checkpoints that survive a kill, exact resume, the best weights."""

import contextlib
import copy
import json
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import EarlyStopping, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn

from distill import build
from distill.cache import Ask, Cached, identity, open_cache
from distill.checkpoints import load_weights, read_state, save_weights
from distill.compress.calibrate import answers, calibration
from distill.compress.static_int8 import static_int8
from distill.data.base import Data
from distill.errors import UsageError, UserError
from distill.files import atomic, content_key
from distill.keep import BEST, LAST, MONITOR, AtomicCheckpoints, Keep, position, read
from distill.lines import Lines
from distill.measure import accuracy_on, agreement
from distill.module import Distill
from distill.network import Network
from distill.precision import precision, teaching
from distill.progress import leads, say
from distill.sources import describe, layers, own_sources
from distill.teachers import Committee, Ema, Frozen, Peer, Teacher, content_hash
from distill.types import Outputs, checked_size

CROSS_ENTROPY = {"_target_": "distill.losses.ce.CE", "label_smoothing": 0.0, "weight": 1.0}
MEMBERS_APART = 1000  # between the seeds of an ensemble's members: far from those of a sweep
ROLE = ("checkpoint", "fit", "precision", "untrained")  # what a teacher is besides its network
CHECKED = 512  # validation images that tell whether a teacher is better than chance


def fit(
    cfg: DictConfig,
    network: Network,
    teacher: Teacher | None,
    losses: Mapping,
    data: Data,
    folder: Path,
    epochs: int,
    lr: float,
    loggers=(),
    callbacks=(),
) -> dict:
    """Train `network` in place for `epochs`, continuing from `folder`/checkpoints where a killed run left one.

    Returns:
        {"best": {"epoch", "accuracy", "state"}, "last": {…}}: epoch counted from 1, validation accuracy in
        [0, 1], and the network's weights. `network` holds those of cfg.select.
    """
    terms, weights = build.losses(losses)
    seen = build.connect(network, teacher, terms, data, cfg.seed + 1)
    checkpoints = folder / "checkpoints"
    keep = Keep(checkpoints, cfg.checkpoint_every)
    callbacks = [keep, Lines(epochs), *callbacks]
    if Lines.on_a_terminal():
        callbacks.append(TQDMProgressBar(leave=False))
    if cfg.early_stopping is not None:
        callbacks.append(EarlyStopping(MONITOR, mode="max", patience=cfg.early_stopping, check_finite=False))
    trainer = _trainer(cfg, network, epochs, callbacks, [CSVLogger(folder, "metrics"), *loggers])
    views = {}
    if any(loss.needs_teacher for loss in terms.values()):
        teacher, views = _cached(cfg, teacher, data, seen, epochs, trainer)
    factor = instantiate(cfg.schedule, _convert_="all")
    module = Distill(
        network,
        teacher,
        terms,
        weights,
        _optimizer(cfg, lr, trainer.precision),
        lambda epoch: factor(epoch, epochs),
        data.num_classes,
        ema=cfg.ema,
        seed=cfg.seed,
        compile=cfg.compile,
    )
    loader = data.resident(trainer.strategy.root_device).train_loader(cfg.seed, **views)
    resume = checkpoints / LAST if (checkpoints / LAST).exists() else None
    if resume:
        epoch, batch = position(read(resume))
        loader.sampler.resume_at(epoch, batch)
        say(f"  continuing after {epoch} epochs and {batch} of {len(loader)} batches")
    try:
        trainer.fit(module, loader, data.val_loader(), ckpt_path=resume, weights_only=True)
    except SystemExit as end:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt if trainer.interrupted else end from None
    except OSError as error:  # of a log, which does not say where
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}; what was written before is whole"
        ) from error
    chosen = {
        "last": {**keep.last, "state": _copy(module.shipped.net.state_dict())},
        "best": {**keep.best, "state": read_state(checkpoints / BEST)},
    }
    network.net.load_state_dict(chosen[cfg.select]["state"])
    network.keep(()).eval().to("cpu", torch.float32)  # whatever number format it was trained in
    return chosen


def _optimizer(cfg: DictConfig, lr: float, precision: str) -> Callable:
    """Parameters to optimizer. A fused one steps before Lightning can clip what mixed precision has scaled."""
    options = {"lr": lr}
    if cfg.trainer.gradient_clip_val and precision.endswith("-mixed") and cfg.optimizer.get("fused"):
        options["fused"] = False
    return instantiate(cfg.optimizer, **options, _convert_="all")


def _trainer(cfg: DictConfig, student: Network, epochs: int, callbacks: list, loggers: list) -> Trainer:
    _quiet()
    return instantiate(
        cfg.trainer,
        _convert_="all",
        precision=precision(cfg.trainer.precision, cfg.trainer.accelerator, student),
        max_epochs=epochs,
        callbacks=callbacks,
        logger=loggers,
        plugins=[AtomicCheckpoints()],
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        enable_progress_bar=Lines.on_a_terminal(),
    )


def _cached(
    cfg: DictConfig, teacher: Teacher, data: Data, seen: Outputs, epochs: int, trainer: Trainer
) -> tuple[Teacher, dict]:
    """The teacher behind its cache where cfg.cache wants one, and what `Data.train_loader` is told of the views.

    Args:
        seen: what the teacher answers to a few images, with the features that the losses read.
    """
    options = build.plain(cfg.cache)
    views = options["views"]
    if views is not None and views < 1:
        raise UsageError(f"cache.views={views}: expected at least 1, or null for a new view in every epoch")
    if options["keep"] == "off":
        return teacher, {"views": views, "view_seed": options["seed"]}
    device = trainer.strategy.root_device.type
    stored = min(views or epochs, epochs)
    known_by = partial(identity, seen=seen, described=_described(cfg.teacher), seed=options["seed"], device=device)
    opened = open_cache(teacher, data, seen, stored, options, known_by)
    seen_views = views if opened is None else stored  # a run sees the views it asks for, kept or not
    return opened or teacher, {"views": seen_views, "view_seed": options["seed"]}


def _described(network: DictConfig) -> dict:
    """What a network or committee is made of, without where its weights come from and what it computes in."""
    kept = {key: value for key, value in build.plain(network).items() if key not in ROLE}
    if "members" in kept:
        kept["members"] = {name: _described(member) for name, member in kept["members"].items()}
    return kept


def fill_cache(cfg: DictConfig, teacher: Teacher, data: Data) -> None:
    """Ask the teacher about every row in every view that a run of `cfg` will see, where that isn't stored yet."""
    student = build.network(cfg.student, data.num_classes, data.image_size, cfg.seed)
    terms, _ = build.losses(cfg.loss)
    seen = build.connect(student, teacher, terms, data, cfg.seed + 1)
    epochs = cfg.trainer.max_epochs
    trainer = _trainer(cfg, student, epochs, [], [])
    teacher, views = _cached(cfg, teacher, data, seen, epochs, trainer)
    if not isinstance(teacher, Cached):
        raise UserError("stages=[cache]: this run keeps no answers of its teacher, so there is nothing to fill")
    start = time.monotonic()
    trainer.predict(Ask(teacher), data.views_loader(**views), return_predictions=False)
    say(f"  filled in {time.monotonic() - start:.0f} s")


def teacher(cfg: DictConfig, data: Data) -> Teacher:
    """The teacher that conf/teacher or a network's name describes, with weights where it does not learn along."""
    kind = get_object(cfg.teacher._target_)
    if kind is Committee:
        if any(member.precision != "auto" for member in cfg.teacher.members.values()):
            raise UsageError("a member of teacher=ensemble has a precision of its own: set teacher.precision, for all")
        members = [
            _trained(cfg, f"teacher {name}", member, data, cfg.seed + number * MEMBERS_APART)
            for number, (name, member) in enumerate(cfg.teacher.members.items())
        ]
        return frozen(cfg, Committee(members, cfg.teacher.weights), data)
    if kind is Peer:
        peer = build.network(cfg.teacher.network, data.num_classes, data.image_size, cfg.seed + 2)
        return Peer(peer, cfg.teacher.temperature, cfg.teacher.weight, _ce(cfg).get("label_smoothing", 0.0))
    if kind is Ema:
        return Ema(build.network(cfg.student, data.num_classes, data.image_size, cfg.seed), cfg.teacher.decay)
    return frozen(cfg, _trained(cfg, "teacher", cfg.teacher, data, cfg.seed), data)


def frozen(cfg: DictConfig, network: nn.Module, data: Data) -> Frozen:
    """`network` as a teacher that computes as teacher.precision says, see conf/role/teacher.yaml."""
    numerics = teaching(cfg.teacher.precision, cfg.trainer, network)
    return Frozen(network, numerics, partial(_in_int8, data)) if numerics == "int8" else Frozen(network, numerics)


def _in_int8(data: Data, net: nn.Module) -> nn.Module:
    small = static_int8(net, data=data)
    images = calibration(data, 512, "teacher.precision=int8: images")
    same = agreement(answers(small, images), answers(net, images))
    say(f"  teacher.precision=int8: the same class as in float32 for {same:.1%} of {sum(map(len, images))} images")
    return small


def _trained(cfg: DictConfig, name: str, described: DictConfig, data: Data, seed: int) -> Network:
    """A teacher's network with its weights: given, fitted before, or fitted now.

    fit.epochs: null fits as long as the student is trained, where there are no weights for these classes;
    N fine-tunes what there is; 0 takes it as it is. It is fitted by the cross-entropy alone and its best epoch is
    taken, whatever is set for the student's training.
    """
    given = described.checkpoint or (_pretrained(described) and data.num_classes == 1000)
    epochs = described.fit.epochs
    if epochs is None:
        epochs = 0 if given else cfg.trainer.max_epochs
    network = build.network(described, data.num_classes, data.image_size, seed, fresh_head=epochs > 0)
    if epochs > 0:
        own = copy.deepcopy(cfg)
        own.seed, own.ema, own.early_stopping, own.select = seed, None, None, "best"
        return _fit_once(own, name, described, network, {"ce": CROSS_ENTROPY}, data, epochs, described.fit.lr)
    say(f"{name}: {type(network.net).__name__} as given ({described.checkpoint or 'its own weights'})")
    if not described.untrained:
        fitted = "fit it (teacher.fit.epochs=N); teacher.untrained=true lets it teach all the same"
        _refuse_chance(name, network, data, fitted)
    return network


def given(cfg: DictConfig, data: Data) -> tuple[Network, dict]:
    """The student with the weights that it came with, and `fit`'s answer for a training of no epochs."""
    network = build.network(cfg.student, data.num_classes, data.image_size, cfg.seed, fresh_head=False).eval()
    say(f"student: {type(network.net).__name__} as given ({cfg.student.checkpoint or 'its own weights'})")
    _refuse_chance("student", network, data, "train it (stages=[teacher,distill,...])")
    accuracy = accuracy_on(network.plain(), data.val_loader())
    return network, {"given": {"epoch": 0, "accuracy": accuracy, "state": _copy(network.net.state_dict())}}


def _refuse_chance(name: str, network: Network, data: Data, instead: str) -> None:
    """Raises UserError where a network that was given, not fitted here, is no better than guessing on up to CHECKED
    validation images: within three standard errors of always saying the most frequent class. It says what to do
    `instead`."""
    rows = torch.randperm(len(data.val), generator=torch.Generator().manual_seed(0))[:CHECKED]
    batches = (data.val[part, torch.zeros_like(part)] for part in rows.split(data.batch_size))
    net = network.plain()
    right = accuracy_on(net, batches)
    share = data.val.labels.bincount().max().item() / len(data.val)
    if right <= share + 3 * (share * (1 - share) / len(rows)) ** 0.5:
        raise UserError(
            f"the {name} answers {right:.1%} of {len(rows)} validation images rightly, which is chance ({share:.1%}): "
            f"give it trained weights of these classes, in their order, and its mean and std "
            f"({name.partition(' ')[0]}.checkpoint=FILE), or {instead}"
        )


def student_alone(cfg: DictConfig, data: Data) -> Network:
    """The student trained on the labels alone with the same budget: what distillation is measured against."""
    network = build.network(cfg.student, data.num_classes, data.image_size, cfg.seed)
    epochs, lr = cfg.trainer.max_epochs, cfg.optimizer.lr
    return _fit_once(cfg, "student alone", cfg.student, network, {"ce": _ce(cfg)}, data, epochs, lr)


def distil(cfg: DictConfig, taught_by: Teacher, data: Data, folder: Path, loggers) -> tuple[Network, dict]:
    """The student taught by the teacher under the losses of `cfg`, and its best and last epoch (see `fit`)."""
    network = build.network(cfg.student, data.num_classes, data.image_size, cfg.seed)
    epochs = cfg.trainer.max_epochs
    say(f"distill: {type(network.net).__name__} under {' + '.join(cfg.loss)} for {epochs} epochs")
    return network, fit(cfg, network, taught_by, cfg.loss, data, folder, epochs, cfg.optimizer.lr, loggers)


def _pretrained(cfg: DictConfig) -> bool:
    return bool(cfg.get("weights") or cfg.get("pretrained"))


def _ce(cfg: DictConfig) -> dict:
    """The cross-entropy of the run, with its label smoothing, at full weight."""
    return {**build.plain(cfg.loss).get("ce", CROSS_ENTROPY), "weight": 1.0}


def _fit_once(
    cfg: DictConfig, name: str, described, network: Network, losses, data: Data, epochs: int, lr: float
) -> Network:
    """`network` fitted on the labels; once for its configuration, initial weights, data and budget.

    The weights lie in cfg.store under the hash of all that decides them, so that runs and sweeps share them.
    """
    decides = {
        "network": _described(described),
        "weights": content_hash(network),
        "images": data.fingerprint,
        "loss": losses,
        "epochs": epochs,
        **{key: build.plain(cfg[key]) for key in ("data", "optimizer", "schedule", "trainer", "seed", "ema", "select")},
        "early_stopping": cfg.early_stopping,
    }
    decides["optimizer"]["lr"] = lr
    decides["trainer"].pop("max_epochs")
    decides["data"].pop("num_workers", None)
    if isinstance(decides["data"].get("image_size"), list):
        decides["data"]["image_size"] = checked_size(decides["data"]["image_size"])  # [N, N] is N
    own = own_sources([layers(network.net), describe(data.train.transform)])
    decides |= {"source": own} if own else {}
    key = content_key(decides)
    folder = Path(cfg.store) / f"{'student' if name == 'student alone' else 'teacher'}-{key}"
    weights = folder / "weights.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    # where several processes train together, the first holds the lock for all
    with FileLock(folder / "lock") if leads() else contextlib.nullcontext():
        if weights.exists():
            say(f"{name}: fitted before, read from {weights}")
            load_weights(network.net, weights)
        elif not {"teacher", "cache", "distill"} & set(cfg.stages):
            raise UserError(f"the {name} is not fitted yet ({weights} is missing): add teacher and distill to stages")
        else:
            say(f"{name}: fitting {type(network.net).__name__} on the labels for {epochs} epochs → {weights}")
            chosen = fit(cfg, network, None, losses, data, folder, epochs, lr)[cfg.select]
            if leads():
                decides |= {"epoch": chosen["epoch"], "val_accuracy": chosen["accuracy"]}
                with atomic(folder / "fit.json") as temporary:
                    temporary.write_text(json.dumps(decides, indent=2), encoding="utf-8")
                save_weights(network.net, weights, {})
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return network.keep(()).eval()


def _copy(state: Mapping) -> dict:
    return {key: value.detach().cpu().clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def _quiet() -> None:
    """Lightning's remarks about hardware, workers and tips are not for our users."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning"):
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
