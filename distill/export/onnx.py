"""ONNX: NAME.onnx for ONNX Runtime and ONNX Runtime Mobile; int8 as QuantizeLinear and DequantizeLinear pairs,
which ONNX Runtime fuses into its int8 kernels when it loads the file.
"""

import ast
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor, nn

from distill.errors import UsageError, UserError
from distill.export.resize import PREPARED, Cut, cuts, described_with, put_before, shown
from distill.runtimes import graph
from distill.runtimes.artifact import Artifact, Model, describe, publish
from distill.runtimes.coverage import stored

FLOW = "onnx"
OPSETS = range(18, 24)  # what torch.onnx writes
OPSET = 21  # what ONNX Runtime computes from 1.20 on, on phones as here
INT8 = 22  # up to which an older one than RECENT computes int8
RECENT = (1, 24)  # ONNX Runtime, with int8 of 23, that reads nothing outside of a file's folder; Python 3.10 has 1.23
METADATA = "distill"  # the key in the file's metadata_props
PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # what it needs besides this package's own dependencies


def export(
    net: nn.Module,
    example: Tensor,
    stem: Path,
    metadata: dict,
    *,
    opset: Annotated[int, Interval(ge=18, le=23)] = OPSET,
    resize: bool = False,
) -> list[Artifact]:
    """Writes stem.onnx: "images" (batch, C, H, W) to "logits" (batch, K).

    Args:
        net: float, or int8 of the flow "onnx", eval mode on the CPU, images in [0, 1] to logits (N, K).
        example: images (N, C, H, W); gives the input's size.
        stem: the file's path without suffix.
        metadata: plain JSON values, such as {"classes": [...]}; the input's description is added.
        opset: the version of ONNX's operators, one of OPSETS: an older one for an older runtime.
        resize: the file takes images of any height and width, and makes of them what `metadata` says.

    Raises:
        UsageError: another opset.
        UserError: onnx is missing, or too old for int8 of this opset, does not know a part of `net`, or the file cannot
            be written.
    """
    if opset not in OPSETS:
        raise UsageError(f"export.onnx.opset={opset} is none that is written: choose {OPSETS[0]} to {OPSETS[-1]}")
    if opset > INT8 and stored(net).keys() != {"float"} and _version() < RECENT:
        raise UserError(
            f"export.onnx.opset={opset}: ONNX Runtime {_runtime().__version__} computes int8 up to {INT8}: choose "
            f"export.onnx.opset={OPSET}, or pip install 'onnxruntime>={RECENT[0]}.{RECENT[1]}'"
        )
    described = described_with(describe(example, metadata), resize)
    steps = cuts(described["input"])
    data, places = written(net, example, opset, json.dumps(described, ensure_ascii=False), cuts=steps)
    file = _artifact(Path(stem))
    publish(file, data, *shown(net, example, steps), place=lambda said: _failing(said, places))
    return [file]


def written(
    net: nn.Module, example: Tensor, opset: int, described: str, name: str = "ONNX", cuts: Sequence[Cut] = ()
) -> tuple[bytes, dict]:
    """The file's bytes, with `described` inside; and {a node's name in it: " at the operator X (layer Y)"}.

    Args:
        cuts: what becomes of images of any height and width, before the network.

    Raises:
        UserError: as `export`, for the format `name`.
    """
    try:
        import onnxscript  # noqa: F401  what torch.onnx needs
    except ImportError as error:
        raise _missing() from error
    program = graph.capture(net, torch.cat([example[:1]] * 2), name)
    with graph.quiet(), torch.no_grad():
        try:
            made = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=[PREPARED if cuts else "images"],
                output_names=["logits"],
                custom_translation_table=_quantization(),
                verbose=False,
            )
        except Exception as error:  # its own exceptions are private
            raise graph.refuse(error, program, name) from error
    outputs, places = set(made.model.graph.outputs), {}
    for number, node in enumerate(made.model.graph.all_nodes()):
        places[f"n{number}"] = _place(node)
        node.metadata_props.clear()  # where each came from, a tenth of a small file
        node.name = f"n{number}"  # its long names, which stand in it two and three times: a thirtieth
        for place, value in enumerate(node.outputs):
            if value not in outputs:
                value.name = f"n{number}_{place}"
    made.model.metadata_props.clear()
    made.model.metadata_props[METADATA] = described
    made = made.model_proto
    del made.graph.value_info[:]  # shapes of what is in between, which every runtime infers: another tenth
    if cuts:
        put_before(made, cuts)
    return made.SerializeToString(), places


