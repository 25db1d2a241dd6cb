"""The two quantization flows of PyTorch, each in the form that a runtime executes natively.

    flow      captured by          becomes                                        runs in
    fx        torch.fx             modules of torch.ao (FX graph mode, "x86")     TorchScript
    xnnpack   torch.export (PT2E)  quantize/dequantize ops, int8 activations      ExecuTorch's and LiteRT's XNNPACK
    onnx      torch.export (PT2E)  quantize/dequantize ops, uint8 activations     ONNX Runtime

Static int8 (Jacob et al. 2018, arXiv:1712.05877): q = clamp(round(x / s) + z). Activations have one scale and zero
point a tensor, found on images; weights are symmetric, with one scale for each output channel, always: with one scale
a tensor, depthwise networks fall to chance (Krishnamoorthi 2018, arXiv:1806.08342). Dynamic int8 finds the activations'
scale and zero point anew for what it is asked about, when it runs.
"""

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import Tensor, fx, nn

from distill.errors import UsageError, UserError
from distill.runtimes.graph import CONV, LINEAR, module_of, place, quiet

FLOWS = ("fx", "xnnpack", "onnx")
WEIGHTS = {"fx": 63, "xnnpack": 127, "onnx": 127}  # the largest number that stands for a weight
OBSERVERS = ("histogram", "minmax", "moving_average")

