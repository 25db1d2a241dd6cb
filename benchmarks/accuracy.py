"""What the fast path costs in accuracy: repeated views of a cached teacher, beside a plain loop that asks every time.

    python -m benchmarks.accuracy teacher=resnet20 teacher.checkpoint=resnet20.safetensors student=resnet8 \
        data=imagefolder data.root=cifar10 --rows 2500 --json benchmarks/accuracy.json --plot docs/views.png

"K views" trains through distill.training.fit with our defaults: K repeatable views of an image take turns over the
epochs, the teacher's answers are cached, batch-wise augmentation, channels last, the precision of the machine. K =
epochs is online distillation. The last K is run in float32, too. "plain loop" has nothing of ours but the networks and
the images: torchvision's transforms for each image in a DataLoader, contiguous tensors, float32, the teacher asked in
every step. Same losses, optimizer, schedule, epochs, initial weights by seed. After each epoch the validation images
are scored, at the end the test images.

Every (path, seed) is a process of its own with one thread; as many run at a time as there are cores.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from benchmarks.data import SHIFTED, TO_FLOAT, PerSample
from benchmarks.epochs import first, setting
from benchmarks.paired import in_own_process, record
from distill import types
from distill.cli import roles
from distill.networks.build import build_network
from distill.runs.tables import curves
from distill.runtimes.measure import accuracy_on
from distill.training import fit

PLAIN = "plain loop"
FLOAT32 = " views, float32"


def fast(cfg, data, teacher, views: int) -> tuple[nn.Module, list[float]]:
    """The student and its validation accuracy after each epoch, by our fit."""
    cfg.cache.views, cfg.select = views, "last"
    student = build_network(cfg.student, data.num_classes, data.image_size, cfg.seed)
    losses = {name: types.plain_values(cfg.loss[name]) for name in ("ce", "kd")}
    with tempfile.TemporaryDirectory() as folder:
        fit.fit(student, teacher, losses, data, roles.recipe(cfg), Path(folder), roles.answers(cfg))
        scores = curves(folder)["val/accuracy"].tolist()
    return student.plain(), scores


def plain(cfg, data, teacher) -> tuple[nn.Module, list[float]]:
    """The same by a loop of plain PyTorch."""
    student = build_network(cfg.student, data.num_classes, data.image_size, cfg.seed).plain().train()
    taught_by = teacher.network.plain()
    samples = PerSample(data.train.images, data.train.labels, v2.Compose([*SHIFTED, *TO_FLOAT]))
    loader = DataLoader(samples, data.batch_size, shuffle=True, drop_last=True)
    options = {"momentum": cfg.optimizer.momentum, "nesterov": True, "weight_decay": cfg.optimizer.weight_decay}
    optimizer = torch.optim.SGD(student.parameters(), cfg.optimizer.lr, **options)
    steps = cfg.trainer.max_epochs * len(loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    temperature, scores = cfg.loss.kd.temperature, []
    torch.manual_seed(cfg.seed)
    for _ in range(cfg.trainer.max_epochs):
        for images, labels in loader:
            with torch.no_grad():
                soft = F.softmax(taught_by(images) / temperature, 1)
            logits = student(images)
            divergence = F.kl_div(F.log_softmax(logits / temperature, 1), soft, reduction="batchmean")
            loss = cfg.loss.ce.weight * F.cross_entropy(logits, labels)
            loss = loss + cfg.loss.kd.weight * temperature**2 * divergence
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        scores.append(accuracy_on(student.eval(), data.val_loader()))
        student.train()
    return student.eval(), scores


def measure(words: list[str], rows: int, path: str, seed: int) -> dict:
    """One path with one seed, in this process."""
    torch.set_num_threads(1)
    words = [*words, "trainer.precision=32-true"] if path.endswith(FLOAT32) else words
    with redirect_stdout(sys.stderr):
        cfg, data, teacher = setting([*words, f"seed={seed}", "cache.seed=0"], None)
        data = replace(data, train=first(data.train, rows), val=first(data.val, rows))
        if path == PLAIN:
            net, scores = plain(cfg, data, teacher)
        else:
            net, scores = fast(cfg, data, teacher, int(path.split()[0]))
        return {"path": path, "seed": seed, "validation": scores, "test": accuracy_on(net, data.test_loader())}


def reached(scores: list[float], wanted: float) -> int | None:
    """The first epoch, from 1, after which the validation accuracy was at least `wanted`."""
    return next((epoch for epoch, value in enumerate(scores, 1) if value >= wanted), None)


def summary(runs: list[dict], epochs: int) -> dict[str, dict]:
    """For each path: test accuracies, and the first epoch with what the online run of the same seed ended with."""
    ends = {run["seed"]: run["validation"][-1] for run in runs if run["path"] == f"{epochs} views"}
    found: dict[str, dict] = {}
    for run in runs:
        row = found.setdefault(run["path"], {"test": [], "epoch": []})
        row["test"].append(run["test"])
        if run["seed"] in ends:
            row["epoch"].append(reached(run["validation"], ends[run["seed"]]))
    for row in found.values():
        row["test mean"] = statistics.mean(row["test"])
        row["test standard deviation"] = statistics.stdev(row["test"]) if len(row["test"]) > 1 else None
    return found


def plot(runs: list[dict], path: Path) -> None:
    """Validation accuracy over the epochs, the mean of the seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(run["path"] for run in runs):
        seeds = [run["validation"] for run in runs if run["path"] == name]
        means = [100 * statistics.mean(values) for values in zip(*seeds, strict=True)]
        axes.plot(range(1, len(means) + 1), means, label=name, linestyle="--" if name == PLAIN else "-")
    axes.set(xlabel="epoch", ylabel="validation accuracy, %")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="of train.py: teacher=resnet20 student=resnet8 …")
    parser.add_argument("--rows", type=int, default=2500, help="training images")
    parser.add_argument("--epochs", type=int, default=64, help="of every run")
    parser.add_argument(
        "--views", type=int, nargs="*", default=[1, 4, 16], help="K, besides that of online distillation"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="runs of the plain loop and of the last of --views; else one"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to draw the curves")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    words = [*options.words, f"trainer.max_epochs={options.epochs}"]
    if options.one:
        print(json.dumps(measure(words, options.rows, *options.one)))
        return
    runs: list[dict] = []

    def job(one: tuple[str, int]) -> None:
        words = [*options.words, "--rows", str(options.rows), "--epochs", str(options.epochs)]
        runs.append(in_own_process("benchmarks.accuracy", *words, "--one", json.dumps(one), OMP_NUM_THREADS="1"))
        print(f"{one[0]}, seed {one[1]}: {runs[-1]['test']:.2%} of the test images", flush=True)

    # the online run first: the views that it asks about are those of all
    paths = [f"{views} views" for views in sorted({*options.views, options.epochs}, reverse=True)]
    again = [f"{options.views[-1]} views", f"{options.views[-1]}{FLOAT32}", PLAIN]
    paths += again[1:]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(job, [(p, seed) for seed in range(options.seeds) for p in paths if seed == 0 or p in again]))
    runs.sort(key=lambda run: (paths.index(run["path"]), run["seed"]))
    found = summary(runs, options.epochs)
    for path, row in found.items():
        spread = "" if row["test standard deviation"] is None else f" ± {row['test standard deviation']:.2%}"
        print(f"{path}: {row['test mean']:.2%}{spread} of the test images; as good as online in epoch {row['epoch']}")
    record("benchmarks.accuracy", options.json, epochs=options.epochs, rows=options.rows, summary=found, runs=runs)
    if options.plot:
        plot(runs, options.plot)


if __name__ == "__main__":
    main()
