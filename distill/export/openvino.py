"""OpenVINO: the folder NAME.openvino with model.xml and model.bin, for Intel's processors; made from ONNX.

An int8 network is that of the flow "onnx": OpenVINO makes int8 kernels of its quantize and dequantize pairs when it
loads the file. Float is float32 here: left to itself OpenVINO rounds to bfloat16 where the processor has it, which is
1 % off.
"""

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.export.onnx import OPSETS, written
from distill.export.resize import cuts, described_with, shown
from distill.files import scratch
from distill.runtimes import graph
from distill.runtimes.artifact import MOST, Artifact, Model, describe, publish

FLOW = "onnx"
METADATA = "distill"  # the key in the model's runtime information
PACKAGES = ("openvino", "onnx", "onnxscript")  # what it needs besides this package's own dependencies
FILES = ("model.xml", "model.bin")
LAYERS = ("Convolution", "GroupConvolution", "MatMul")


def export(net: nn.Module, example: Tensor, stem: Path, metadata: dict, *, resize: bool = False) -> list[Artifact]:
    """Writes stem.openvino/model.xml and model.bin: "images" (batch, C, H, W) to "logits" (batch, K).

    Args:
        net: float, or int8 of the flow "onnx", eval mode on the CPU, images in [0, 1] to logits (N, K).
        example: images (N, C, H, W); gives the input's size.
        stem: the folder's path without suffix.
        metadata: plain JSON values, such as {"classes": [...]}; the input's description is added.
        resize: the file takes images of any height and width, and makes of them what `metadata` says.

    Raises:
        UserError: openvino or onnx is missing, does not know a part of `net`, or the folder cannot be written.
    """
    openvino = _openvino()
    described = described_with(describe(example, metadata), resize)
    steps, said = cuts(described["input"]), json.dumps(described, ensure_ascii=False)
    data, _ = written(net, example, OPSETS[-1], said, "OpenVINO", steps)
    try:
        model = openvino.convert_model(io.BytesIO(data))
    except Exception as error:  # its own exceptions have no common class; they name the operator
        raise UserError(f"OpenVINO cannot take this network: {graph.reason(error)}") from error
    _antialias(model)
    model.set_rt_info(said, METADATA)
    with scratch() as folder:
        openvino.save_model(model, folder / FILES[0], compress_to_fp16=False)
        text, weights = ((folder / name).read_bytes() for name in FILES)
    content = dict(zip(FILES, (re.sub(rb">\s+<", b"><", text), weights), strict=True))  # a third is indentation
    file = _artifact(Path(stem))
    publish(file, content, *shown(net, example, steps))
    return [file]


def _antialias(model) -> None:
    """What of ONNX is resized with antialiasing is so here, too: OpenVINO's translation would leave that out."""
    from openvino import opset11

    for op in model.get_ops():
        if op.get_type_name() != "Interpolate":
            continue
        said = op.get_attributes()
        if (said["antialias"], said["mode"], said["shape_calculation_mode"]) == (True, "linear_onnx", "sizes"):
            values = [op.input_value(place) for place in range(op.get_input_size())]
            axes = values[2] if len(values) > 2 else None
            resized = opset11.interpolate(*values[:2], "bilinear_pillow", "sizes", axes=axes)
            op.output(0).replace(resized.output(0))


def reload(stem: Path) -> list[Artifact]:
    """The folder that `export` wrote at `stem`, if it is there."""
    file = _artifact(stem)
    return [file] if all((file.path / name).is_file() for name in FILES) else []


def _artifact(stem: Path) -> Artifact:
    return Artifact("openvino", stem.parent / f"{stem.name}.openvino", FLOW, load, rounds=True, shares=shares)


def load(path: Path) -> Model:
    """The folder in OpenVINO, on the CPU, float as float32."""
    model = _compiled(path)
    return lambda images: torch.from_numpy(np.array(model({"images": images.numpy()})["logits"]))


def read_metadata(path: Path) -> dict:
    """What `export` wrote into the folder; nothing of it is executed. Raises UserError for another one."""
    try:
        text = _read(path).get_rt_info(METADATA).astype(str)
        if len(text) > MOST:
            raise ValueError(f"it has {len(text):,} bytes")
        return json.loads(text)
    except (RuntimeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} has no readable metadata: expected a folder that distill exported") from error


def shares(path: Path) -> tuple[float, float]:
    """Of the file's learned numbers those that are stored in int8, and those of them that this processor multiplies in
    int8: two shares in [0, 1], read from the file's constants and from what OpenVINO makes of them here.

    Learned are constants of floats with a dimension, and of int8.
    """
    model = _read(path)
    small = {op.get_friendly_name(): _count(op) for op in _constants(model) if _type(op) == "i8"}
    floats = sum(_count(op) for op in _constants(model) if _type(op) in ("f32", "f16", "bf16") and _count(op) > 1)
    weights = {}  # of each layer, the int8 constants that lead to its second input
    for layer in model.get_ops():
        if layer.get_type_name() in LAYERS:
            weights[layer.get_friendly_name()] = _above(layer.input_value(1).get_node(), small)
    computed = set()
    for kernel in _compiled(path).get_runtime_model().get_ops():
        said = kernel.get_rt_info()
        if said["runtimePrecision"].astype(str) in ("i8", "u8"):
            for name in said["originalLayersNames"].astype(str).split(","):
                computed |= weights.get(name, set())
    total = max(floats + sum(small.values()), 1)
    return sum(small.values()) / total, sum(small[name] for name in computed) / total


def _constants(model) -> list:
    return [op for op in model.get_ops() if op.get_type_name() == "Constant"]


def _type(op) -> str:
    return op.get_output_element_type(0).get_type_name()


def _count(op) -> int:
    return int(np.prod(op.get_output_shape(0)))


def _above(node, names) -> set[str]:
    """Which of the constants lead to a node that no image reaches."""
    if node.get_type_name() == "Constant":
        return {node.get_friendly_name()} & names.keys()
    return set().union(*(_above(value.get_node(), names) for value in node.input_values()))


def _read(path: Path):
    openvino = _openvino()
    try:
        return openvino.Core().read_model(Path(path) / FILES[0])
    except Exception as error:  # its own exceptions have no common class
        raise UserError(f"cannot load {path}: {graph.reason(error)}; export it again") from error


def _compiled(path: Path):
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # nothing is rounded that the network does not round
    }
    model = _read(path)
    try:
        return _openvino().Core().compile_model(model, "CPU", options)
    except Exception as error:
        raise UserError(f"cannot load {path}: {graph.reason(error)}; export it again") from error


def _openvino():
    sys.modules.setdefault("openvino_telemetry", None)  # not there: it reports every import and conversion to Intel
    try:
        import openvino
    except ImportError as error:
        raise UserError(f"OpenVINO files need their packages: pip install {' '.join(PACKAGES)}") from error
    return openvino
