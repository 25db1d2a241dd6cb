"""The report stage: every network and every reloaded file answers the test set once; what fails parity is told."""

from collections.abc import Callable, Mapping, Sequence

import safetensors.torch
import torch
from torch import Tensor, nn

from distill import measure, report
from distill.compress.coverage import int8_share
from distill.data.base import Data
from distill.export.artifact import Artifact
from distill.network import Network


def evaluate(
    networks: Mapping[str, Network | None],
    exported: Mapping[str, tuple[nn.Module, Sequence[Artifact]]],
    data: Data,
    tolerance: Mapping,
) -> tuple[list[report.Row], list[str]]:
    """Measure all models of a run.

    Args:
        networks: by row name, among them "student" and "teacher" (see distill.report.ORDER).
        exported: by name, the plain network that was exported and its files.
        data: its test images are read once, by all models together.
        tolerance: {"file", "float", "int8"}, each {"logit", "agreement"}.

    Returns:
        The rows, and one line for each reason why a file may not ship.
    """
    plain = {name: network.plain() for name, network in networks.items() if network is not None}
    artifacts = {file.path.name: file for _, files in exported.values() for file in files}
    sources = {f"source of {name}": net for name, (net, _) in exported.items()}
    eager = {name: _on_device(net) for name, net in plain.items()}
    logits, labels = measure.predict(
        {**eager, **sources, **{name: file.run for name, file in artifacts.items()}}, data.test_loader()
    )
    example = data.test[torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)].images
    times = measure.latency(
        {**{n: net.to("cpu") for n, net in plain.items()}, **{n: file.run for n, file in artifacts.items()}},
        example,
    )
    rows, failures = [], []

    def row(name: str, net: nn.Module, counted: nn.Module, size: int) -> report.Row:
        scores = measure.scores(logits[name], labels, logits.get("teacher"), logits["student"])
        return report.Row(
            name,
            **scores,
            **times[name],
            parameters=measure.parameters(net),
            macs=measure.macs(counted, example),
            bytes=size,
            int8_share=int8_share(net),
        )

    for name, net in plain.items():
        rows.append(row(name, net, net, len(safetensors.torch.save(net.state_dict()))))
    for name, (net, files) in exported.items():
        kind = "int8" if int8_share(net) > 0 else "float"
        bounds = {"file": tolerance["file"], "compression": tolerance[kind]}
        for file in files:
            answers = logits[file.path.name]
            reasons = report.check(file.path.name, answers, logits[f"source of {name}"], logits["student"], bounds)
            failures += reasons
            if torch.isfinite(answers).all():
                rows.append(row(file.path.name, net, plain["student"], measure.file_bytes(file.path)))
    return rows, failures


def _on_device(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """Big float networks answer on the accelerator where there is one."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    net.to(device)
    return lambda images: net(images.to(device)).cpu()
