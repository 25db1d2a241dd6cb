"""Core ML: the folder NAME.mlpackage for iPhones and Macs. It is written anywhere and runs on macOS and iOS only:
elsewhere its structure is checked by reading it back, and the report says that it was not executed.

It takes an image and no tensor, as apps have it, and one at a time. Floats are float16, which Apple's accelerators
compute in. An int8 network is that of the flow "xnnpack": int8 weights, and activations where it rounds them.
"""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx, nn

from distill.errors import UserError
from distill.files import scratch
from distill.runtimes import graph
from distill.runtimes.artifact import MOST, Artifact, Model, describe, publish, write

FLOW = "xnnpack"
METADATA = "distill"  # the key in the model's own metadata
PACKAGES = ("coremltools",)  # what it needs besides this package's own dependencies
MODEL = "Data/com.apple.CoreML/model.mlmodel"
KEPT = ("Manifest.json", "Data")  # of what coremltools writes; the rest is for ExecuTorch's debugger
RUNS = sys.platform == "darwin"
ELSEWHERE = "" if RUNS else "Core ML runs on macOS and iOS only"


def export(net: nn.Module, example: Tensor, stem: Path, metadata: dict) -> list[Artifact]:
    """Writes stem.mlpackage: "images", an RGB image of H × W pixels, to "logits" (1, K), for iOS 17 and macOS 14.

    Args:
        net: float, or int8 of the flow "xnnpack", eval mode on the CPU, images in [0, 1] to logits (N, K).
        example: images (N, 3, H, W); gives the input's size.
        stem: the folder's path without suffix.
        metadata: plain JSON values, such as {"classes": [...]}; the input's description is added.

    Raises:
        UserError: coremltools is missing, does not know a part of `net`, or the folder cannot be written.
    """
    tools = _tools()
    described = describe(example, metadata)
    described["input"] |= {"layout": "image", "dtype": "uint8", "range": [0, 255]}
    program = graph.capture(net, torch.cat([example[:1]] * 2), "Core ML")
    with graph.quiet(), _silent(), torch.no_grad(), scratch() as folder:
        try:
            single = torch.export.export(_rewritten(program.module()), (example[:1],)).run_decompositions({})
            model = tools.convert(
                single,
                inputs=[tools.ImageType(name="images", shape=tuple(example[:1].shape), scale=1 / 255)],
                outputs=[tools.TensorType(name="logits", dtype=np.float32)],
                minimum_deployment_target=tools.target.iOS17,
                skip_model_load=True,
            )
        except Exception as error:  # its passes have no class of errors
            raise graph.refuse(error, program, "Core ML") from error
        model.user_defined_metadata[METADATA] = json.dumps(described, ensure_ascii=False)
        package = folder / "net.mlpackage"
        model.save(str(package))
        files = (file for name in KEPT for file in [package / name, *(package / name).rglob("*")] if file.is_file())
        content = {file.relative_to(package).as_posix(): file.read_bytes() for file in files}
    file = _artifact(Path(stem))
    if RUNS:
        publish(file, content, net, example)
    else:
        write(file.path, content, lambda path: check(path, described))
    return [file]


def reload(stem: Path) -> list[Artifact]:
    """The folder that `export` wrote at `stem`, if it is there."""
    file = _artifact(stem)
    return [file] if (file.path / MODEL).is_file() else []


def _artifact(stem: Path) -> Artifact:
    path = stem.parent / f"{stem.name}.mlpackage"
    return Artifact("coreml", path, FLOW, load, rounds=True, shares=shares, halves=True, elsewhere=ELSEWHERE)


def load(path: Path) -> Model:
    """The folder in Core ML, on the CPU: images are rounded to bytes.

    Raises:
        UserError: it is damaged, or the system is not macOS.
    """
    from PIL import Image

    tools = _tools()
    _spec(path)
    if ELSEWHERE:
        raise UserError(f"cannot load {path} here: {ELSEWHERE}")
    with scratch() as folder:  # it wants a name that ends so
        named = folder / "net.mlpackage"
        named.symlink_to(Path(path).resolve())
        try:
            model = tools.models.MLModel(str(named), compute_units=tools.ComputeUnit.CPU_ONLY)
        except Exception as error:  # whatever its compiler says
            raise UserError(f"cannot load {path}: {graph.reason(error)}; export it again") from error

    def run(images: Tensor) -> Tensor:
        photos = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        answers = [model.predict({"images": Image.fromarray(photo)})["logits"] for photo in photos]
        return torch.from_numpy(np.concatenate(answers)).float()

    return run


