"""Who is trained in a run: the teacher, the student alone, the student that is taught."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from hydra.utils import get_object
from omegaconf import DictConfig
from torch import nn

from distill import types
from distill.compress import calibrate
from distill.compress.static_int8 import static_int8
from distill.data.base import Data
from distill.errors import UsageError, UserError
from distill.losses.terms import build_losses
from distill.networks.build import build_network
from distill.networks.network import Network
from distill.networks.sources import describe, layers, own_sources
from distill.networks.weights import content_hash, load_weights
from distill.progress import say
from distill.runs import trials
from distill.runs.records import STARTING_POINT
from distill.runtimes.measure import accuracy_on, agreement
from distill.teachers.base import Teacher
from distill.teachers.cache import check_top_k, reads
from distill.teachers.committee import Committee
from distill.teachers.ema import Ema
from distill.teachers.frozen import Frozen
from distill.teachers.peer import Peer
from distill.training.answers import Answers, fill, made_of
from distill.training.connect import record
from distill.training.finetune import finetuner
from distill.training.fit import copied, fit
from distill.training.precision import teaching
from distill.training.recipe import Recipe
from distill.training.store import kept, once
from distill.training.trial import Judged

CROSS_ENTROPY = {"_target_": "distill.losses.ce.CE", "label_smoothing": 0.0, "weight": 1.0}
TEACHERS = {"ema": None, "early_stopping": None, "select": "best"}  # whatever the student's recipe says
MEMBERS_APART = 1000  # between the seeds of an ensemble's members, or of peers: far from those of a sweep
CHECKED = 512  # validation images that tell whether a teacher is better than chance


@dataclass(frozen=True)
class Fitting:
    """A network's training on the labels alone, which is done once for all runs that ask for the same.

    Attributes:
        name: for a person: "teacher", "student alone".
        described: what configuration says of the network.
        recipe: of no epochs: the network is taken as it is.
    """

    name: str
    described: DictConfig
    network: Network
    losses: Mapping
    recipe: Recipe

    def decides(self, cfg: DictConfig, data: Data) -> dict:
        """All that its weights depend on."""
        return {
            "network": made_of(types.plain_values(self.described)),
            "weights": content_hash(self.network),
            "images": data.fingerprint,
            "data": _images(cfg),
            "loss": self.losses,
            "recipe": self.recipe.decides(),
            "source": own_sources([layers(self.network.net), describe(data.train.transform)]),
        }

    def place(self, cfg: DictConfig) -> Path:
        """Where in the store its folder lies, but for the key."""
        return Path(cfg.store) / ("student" if self.name == "student alone" else "teacher")

    def kept(self, cfg: DictConfig, data: Data) -> Path:
        """Its weights, if they were fitted before."""
        return kept(self.place(cfg), self.decides(cfg, data))


def teacher(cfg: DictConfig, data: Data) -> Teacher:
    """The teacher that conf/teacher or a network's name describes, with weights where it does not learn along."""
    check_top_k(cfg.cache.top_k, data.num_classes)
    kind = get_object(cfg.teacher._target_)
    if kind is Committee:
        if any(member.precision != "auto" for member in cfg.teacher.members.values()):
            raise UsageError("a member of teacher=ensemble has a precision of its own: set teacher.precision, for all")
        members = [_trained(cfg, each, data, read=number == 0) for number, each in enumerate(teachers(cfg, data))]
        return frozen(cfg, Committee(members, cfg.teacher.weights), data)
    if kind is Peer:

        def peer(number: int) -> Network:
            seed = cfg.seed + 2 + number * MEMBERS_APART
            return build_network(cfg.teacher.network, data.num_classes, data.image_size, seed)

        own = cfg.teacher
        smoothing = ce(cfg).get("label_smoothing", 0.0)
        return Peer(peer(0), own.temperature, own.weight, smoothing, own.get("peers", 1), peer)
    if kind is Ema:
        return Ema(build_network(cfg.student, data.num_classes, data.image_size, cfg.seed), cfg.teacher.decay)
    return frozen(cfg, _trained(cfg, next(teachers(cfg, data)), data), data)


def teachers(cfg: DictConfig, data: Data) -> Iterator[Fitting]:
    """The networks that teach without learning along: one, the members of a committee, or none."""
    kind = get_object(cfg.teacher._target_)
    if kind in (Peer, Ema):
        return
    members = cfg.teacher.members.items() if kind is Committee else [(None, cfg.teacher)]
    for number, (name, described) in enumerate(members):
        called = "teacher" if name is None else f"teacher {name}"
        yield _teacher(cfg, called, described, data, described.fit.seed + number * MEMBERS_APART)


def frozen(cfg: DictConfig, network: nn.Module, data: Data) -> Frozen:
    """`network` as a teacher that computes as teacher.precision says, see conf/role/teacher.yaml."""
    numerics = teaching(cfg.teacher.precision, cfg.trainer, network)
    return Frozen(network, numerics, partial(_in_int8, data)) if numerics == "int8" else Frozen(network, numerics)


