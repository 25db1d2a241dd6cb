"""Every network in every format under every quantization: what is written, and whether it answers like its source.

    python -m benchmarks.matrix --json benchmarks/matrix.json
    python -m benchmarks.matrix --networks resnet20 mobilenet --json benchmarks/matrix.json    # these anew

Networks have random weights and batch norms that know the images, which are made (data=fake), of 32 px. A file is
asked for 64 of them and judged as a run judges it, by `tolerance` of conf/train.yaml. Every network and flow is a
process of its own; formats whose packages are missing are left as they were in the file.
"""

import argparse
import json
import subprocess
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

from benchmarks.paired import in_own_process, record

NETWORKS = {
    "resnet20": [],
    "resnet56": [],
    "wrn_16_2": [],
    "vgg8": [],
    "resnet18": [],
    "resnet50": [],
    "mobilenet": [],
    "mobilenet_v3_small": [],
    "mobilenet_v3_large": [],
    "efficientnet_b0": [],
    "shufflenet_v2": [],
    "squeezenet": [],
    "convnext_tiny": [],
    "deit_tiny": [],
    "vit_b_16": [],
    "regnet_y_400mf": ["student=torchvision", "student.name=regnet_y_400mf"],
    "mobilevit_xs (timm)": ["student=timm", "student.name=mobilevit_xs", "data.image_size=64"],
}
FORMATS = {  # by flow: what each needs
    "fx": {"torchscript": "torch"},
    "xnnpack": {"executorch": "executorch", "litert": "litert_torch", "coreml": "coremltools", "torch_export": "torch"},
    "onnx": {"onnx": "onnxruntime", "openvino": "openvino"},
}
QUANTIZERS = ("float", "dynamic_int8", "static_int8")
IMAGES = 64


def measure(name: str, flow: str) -> list[dict]:
    """The cells of one network and flow, in this process."""
    import torch

    from benchmarks.epochs import compose
    from distill import compress
    from distill.cli import build
    from distill.errors import UserError
    from distill.networks.build import build_network
    from distill.report import parity
    from distill.runtimes.measure import file_bytes, signal_to_noise

    torch.manual_seed(0)
    words = NETWORKS[name] or [f"student={name}"]
    cfg = compose("data=fake", "data.train_size=192", *words)
    data = build.data(cfg.data)
    network = build_network(cfg.student, data.num_classes, data.image_size, 0)
    images = data.val[torch.arange(IMAGES) % len(data.val), 0].images
    _settle(network, data.train[torch.arange(128), 0].images)
    net = network.plain()
    with torch.no_grad():
        wanted = net(images)
    cells = []
    for quantizer in QUANTIZERS:
        here = {"network": name, "quantizer": quantizer}
        formats = [each for each, package in FORMATS[flow].items() if find_spec(package)]
        try:
            steps = {} if quantizer == "float" else {quantizer: partial(_step(quantizer), **_options(quantizer))}
            source = compress.chain(steps, net, data, None, flow)
            # one by one where the ranges are those of what is asked together
            asked = images.split(1 if quantizer == "dynamic_int8" else 16)
            with torch.no_grad():
                answers = torch.cat([source(part) for part in asked])
        except UserError as error:
            cells += [{**here, "format": each, "refused": str(error)} for each in formats]
            continue
        for each in formats:
            cell = {**here, "format": each, "source_db": signal_to_noise(answers, wanted)}
            with tempfile.TemporaryDirectory() as folder:
                try:
                    files = import_module(f"distill.export.{each}").export(source, images[:2], Path(folder) / "net", {})
                    file = files[-1]
                    cell["bytes"] = file_bytes(file.path)
                    if file.elsewhere:
                        cell["elsewhere"] = file.elsewhere
                    else:
                        found = torch.cat([file.run(part) for part in asked])
                        rounds = quantizer != "float" and file.rounds
                        bounds = cfg.tolerance.rounding if rounds else cfg.tolerance.file
                        cell["file_db"] = signal_to_noise(found, answers)
                        cell["float_db"] = signal_to_noise(found, wanted)
                        cell["failures"] = parity.difference(found, answers, parity.SOURCE, wanted, bounds)
                except UserError as error:
                    cell["refused"] = str(error)
            cells.append(cell)
    return cells


def _settle(network, images) -> None:
    """Batch norms that know the images, and a head that isn't zero."""
    import torch
    from torch import nn

    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean of all batches
        elif isinstance(module, nn.Linear) and not module.weight.any():  # a vision transformer's head
            nn.init.normal_(module.weight)
    with torch.no_grad():
        network.train()
        for part in images.split(64):
            network(part)
        network.eval()


def _step(quantizer: str):
    return getattr(import_module(f"distill.compress.{quantizer}"), quantizer)


def _options(quantizer: str) -> dict:
    return {"images": 128} if quantizer == "static_int8" else {}


def cells(name: str, flow: str) -> list[dict]:
    try:
        return in_own_process("benchmarks.matrix", "--one", json.dumps([name, flow]))
    except (subprocess.CalledProcessError, ValueError, IndexError) as error:
        formats = [each for each, package in FORMATS[flow].items() if find_spec(package)]
        reason = f"the process failed ({error})"[:120]
        return [
            {"network": name, "quantizer": quantizer, "format": each, "failures": [reason]}
            for each in formats
            for quantizer in QUANTIZERS
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--flows", nargs="*", default=list(FORMATS), help=f"of {', '.join(FORMATS)}")
    parser.add_argument("--json", type=Path, help="the figures; those of other networks and formats are kept")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            found = measure(*options.one)
        print(json.dumps(found))
        return
    kept = json.loads(options.json.read_text())["cells"] if options.json and options.json.exists() else []
    place = {(each["network"], each["quantizer"], each["format"]): each for each in kept}
    for name in options.networks:
        for flow in options.flows:
            for cell in cells(name, flow):
                place[cell["network"], cell["quantizer"], cell["format"]] = cell
                told = cell.get("refused") or cell.get("elsewhere") or "; ".join(cell["failures"]) or "ok"
                print(f"{cell['network']} {cell['quantizer']} {cell['format']}: {told}", flush=True)
            record("benchmarks.matrix", options.json, images=IMAGES, cells=list(place.values()))


if __name__ == "__main__":
    main()
