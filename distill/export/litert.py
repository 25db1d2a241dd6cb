"""LiteRT (once TensorFlow Lite): NAME.tflite for Android, iOS and microcontrollers; its CPU kernels are XNNPACK's.

An int8 network is that of the flow "xnnpack": its ranges, and the weights that QAT trained in them, are the file's. The
file takes one image, as litert-torch writes no other batch for most networks; `load` asks for larger ones in turn.
"""

import copy
import io as streams
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from operator import attrgetter
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn

from distill.errors import UsageError, UserError
from distill.runtimes import graph
from distill.runtimes.artifact import MOST, Artifact, Model, describe, publish
from distill.runtimes.int8_layers import Int8Conv2d, Int8Linear

FLOW = "xnnpack"
METADATA = "distill"  # the name of the file's own metadata
PACKAGES = ("litert_torch", "ai_edge_litert")  # what it needs besides this package's own dependencies
KINDS = ("float", "int8")
EXPAND = torch.ops.aten.expand.default
HYBRID = 9  # of FULLY_CONNECTED, the version with int8 weights and float images
PIXEL = (1 / 255, -128)  # scale and zero point of an int8 image: a photo's byte less 128


def export(
    net: nn.Module, example: Tensor, stem: Path, metadata: dict, *, io: Literal["float", "int8"] = "float"
) -> list[Artifact]:
    """Writes stem.tflite: "images" (1, C, H, W) to "logits" (1, K), with `metadata` inside.

    Args:
        net: float, or int8 of the flow "xnnpack", eval mode on the CPU, images in [0, 1] to logits (N, K).
        example: images (N, C, H, W); gives the input's size.
        stem: the file's path without suffix.
        metadata: plain JSON values, such as {"classes": [...]}; the input's description is added.
        io: "int8" gives a static int8 network's file int8 images (a photo's bytes less 128) and int8 logits, with scale
            and zero point in the file; "float", and every other network, has float32 ones.

    Raises:
        UsageError: another `io`.
        UserError: litert-torch is missing, does not know a part of `net`, or the file cannot be written.
    """
    if io not in KINDS:
        raise UsageError(f"export.litert.io={io} is unknown: choose one of {', '.join(KINDS)}")
    with _silent():
        try:
            import litert_torch
            from litert_torch.quantize.pt2e_quantizer import PT2EQuantizer, get_symmetric_quantization_config
            from litert_torch.quantize.quant_config import QuantConfig
        except ImportError as error:
            raise _missing(error) from error
    from distill.runtimes.coverage import stored  # not what a file's own process loads

    stem, kinds = Path(stem), stored(net)
    net, rounded = (net, {}) if "static int8" in kinds else _weights(net)
    program = graph.capture(net, torch.cat([example[:1]] * 2), "LiteRT")
    config = None
    if "static int8" in kinds:  # only its mode is read: `net` is quantized already
        config = QuantConfig(PT2EQuantizer().set_global(get_symmetric_quantization_config()))
    with graph.quiet(), _silent(), torch.no_grad():
        try:
            plain = _rewritten(program.module())
            converted = litert_torch.convert(plain, (example[:1],), quant_config=config)
            data = converted.model_content()
        except Exception as error:  # its passes have no class of errors
            raise graph.refuse(error, program, "LiteRT") from error
    described = describe(example, metadata)
    if config is None:
        io = "float"
    if io == "int8":
        described["input"] |= {"dtype": "int8", "scale": PIXEL[0], "zero_point": PIXEL[1]}
    file = _artifact(stem)
    data = _finished(data, rounded, "dynamic int8" in kinds, io, json.dumps(described, ensure_ascii=False))
    with _silent():
        publish(file, data, net, example)
    return [file]


def reload(stem: Path) -> list[Artifact]:
    """The file that `export` wrote at `stem`, if it is there."""
    file = _artifact(stem)
    return [file] if file.path.is_file() else []


def _artifact(stem: Path) -> Artifact:
    return Artifact("litert", stem.parent / f"{stem.name}.tflite", FLOW, load, rounds=True, shares=shares)