BATCH_NORM, DROPOUT = torch.ops.aten.batch_norm.default, torch.ops.aten.dropout.default
CLAMPS = (  # ReLU6
    torch.ops.aten.hardtanh.default,
    torch.ops.aten.hardtanh_.default,
    nn.functional.hardtanh,
    nn.functional.relu6,
)
TRAINING = {BATCH_NORM: 5, DROPOUT: 2}  # which argument of the op says that it trains
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
MOMENTUM, EPS = 6, 7  # arguments of the batch norm
DIVIDE, ADD = torch.ops.aten.div.Tensor, torch.ops.aten.add.Tensor
SLICE = torch.ops.aten.slice.Tensor
CONVOLUTIONS = tuple(
    getattr(torch.ops.aten, name) for name in ("conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d")
)


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
            5e-3). Otherwise they are folded now. What else is random or different in training (stochastic depth, noise,
            further answers) is captured as in eval mode; dropout follows the mode.
        skip: paths of modules that stay float, with all that is inside of them; see `paths`.
        observer: how an activation's range is found without `qat`: "histogram" (least squared error), "minmax", or
            "moving_average" of the batches' minima and maxima, which is what `qat` always does.

    Raises:
        UsageError: an unknown flow or observer.
        UserError: a name in `skip` that is no module's, or a network whose graph can't be captured or that answers the
            same images differently each time.
    """
    known(flow, observer)
    skip = paths(net, skip)
    net = apart(copy.deepcopy(net).eval())
    with quiet(), _capturing(net, flow):
        _refuse_random(net, example)
        return (_prepare_fx if flow == "fx" else _prepare_pt2e)(net, example, flow, qat, skip, observer)


def known(flow: str, observer: str) -> None:
    """Raises UsageError for an unknown flow or observer."""
    for option, value, choices in (("flow", flow, FLOWS), ("observer", observer, OBSERVERS)):
        if value not in choices:
            raise UsageError(f"{option}={value} is unknown: choose one of {', '.join(choices)}")


def calibrate(prepared: nn.Module, batches: Sequence[Tensor], seed: int) -> None:
    """Let the ranges of activations under `qat` start where training starts: with the statistics of each batch of
    images (N, C, H, W). For a network that was trained briefly the running ones lead to ranges far from that, in which
    all is cut off or rounded to zero, so that training diverges. The statistics stay as they were.
    """
    before = {name: value.clone() for name, value in prepared.named_buffers() if name.rpartition(".")[2] in STATISTICS}
    activations = [each for each in prepared.modules() if hasattr(each, "enable_observer") and not each.is_per_channel]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)  # of dropout
        for images in batches:
            if len(images) > 1:  # one alone has no statistics
                prepared.train()(images)
        buffers = dict(prepared.named_buffers())
        for name, value in before.items():
            buffers[name].copy_(value)
        for each in activations:
            each.enable_observer(False)
        prepared.eval()(batches[0])  # the ranges of the weights, in which the running statistics are
        for each in activations:
            each.enable_observer(True)


def convert(prepared: nn.Module, flow: str) -> nn.Module:
    """What `prepare` made, with int8 weights and folded batch norms: images to logits, any batch size, eval mode."""
    prepared = copy.deepcopy(prepared).eval()
    freeze(prepared, observers=True, statistics=True)
    with quiet():
        if flow == "fx":
            from torch.ao.quantization import quantize_fx

            _round_twice(prepared)
            return quantize_fx.convert_fx(prepared)
        for node in prepared.graph.graph.nodes:
            if node.target in TRAINING:
                node.update_arg(TRAINING[node.target], False)
        _fold_batch_norms(prepared.graph)
        small = _convert_pt2e(prepared.graph)
        return _sliced_in_int8(small) if flow == "xnnpack" else small


def dynamic(net: nn.Module, example: Tensor, flow: str) -> nn.Module:
    """A copy of `net` whose Linear layers have int8 weights and round their input in the range that it has at run time.

    Args:
        net, example: as for `prepare`.
        flow: "xnnpack" or "onnx".

    Raises:
        UserError: a network whose graph can't be captured.
    """
    net = apart(copy.deepcopy(net).eval())
    with quiet(), _capturing(net, flow):
        try:
            from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

            from distill.compress.quantizer import Dynamic
        except ImportError as error:
            raise _missing(flow) from error
        graph = _without_batch_norms(_exported(net, example))
        prepared = prepare_pt2e(graph, Dynamic(_pt2e_config(flow, False, None)))
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
        from torch.ao.nn.intrinsic.qat import freeze_bn_stats

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


def layers(net: nn.Module, flow: str | None = None, skip: Collection[str] = ()) -> list[str]:
    """The paths of the layers whose weights static int8 rounds: convolutions and Linear, in order; without those that
    stay float in `flow` or are skipped."""
    float_ones = paths(net, skip) | (_float_in_fx(net) if flow == "fx" else set())
    weighted = [name for name, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return [name for name in weighted if name not in float_ones]


def rounded(weight: Tensor, flow: str) -> Tensor:
    """The numbers that the int8 of weights (O, …) stands for in `flow`; a batch norm's scale, which goes into them,
    makes no difference to how they are rounded."""
    most = WEIGHTS[flow]
    scale = weight.float().abs().flatten(1).amax(1).clamp(min=1e-12) / most  # (O,)
    zero = torch.zeros_like(scale).int()
    return torch.fake_quantize_per_channel_affine(weight.float(), scale, zero, 0, -most, most).to(weight.dtype)


def apart(net: nn.Module) -> nn.Module:
    """`net` in layers that the flows know:

    - a batch norm and its activation in one (timm's) are two: captured as one it is not known for a batch norm, so it
      is not folded, or computes in the mode that it was captured in;
    - padding by a word is padding by numbers, where it is more on one side than on the other in a layer of its own;
    - a batch norm without statistics is its arithmetic: nothing can be folded;
    - PReLU is its function, in float: PyTorch's int8 kernel reads the slopes with a zero point that isn't theirs.
    """
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Conv2d) and isinstance(module.padding, str):
            left, right, top, bottom = module._reversed_padding_repeated_twice
            if (left, top) == (right, bottom):
                module.padding = (top, left)
            elif module.padding_mode == "zeros":
                module.padding = (0, 0)
                net.set_submodule(name, nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), module))
        elif type(module) is nn.PReLU:
            net.set_submodule(name, Slopes(module))
        elif isinstance(module, nn.BatchNorm2d) and isinstance(getattr(module, "act", None), nn.Module):
            with torch.device("meta"):
                norm = nn.BatchNorm2d(module.num_features, module.eps, module.momentum, module.affine)
            norm.weight, norm.bias = module.weight, module.bias
            for buffer in STATISTICS:
                norm.register_buffer(buffer, getattr(module, buffer))
            norm.track_running_stats = module.track_running_stats
            rest = [part for part in (getattr(module, "drop", None), module.act) if isinstance(part, nn.Module)]
            net.set_submodule(name, nn.Sequential(norm, *rest).eval())
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            net.set_submodule(name, StatisticsOfBatch(module))
    return net


class Slopes(nn.Module):
    """PReLU: x where it is positive, else a slope times x; one slope, or one for each channel."""

    def __init__(self, layer: nn.PReLU):
        super().__init__()
        self.weight = layer.weight

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.prelu(images, self.weight)


class StatisticsOfBatch(nn.Module):
    """A batch norm that keeps no statistics and takes those of each batch, in eval mode, too: (N, C, …) to the same."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, images: Tensor) -> Tensor:
        rows = images.transpose(0, 1).flatten(1)  # (C, N · …)
        difference = rows - rows.mean(1, keepdim=True)
        normed = difference * torch.rsqrt((difference * difference).mean(1, keepdim=True) + self.eps)
        if self.weight is not None:
            normed = normed * self.weight[:, None] + self.bias[:, None]
        return normed.reshape_as(images.transpose(0, 1)).transpose(0, 1)


@torch.no_grad()
def _refuse_random(net: nn.Module, example: Tensor) -> None:
    if not torch.allclose(net(example), net(example), rtol=0, atol=1e-6, equal_nan=True):
        raise UserError(
            f"{type(getattr(net, 'net', net)).__name__} answers the same images differently each time, in eval mode, "
            "too: what is random in its forward can't be captured; leave it out where `self.training` is false"
        )


def _prepare_fx(net, example, flow, qat, skip, observer) -> nn.Module:
    from torch.ao import quantization as ao
    from torch.ao.quantization import quantize_fx

    mapping = ao.get_default_qat_qconfig_mapping("x86") if qat else ao.get_default_qconfig_mapping("x86")
    stock = mapping.global_qconfig
    # 7 bits: 8-bit kernels for x86 add pairs of products in 16 bits, all of them on processors without VNNI and
    # those for depthwise convolutions on the others, too. Weights, each channel in its own range, miss the bit less
    # than activations do (ResNet-56 and MobileNetV3: 4 to 5 dB of signal to noise)
    seven_bits = {"quant_min": -WEIGHTS["fx"], "quant_max": WEIGHTS["fx"]}
    if qat:
        activation = ao.FakeQuantize.with_args(observer=ao.MovingAverageMinMaxObserver, dtype=torch.quint8)
        # not the fused one, whose scales differ from those that converting computes
        weight = ao.default_per_channel_weight_fake_quant.with_args(averaging_constant=1.0, **seven_bits)
    else:
        activation = _observers(ao)[observer].with_args(dtype=torch.quint8)
        weight = ao.default_per_channel_weight_observer.with_args(**seven_bits)
    mapping.set_global(ao.QConfig(activation=activation, weight=weight))
    for kind, config in list(mapping.object_type_qconfigs.items()):
        if config is stock:
            mapping.set_object_type(kind, mapping.global_qconfig)
        elif qat and config is not None and config.activation is stock.activation:
            mapping.set_object_type(kind, config._replace(activation=activation))
    for path in skip | _float_in_fx(net):
        mapping.set_module_name(path, None)
    prepare = quantize_fx.prepare_qat_fx if qat else quantize_fx.prepare_fx
    prepared = prepare(net, mapping, (example,))
    _round_once(prepared)
    return prepared.train(qat)


def _float_in_fx(net: nn.Module) -> set[str]:
    return _inside_of_leaves(net) | _padded_otherwise(net)


def _inside_of_leaves(net: nn.Module) -> set[str]:
    """The modules that torch.fx does not look at, within PyTorch's own ones: a TransformerEncoder computes in float."""
    leaves = [
        (path, module)
        for path, module in net.named_modules()
        if path and fx.Tracer().is_leaf_module(module, path) and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
    ]
    return {f"{path}.{inner}" for path, leaf in leaves for inner, _ in leaf.named_modules() if inner}


def _padded_otherwise(net: nn.Module) -> set[str]:
    """Convolutions whose padding PyTorch's int8 kernels don't know: they stay float."""
    modules = net.named_modules()
    return {path for path, each in modules if getattr(each, "padding_mode", "zeros") not in ("zeros", "reflect")}


def _prepare_pt2e(net, example, flow, qat, skip, observer) -> nn.Module:
    try:
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e
    except ImportError as error:
        raise _missing(flow) from error
    quantizer = XNNPACKQuantizer().set_global(_pt2e_config(flow, qat, observer))
    quantizer.set_filter_function(lambda node: module_of(node)[0] not in skip)
    graph = _exported(net, example)
    norms = _batch_norms(graph)
    prepared = (prepare_qat_pt2e if qat else prepare_pt2e)(graph, quantizer)
    _restore_batch_norms(prepared, norms)
    _round_once(prepared)
    return Captured(prepared).train(qat)


def _exported(net: nn.Module, example: Tensor) -> fx.GraphModule:
    return torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)).module()