def _place(node) -> str:
    """ " at the operator X (layer Y, Z)" of a node of the graph that torch.onnx wrote."""
    scopes, classes = (
        ast.literal_eval(node.metadata_props.get(f"pkg.torch.onnx.{key}", "[]"))[:-1]
        for key in ("name_scopes", "class_hierarchy")
    )
    layer = f" (layer {scopes[-1] or 'the network itself'}, {classes[-1].rpartition('.')[2]})" if scopes else ""
    return f" at the operator {node.op_type}{layer}"


def _failing(said: str, places: dict[str, str]) -> str:
    """The place of the first node that ONNX Runtime names."""
    return next((places[name] for name in re.findall(r"\bn\d+\b", said) if name in places), "")


def reload(stem: Path) -> list[Artifact]:
    """The file that `export` wrote at `stem`, if it is there."""
    file = _artifact(stem)
    return [file] if file.path.is_file() else []


def _artifact(stem: Path) -> Artifact:
    return Artifact("onnx", stem.parent / f"{stem.name}.onnx", FLOW, load, rounds=True)


def load(path: Path) -> Model:
    """The file in ONNX Runtime, on the CPU."""
    session = _session(path)
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": np.ascontiguousarray(images)})[0])


def read_metadata(path: Path) -> dict:
    """What `export` wrote into the file."""
    return json.loads(_session(path).get_modelmeta().custom_metadata_map[METADATA])


def _runtime():
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing() from error
    return onnxruntime


def _version() -> tuple[int, ...]:
    return tuple(map(int, _runtime().__version__.split(".")[:2]))


def _session(path: Path):
    onnxruntime = _runtime()
    if _version() < RECENT:
        _refuse_outside(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own exceptions have no common class
        raise UserError(f"cannot load {path}: {graph.reason(error)}; export it again") from error


def _refuse_outside(path: Path) -> None:
    """Raises UserError where a part of the file lies in another folder: an older ONNX Runtime reads what is named."""
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own, whatever the bytes lead to
        raise UserError(f"cannot load {path}: {graph.reason(error)}; export it again") from error
    folder = os.path.realpath(path.parent)
    for tensor in _tensors(model):
        place = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        found = os.path.realpath(os.path.join(folder, place))
        if tensor.data_location == tensor.EXTERNAL and os.path.commonpath([folder, found]) != folder:
            raise UserError(f"cannot load {path}: External data path {place} is not in its folder; export it again")


def _tensors(message) -> Iterator:
    """The tensors in a message of ONNX, in whatever it holds."""
    for field, value in message.ListFields():
        for each in (value if isinstance(value, Iterable) else [value]) if field.message_type else ():
            if field.message_type.name == "TensorProto":
                yield each
            else:
                yield from _tensors(each)


def _quantization() -> dict:
    """torch.onnx does not know PT2E's operators; ONNX has the same ones by other names.

    Each takes the clamping bounds too, which are those of the type in every flow of this toolkit, or -127 for
    weights that are integers already. One ONNX operator finds a range at run time and rounds by it; the exporter makes
    one of equal ones.
    """
    import torch.ao.quantization.fx._decomposed  # registers the operators
    from onnxscript import ir
    from onnxscript import opset18 as op

    def parameters(scale: float, zero_point: int, dtype):
        return op.Constant(value_float=scale), op.Constant(value=ir.tensor(zero_point, dtype=dtype))

    def quantize(images, scale: float, zero_point: int, low: int, high: int, dtype: int):
        return op.QuantizeLinear(images, *parameters(scale, zero_point, dtype))

    def dequantize(images, scale: float, zero_point: int, low: int, high: int, dtype: int):
        return op.DequantizeLinear(images, *parameters(scale, zero_point, dtype))

    def choose(images, low: int, high: int, eps: float, dtype: int):
        _, scale, zero_point = op.DynamicQuantizeLinear(images)
        return scale, zero_point

    def quantize_by(images, scale, zero_point, low: int, high: int, dtype: int):
        return op.DynamicQuantizeLinear(images)[0]

    def dequantize_by(images, scale, zero_point, low: int, high: int, dtype: int):
        return op.DequantizeLinear(images, scale, zero_point)

    def dequantize_weights(weights, scales, zero_points, axis: int, low: int, high: int, dtype: int):
        return op.DequantizeLinear(weights, scales, op.Cast(zero_points, to=dtype), axis=axis)

    ops = torch.ops.quantized_decomposed
    return {
        ops.quantize_per_tensor.default: quantize,
        ops.dequantize_per_tensor.default: dequantize,
        ops.choose_qparams.tensor: choose,
        ops.quantize_per_tensor.tensor: quantize_by,
        ops.dequantize_per_tensor.tensor: dequantize_by,
        ops.dequantize_per_channel.default: dequantize_weights,
    }


def _missing() -> UserError:
    return UserError(f"ONNX files need their packages: pip install {' '.join(PACKAGES)}")