def load(path: Path) -> Model:
    """The file in LiteRT's interpreter, with XNNPACK; images and logits are float, whatever the file's are."""
    with _silent():
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise _missing(error) from error
        try:
            interpreter = Interpreter(str(path), num_threads=torch.get_num_threads())
            interpreter.allocate_tensors()
        except Exception as error:  # of whatever kind its bytes lead to
            raise UserError(f"cannot load {path}: {graph.reason(error)}; export it again") from error
    (given,), (asked,) = interpreter.get_input_details(), interpreter.get_output_details()

    def answer(image: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(given["index"], _rounded(image, given))
        interpreter.invoke()
        return _restored(interpreter.get_tensor(asked["index"]), asked)

    return lambda images: torch.from_numpy(np.concatenate([answer(each.numpy()) for each in images.split(1)]))


def _rounded(values: np.ndarray, place: dict) -> np.ndarray:
    if place["dtype"] is not np.int8:
        return values
    scale, zero_point = place["quantization"]
    return np.clip(np.rint(values / scale) + zero_point, -128, 127).astype(np.int8)


def _restored(values: np.ndarray, place: dict) -> np.ndarray:
    if place["dtype"] is not np.int8:
        return values
    scale, zero_point = place["quantization"]
    return (values.astype(np.float32) - zero_point) * np.float32(scale)


def read_metadata(path: Path) -> dict:
    """What `export` wrote into the file; nothing of it is executed. Raises UserError for another file."""
    model = _read(path)
    found = [each for each in model.metadata or () if each.name == METADATA.encode()]
    try:
        text = bytes(model.buffers[found[0].buffer].data)
        if len(text) > MOST:
            raise ValueError(f"it has {len(text):,} bytes")
        return json.loads(text)
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} has no readable metadata: expected a .tflite that distill exported") from error


def shares(path: Path) -> tuple[float, float]:
    """Of the file's learned numbers those that are stored in int8, and those of them that an operator multiplies as
    they are, in its own int8 kernel: two shares in [0, 1], read from its tensors and operators.

    Learned are constants of floats, and of integers that have a scale.
    """
    model = _read(path)
    from ai_edge_litert import schema_py_generated as schema

    total = small = computed = 0
    graph_ = model.subgraphs[0]
    dequantized = {op.inputs[0] for op in graph_.operators if _kind(model, op) == schema.BuiltinOperator.DEQUANTIZE}
    for number, tensor in enumerate(graph_.tensors):
        data = model.buffers[tensor.buffer].data
        scaled = tensor.quantization is not None and tensor.quantization.scale is not None
        if data is None or not len(data) or not (tensor.type == schema.TensorType.FLOAT32 or scaled):
            continue
        count = int(np.prod(tensor.shape))
        total += count
        if tensor.type == schema.TensorType.INT8:
            small += count
            computed += count * (number not in dequantized)
    return small / max(total, 1), computed / max(total, 1)


def _read(path: Path):
    """The file as the classes of its schema. Raises UserError where it is none, or LiteRT is missing."""
    try:
        from ai_edge_litert.tools import flatbuffer_utils
    except ImportError as error:
        raise _missing(error) from error
    try:
        data = Path(path).read_bytes()
        if data[4:8] != b"TFL3":
            raise ValueError("it does not begin like one")
        return flatbuffer_utils.read_model_from_bytearray(bytearray(data))
    except Exception as error:  # offsets that lead anywhere
        raise UserError(f"cannot read {path} as a .tflite: {graph.reason(error)}") from error


def _kind(model, operator) -> int:
    code = model.operatorCodes[operator.opcodeIndex]
    return max(code.builtinCode, code.deprecatedBuiltinCode)


class Rounded(NamedTuple):
    values: np.ndarray  # int8, in the order of the file
    scale: np.ndarray  # (O,) float32


@torch.no_grad()
def _weights(net: nn.Module) -> tuple[nn.Module, dict[bytes, Rounded]]:
    """A copy of `net` whose layers with int8 weights hold the floats they stand for, and {these, as they will stand in
    the file: what they were}: the converter folds what is dequantized in a graph to floats of its own."""
    net, found = copy.deepcopy(net), {}

    def keep(values: Tensor, scale: Tensor) -> Tensor:
        weight = values.float() * scale.reshape(-1, *[1] * (values.dim() - 1))
        orders = [(0, 2, 3, 1), (1, 2, 3, 0)] if values.dim() == 4 else [(0, 1)]  # plain, depthwise; Linear
        for order in orders:
            wide, narrow = (each.permute(order).contiguous().numpy().reshape(-1) for each in (weight, values))
            found[wide.tobytes()] = Rounded(narrow, scale.reshape(-1).numpy())
        return weight

    for module in net.modules():
        if isinstance(module, (Int8Conv2d, Int8Linear)):
            module.weight = keep(module.weight, module.scale)
            module.scale = torch.ones_like(module.scale)
        elif isinstance(module, fx.GraphModule):
            dequantize = torch.ops.quantized_decomposed.dequantize_per_channel.default
            for node in module.graph.find_nodes(op="call_function", target=dequantize):
                name = f"float_{node.name}"
                module.register_buffer(name, keep(*(attrgetter(each.target)(module) for each in node.args[:2])))
                with module.graph.inserting_before(node):
                    node.replace_all_uses_with(module.graph.get_attr(name))
            for node in module.graph.find_nodes(
                op="call_function", target=torch.ops.quantized_decomposed.dequantize_per_tensor.tensor
            ):
                node.replace_all_uses_with(node.args[0].args[0])  # the kernel finds the range
            module.graph.eliminate_dead_code()
            module.recompile()
    return net, found


