"""The two quantization flows of PyTorch, each in the form that a runtime executes natively.

    flow      captured by          becomes                                        runs in
    fx        torch.fx             modules of torch.ao (FX graph mode, "x86")     TorchScript
    xnnpack   torch.export (PT2E)  quantize/dequantize ops, int8 activations      ExecuTorch's XNNPACK
    onnx      torch.export (PT2E)  quantize/dequantize ops, uint8 activations     ONNX Runtime

Static int8 (Jacob et al. 2018, arXiv:1712.05877): q = clamp(round(x / s) + z). Activations have one scale and zero
point a tensor, found on images; weights are symmetric, with one scale for each output channel, always: with one scale
a tensor, depthwise networks fall to chance (Krishnamoorthi 2018, arXiv:1806.08342). Dynamic int8 finds the activations'
scale and zero point anew for what it is asked about, when it runs.
"""

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import Tensor, fx, nn
from torch.ao import quantization as ao
from torch.ao.nn.intrinsic.qat import freeze_bn_stats
from torch.ao.quantization import quantize_fx

from distill.errors import UsageError, UserError
from distill.export.graph import module_of, place, quiet

FLOWS = ("fx", "xnnpack", "onnx")
OBSERVERS = ("histogram", "minmax", "moving_average")

BATCH_NORM, DROPOUT = torch.ops.aten.batch_norm.default, torch.ops.aten.dropout.default
CLAMPS = (torch.ops.aten.hardtanh.default, torch.ops.aten.hardtanh_.default)  # ReLU6
TRAINING = {BATCH_NORM: 5, DROPOUT: 2}  # which argument of the op says that it trains
SLICE = torch.ops.aten.slice.Tensor
QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
LINEAR, CONV = torch.ops.aten.linear.default, torch.ops.aten.conv2d.default
ELEMENTWISE = tuple(getattr(torch.ops.aten, name).Tensor for name in ("add", "sub", "mul", "div"))


class Captured(nn.Module):
    """A graph of torch.export in preparation, whose batch norms and dropout follow `training` as a module's do.

    The graph holds that mode as arguments of its ops. It is compared at every call, because Lightning puts modes
    back by writing the attribute. `frozen` keeps batch norm's statistics as they are while training.
    """

    def __init__(self, graph: fx.GraphModule):
        super().__init__()
        self.graph = _plain(graph)
        self.frozen = False
        self._mode = None

    def forward(self, images: Tensor) -> Tensor:
        mode = {BATCH_NORM: self.training and not self.frozen, DROPOUT: self.training}
        if mode != self._mode:
            for node in self.graph.graph.nodes:
                if node.target in TRAINING:
                    node.update_arg(TRAINING[node.target], mode[node.target])
            self.graph.recompile()
            self._mode = mode
        return self.graph(images)


def prepare(
    net: nn.Module,
    example: Tensor,
    flow: str,
    *,
    qat: bool = False,
    skip: Collection[str] = (),
    observer: str = "histogram",
) -> nn.Module:
    """A copy of `net` that observes its activations when called; with `qat` it also rounds them as int8 will.

    Args:
        net: float32 on the CPU, images (N, C, H, W) to logits (N, K).
        example: images (2 or more, C, H, W).
        flow: one of FLOWS.
        qat: for training under fake quantization, in train mode, with its batch norms, whose scale is in the rounded
            weights (Jacob et al., section 3.2): folded ones train badly (ResNet-20 diverges at a learning rate of
            5e-3). Otherwise they are folded now.
        skip: paths of modules that stay float, with all that is inside of them; see `paths`.
        observer: how an activation's range is found without `qat`: "histogram" (least squared error), "minmax", or
            "moving_average" of the batches' minima and maxima, which is what `qat` always does.

    Raises:
        UsageError: an unknown flow or observer.
        UserError: a name in `skip` that is no module's, or a network whose graph can't be captured.
    """
    for option, value, choices in (("flow", flow, FLOWS), ("observer", observer, OBSERVERS)):
        if value not in choices:
            raise UsageError(f"{option}={value} is unknown: choose one of {', '.join(choices)}")
    skip = paths(net, skip)
    net = copy.deepcopy(net).train(qat)
    with quiet(), _capturing(net, flow):
        return (_prepare_fx if flow == "fx" else _prepare_pt2e)(net, example, flow, qat, skip, observer)


def convert(prepared: nn.Module, flow: str) -> nn.Module:
    """What `prepare` made, with int8 weights and folded batch norms: images to logits, any batch size, eval mode."""
    with quiet():
        if flow == "fx":
            return quantize_fx.convert_fx(copy.deepcopy(prepared).eval())
        prepared = copy.deepcopy(prepared).eval()
        for node in prepared.graph.graph.nodes:
            if node.target in TRAINING:
                node.update_arg(TRAINING[node.target], False)
        small = _convert_pt2e(prepared.graph)
        return _sliced_in_int8(small) if flow == "xnnpack" else small