def _in_int8(data: Data, net: nn.Module) -> nn.Module:
    small = static_int8(net, data=data)
    images = calibrate.calibration(data, 512, "teacher.precision=int8: images")
    same = agreement(*(calibrate.answers(each, images) for each in (small, net)))
    say(f"  teacher.precision=int8: the same class as in float32 for {same:.1%} of {sum(map(len, images))} images")
    return small


def _teacher(cfg: DictConfig, name: str, described: DictConfig, data: Data, seed: int) -> Fitting:
    """A teacher's network and its training.

    fit.epochs: null fits as long as the student is trained, where there are no weights for these classes;
    N fine-tunes what there is; 0 takes it as it is. It is fitted by the cross-entropy alone and its best epoch is
    taken, whatever is set for the student's training.
    """
    given = described.checkpoint or (_pretrained(described) and data.num_classes == 1000)
    epochs = described.fit.epochs
    if epochs is None:
        epochs = 0 if given else cfg.trainer.max_epochs
    network = build_network(described, data.num_classes, data.image_size, seed, fresh_head=epochs > 0)
    own = recipe(cfg).changed(described.fit.lr, epochs=epochs, seed=seed, **TEACHERS)
    return Fitting(name, described, network, {"ce": CROSS_ENTROPY}, own)


def _trained(cfg: DictConfig, one: Fitting, data: Data, read: bool = True) -> Network:
    """A teacher's network with its weights: given, fitted before, or fitted now. What the losses `read` of it must be
    there before it is trained."""
    name, network = one.name, one.network
    if read:
        _check_taps(cfg, network)
    if one.recipe.epochs > 0:
        return _fit_once(cfg, one, data)
    say(f"{name}: {type(network.net).__name__} as given ({one.described.checkpoint or 'its own weights'})")
    if not one.described.untrained:
        fitted = "fit it (teacher.fit.epochs=N); teacher.untrained=true lets it teach all the same"
        _refuse_chance(name, network, data, fitted)
    return network


def _refuse_chance(name: str, network: Network, data: Data, instead: str) -> None:
    """Raises UserError where a network that was given, not fitted here, is no better than guessing on up to CHECKED
    validation images: within three standard errors of always saying the most frequent class. It says what to do
    `instead`."""
    rows = torch.randperm(len(data.val), generator=torch.Generator().manual_seed(0))[:CHECKED]
    batches = (data.val[part, 0] for part in rows.split(data.batch_size))
    net = network.plain()
    right = accuracy_on(net, batches)
    share = data.val.labels.bincount().max().item() / len(data.val)
    if right <= share + 3 * (share * (1 - share) / len(rows)) ** 0.5:
        raise UserError(
            f"the {name} answers {right:.1%} of {len(rows)} validation images rightly, which is chance ({share:.1%}): "
            f"give it trained weights of these classes, in their order, and its mean and std "
            f"({name.partition(' ')[0]}.checkpoint=FILE), or {instead}"
        )


def given(cfg: DictConfig, data: Data) -> tuple[Network, dict]:
    """The student with the weights that it came with, and `fit`'s answer for a training of no epochs."""
    network = build_network(cfg.student, data.num_classes, data.image_size, cfg.seed, fresh_head=False).eval()
    say(f"student: {type(network.net).__name__} as given ({cfg.student.checkpoint or 'its own weights'})")
    _refuse_chance("student", network, data, "train it (stages=[teacher,distill,...])")
    accuracy = accuracy_on(network.plain(), data.val_loader())
    return network, {"given": {"epoch": 0, "accuracy": accuracy, "state": copied(network.net.state_dict())}}


def taught_by(cfg: DictConfig, teacher: Teacher | None, data: Data) -> tuple[str | None, list[Path]]:
    """The hash of a fixed teacher's weights, and the files that they are in; None for one that learned along."""
    if not isinstance(teacher, Frozen):
        return None, []
    files = (
        one.kept(cfg, data) if one.recipe.epochs > 0 else Path(one.described.checkpoint or "")
        for one in teachers(cfg, data)
    )
    return teacher.fingerprint, [file for file in files if file.is_file()]


def student_alone(cfg: DictConfig, data: Data) -> Network:
    """The student trained on the labels alone with the same budget: what distillation is measured against."""
    return _fit_once(cfg, baseline(cfg, data), data)


def baseline(cfg: DictConfig, data: Data) -> Fitting:
    """The training of the student alone."""
    network = build_network(cfg.student, data.num_classes, data.image_size, cfg.seed)
    return Fitting("student alone", cfg.student, network, {"ce": ce(cfg)}, recipe(cfg))


def fitted_once(cfg: DictConfig, data: Data) -> Iterator[Fitting]:
    """The trainings that a run shares with others through the store."""
    yield from teachers(cfg, data)
    if cfg.baseline:
        yield baseline(cfg, data)