def _rewritten(net: fx.GraphModule) -> fx.GraphModule:
    """`net` in what litert-torch lowers: constants are rounded in the graph and not before it, so that their type has
    its scale; what is sliced is float between two roundings, which it makes one again."""
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers the operators

    for module in net.modules():  # it is captured as in eval mode; its eval() raises
        module.training = False
    ops, nodes = torch.ops.quantized_decomposed, net.graph
    rounding = {
        getattr(ops, f"dequantize_{kind}").default: getattr(ops, f"quantize_{kind}").default
        for kind in ("per_tensor", "per_channel")
    }
    for node, value in _constants(net).items():
        if node.target in rounding:
            net.register_buffer(f"rounded_{node.name}", value)
            with nodes.inserting_before(node):
                constant = nodes.get_attr(f"rounded_{node.name}")
                if all(user.target is EXPAND for user in node.users):  # a token; its copies are rounded
                    node.replace_all_uses_with(constant)
                else:
                    node.update_arg(0, nodes.call_function(rounding[node.target], (constant, *node.args[1:])))
    quantize, dequantize = ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default
    for node in nodes.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor):
        rounded = _rounding(node)
        if rounded is not None:
            with nodes.inserting_before(node):
                node.update_arg(0, nodes.call_function(dequantize, (node.args[0], *rounded)))
            with nodes.inserting_after(node):
                again = nodes.call_function(quantize, (node, *rounded))
            node.replace_all_uses_with(again, delete_user_cb=lambda user, again=again: user is not again)
    nodes.eliminate_dead_code()
    net.recompile()
    return net


def _constants(net: fx.GraphModule) -> dict[fx.Node, Tensor]:
    """The values that no image reaches."""
    known: dict[fx.Node, Tensor] = {}
    for node in net.graph.nodes:
        if node.op == "get_attr":
            known[node] = attrgetter(node.target)(net)
        elif node.op == "call_function" and node.all_input_nodes and known.keys() >= {*node.all_input_nodes}:
            known[node] = node.target(*fx.node.map_arg(node.args, known.__getitem__), **node.kwargs)
    return known


def _rounding(node: fx.Node | None) -> tuple | None:
    """Scale, zero point and the rest of what int8 numbers that a slice reads were rounded by; None: it reads floats."""
    while node is not None and node.target is torch.ops.aten.slice.Tensor:
        node = node.args[0]
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    return tuple(node.args[1:]) if node is not None and node.target is quantize else None


