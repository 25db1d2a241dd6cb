"""A student measured, compressed and exported from Python, by the code of a run's stages."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from distill import compress as steps_of
from distill import export as exporters_of
from distill.api.session import session
from distill.cli import build, pilots, roles, words
from distill.data.base import Data, Split
from distill.data.prepare import preparation
from distill.errors import UsageError, UserError
from distill.export.deploy import write_readme
from distill.files import scratch
from distill.networks.fold import copied
from distill.networks.network import Network
from distill.networks.student import Compressed, Student
from distill.report import evaluate as measured
from distill.runs.records import continued, read_record
from distill.runs.run import Run
from distill.runtimes import measure
from distill.runtimes.artifact import Artifact
from distill.types import in_px

Images = Literal["test", "val", "train", "all"]


def evaluate(student: Student, data=None, images: Images = "test", config_dir=None, **options) -> dict[str, float]:
    """What a student is worth on labelled images, as a run's report has it.

        distill.evaluate(run.student, "photos/")        # {"top1": 0.93, "top1_error": 0.01, "ece": …, "images": 411}

    Args:
        student: of a run, or a distill.Student around any network.
        data: a folder of images, or a choice of the group `data`; None: the images of the student's own run. Its
            classes must be the student's, or some of them.
        images: which of them. "test" are those that a run keeps for its report: of a folder without test/ a fifth,
            always the same; "all" makes sense of images that the student has not been trained on.
        options: as for `distill.train`, such as data__test_fraction=0.3.

    Returns:
        top1, top1_error (one standard error), macro (mean of the classes' own top-1), top5 where there are more than
        five classes, ece: all in [0, 1]; and how many images there were.

    Raises:
        UserError: the images can't be read, or have other classes.
    """
    if images not in ("test", "val", "train", "all"):
        raise UsageError(f"images={images!r}: expected one of test, val, train, all")
    with _work(student, data, [], config_dir, options) as (_, found):
        labels = _labels(student, found)
        splits = [getattr(found, name) for name in (("train", "val", "test") if images == "all" else (images,))]
        splits = [replace(each, transform=found.test.transform, training=False) for each in splits]
        logits, true = zip(*(_answers(student, found, each) for each in splits), strict=True)
        scores = measure.scores(torch.cat(logits), labels[torch.cat(true)], None, None)
    found = {name: value for name, value in scores.items() if value is not None}
    return {**found, "images": sum(map(len, true))}


def compress(
    student: Student,
    steps: str | Sequence[str] = "dynamic_int8",
    data=None,
    runtime: str = "torchscript",
    config_dir=None,
    **options,
) -> Student:
    """A smaller student, by the steps of the group `compress`.

        small = distill.compress(student, "static_int8", "photos/", runtime="executorch")
        small = distill.compress(student, ["prune", "static_int8"], "photos/", compress__prune__ratio=0.5)

    Steps that train go by the labels; with a teacher: distill.train(run=…, stages=["compress", "export", "report"],
    compress=…).

    Args:
        data: as for `evaluate`; its training images calibrate and fine-tune.
        runtime: an exporter's name, for whose runtime it is quantized.
        options: as for `distill.train`.

    Raises:
        UserError: a step can't take the network, or the result is neither like the student nor as accurate, on
            validation images (`tolerance.compressed`).
    """
    names = [steps] if isinstance(steps, str) else [*steps]
    said = words.written({"compress": names, "export": [runtime]})
    with _work(student, data, said, config_dir, options) as (cfg, found), scratch() as folder:
        _labels(student, found)
        if student.compressed:
            raise UsageError(f"this student is compressed already, by {', '.join(student.compressed.steps)}")
        plain, exporters = _plain(student), build.steps(cfg.export)
        [flow] = dict.fromkeys(map(exporters_of.flow, exporters.values()))
        finetune = roles.finetuning(cfg, None, found, folder, exporters)
        net = steps_of.chain(build.steps(cfg.compress), plain, found, finetune, flow)
        failures = measured.unlike(net, plain, found, build.tolerance(cfg)["compressed"])
        if failures:
            raise UserError(f"{', '.join(names)}: {'; '.join(failures)}")
    small = Student.of(net, student.classes, student.preprocess, student.folder)
    small.compressed = Compressed(tuple(names), flow, plain)
    return small


def export(
    student: Student,
    folder: str | os.PathLike,
    runtimes: str | Sequence[str] = "torchscript",
    data=None,
    config_dir=None,
    **options,
) -> list[Artifact]:
    """Files of a student for phones and other runtimes, each reloaded and compared with it on test images.

        files = distill.export(student, "mobile/", ["torchscript", "executorch"], "photos/")
        files[0].path, files[0].run(images)

    The folder also gets classes.txt and a README.md with programs that run the files.

    Args:
        folder: into which student.SUFFIX are written.
        runtimes: of the group `export`; of a compressed student those that it was compressed for.
        data: as for `evaluate`.

    Raises:
        UserError: a file can't be written, or doesn't answer like the student.
    """
    names = [runtimes] if isinstance(runtimes, str) else [*runtimes]
    target = Path(folder).expanduser()
    with _work(student, data, words.written({"export": names, "compress": []}), config_dir, options) as (cfg, found):
        _labels(student, found)
        exporters = build.steps(cfg.export)
        flows = {name: exporters_of.flow(exporter) for name, exporter in exporters.items()}
        small = student.compressed
        wrong = [name for name, flow in flows.items() if small and small.flow != flow]
        if wrong:
            raise UsageError(
                f"this student was compressed for another runtime than {wrong[0]}'s: "
                f"distill.compress(student, …, runtime={wrong[0]!r})"
            )
        name = "-".join(["student", *(small.steps if small else ())])
        plain = small.source if small else _plain(student)
        floats = {"student": exporters_of.for_all(plain, exporters)}
        nets = {name: exporters_of.for_all(student.net, exporters)} if small else floats
        origin = {"run": student.folder.name} if student.folder else {}
        files, failures = exporters_of.export(nets, exporters, target, found, origin)
        measurable, answered = {"student": _Shipped(plain)}, {"student": [], **files}
        rows, unlike, *_ = measured.evaluate(measurable, floats | nets, answered, found, build.tolerance(cfg))
        failures += unlike
        write_readme(rows, found, target, failures)
        if failures:
            raise UserError("; ".join(failures))
    return files[name]


def opened(folder: Path, trust: bool) -> tuple[dict[str, Network], Data]:
    """The networks that a run's report measures, by name, and its images; nothing is trained or written.

    Raises:
        UserError: see distill.api.run.Run.
    """
    said = [f"run={words.quoted(str(folder))}", "stages=[report]", *(["trust=true"] if trust else [])]
    with session(said) as cfg:
        cfg, own = continued(folder, said[1:2], trust, trust)
        found, record = build.data(cfg.data), read_record(folder, trust)
        networks = {"student": Run(folder, cfg, record).student()}
        if not record.get("given"):
            teacher = roles.teacher(cfg, found)
            cfg, alone, found = pilots.settle(cfg, own, teacher, found, folder)
            networks = {
                **({"teacher": teacher.network} if teacher.fixed else {}),
                **({"student alone": roles.student_alone(*alone)} if cfg.baseline else {}),
                **networks,
            }
    return networks, found


@dataclass(frozen=True)
class _Shipped:
    """What of a Network the report asks for."""

    net: nn.Module

    def plain(self) -> nn.Module:
        return copy.deepcopy(self.net)


@contextlib.contextmanager
def _work(student: Student, data, said: Sequence[str], config_dir, options) -> Iterator[tuple[DictConfig, Data]]:
    """The configuration, and the images that the words describe, prepared as the student wants them."""
    if not isinstance(student, Student):
        raise UsageError(f"{type(student).__name__}: expected a student: run.student, or distill.Student(net, classes)")
    if data is None and student.folder is None:
        raise UsageError("data: name a folder of images, or a choice of the group data: this student is of no run")
    given = words.written(options)
    if data is None:
        base = [f"run={words.quoted(str(student.folder))}"]
    else:
        base = words.spelled(words.written({"data": data}))
        keys = {word.partition("=")[0] for word in given}
        if base[0] == "data=imagefolder":
            wanted = {"data.image_size": student.image_size, "data.pack": student.preprocess.pack}
            base += words.written(
                {key: value for key, value in wanted.items() if value is not None and key not in keys}
            )
    with session([*base, *said, *given], config_dir) as cfg:
        if data is None:
            cfg, _ = continued(student.folder, [*said, *given], cfg.trust, cfg.trust or cfg.force)
        found = build.data(cfg.data)
        if found.image_size != student.image_size:
            raise UsageError(
                f"data.image_size: the student takes {in_px(student.image_size)}, and these images have "
                f"{in_px(found.image_size)}"
            )
        if preparation(found) != student.preprocess:
            test = student.preprocess
            raise UsageError(
                f"these images are prepared otherwise than the student's ({preparation(found).described()} instead of "
                f"{test.described()}): give the same data.image_size and data.pack"
            )
        yield cfg, found


def _plain(student: Student) -> nn.Module:
    """A copy of what ships, as the stages have it."""
    return copied(student.net).to("cpu", memory_format=torch.contiguous_format).float().eval()


def _labels(student: Student, data: Data) -> Tensor:
    """The student's class of each class of the images, (K,) int64."""
    absent = [name for name in data.classes if name not in student.classes]
    if absent:
        raise UserError(
            f"the images have classes that the student doesn't know: {', '.join(absent[:5])}; it knows "
            f"{', '.join(student.classes[:20])}"
        )
    return torch.tensor([student.classes.index(name) for name in data.classes])


def _answers(student: Student, data: Data, split: Split) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and labels (N,)."""
    net = copy.deepcopy(student).eval() if student.training else student
    place = next(iter(student.parameters()), torch.empty(0))

    def answer(images: Tensor) -> Tensor:
        parts = images.split(1) if student.compressed else [images]  # as a phone asks
        return torch.cat([net(part.to(place.device)).cpu() for part in parts])

    logits, labels, _ = measure.predict({"student": answer}, data.in_order(split))
    return logits["student"], labels