def _batch_norms(graph: fx.GraphModule) -> dict[str, tuple[float, float]]:
    """Momentum and eps of each batch norm, by the name of its running mean."""
    nodes = graph.graph.find_nodes(op="call_function", target=BATCH_NORM)
    return {node.args[3].target: (node.args[MOMENTUM], node.args[EPS]) for node in nodes if node.args[3] is not None}


def _restore_batch_norms(prepared: fx.GraphModule, norms: dict[str, tuple[float, float]]) -> None:
    """Momentum and eps as they were: where torchao puts a batch norm's scale into the rounded weights, it writes 0.1
    and 1e-5 for them, whatever the network has (MobileNetV3: 0.01 and 1e-3)."""
    for node in prepared.graph.find_nodes(op="call_function", target=BATCH_NORM):
        if node.args[3] is not None:
            momentum, eps = norms[node.args[3].target]
            node.update_arg(MOMENTUM, momentum)
            node.update_arg(EPS, eps)
            for user in list(node.args[4].users):
                if user.target == ADD:
                    user.update_arg(1, eps)
    prepared.recompile()


@torch.no_grad()
def _fold_batch_norms(prepared: fx.GraphModule) -> None:
    """Each batch norm whose scale is in its convolution's rounded weights goes into weights and bias altogether:

        batch_norm(conv(x, round(w · s)) / s + b) = conv(x, round(w · s)) + (b - mean) · s + beta
        s = gamma / √(var + eps)

    torchao's own way knows one eps only, and takes half a minute.
    """
    graph = prepared.graph
    for number, norm in enumerate(graph.find_nodes(op="call_function", target=BATCH_NORM)):
        value, bias = norm.args[0], None
        if value.target == ADD:
            value, bias = value.args[0], value.args[1].args[0]
        if value.target != DIVIDE or getattr(value.args[0].target, "overloadpacket", None) not in CONVOLUTIONS:
            continue
        conv = value.args[0]
        gamma, beta, mean, variance = (attrgetter(node.target)(prepared) for node in norm.args[1:5])
        scale = gamma / (variance + norm.args[EPS]).sqrt()  # (O,)
        rounded = conv.args[1]
        product = rounded.args[0] if rounded.op == "call_module" else rounded  # of weights and scale
        weight, shape = attrgetter(product.args[0].target)(prepared), product.args[1].args[1]
        added = mean.neg() if bias is None else attrgetter(bias.target)(prepared) - mean
        folded = {"weight": weight * scale.reshape(shape), "bias": added * scale + beta}
        with graph.inserting_before(rounded):
            nodes = {}
            for kind, tensor in folded.items():
                prepared.register_parameter(f"folded_{number}_{kind}", nn.Parameter(tensor))
                nodes[kind] = graph.get_attr(f"folded_{number}_{kind}")
                nodes[kind].meta = dict(product.args[0].meta if kind == "weight" else norm.args[2].meta)
        product.replace_all_uses_with(nodes["weight"])
        conv.update_arg(2, nodes["bias"]) if len(conv.args) > 2 else conv.insert_arg(2, nodes["bias"])
        norm.replace_all_uses_with(conv)
    graph.eliminate_dead_code()
    prepared.recompile()