def _finished(data: bytes, rounded: Mapping[bytes, Rounded], computes: bool, io: str, described: str) -> bytes:
    """The file with weights in int8 that were `rounded` (see `_store_rounded`), images and logits named and of the type
    asked for, `described` inside, and no other names: those of all tensors stand in it, a fifth of a small file."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(data))
    (part,) = model.subgraphs
    _store_rounded(model, rounded, computes)
    for number, tensor in enumerate(part.tensors):
        tensor.name = f"t{number}".encode()
    given, asked = part.inputs[0], part.outputs[0]
    int8, float32 = schema.TensorType.INT8, schema.TensorType.FLOAT32
    wanted = int8 if io == "int8" else float32
    if part.tensors[given].type != wanted:
        new = _add(part, part.tensors[given], wanted)
        if wanted == int8:
            part.tensors[new].quantization = schema.QuantizationParametersT()
            part.tensors[new].quantization.scale, part.tensors[new].quantization.zeroPoint = ([x] for x in PIXEL)
        part.operators.insert(0, _operator(model, "DEQUANTIZE" if wanted == int8 else "QUANTIZE", new, given))
        given = new
    if part.tensors[asked].type == int8 and wanted == float32:  # the other way, a float head has no range
        new = _add(part, part.tensors[asked], wanted)
        part.operators.append(_operator(model, "DEQUANTIZE", asked, new))
        asked = new
    part.inputs, part.outputs = [given], [asked]
    (signature,) = model.signatureDefs
    for name, number, maps in ((b"images", given, signature.inputs), (b"logits", asked, signature.outputs)):
        part.tensors[number].name = maps[0].name = name
        maps[0].tensorIndex = number
    text, entry = schema.BufferT(), schema.MetadataT()
    text.data = np.frombuffer(described.encode(), dtype=np.uint8)
    model.buffers.append(text)
    entry.name, entry.buffer = METADATA.encode(), len(model.buffers) - 1
    model.metadata = [*(model.metadata or ()), entry]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _store_rounded(model, rounded: Mapping[bytes, Rounded], computes: bool) -> None:
    """Stores the weights of layers in int8 that were rounded. With `computes` a FULLY_CONNECTED multiplies them as they
    are with its input, which it rounds in the range that it finds; the others are dequantized before they are used."""
    from ai_edge_litert import schema_py_generated as schema

    kinds, (part,) = schema.BuiltinOperator, model.subgraphs
    axes = {kinds.CONV_2D: 0, kinds.DEPTHWISE_CONV_2D: 3, kinds.FULLY_CONNECTED: 0}  # of the output channels
    known, floats = set(), {}  # of weights: those that are rounded; the number of what each of them stands for
    for layer in [operator for operator in part.operators if _kind(model, operator) in axes]:
        number, axis = layer.inputs[1], axes[_kind(model, layer)]
        tensor = part.tensors[number]
        buffer = model.buffers[tensor.buffer]
        if number not in known:
            found = None if buffer.data is None else rounded.get(bytes(buffer.data))
            if found is None:
                continue
            known.add(number)
            buffer.data = found.values.view(np.uint8)
            tensor.type, tensor.quantization = schema.TensorType.INT8, schema.QuantizationParametersT()
            tensor.quantization.scale = found.scale.tolist()
            tensor.quantization.zeroPoint = [0] * len(found.scale)
            tensor.quantization.quantizedDimension = axis
        if computes and _kind(model, layer) == kinds.FULLY_CONNECTED:
            layer.builtinOptions.asymmetricQuantizeInputs = True
            model.operatorCodes[layer.opcodeIndex].version = HYBRID
            continue
        if number not in floats:
            floats[number] = _add(part, tensor, schema.TensorType.FLOAT32)
            part.operators.insert(0, _operator(model, "DEQUANTIZE", number, floats[number]))
        layer.inputs[1] = floats[number]


def _add(part, like, kind: int) -> int:
    """The number of a new tensor of a part of the model, shaped as another one, of this type."""
    from ai_edge_litert import schema_py_generated as schema

    tensor = schema.TensorT()
    tensor.shape, tensor.shapeSignature, tensor.hasRank = like.shape, like.shapeSignature, like.hasRank
    tensor.type, tensor.buffer, tensor.name = kind, 0, f"t{len(part.tensors)}".encode()
    part.tensors.append(tensor)
    return len(part.tensors) - 1


def _operator(model, name: str, given: int, asked: int):
    from ai_edge_litert import schema_py_generated as schema

    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = _code(model, name), [given], [asked]
    return operator


def _code(model, name: str) -> int:
    """The index of an operator's code, which is added where there is none."""
    from ai_edge_litert import schema_py_generated as schema

    wanted = getattr(schema.BuiltinOperator, name)
    for number, code in enumerate(model.operatorCodes):
        if max(code.builtinCode, code.deprecatedBuiltinCode) == wanted:
            return number
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = wanted
    code.version = 2  # with int8
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


@contextmanager
def _silent() -> Iterator[None]:
    """What the converter and the runtime say of their progress, also past Python, is hidden."""
    before = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        with redirect_stdout(streams.StringIO()):
            yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nothing)


def _missing(error: ImportError) -> UserError:
    absent = (error.name or "").partition(".")[0] in PACKAGES
    reason = "" if absent else f" ({graph.reason(error)})"
    return UserError(f"LiteRT files need their packages: pip install litert-torch ai-edge-litert{reason}")
