"""How the optimizer treats a training's parameters: which are decayed, and how fast each learns beside the others."""

from collections.abc import Iterable, Iterator

from torch import fx, nn
from torch.optim import Optimizer

from distill.errors import UserError
from distill.networks.network import SIZE, Network
from distill.networks.taps import dry_run, heads, infer_taps
from distill.progress import say

DEFAULTS = {"decay_norms": True, "head_lr": 1.0, "layer_decay": None}  # one group of all


def grouped(
    parts: Iterable[nn.Module], decay_norms: bool = True, head_lr: float = 1.0, layer_decay: float | None = None
) -> list[dict]:
    """What `parts` learn with, in groups for an optimizer: those of one treatment together, in the order of `parts`.

    A group's "lr_scale" is the share of the rate that its parameters take, for `scale` to apply. A network that
    compression made may have no head or stages that can be found, a captured graph for one: a line says so, and all of
    it learns at one rate.

    Args:
        parts: the student, the losses, a teacher that learns along.
        decay_norms: false: no weight decay for vectors (norms, biases) nor for what a network of timm's excludes, as
            timm groups them.
        head_lr: of the classifiers, and of what losses learn, which is new as those are.
        layer_decay: the last stage learns at so many times the rate of what follows it, the stage before it at so
            many times that, and so on to the first, which begins with the image (Clark et al. 2020, §3.1.3; Bao et
            al. 2022). None: all stages at one rate.

    Raises:
        UserError: head_lr or layer_decay, and a network of the configuration in which no head or no stages are found.
    """
    groups: dict[tuple[float, bool], dict] = {}
    for parameter, share, decays in _treated(parts, head_lr, layer_decay):
        decays = decays or decay_norms
        empty = {"params": [], "lr_scale": share} | ({} if decays else {"weight_decay": 0.0})
        groups.setdefault((share, decays), empty)["params"].append(parameter)
    return list(groups.values())


def scale(optimizer: Optimizer) -> None:
    """Give each group of an optimizer that was made with one rate its share of it."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group["lr_scale"]


def rate(optimizer: Optimizer) -> float:
    """The rate that groups have their shares of; in a run that began before there were shares, the only one."""
    group = optimizer.param_groups[0]
    return group["lr"] / group.get("lr_scale", 1.0)


def _treated(
    parts: Iterable[nn.Module], head_lr: float, layer_decay: float | None
) -> Iterator[tuple[nn.Parameter, float, bool]]:
    """(parameter, its share of the rate, whether it decays where vectors don't) of all that learns, each once."""
    seen = set()
    for part in parts:
        shares, undecayed = {}, set()
        for network in (module for module in part.modules() if isinstance(module, Network)):
            excluded = getattr(network.net, "no_weight_decay", set)()
            undecayed |= {parameter for name, parameter in network.net.named_parameters() if name in excluded}
            shares |= _shares(network, head_lr, layer_decay) if _learns(network) else {}
        for name, parameter in part.named_parameters():
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                vector = parameter.ndim < 2 or name.endswith(".bias") or parameter in undecayed
                yield parameter, shares.get(parameter, head_lr), not vector


def _learns(network: Network) -> bool:
    return any(parameter.requires_grad for parameter in network.parameters())


def _shares(network: Network, head_lr: float, layer_decay: float | None) -> dict[nn.Parameter, float]:
    """The share of the rate of each of a network's parameters."""
    net, images = network.net, (network.image_size or SIZE, len(network.normalize.mean))
    captured = any(isinstance(module, fx.GraphModule) for module in net.modules())
    classifiers = heads(net, *images) if head_lr != 1 and not captured else []
    depths = stage_depths(network) if layer_decay is not None and not captured else {}
    absent = [*(["head"] if head_lr != 1 and not classifiers else [])]
    absent += ["stages"] if layer_decay is not None and not depths else []
    if absent:
        found = f"no {' and no '.join(absent)} found in {type(net).__name__}"
        if network.role:
            raise UserError(
                f"parameters: {found}; leave parameters.head_lr=1 and parameters.layer_decay=null, or name the stages: "
                f"{network.role}.taps={{stage1: LAYER, …}}"
            )
        say(f"  parameters: {found}, so all of it learns at one rate")
    last = max(depths.values(), default=0)
    return {
        parameter: (head_lr if any(name.startswith(f"{path}.") for path in classifiers) else 1.0)
        * (layer_decay ** (last - _depth(name, depths, last)) if depths else 1.0)
        for name, parameter in net.named_parameters()
    }


def _depth(name: str, depths: dict[str, int], otherwise: int) -> int:
    """A parameter's: that of the module that holds it or, where that is never called, of the next one around it."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        if path in depths:
            return depths[path]
    return otherwise


def stage_depths(network: Network) -> dict[str, int]:
    """By the path of each module that is called: how many stages are finished when it is called first. What lies in the
    first stage or before it has 0, what follows the last one, such as the head, the number of stages. Found by running;
    empty where no stages are known."""
    images = (network.image_size or SIZE, len(network.normalize.mean))
    taps, modules = network.taps or infer_taps(network.net, *images), dict(network.net.named_modules())
    stages = {path.partition(":")[0] for tap, path in taps.items() if tap.startswith("stage")} & modules.keys()
    finished, depths = set(), {}

    def begins(path: str):
        def hook(module, inputs) -> None:
            depths.setdefault(path, len(finished))

        return hook

    def ends(path: str):
        def hook(module, inputs, output) -> None:
            finished.add(path)

        return hook

    hooks = [module.register_forward_pre_hook(begins(path)) for path, module in modules.items()]
    hooks += [modules[path].register_forward_hook(ends(path)) for path in stages]
    try:
        dry_run(network.net, *images)
    finally:
        for hook in hooks:
            hook.remove()
    return depths if stages else {}
