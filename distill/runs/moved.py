"""Names that things had in earlier versions: in users' YAML, in finished runs' config.yaml and student.safetensors."""

from omegaconf import DictConfig, OmegaConf

MOVED = {  # old module or name: new one; what lies below goes along
    "distill.models": "distill.networks",
    "distill.schedules": "distill.training.schedules",
    "distill.loggers": "distill.training.loggers",
    "distill.runs.SweepTable": "distill.report.sweeps.SweepTable",
    "distill.runs.sweeps.SweepTable": "distill.report.sweeps.SweepTable",
    "distill.teachers.Frozen": "distill.teachers.frozen.Frozen",
    "distill.teachers.Committee": "distill.teachers.committee.Committee",
    "distill.teachers.Peer": "distill.teachers.peer.Peer",
    "distill.teachers.Ema": "distill.teachers.ema.Ema",
}


def present(cfg: DictConfig) -> DictConfig:
    """`cfg`, changed in place, with the present names."""
    _rename(cfg)
    return cfg


def _rename(node) -> None:
    for key in node if OmegaConf.is_dict(node) else range(len(node)):
        value = node._get_node(key)
        if key == "_target_" and (now := _now(value._value())) != value._value():
            value._set_value(now)
        elif OmegaConf.is_config(value) and not (value._is_missing() or value._is_none() or value._is_interpolation()):
            _rename(value)


def renamed(node):
    """Plain values (mappings, lists) in which every `_target_` at any depth has its present name."""
    if isinstance(node, dict):
        return {key: _now(value) if key == "_target_" else renamed(value) for key, value in node.items()}
    return [renamed(value) for value in node] if isinstance(node, list) else node


def _now(target):
    for old, new in MOVED.items():
        if isinstance(target, str) and f"{target}.".startswith(f"{old}."):
            return new + target[len(old) :]
    return target