def check(path: Path, described: dict) -> None:
    """Raises UserError where the folder does not take such images, give as many logits, and say what it should."""
    spec, size = _spec(path).description, described["input"]
    (given,), (asked,) = spec.input, spec.output
    image = given.type.imageType
    found = (given.name, image.height, image.width, image.colorSpace, asked.name)
    wanted = ("images", size["height"], size["width"], image.RGB, "logits")
    if found != wanted or read_metadata(path) != json.loads(json.dumps(described)):
        raise UserError(f"{path} is not kept: read back, it has {found}, expected {wanted}")


def read_metadata(path: Path) -> dict:
    """What `export` wrote into the folder. Raises UserError for another one."""
    try:
        text = _spec(path).description.metadata.userDefined[METADATA]
        if len(text) > MOST:
            raise ValueError(f"it has {len(text):,} bytes")
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} has no readable metadata: expected a folder that distill exported") from error


def shares(path: Path) -> tuple[float, None]:
    """Of the file's learned numbers those that are stored in int8, a share in [0, 1]; and None: whether Core ML
    multiplies them so is for each device to choose. Learned are constants of more than one float, and of int8."""
    (function,) = _spec(path).mlProgram.functions.values()
    small = floats = 0
    for operation in function.block_specializations[function.opset].operations:
        if operation.type == "const":
            kind = operation.outputs[0].type.tensorType
            count = _count(kind)
            floats += count * (kind.dataType in (kind_of("FLOAT16"), kind_of("FLOAT32")) and count > 1)
        elif operation.type == "constexpr_affine_dequantize":
            small += _count(operation.attributes["quantized_data"].type.tensorType)
    return small / max(small + floats, 1), None


def kind_of(name: str) -> int:
    from coremltools.proto import MIL_pb2

    return getattr(MIL_pb2, name)


def _count(kind) -> int:
    return int(np.prod([each.constant.size for each in kind.dimensions])) if kind.rank else 1


def _spec(path: Path):
    tools = _tools()
    try:
        return tools.utils.load_spec(str(Path(path) / MODEL))
    except Exception as error:  # of whatever kind its bytes lead to
        raise UserError(f"cannot load {path}: {graph.reason(error)}; export it again") from error


def _rewritten(net: fx.GraphModule) -> fx.GraphModule:
    """`net` in what coremltools keeps in int8: weights that were stored in it are dequantized by the operator for that
    and not by a product, and a range that is found at run time is left to the float16 of the device."""
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers the operators

    ops, nodes = torch.ops.quantized_decomposed, net.graph
    for node in nodes.find_nodes(op="call_function", target=ops.dequantize_per_tensor.tensor):
        node.replace_all_uses_with(node.args[0].args[0])
    for node in nodes.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor):
        stored, scale = node.args
        if not isinstance(stored, fx.Node) or stored.op != "get_attr" or stored.meta["val"].dtype != torch.int8:
            continue
        flat = net.get_buffer(scale.target).flatten()
        net.register_buffer(f"{node.name}_scale", flat)
        net.register_buffer(f"{node.name}_zero", torch.zeros(len(flat), dtype=torch.int64))
        with nodes.inserting_before(node):
            parameters = [nodes.get_attr(f"{node.name}_{each}") for each in ("scale", "zero")]
            arguments = (stored, *parameters, 0, -127, 127, torch.int8)
            node.replace_all_uses_with(nodes.call_function(ops.dequantize_per_channel.default, arguments))
    nodes.eliminate_dead_code()
    net.recompile()
    return net


@contextmanager
def _silent() -> Iterator[None]:
    """Its bars of progress and what it says of untested versions are hidden."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _tools():
    try:
        with _silent(), graph.quiet():
            import coremltools
    except ImportError as error:
        raise UserError(f"Core ML files need their package: pip install {PACKAGES[0]}") from error
    return coremltools