def _missing(flow: str) -> UserError:
    return UserError(f"int8 for {flow} needs executorch: pip install executorch")


def _without_batch_norms(graph: fx.GraphModule) -> fx.GraphModule:
    """`graph` whose batch norms behind a weight that is computed (one that is stored in int8) scale and shift: torchao
    would fold them into it, and can only into one that is a tensor."""
    for node in graph.graph.find_nodes(op="call_function", target=BATCH_NORM):
        conv = node.args[0]
        if conv.op != "call_function" or conv.target != CONV or conv.args[1].op == "get_attr":
            continue
        images, weight, bias, mean, variance, _, _, eps = node.args[:8]
        weight, bias, mean, variance = (
            None if at is None else attrgetter(at.target)(graph) for at in (weight, bias, mean, variance)
        )
        scale = (variance + eps).rsqrt() if weight is None else weight * (variance + eps).rsqrt()
        shift = -mean * scale if bias is None else bias - mean * scale
        with graph.graph.inserting_before(node):
            held = []
            for name, value in (("scale", scale), ("shift", shift)):
                graph.register_buffer(f"{node.name}_{name}", value.detach().view(-1, 1, 1))
                held.append(graph.graph.get_attr(f"{node.name}_{name}"))
                held[-1].meta = {**node.meta, "val": node.meta["val"].new_empty(value.view(-1, 1, 1).shape)}
            scaled = graph.graph.call_function(torch.ops.aten.mul.Tensor, (images, held[0]))
            shifted = graph.graph.call_function(torch.ops.aten.add.Tensor, (scaled, held[1]))
        scaled.meta = shifted.meta = dict(node.meta)
        node.replace_all_uses_with(shifted)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _convert_pt2e(prepared: fx.GraphModule) -> fx.GraphModule:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    # a copy is a plain GraphModule, whose train() and eval() don't raise as those of an exported one
    return _used(_plain(copy.deepcopy(convert_pt2e(prepared, fold_quantize=True))))


