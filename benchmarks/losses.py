"""What every loss of conf/loss costs: time and memory of a training step beside those of `kd`.

    python -m benchmarks.losses --json benchmarks/losses.json

Each loss is trained beside `ce` and takes turns with `kd` (kd, loss, kd, loss …) on the same student, in one process,
on made images of as many rows and classes as CIFAR-100; a ratio is the median over the turns. A loss that does without
a teacher is spared the teacher's forward pass. Memory: what the loss holds itself (parameters and buffers), and what
is kept for the backward pass, the student's activations included, each storage once.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import hydra
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.paired import record
from distill.cli import config
from distill.data.base import Data
from distill.data.fake import fake
from distill.errors import UserError
from distill.files import CONF
from distill.losses.terms import build_losses
from distill.losses.weight import weight_at
from distill.networks.build import build_network
from distill.networks.network import Network
from distill.networks.weights import save_weights
from distill.teachers.frozen import Frozen
from distill.training.connect import connect
from distill.types import Batch

NAMES = sorted(file.stem for file in Path(CONF, "loss").glob("*.yaml"))
OTHER_STUDENTS = {"deit": ["student=deit_tiny"], "simkd": ["student=simkd", "student.weights={teacher}"]}
ROWS, PATTERNS = 50_000, 500  # training rows, and how many different images they repeat


def made(rows: int = ROWS, classes: int = 100) -> Data:
    """As many rows as CIFAR-100's training set, which decide the size of a memory bank."""
    data = fake(num_classes=classes, train_size=PATTERNS)
    copies = rows // PATTERNS
    images, labels = data.train.images.repeat(copies, 1, 1, 1), data.train.labels.repeat(copies)
    return replace(data, train=replace(data.train, images=images, labels=labels))


def compose(*words: str) -> DictConfig:
    """The configuration under these words, with every loss in it."""
    config.register(["train.py"])
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose("train", [f"loss=[{','.join(NAMES)}]", "name=none", *words])


class Step:
    """One training step of a student under `ce` and the losses named.

    Args:
        cfg: from `compose`.
        names: of losses; `ce` is added.
        student, teacher: networks of this step alone, whose taps are changed.
    """

    def __init__(self, cfg: DictConfig, names: Sequence[str], student: Network, teacher: Frozen, data: Data):
        described = OmegaConf.to_container(cfg.loss, resolve=True)
        self.terms, self.weights = build_losses({name: described[name] for name in dict.fromkeys(["ce", *names])})
        self.student = student
        self.teacher = teacher if any(term.needs_teacher for term in self.terms.values()) else None
        connect(self.student, self.teacher, self.terms, data, cfg.seed)
        self.learned = nn.ModuleList([self.student, *self.terms.values()])
        parameters = [parameter for parameter in self.learned.parameters() if parameter.requires_grad]
        self.optimizer = instantiate(cfg.optimizer, lr=1e-4, _convert_="all")(parameters)

    def total(self, batch: Batch) -> Tensor:
        student = self.student(batch.images).float()
        teacher = self.teacher and self.teacher(batch).float()
        return sum(
            weight_at(self.weights[name], 0) * term(student, teacher, batch) for name, term in self.terms.items()
        )

    def seconds(self, batch: Batch) -> float:
        start = time.perf_counter()
        self.total(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def saved_bytes(self, batch: Batch) -> int:
        """What the forward pass keeps for the backward pass, without parameters and buffers."""
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            total = self.total(batch)  # keeps the graph, and so the storages, alive until they are counted
        held = {tensor.untyped_storage().data_ptr() for tensor in tensors(self.learned)}
        del total
        return sum(size for pointer, size in sizes.items() if pointer not in held)


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def held_bytes(loss: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in tensors(loss))


def networks(cfg: DictConfig, data: Data) -> tuple[Network, Frozen]:
    """Student and teacher with fresh weights."""
    student, teacher = (
        build_network(part, data.num_classes, data.image_size, 0) for part in (cfg.student, cfg.teacher)
    )
    return student, Frozen(teacher)


def connected(teacher: str, student: str, data: Data) -> tuple[dict[str, tuple[Step, Step]], dict[str, str]]:
    """({loss: (its step, that of kd on the same student)}, {loss that can't teach this pair: why})."""
    cfg = compose(f"teacher={teacher}", f"student={student}")
    usual = networks(cfg, data)
    steps, left_out, kd = {}, {}, Step(cfg, ["kd"], *copy.deepcopy(usual), data)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "teacher.safetensors")
        save_weights(usual[1].network.net, weights, {})
        for name in NAMES:
            other = [word.format(teacher=weights) for word in OTHER_STUDENTS.get(name, [])]
            try:
                own = compose(f"teacher={teacher}", *other) if other else cfg
                pair = networks(own, data) if other else usual
                reference = Step(own, ["kd"], *copy.deepcopy(pair), data) if other else kd
                steps[name] = Step(own, [name], *copy.deepcopy(pair), data), reference
            except UserError as error:
                left_out[name] = str(error)
    return steps, left_out


def measure(steps: dict[str, tuple[Step, Step]], batch: Batch, rounds: int) -> dict[str, dict[str, float]]:
    """What is written for each loss, by name."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, (step, kd) in steps.items():
            pair = kd.seconds(batch), step.seconds(batch)
            if turn > 0:  # the first warms up
                seconds[name].append(pair)
    found = {}
    for name, (step, kd) in steps.items():
        found[name] = {
            "ms": 1000 * statistics.median(own for _, own in seconds[name]),
            "time_ratio": statistics.median(own / reference for reference, own in seconds[name]),
            "saved_bytes": step.saved_bytes(batch),
            "saved_ratio": step.saved_bytes(batch) / kd.saved_bytes(batch),
            "held_bytes": held_bytes(step.terms[name]),
        }
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    rows = [f"{'loss':<22} {'ms':>8} {'time / kd':>10} {'saved MB':>9} {'saved / kd':>11} {'held kB':>9}"]
    for name, row in sorted(found.items(), key=lambda item: item[1]["time_ratio"]):
        rows.append(
            f"{name:<22} {row['ms']:>8.1f} {row['time_ratio']:>10.2f} {row['saved_bytes'] / 1e6:>9.1f} "
            f"{row['saved_ratio']:>11.2f} {row['held_bytes'] / 1e3:>9.1f}"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--teacher", default="resnet56", help="a file of conf/network")
    parser.add_argument("--student", default="resnet20", help="a file of conf/network")
    parser.add_argument("--batch", type=int, default=64, help="images in a batch")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each loss")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    data = made()
    rows = torch.arange(options.batch)
    batch = data.train[rows, 0]
    steps, left_out = connected(options.teacher, options.student, data)
    found = measure(steps, batch, options.steps)
    print(table(found))
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    record(
        "benchmarks.losses",
        options.json,
        pair=f"{options.teacher} → {options.student}",
        batch=options.batch,
        steps=options.steps,
        losses=found,
        left_out=left_out,
    )


if __name__ == "__main__":
    main()
