"""The report stage: every network and every file answers the test set once; what fails parity is told."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from distill.data.base import Data
from distill.errors import UserError
from distill.export import Nets, told
from distill.files import digest
from distill.networks.network import Network
from distill.networks.weights import content_hash, serialised_bytes
from distill.report import bill, parity, tables
from distill.runtimes import measure
from distill.runtimes.artifact import Artifact
from distill.runtimes.coverage import COMPUTED, HALF, computed_share, int8_share, stored
from distill.runtimes.serve import serve

FEW = 12  # images that are asked in other batches than the rest


def evaluate(
    networks: Mapping[str, Network | None],
    nets: Nets,
    files: Mapping[str, Sequence[Artifact]],
    data: Data,
    tolerance: Mapping,
    between: Mapping[str, Mapping[str, Mapping[str, nn.Module]]] | None = None,
) -> tuple[list[tables.Row], list[str], dict[str, Tensor], Tensor, bill.Ways]:
    """Measure all models of a run; each file answers in a process of its own.

    Args:
        networks: by row name, among them "student" and "teacher" (see distill.report.tables.ORDER).
        nets: the plain networks that were exported, by name and flow.
        files: what was exported, by the same names.
        data: its test images are read once, by all models together.
        tolerance: {"file", "rounding", "float", "compressed"}, bounds of `report.difference`.
        between: by name and flow of `nets`, what each compression step made, the network itself last.

    Returns:
        The rows, one line for each reason why a file may not ship, the rows' logits on the test images, (N, K) by
        name, these images' labels (N,), and the files' ways from the teacher, see `distill.report.bill`.
    """
    plain = {name: network.plain() for name, network in networks.items() if network is not None}
    every = {file.path.name: file for several in files.values() for file in several}
    artifacts = {name: file for name, file in every.items() if not file.elsewhere}
    source_of = {file.path.name: nets[name][file.flow] for name, several in files.items() for file in several}
    floats = {file.path.name for file in files["student"] if not file.halves}
    # once, where it is the same for all flows; on the CPU: an accelerator may compute float32 in fewer digits
    sources = {f"source {id(net)}": net for net in [*source_of.values(), *nets["student"].values()]}
    student = f"source {id(next(iter(nets['student'].values())))}" if nets["student"] else "student"
    made = {
        file.path.name: (between or {}).get(name, {}).get(file.flow, {})
        for name, several in files.items()
        for file in several
    }
    halfway = {_key(step, net): net for steps in made.values() for step, net in [*steps.items()][:-1]}
    example = data.test[torch.zeros(1, dtype=torch.int64), 0].images
    with serve(artifacts, data.num_classes) as served:
        timers = {name: measure.timed(net.to("cpu")) for name, net in plain.items()}
        timers |= {name: each.time for name, each in served.items()}
        times, unable = measure.latency(timers, example)  # before they answer large batches, as on a phone
        eager = {name: _on_device(net) for name, net in plain.items()}
        models = {**eager, **{name: _as_shipped(net, _told(net)) for name, net in (sources | halfway).items()}}
        models |= {name: _as_shipped(source_of[name], each) for name, each in served.items() if name in times}
        logits, labels, failed = measure.predict(models, data.test_loader())
        for net in plain.values():
            net.to("cpu")
        answered = [name for name in artifacts if name in logits and f"source {id(source_of[name])}" in logits]
        bounds = {name: _bounds(artifacts[name], source_of[name], tolerance) for name in answered}
        few = data.test[torch.arange(len(data.test))[:FEW], 0]
        reference = next(iter(nets["student"].values()), plain["student"])
        failures = [*unable.values(), *failed.values()]
        for name in answered:
            failures += _in_other_batches(name, served[name], source_of[name], reference, few.images, bounds[name])

    def row(name: str, net: nn.Module, size: int, shares: tuple[float, float] | None = None) -> tables.Row:
        small, computed = shares or (int8_share(net), computed_share(net))
        scores = measure.scores(logits[name], labels, logits.get("teacher"), logits["student"])
        return tables.Row(
            name,
            **scores,
            **times[name],
            format=artifacts[name].format if name in artifacts else "eager",
            parameters=measure.parameters(net),
            macs=measure.macs(net, example),
            bytes=size,
            int8_share=small,
            int8_computed=computed,
            digest=digest(artifacts[name].path) if name in artifacts else None,
        )

    rows = [row(name, net, serialised_bytes(net)) for name, net in plain.items()]
    for name in answered:
        net = source_of[name]
        compared = logits[name], logits[f"source {id(net)}"], logits[student], labels
        failures += parity.check(name, *compared, bounds[name], tolerance["float" if name in floats else "compressed"])
        if torch.isfinite(logits[name]).all():
            file = artifacts[name]
            rows.append(row(name, net, measure.file_bytes(file.path), file.shares and file.shares(file.path)))
    measured = {row.name: logits[row.name] for row in rows}

    def way(name: str) -> list[tuple[str, Tensor]]:
        """From the teacher to a file, as far as it answers."""
        *first, last = [*made[name].items()] or [None]
        keys = [(step, _key(step, net)) for step, net in first]
        keys += [(last[0], f"source {id(source_of[name])}")] if last else []
        stations = [(bill.TEACHER, "teacher"), (bill.STUDENT, student), *keys, (bill.KERNELS, name)]
        return [(station, logits[key]) for station, key in stations if key in logits]

    known = [name for name, file in every.items() if student in logits and (file.elsewhere or name in measured)]
    ways = {name: way(name) for name in known}
    rows += [_unexecuted(file, source_of[name], example) for name, file in every.items() if file.elsewhere]
    return tables.compare(rows), list(dict.fromkeys(failures)), measured, labels, ways


def _key(step: str, net: nn.Module) -> str:
    """The same for what a step made that is the same in several flows."""
    return f"{step} {content_hash(net)}"


@torch.no_grad()
def unlike(small: nn.Module, net: nn.Module, data: Data, bounds: Mapping) -> list[str]:
    """Why a compressed network is none that may take the place of `net`, a line a reason, on validation images.

    Args:
        bounds: tolerance.compressed, see distill.report.parity.difference.
    """
    models = {"net": net, "small": _as_shipped(small, _told(small))}
    logits, labels, failed = measure.predict(models, data.val_loader())
    if failed:
        return [*failed.values()]
    if not torch.isfinite(logits["small"]).all():
        return ["it answers NaN or infinity"]
    return parity.difference(logits["small"], logits["net"], "the float student", logits["net"], bounds, labels)


def _unexecuted(file: Artifact, net: nn.Module, example: Tensor) -> tables.Row:
    """What can be said of a file that does not run on this machine."""
    small, computed = file.shares(file.path) if file.shares else (int8_share(net), computed_share(net))
    return tables.Row(
        file.path.name,
        format=file.format,
        parameters=measure.parameters(net),
        macs=measure.macs(net, example),
        bytes=measure.file_bytes(file.path),
        int8_share=small,
        int8_computed=computed,
        digest=digest(file.path),
    )


def _bounds(file: Artifact, net: nn.Module, tolerance: Mapping) -> Mapping:
    """Those of float32, and of int8 where the runtime has PyTorch's kernels; or those of numbers that are rounded."""
    kinds = stored(net).keys()
    return tolerance["rounding" if kinds & HALF or file.halves or (file.rounds and kinds & COMPUTED) else "file"]