def _sliced_in_int8(graph: fx.GraphModule) -> fx.GraphModule:
    """`graph` that slices int8 numbers and not the float ones they stand for, which are rounded to the same again:
    XNNPACK has no slices, so that each would be a way out of it and back (ResNet-20 with option A shortcuts: 12 % of
    its time). ONNX Runtime does this itself."""
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  registers the operators

    ops = torch.ops.quantized_decomposed
    quantize, dequantize = ops.quantize_per_tensor.default, ops.dequantize_per_tensor.default
    for node in graph.graph.find_nodes(op="call_function", target=SLICE):
        source = node.args[0]
        rounded = list(node.users)
        if source.target is dequantize and all(
            (to.target, to.args[1:]) == (quantize, source.args[1:]) for to in rounded
        ):
            node.replace_input_with(source, source.args[0])
            for user in rounded:
                user.replace_all_uses_with(node)
                graph.graph.erase_node(user)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _round_once(prepared: fx.GraphModule) -> None:
    """Nothing is observed and rounded between a layer with weights and its ReLU6: the range is that of what is left.
    Beyond it int8 would spend its steps on numbers that are cut off (MobileNetV2, 1000 classes: 6 dB)."""
    for clamp, observed in _clamped(prepared):
        if _observes(prepared, observed) and len(observed.users) == 1 and _has_weights(prepared, observed.args[0]):
            clamp.replace_input_with(observed, observed.args[0])
            prepared.graph.erase_node(observed)
    prepared.recompile()


def _round_twice(prepared: fx.GraphModule) -> None:
    """What `_round_once` took away, for the kernels of the flow "fx", which round before they clamp: in the range found
    behind the clamp."""
    for clamp, layer in _clamped(prepared):
        ranges = [user.target for user in clamp.users if _observes(prepared, user)]
        if ranges and _has_weights(prepared, layer):
            with prepared.graph.inserting_after(layer):
                clamp.replace_input_with(layer, prepared.graph.call_module(ranges[0], (layer,)))
    prepared.recompile()


def _clamped(prepared: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Each ReLU6 and what goes into it."""
    return [
        (node, node.args[0])
        for node in prepared.graph.nodes
        if node.target in CLAMPS or isinstance(_called(prepared, node), nn.Hardtanh)
    ]


def _called(prepared: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return prepared.get_submodule(node.target) if node.op == "call_module" else None


def _observes(prepared: fx.GraphModule, node: fx.Node) -> bool:
    return hasattr(_called(prepared, node), "calculate_qparams")


def _has_weights(prepared: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a convolution or a Linear, or the batch norm of one."""
    return (
        isinstance(_called(prepared, node), (nn.Conv2d, nn.Linear))
        or node.target in (LINEAR, BATCH_NORM)
        or getattr(node.target, "overloadpacket", None) in CONVOLUTIONS
    )


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
    if qat:  # not the fused ones, whose scales differ from those that converting computes
        activation = pt2e.FakeQuantize.with_args(observer=pt2e.MovingAverageMinMaxObserver, eps=eps)
        observer_of_weights = pt2e.MovingAveragePerChannelMinMaxObserver.with_args(averaging_constant=1.0)
        weight = pt2e.FakeQuantize.with_args(observer=observer_of_weights, eps=eps)
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
        quant_min=-WEIGHTS[flow],
        quant_max=WEIGHTS[flow],
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
