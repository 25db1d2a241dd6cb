"""The report stage: every network and every file answers the test set once; what fails parity is told."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from distill import measure, report
from distill.checkpoints import serialised_bytes
from distill.compress.coverage import int8_share
from distill.data.base import Data
from distill.export import Nets
from distill.export.artifact import Artifact
from distill.export.serve import serve
from distill.network import Network


def evaluate(
    networks: Mapping[str, Network | None],
    nets: Nets,
    files: Mapping[str, Sequence[Artifact]],
    data: Data,
    tolerance: Mapping,
) -> tuple[list[report.Row], list[str]]:
    """Measure all models of a run; each file answers in a process of its own.

    Args:
        networks: by row name, among them "student" and "teacher" (see distill.report.ORDER).
        nets: the plain networks that were exported, by name and flow.
        files: what was exported, by the same names.
        data: its test images are read once, by all models together.
        tolerance: {"file", "rounding", "float", "compressed"}, see `report.check`.

    Returns:
        The rows, and one line for each reason why a file may not ship.
    """
    plain = {name: network.plain() for name, network in networks.items() if network is not None}
    artifacts = {file.path.name: file for several in files.values() for file in several}
    source_of = {file.path.name: nets[name][file.flow] for name, several in files.items() for file in several}
    floats = {file.path.name for file in files["student"]}
    sources = {f"source {id(net)}": net for net in source_of.values()}  # once, where it is the same for all flows
    example = data.test[torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)].images
    with serve(artifacts) as served:
        eager = {name: _on_device(net) for name, net in plain.items()}
        logits, labels, failed = measure.predict({**eager, **sources, **served}, data.test_loader())
        timers = {name: measure.timed(net.to("cpu")) for name, net in plain.items()}
        timers |= {name: each.time for name, each in served.items() if name in logits}
        times = measure.latency(timers, example)

    def row(name: str, net: nn.Module, size: int) -> report.Row:
        scores = measure.scores(logits[name], labels, logits.get("teacher"), logits["student"])
        return report.Row(
            name,
            **scores,
            **times.get(name, {}),
            format=artifacts[name].format if name in artifacts else "eager",
            parameters=measure.parameters(net),
            macs=measure.macs(net, example),
            bytes=size,
            int8_share=int8_share(net),
        )

    rows = [row(name, net, serialised_bytes(net)) for name, net in plain.items()]
    failures = list(failed.values())
    for name in (name for name in artifacts if name in logits):
        net = source_of[name]
        rounds = artifacts[name].rounds and int8_share(net) > 0
        bounds = tolerance["rounding" if rounds else "file"], tolerance["float" if name in floats else "compressed"]
        failures += report.check(name, logits[name], logits[f"source {id(net)}"], logits["student"], labels, *bounds)
        if name not in times:
            failures.append(f"{name}: its process died while its latency was measured")
        if torch.isfinite(logits[name]).all():
            rows.append(row(name, net, measure.file_bytes(artifacts[name].path)))
    return report.compare(rows), failures


def _on_device(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """Big float networks answer on the accelerator where there is one."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    net.to(device)
    return lambda images: net(images.to(device)).cpu()