def _as_shipped(net: nn.Module, answer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`answer` of `net` or of a file of it. What finds an activation's range anew for what it is asked about is asked
    about one image at a time, as on a phone: in a batch it would round otherwise."""
    if "dynamic int8" not in stored(net):
        return answer
    return lambda images: torch.cat([answer(image) for image in images.split(1)])


def _told(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """`net`, whose own errors are the file's that was made of it."""

    def answer(images: Tensor) -> Tensor:
        try:
            return net(images)
        except RuntimeError as error:
            raise UserError(f"the network to be exported fails on {len(images)} images: {told(error)}") from error

    return answer


@torch.no_grad()
def _in_other_batches(
    name: str, file: Callable, source: nn.Module, student: nn.Module, images: Tensor, bounds: Mapping
) -> list[str]:
    """What a file answers wrongly, or not at all, when it is asked one by one and by three."""
    failures = []
    for size, words in ((1, " one by one"), (3, " in batches of three")):
        try:
            came = torch.cat([file(part) for part in images.split(size)])
        except UserError as error:
            return [f"{name}: asked{words}: {error}"]
        wanted = torch.cat([source(part) for part in images.split(size)])
        lines = parity.difference(came, wanted, parity.SOURCE, student(images), bounds)
        failures += [f"{name}: asked{words}, {line}" for line in lines]
    return failures


def _on_device(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """Big float networks answer on the accelerator where there is one."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    net.to(device)
    return lambda images: net(images.to(device)).cpu()
