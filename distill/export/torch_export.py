"""torch.export archive: NAME.pt2, the captured graph with its weights, for PyTorch and for compilers that start there.

An int8 network is written as XNNPACK quantizes it, with operators that PyTorch computes in float: small and exact, and
not fast in Python.
"""

import io
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.errors import UserError
from distill.export.pt2 import sanitized
from distill.runtimes import graph
from distill.runtimes.artifact import Artifact, Model, describe, publish, read_zipped

FLOW = "xnnpack"
METADATA = "metadata.json"


def export(net: nn.Module, example: Tensor, stem: Path, metadata: dict) -> list[Artifact]:
    """Writes stem.pt2, for any batch size, with `metadata` inside.

    Args:
        net: float, or int8 of the flow "xnnpack", eval mode on the CPU, images in [0, 1] to logits (N, K).
        example: images (N, C, H, W); gives the input's size.
        stem: the file's path without suffix.
        metadata: plain JSON values, such as {"classes": [...]}; the input's description is added.

    Raises:
        UserError: `net` cannot be captured, or the file cannot be written.
    """
    stem, buffer = Path(stem), io.BytesIO()
    described = json.dumps(describe(example, metadata), ensure_ascii=False)
    program = graph.capture(net, torch.cat([example[:1]] * 2), "torch.export")
    for node in program.graph.nodes:  # where each came from in Python: half of a small file
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            node.meta.pop(key, None)
    with graph.quiet():
        try:
            program.example_inputs = None  # nobody reads them, and they are pickled
            torch.export.save(program, buffer, extra_files={METADATA: described})
        except Exception as error:  # an operator without a schema, a constant that is no tensor
            raise graph.refuse(error, program, "torch.export") from error
    file = _artifact(stem)
    publish(file, buffer.getvalue(), net, example)
    return [file]


def reload(stem: Path) -> list[Artifact]:
    """The file that `export` wrote at `stem`, if it is there."""
    file = _artifact(stem)
    return [file] if file.path.is_file() else []


def _artifact(stem: Path) -> Artifact:
    return Artifact("torch_export", stem.parent / f"{stem.name}.pt2", FLOW, load)


def load(path: Path) -> Model:
    """The file's graph, executed by PyTorch one operator at a time. Nothing in the file is unpickled or run as Python.

    Raises:
        UserError: a damaged file, or one that holds more than a plain graph (see distill/export/pt2.py).
    """
    import torch.ao.quantization.fx._decomposed  # registers the operators of int8 files

    archive = sanitized(path)
    try:
        with graph.quiet():
            return torch.no_grad()(torch.export.load(archive).module())
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        raise UserError(f"cannot load {path}: {graph.reason(error)}; export it again") from error


def read_metadata(path: Path) -> dict:
    """What `export` wrote beside the graph; nothing of the file is executed. Raises UserError for another file."""
    return read_zipped(path, METADATA, ".pt2")
