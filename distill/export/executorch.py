"""ExecuTorch: NAME.pte for PyTorch's runtime on phones, its convolutions and matrix products in XNNPACK.

The batch is dynamic up to MOST images, for which the file plans its memory; measured on ResNet-20 and MobileNetV2,
one image is no slower than in a file for one image only. `load` splits larger batches.
"""

import io
import json
import re
from contextlib import redirect_stderr
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from distill.errors import UserError
from distill.runtimes import graph
from distill.runtimes.artifact import Artifact, Model, describe, publish

FLOW = "xnnpack"
MOST = 8
METADATA = "metadata"  # the method of the file that returns the metadata as JSON
PACKAGES = ("executorch", "torchao")  # what it needs besides this package's own dependencies


def export(net: nn.Module, example: Tensor, stem: Path, metadata: dict) -> list[Artifact]:
    """Writes stem.pte, for any batch size up to MOST; its method `metadata` returns `metadata` as JSON.

    Args:
        net: float, or int8 of the flow "xnnpack", eval mode on the CPU, images in [0, 1] to logits (N, K).
        example: images (N, C, H, W); gives the input's size.
        stem: the file's path without suffix.
        metadata: plain JSON values, such as {"classes": [...]}; the input's description is added.

    Raises:
        UserError: executorch is missing, does not know a part of `net`, or the file cannot be written.
    """
    try:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    except ImportError as error:
        raise _missing() from error
    from distill.runtimes.coverage import stored  # not what a file's own process loads

    if "weight-only int8" in stored(net):
        raise UserError(
            "ExecuTorch computes layers whose int8 weights are dequantized in the graph wrongly, and "
            "a hundred times slower: choose compress=[static_int8] for it"
        )
    stem, described = Path(stem), json.dumps(describe(example, metadata), ensure_ascii=False)
    program = _rewritten(graph.capture(net, torch.cat([example[:1]] * 2), "ExecuTorch", most=MOST))
    with graph.quiet(), torch.no_grad():
        try:
            lowered = to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackPartitioner()],
                constant_methods={METADATA: described},
                # its validity check takes the length of what `chunk` and `split` return, of a tensor instead of the
                # list: that fixes the batch to the example's
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            finished = lowered.to_executorch()
        except Exception as error:  # whatever a pass of its compiler stumbles over
            raise graph.refuse(error, program, "ExecuTorch") from error
    _check_kernels(finished)
    file = _artifact(stem)
    with redirect_stderr(io.StringIO()) as said:  # only there its runtime tells which operator failed
        publish(file, finished.buffer, net, example, place=lambda _: _failing(said.getvalue(), finished))
    return [file]


def reload(stem: Path) -> list[Artifact]:
    """The file that `export` wrote at `stem`, if it is there."""
    file = _artifact(stem)
    return [file] if file.path.is_file() else []


def _artifact(stem: Path) -> Artifact:
    return Artifact("executorch", stem.parent / f"{stem.name}.pte", FLOW, load, rounds=True)


def load(path: Path) -> Model:
    """The file in ExecuTorch's runtime."""
    method = _program(path).load_method("forward")

    def run(images: Tensor) -> Tensor:
        parts = [method.execute((part.contiguous(),))[0] for part in images.split(MOST)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return run


def read_metadata(path: Path) -> dict:
    """What `export` wrote into the file."""
    return json.loads(_program(path).load_method(METADATA).execute(())[0])


def _program(path: Path):
    try:
        with graph.quiet():
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
    except ImportError as error:
        raise _missing() from error
    if portable_lib._threadpool_get_thread_count() != torch.get_num_threads():
        portable_lib._unsafe_reset_threadpool(torch.get_num_threads())
    try:
        return Runtime.get().load_program(path)
    except RuntimeError as error:
        raise UserError(f"cannot load {path}: {graph.reason(error)}; export it again") from error


def _rewritten(program: ExportedProgram) -> ExportedProgram:
    """`program` without operators that lower to what doesn't run: pads by nothing, which XNNPACK refuses in int8, and
    softplus and what is made of it, whose usual form chooses between tensors of two memory layouts."""
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.pad.default):
        if not any(node.args[1]):
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    known = {node.target for node in program.graph.nodes}
    table = {operator: form for operator, form in FORMS.items() if operator in known}
    return program.run_decompositions(table) if table else program


def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """log(1 + exp(βx)) / β without overflow; where βx > threshold it is x but for less than exp(-threshold).

    From -x, since XNNPACK has no kernel for a ReLU of int8 numbers whose result is float, as the sum is."""
    minus = -x
    return torch.relu(-minus) + torch.log(1 + torch.exp(-torch.abs(beta * minus))) / beta


FORMS = {
    torch.ops.aten.softplus.default: _softplus,
    torch.ops.aten.mish.default: lambda x: -(-x * torch.tanh(_softplus(x))),
    torch.ops.aten.log_sigmoid.default: lambda x: -_softplus(-x),
}


def _check_kernels(finished) -> None:
    """The compiler also lets through operators for which the runtime has no kernel."""
    from executorch.runtime import Runtime

    known = Runtime.get().operator_registry.operator_names
    calls = {node.target.name(): node for node in _calls(finished)}
    for operator in finished.executorch_program.execution_plan[0].operators:
        name = f"{operator.name}.{operator.overload}" if operator.overload else operator.name
        if name not in known and f"{name}.default" not in known:
            raise graph.unknown(name, calls.get(name), "ExecuTorch's runtime")


def _calls(finished) -> list[fx.Node]:
    """The calls of kernels outside of XNNPACK's parts."""
    nodes = finished.exported_program().graph.nodes
    return [node for node in nodes if isinstance(node.target, torch._ops.OpOverload)]


def _failing(said: str, finished) -> str:
    """The operator at which the runtime says that it stopped, and its layer."""
    found = re.search(r"KernelCall failed at instruction \d+:(\d+)", said)
    for node in _calls(finished) if found else ():
        if node.meta.get("debug_handle") == int(found[1]):
            return f" at the operator {node.target} ({graph.layer(node)})"
    return ""


def _missing() -> UserError:
    return UserError(f"ExecuTorch files need their packages: pip install {' '.join(PACKAGES)}")