def dynamic(net: nn.Module, example: Tensor, flow: str, conv: bool) -> nn.Module:
    """A copy of `net` whose Linear layers have int8 weights and round their input in the range that it has at run time.

    Args:
        net, example: as for `prepare`.
        flow: "xnnpack" or "onnx".
        conv: convolutions too, but for depthwise ones. XNNPACK has kernels for it, ONNX Runtime no fast ones.

    Raises:
        UserError: a network whose graph can't be captured.
    """
    net = copy.deepcopy(net).eval()
    with quiet(), _capturing(net, flow):
        try:
            from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

            from distill.compress.quantizer import Dynamic
        except ImportError as error:
            raise _missing(flow) from error
        graph = _four_dimensional(_exported(net, example))
        prepared = prepare_pt2e(graph, Dynamic(_pt2e_config(flow, False, None), conv))
        prepared(example)  # the weights are observed
        small = _convert_pt2e(prepared)
    return _bias_apart(small) if flow == "onnx" else small


def freeze(prepared: nn.Module, *, observers: bool, statistics: bool) -> None:
    """What fine-tuning moves besides the weights: whether the ranges of activations and weights stay as they are, and
    whether batch norm's statistics do. Neither affects a network that was prepared without `qat`."""
    for module in prepared.modules():
        if hasattr(module, "enable_observer"):
            module.enable_observer(not observers)
        elif statistics and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    if isinstance(prepared, Captured):
        prepared.frozen = statistics
    elif statistics:
        prepared.apply(freeze_bn_stats)


def paths(net: nn.Module, names: Collection[str]) -> set[str]:
    """The modules of a plain net that are named, with all inside of them; "layer1" also means "net.layer1".

    Raises:
        UserError: a name that is no module's.
    """
    modules, found = dict(net.named_modules()), set()
    for name in names:
        path = next((path for path in (name, f"net.{name}") if name and path in modules), None)
        if path is None:
            raise UserError(
                f"skip: no layer '{name}' in the network; its layers with weights: {', '.join(layers(net)) or 'none'}"
            )
        found |= {f"{path}.{inner}".rstrip(".") for inner, _ in modules[path].named_modules()}
    return found


def layers(net: nn.Module) -> list[str]:
    """The paths of the layers whose weights static int8 rounds: convolutions and Linear, in order."""
    return [name for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]


def _prepare_fx(net, example, flow, qat, skip, observer) -> nn.Module:
    mapping = ao.get_default_qat_qconfig_mapping("x86") if qat else ao.get_default_qconfig_mapping("x86")
    default = mapping.global_qconfig
    if not qat:
        # 7 bits: 8-bit kernels for x86 add pairs of products in 16 bits, all of them on processors without VNNI and
        # those for depthwise convolutions on the others, too
        activation = _observers(ao)[observer].with_args(dtype=torch.quint8, reduce_range=True)
        mapping.set_global(ao.QConfig(activation=activation, weight=default.weight))
        for kind, config in list(mapping.object_type_qconfigs.items()):
            if config is default:
                mapping.set_object_type(kind, mapping.global_qconfig)
    for path in skip:
        mapping.set_module_name(path, None)
    prepare = quantize_fx.prepare_qat_fx if qat else quantize_fx.prepare_fx
    return prepare(net, mapping, (example,))


def _prepare_pt2e(net, example, flow, qat, skip, observer) -> nn.Module:
    try:
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e
    except ImportError as error:
        raise _missing(flow) from error
    quantizer = XNNPACKQuantizer().set_global(_pt2e_config(flow, qat, observer))
    quantizer.set_filter_function(lambda node: module_of(node)[0] not in skip)
    prepared = (prepare_qat_pt2e if qat else prepare_pt2e)(_exported(net, example), quantizer)
    if flow == "onnx":
        _round_once(prepared)
    return Captured(prepared).train(qat)


def _exported(net: nn.Module, example: Tensor) -> fx.GraphModule:
    return torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)).module()


def _missing(flow: str) -> UserError:
    return UserError(f"int8 for {flow} needs executorch: pip install 'distill[executorch]'")


def _four_dimensional(graph: fx.GraphModule) -> fx.GraphModule:
    """`graph` whose constants that meet images (N, C, H, W) have four dimensions too: in front of a dynamic
    convolution XNNPACK lays images out with the channels last, and would take a (C, 1, 1) for (1, C, 1, 1) there."""
    for node in graph.graph.nodes:
        meet = {user.meta["val"].dim() if user.target in ELEMENTWISE else None for user in node.users}
        if node.op == "get_attr" and meet == {4}:
            value = attrgetter(node.target)(graph)
            value.data = value.data.view([1] * (4 - value.dim()) + list(value.shape))
    return graph


