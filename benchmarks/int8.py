"""What static int8 costs a trained network in each flow, with and without bias correction, and what is left to win.

    python -m benchmarks.int8 'ResNet-56, CIFAR-10' student=resnet56 student.checkpoint=resnet56.safetensors \
        data=imagefolder data.root=cifar10 --images 2000 --json benchmarks/int8.json
    python -m benchmarks.int8 'MobileNetV2, 1,000 classes' student=mobilenet \
        student.checkpoint=mobilenet_v2.safetensors 'student.mean=[.5,.5,.5]' 'student.std=[.5,.5,.5]' \
        data=imagefolder data.root=imagenette data.image_size=224 --classes 1000 --images 200 \
        --json benchmarks/int8.json

The first word names the network in the file; other networks in it are kept. Asked are test images. "activations only"
is the network whose weights stay float: as near as any better rounding of weights (AdaRound) could come. The flow
"onnx" rounds as "xnnpack" does.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.epochs import compose
from benchmarks.paired import record
from distill.cli import build
from distill.compress import bias, flows
from distill.compress.calibrate import answers, calibration
from distill.networks.build import build_network
from distill.runtimes.measure import agreement, signal_to_noise

FLOWS = ("fx", "xnnpack")


@torch.no_grad()
def quantized(net: nn.Module, batches: list[Tensor], flow: str, kind: str) -> nn.Module:
    if kind == "corrected":
        layers = flows.layers(net, flow)
        net = bias.correct(net, batches, layers, lambda weight: flows.rounded(weight, flow))
    prepared = flows.prepare(net, batches[0][:2], flow)
    answers(prepared, batches)
    return _float_weights(prepared) if kind == "activations only" else flows.convert(prepared, flow)


def _float_weights(prepared: nn.Module) -> nn.Module:
    """A network in preparation whose activations are rounded and whose weights are not."""
    for path, module in list(prepared.named_modules()):
        if hasattr(module, "calculate_qparams"):
            prepared.set_submodule(path, nn.Identity() if "PerChannel" in type(module).__name__ else Rounds(module))
    return prepared


class Rounds(nn.Module):
    def __init__(self, observer: nn.Module):
        super().__init__()
        self.scale, self.zero_point = (value.squeeze() for value in observer.calculate_qparams())
        self.low, self.high = observer.quant_min, observer.quant_max

    def forward(self, values: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(
            values, self.scale.float(), self.zero_point.int(), self.low, self.high
        )


def ask(net: nn.Module, batches: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([net(images) for images in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", help="of the network in the file")
    parser.add_argument("words", nargs="*", help="of train.py: student=… data=…")
    parser.add_argument("--classes", type=int, help="the network's, where they aren't the images'")
    parser.add_argument("--images", type=int, default=2000, help="test images")
    parser.add_argument("--calibration", type=int, default=128, help="training images")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    cfg = compose(*options.words)
    data = build.data(cfg.data)
    net = build_network(cfg.student, options.classes or data.num_classes, data.image_size, 0).plain()
    batches = calibration(data, options.calibration, "--calibration")
    count = min(options.images, len(data.test))
    rows = torch.arange(count) * (len(data.test) // count)  # over the classes: every n-th
    shown = [data.test[part, 0] for part in rows.split(50)]
    images, labels = [batch.images for batch in shown], torch.cat([batch.labels for batch in shown])
    wanted = ask(net, images)
    known = options.classes in (None, data.num_classes)
    found = []
    for flow in FLOWS:
        for kind in ("plain", "corrected", *(["activations only"] if flow != "fx" else [])):
            logits = ask(quantized(net, batches, flow, kind), images)
            row = {"flow": flow, "kind": kind, "agreement": agreement(logits, wanted)}
            row["snr_db"] = signal_to_noise(logits, wanted)
            if known:
                gain = (logits.argmax(1) == labels).double() - (wanted.argmax(1) == labels).double()
                row |= {"gain": gain.mean().item(), "error": 1.96 * (gain.std() / len(gain) ** 0.5).item()}
            found.append(row)
            print(row, flush=True)
    kept = json.loads(options.json.read_text())["found"] if options.json and options.json.exists() else {}
    kept[options.name] = {
        "words": options.words,
        "images": count,
        "calibration": len(torch.cat(batches)),
        "rows": found,
    }
    record("benchmarks.int8", options.json, found=kept)


if __name__ == "__main__":
    main()
