"""What a training epoch costs: the student alone, distilled online, distilled from the cache, and a loop by hand.

    python -m benchmarks.epochs teacher=resnet56 student=resnet20 data=imagefolder data.root=cifar10 \
        data.batch_size=128 --rows 3840 --json benchmarks/epochs.json

Words are those of train.py. The contenders take turns in one process, an epoch each, on the same images and from the
same weights; timed are the training steps with their loading, without validation. The loops by hand are the least that
trains the same student in the same precision and memory format: no Lightning, nothing of ours but networks and images.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from pytorch_lightning import Callback
from torch.nn import functional as F

from benchmarks.paired import in_turns, ratio, record
from distill import types
from distill.cli import build, config, roles
from distill.data.base import Data
from distill.files import CONF
from distill.networks.build import build_network
from distill.teachers.frozen import Frozen
from distill.training import fit
from distill.training.precision import precision


class Stopwatch(Callback):
    """Seconds of the training steps of an epoch."""

    def on_train_epoch_start(self, trainer, module) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if batch_idx + 1 == trainer.num_training_batches:
            _wait()
            self.seconds = time.perf_counter() - self.start


def ours(cfg: DictConfig, data: Data, teacher: Frozen | None, losses: tuple[str, ...], **cache) -> Callable[[], float]:
    """An epoch through distill.training.fit."""
    cfg = cfg.copy()
    cfg.cache.update(cache)
    network = build_network(cfg.student, data.num_classes, data.image_size, cfg.seed)
    recipe, answers = roles.recipe(cfg).changed(epochs=1), roles.answers(cfg)
    chosen = {name: types.plain_values(cfg.loss[name]) for name in losses}

    def epoch() -> float:
        watch = Stopwatch()
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            fit.fit(network, teacher, chosen, data, recipe, Path(folder), answers, callbacks=[watch])
        return watch.seconds

    return epoch


def by_hand(cfg: DictConfig, data: Data, teacher: Frozen | None) -> Callable[[], float]:
    """The same student, optimizer, precision and memory format in ten lines."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build_network(cfg.student, data.num_classes, data.image_size, cfg.seed).to(device)
    if teacher is not None:
        teacher.to(device)
    optimizer = torch.optim.SGD(network.parameters(), cfg.optimizer.lr, 0.9, weight_decay=5e-4, nesterov=True)
    temperature = cfg.loss.kd.temperature
    labelled, taught = (cfg.loss.ce.weight, cfg.loss.kd.weight) if teacher else (1.0, 0.0)
    bf16 = precision(cfg.trainer.precision, cfg.trainer.accelerator, network) == "bf16-mixed"
    half = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def epoch() -> float:
        network.train()
        _wait()
        start = time.perf_counter()
        for rows in torch.randperm(len(data.train)).split(data.batch_size):
            batch = data.train[rows, 0]
            images, labels = batch.images.to(device), batch.labels.to(device)
            with half:
                logits = network(images).logits
                if teacher is not None:
                    with torch.no_grad():
                        soft = F.log_softmax(teacher.network(images).logits.float() / temperature, 1)
            loss = labelled * F.cross_entropy(logits.float(), labels)
            if teacher is not None:
                student = F.log_softmax(logits.float() / temperature, 1)
                loss = loss + taught * temperature**2 * F.kl_div(student, soft, reduction="batchmean", log_target=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        _wait()
        return time.perf_counter() - start

    return epoch


def setting(words: list[str], rows: int | None) -> tuple[DictConfig, Data, Frozen]:
    """Configuration, images (`rows` of training, a tenth as many of validation), and a teacher of fresh weights."""
    cfg = compose(*words)
    data = build.data(cfg.data)
    if rows is not None:
        data = replace(data, train=first(data.train, rows), val=first(data.val, max(rows // 10, data.batch_size)))
    return cfg, data, roles.frozen(cfg, build_network(cfg.teacher, data.num_classes, data.image_size, 1), data)


def compose(*words: str) -> DictConfig:
    """The configuration under these words of train.py."""
    config.register(["train.py"])
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose("train", ["name=benchmark", *words])


def first(split, rows: int):
    """A split's rows, over the classes: every n-th."""
    chosen = torch.arange(rows) * (len(split) // rows) if rows <= len(split) else torch.arange(rows) % len(split)
    return replace(split, images=split.images[chosen], labels=split.labels[chosen])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="of train.py: teacher=resnet56 student=resnet20 …")
    parser.add_argument("--rows", type=int, help="training images of an epoch; all where it isn't given")
    parser.add_argument("--rounds", type=int, default=3, help="measured epochs of each contender")
    parser.add_argument("--no-loops", action="store_true", help="leave out the loops by hand")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cfg, data, teacher = setting([f"cache.folder={folder}", *options.words], options.rows)
        contenders = {
            "student alone": ours(cfg, data, None, ("ce",)),
            "cached": ours(cfg, data, teacher, ("ce", "kd"), keep="logits", views=1),
            "online": ours(cfg, data, teacher, ("ce", "kd"), keep="off"),
        }
        if not options.no_loops:
            contenders |= {"alone by hand": by_hand(cfg, data, None), "online by hand": by_hand(cfg, data, teacher)}
        found = in_turns(contenders, options.rounds)
    ratios = {
        "cached / student alone": ratio(found, "cached", "student alone"),
        "online / student alone": ratio(found, "online", "student alone"),
    }
    if not options.no_loops:
        ratios |= {
            "student alone / alone by hand": ratio(found, "student alone", "alone by hand"),
            "online / online by hand": ratio(found, "online", "online by hand"),
        }
    for name, value in ratios.items():
        print(f"{name}: {value:.3f}")
    record("benchmarks.epochs", options.json, rows=len(data.train), seconds=found, ratios=ratios)


if __name__ == "__main__":
    main()