def _convert_pt2e(prepared: fx.GraphModule) -> fx.GraphModule:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    # a copy is a plain GraphModule, whose train() and eval() don't raise as those of an exported one
    return _used(_plain(copy.deepcopy(convert_pt2e(prepared, fold_quantize=True))))


def _sliced_in_int8(graph: fx.GraphModule) -> fx.GraphModule:
    """`graph` that slices int8 numbers and not the float ones they stand for, which are rounded to the same again:
    XNNPACK has no slices, so that each would be a way out of it and back (ResNet-20 with option A shortcuts: 12 % of
    its time). ONNX Runtime does this itself."""
    for node in graph.graph.find_nodes(op="call_function", target=SLICE):
        source = node.args[0]
        rounded = list(node.users)
        if source.target is DEQUANTIZE and all(
            (to.target, to.args[1:]) == (QUANTIZE, source.args[1:]) for to in rounded
        ):
            node.replace_input_with(source, source.args[0])
            for user in rounded:
                user.replace_all_uses_with(node)
                graph.graph.erase_node(user)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _round_once(prepared: fx.GraphModule) -> None:
    """Nothing is rounded between a convolution and its ReLU6, so that ONNX Runtime runs both as one."""
    for node in prepared.graph.nodes:
        if node.target in CLAMPS:
            observed = node.args[0]
            if observed.op == "call_module" and len(observed.users) == 1:
                node.update_arg(0, observed.args[0])
                prepared.graph.erase_node(observed)
    prepared.recompile()


def _bias_apart(graph: fx.GraphModule) -> fx.GraphModule:
    """`graph` whose Linear layers add their bias in an operator of its own: with a float one inside, ONNX Runtime would
    dequantize the weights at every call."""
    for node in graph.graph.find_nodes(op="call_function", target=LINEAR):
        if len(node.args) > 2 and node.args[2] is not None:
            with graph.graph.inserting_after(node):
                added = graph.graph.call_function(torch.ops.aten.add.Tensor, (node, node.args[2]))
            added.meta = dict(node.meta)
            node.replace_all_uses_with(added, delete_user_cb=lambda user, added=added: user is not added)
            node.args = node.args[:2]
    graph.recompile()
    return graph


def _pt2e_config(flow: str, qat: bool, observer: str | None):
    """What XNNPACK executes; ONNX Runtime's fast kernels want the activations unsigned. Without an `observer` the
    activations' ranges are found at run time."""
    from torchao.quantization import pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec

    eps = 2**-12
    if qat:
        fake = pt2e.FusedMovingAvgObsFakeQuantize
        activation = fake.with_args(observer=pt2e.MovingAverageMinMaxObserver, eps=eps)
        weight = fake.with_args(observer=pt2e.MovingAveragePerChannelMinMaxObserver, eps=eps)
    else:
        kind = pt2e.PlaceholderObserver if observer is None else _observers(pt2e)[observer]
        activation = kind.with_args(eps=eps)
        weight = pt2e.PerChannelMinMaxObserver.with_args(eps=eps)
    dtype, low, high = (torch.uint8, 0, 255) if flow == "onnx" else (torch.int8, -128, 127)
    activations = QuantizationSpec(
        dtype=dtype,
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_tensor_affine,
        is_dynamic=observer is None,
        observer_or_fake_quant_ctr=activation,
    )
    weights = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=weight,
    )
    return QuantizationConfig(activations, activations, weights, None, qat)


def _observers(package) -> dict:
    """torch.ao's or torchao's observers of activations by name: one interface, two packages."""
    return {
        "histogram": package.HistogramObserver,
        "minmax": package.MinMaxObserver,
        "moving_average": package.MovingAverageMinMaxObserver,
    }


def _plain(graph: fx.GraphModule) -> fx.GraphModule:
    """`graph` whose train() and eval() are those of any module: torch.export lets them raise."""
    for name in ("train", "eval"):
        graph.__dict__.pop(name, None)
    return graph


def _used(graph: fx.GraphModule) -> fx.GraphModule:
    """`graph` without the tensors that it no longer reads: the float weights that were rounded."""
    read = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [*dict(graph.named_parameters()), *dict(graph.named_buffers())]:
        if name not in read:
            owner, _, attribute = name.rpartition(".")
            delattr(graph.get_submodule(owner), attribute)
    return graph


@contextmanager
def _capturing(net: nn.Module, flow: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever the network's own code raises on a symbolic value
        name = type(net.net if hasattr(net, "net") else net).__name__
        reason = str(error).strip().partition("\n")[0][:200]
        where = place(error, net)
        instead = ", or choose compress=[dynamic_int8], which needs no graph" if flow == "fx" else ""
        raise UserError(
            f"{name} can't be captured as a graph{where}: {type(error).__name__}: {reason}; let its forward not "
            f"depend on values{instead}"
        ) from error