def distil(cfg: DictConfig, taught_by: Teacher, data: Data, folder: Path, loggers) -> tuple[Network, dict]:
    """The student taught by the teacher under the losses of `cfg`, and its best and last epoch (see `fit`)."""
    network = build_network(cfg.student, data.num_classes, data.image_size, cfg.seed)
    start = "from weights" if any(cfg.student.get(key) for key in STARTING_POINT) else "from scratch"
    terms = " + ".join(f"{_short(options['weight'])} {name}" for name, options in types.plain_values(cfg.loss).items())
    say(f"distill: {type(network.net).__name__} {start} under {terms} for {cfg.trainer.max_epochs} epochs")
    judge = trials.judge(folder)  # where a search made this run
    judged = [Judged(judge)] if judge else []
    return network, fit(network, taught_by, cfg.loss, data, recipe(cfg), folder, answers(cfg), loggers, judged)


def _short(weight: float | list) -> str:
    return f"{weight:g}" if isinstance(weight, (int, float)) else "→".join(f"{value:g}" for _, value in weight)


def fill_cache(cfg: DictConfig, teacher: Teacher, data: Data) -> None:
    """Ask the teacher about all that the run's student will see."""
    student = build_network(cfg.student, data.num_classes, data.image_size, cfg.seed)
    fill(student, teacher, cfg.loss, data, recipe(cfg), answers(cfg))


def finetuning(
    cfg: DictConfig, teacher: Teacher | None, data: Data, folder: Path, exporters: Mapping[str, Callable], origin=None
) -> Callable:
    """`finetuner` of a run's configuration."""
    configured = {key: types.plain_values(cfg[key]) for key in ("compress", "export", "teacher")} | {
        "data": _images(cfg)
    }
    return finetuner(recipe(cfg), cfg.loss, teacher, data, folder, exporters, configured, answers(cfg), origin)


def recipe(cfg: DictConfig) -> Recipe:
    """How the student is trained."""
    trainer = types.plain_values(cfg.trainer)
    if cfg.deterministic:
        trainer["deterministic"] = True
    epochs, same = trainer.pop("max_epochs"), {field.name for field in fields(Recipe)} - {"epochs", "trainer"}
    return Recipe(epochs, trainer=trainer, **{name: types.plain_values(cfg[name]) for name in same})


def answers(cfg: DictConfig) -> Answers:
    """How the teacher's answers are kept."""
    return Answers(types.plain_values(cfg.cache), types.plain_values(cfg.teacher))


def _images(cfg: DictConfig) -> dict:
    """What configuration says of the images, for a key: without what changes no bit and where they lie, [N, N] being
    N."""
    elsewhere = ("num_workers", "root", "store", "train", "val", "test")
    images = {key: value for key, value in types.plain_values(cfg.data).items() if key not in elsewhere}
    if isinstance(images.get("image_size"), list):
        images["image_size"] = types.checked_size(images["image_size"])
    return images


def _fit_once(cfg: DictConfig, one: Fitting, data: Data) -> Network:
    """Its network, fitted."""
    name, network, epochs = one.name, one.network, one.recipe.epochs

    def train(folder: Path) -> dict:
        if not {"teacher", "cache", "distill"} & set(cfg.stages):
            raise UserError(f"the {name} is not fitted yet ({folder} is empty): add teacher and distill to stages")
        kind = type(network.net).__name__
        say(f"{name}: fitting {kind} on the labels for {epochs} epochs → {folder / 'weights.safetensors'}")
        return fit(network, None, one.losses, data, one.recipe, folder)[one.recipe.select]

    said, restart = f"{name}: fitted", one.recipe.restart
    once(network.net, one.place(cfg), one.decides(cfg, data), train, load_weights, said, restart)
    return network.record(()).eval()


def _pretrained(cfg: DictConfig) -> bool:
    return bool(cfg.get("weights") or cfg.get("pretrained"))


def ce(cfg: DictConfig) -> dict:
    """The cross-entropy of the run, with its label smoothing, at full weight."""
    return {**types.plain_values(cfg.loss).get("ce", CROSS_ENTROPY), "weight": 1.0}


def _check_taps(cfg: DictConfig, network: Network) -> None:
    """Raises UserError where the losses of a run that distils read what the teacher doesn't have, or what a cache of
    logits, or a teacher in int8, leaves out."""
    if not {"cache", "distill"} & set(cfg.stages):
        return
    terms = build_losses(cfg.loss)[0]
    record(network, "teacher", terms)
    features = [tap for loss in terms.values() for tap in loss.teacher_taps if tap not in network.tensors()]
    network.record(())
    if features and cfg.cache.keep == "logits":
        raise UsageError(f"cache=logits: {reads(features)}; cache=off asks the teacher every time")
    if features and cfg.teacher.precision == "int8":
        raise UsageError(f"teacher.precision=int8 answers with logits only: {', '.join(features)} can't be read of it")
