"""The types of options that no target's signature has: those of a run, of a role, and ranges that others' signatures
leave open. Their defaults and what they are for stand in conf/. Never imports torch."""

from collections import ChainMap
from collections.abc import Sequence
from fnmatch import fnmatchcase
from types import EllipsisType
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Interval
from pydantic import Field
from typing_extensions import TypedDict

from distill.schema.ranges import (
    BelowOne,
    Count,
    Mean,
    NotNegative,
    Number,
    Positive,
    Precision,
    Seed,
    Share,
    Size,
    Std,
    TeacherPrecision,
    UpToOne,
)
from distill.schema.signatures import Signature

Stage = Literal["check", "teacher", "cache", "distill", "compress", "export", "report"]
Accelerator = Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"]
Strategy = Annotated[
    str,
    Field(
        pattern=r"^(auto|single_\w+|xla\w*|ddp(_spawn|_fork|_notebook)?(_find_unused_parameters_(true|false))?"
        r"|fsdp(_cpu_offload)?|deepspeed\w*)$",
        description="one of Lightning's strategies: auto, ddp, ddp_spawn, ddp_find_unused_parameters_true, fsdp …",
    ),
]
Dashed = Annotated[str, Field(pattern=r"^(auto|-1|\d+(,\d+)*)$")]
Devices = Annotated[
    Count | Literal[-1] | list[Number] | Dashed,
    Field(description="auto, how many (-1: all), or a list of their numbers"),
]
Batches = Count | Annotated[float, Interval(gt=0, le=1)] | None
ValidationBatches = Annotated[
    Batches, Field(description="at least 1 batch, or a share up to 1: what ships is chosen on validation images")
]
Candidate = Annotated[
    TypedDict("Candidate", {"words": list[str], "rate": Positive}),
    Field(description="{words: [WORD, ...], rate: FACTOR}, the words being those of the command line"),
]
Whole = "a whole number of at least {}; stages= leaves training out"


class Run:
    """conf/train.yaml."""

    name: str | int
    run: str | None
    stages: list[Stage]
    seed: Seed
    baseline: bool
    select: Literal["best", "last"]
    ema: BelowOne | None
    deterministic: bool
    compile: bool
    early_stopping: Count | None
    on_divergence: Literal["stop", "back"]
    checkpoint_every: Count
    restart: bool
    force: bool
    trust: bool
    store: str
    augment: dict
    loss: dict
    recipe: dict
    logger: dict
    compress: dict
    export: dict
    parameters: dict
    budget: dict
    tolerance: dict
    cache: dict
    data: dict
    teacher: dict
    student: dict
    optimizer: dict
    schedule: dict
    trainer: dict


class Cache:
    keep: Literal["auto", "logits", "features", "off"]
    views: Count | None
    seed: Seed
    top_k: Count | None
    dtype: Literal["float32", "float16", "bfloat16"]
    budget: Size
    folder: str


class Parameters:
    decay_norms: bool
    head_lr: Positive
    layer_decay: UpToOne | None


class Budget:
    bytes: Size | None
    latency_ms: Positive | None
    accuracy_drop: Share
    files: Literal["every", "one"]


class Pilots:
    """conf/recipe/auto.yaml."""

    share: Positive
    tell_apart: Annotated[float, Interval(gt=0, lt=1)]
    candidates: list[Candidate]


class Tolerance:
    file: dict
    float: dict
    rounding: dict
    compressed: dict


class Bounds:
    snr: float | None
    agreement: Share | None
    logit: NotNegative | None
    beside: NotNegative | None
    floor: float | None
    least: Share | None
    accuracy_drop: Share | None


class Student:
    checkpoint: str | None
    taps: dict[str, str] | None
    mean: Mean
    std: Std


class Teacher(Student):
    fit: dict
    precision: TeacherPrecision
    untrained: bool


class Fit:
    epochs: Annotated[int, Ge(0), Field(description=Whole.format(0))] | None
    lr: NotNegative | None
    seed: Seed


class Loading:
    """Of conf/data, whatever the image set takes."""

    batch_size: Count
    num_workers: Number | None


class Term:
    """A loss's weight has a check of its own, distill.losses.weight.check_weight."""

    weight: Any


class Optimizer:
    lr: NotNegative
    momentum: BelowOne
    weight_decay: NotNegative
    dampening: Share
    betas: tuple[BelowOne, BelowOne]
    eps: NotNegative


class Trainer:
    """The options of Lightning's Trainer that are honoured; ...: its own type is enough."""

    accelerator: Accelerator
    strategy: Strategy
    devices: Devices
    num_nodes: Annotated[Count | Literal["auto"], Field(description="a whole number of at least 1, or auto")]
    precision: Precision
    max_epochs: Annotated[int, Ge(1), Field(description=Whole.format(1))]
    min_epochs: Number | None
    limit_train_batches: Batches
    limit_val_batches: ValidationBatches
    accumulate_grad_batches: Count
    gradient_clip_val: NotNegative | None
    gradient_clip_algorithm: Literal["norm", "value"] | None
    deterministic: EllipsisType
    benchmark: EllipsisType
    inference_mode: EllipsisType
    detect_anomaly: EllipsisType
    profiler: Literal["simple", "advanced", "pytorch", "xla"] | None
    sync_batchnorm: EllipsisType
    log_every_n_steps: Number | None
    default_root_dir: EllipsisType


MODELS: Sequence[tuple[str, type]] = (  # by the key of the part that holds them; the first that matches
    ("", Run),
    ("cache", Cache),
    ("parameters", Parameters),
    ("budget", Budget),
    ("recipe", Pilots),
    ("tolerance", Tolerance),
    ("tolerance.*", Bounds),
    ("data", Loading),
    ("loss.*", Term),
    ("optimizer", Optimizer),
    ("trainer", Trainer),
    ("student", Student),
    ("teacher.network", Student),
    ("teacher.fit", Fit),
    ("teacher.members.*.fit", Fit),
    ("teacher", Teacher),
    ("teacher.members.*", Teacher),
)
RANGES = (Optimizer, Trainer)  # of arguments that a signature has already
OPEN = (Run,)  # where a user's own values may stand, for others to point at
WHOLE = (Run, Cache, Parameters, Budget, Tolerance, Fit, Student, Teacher)  # all of it must be there
NEEDED = {Optimizer: ("lr",), Trainer: ("max_epochs", "accelerator", "precision")}


def within(key: str, signature: Signature | None) -> Signature | None:
    """What a part of the configuration takes.

    Args:
        key: dotted, of the part.
        signature: of its `_target_`; None: it has none, or one that is not known.
    """
    model = next(
        (each for pattern, each in MODELS if fnmatchcase(key, pattern) and _depth(key) == _depth(pattern)), None
    )
    if model is None:
        return signature
    hints = {name: kind for name, kind in hints_of(model).items() if kind is not EllipsisType}
    required = NEEDED.get(model, tuple(hints) if model in WHOLE else ())
    if signature is None:
        return Signature(hints, required, Any if model in (*OPEN, *RANGES, Term, Loading, Student, Teacher) else None)
    if model in RANGES:
        hints = {name: kind for name, kind in hints.items() if name in signature.types}
    elif "members" in signature.types or "network" in signature.types or "student" in signature.types:
        required = ()  # a teacher that isn't one network
    return Signature(ChainMap(hints, signature.types), (*signature.required, *required), signature.others)


def hints_of(model: type) -> dict[str, Any]:
    """An option model's types by name."""
    return get_type_hints(model, include_extras=True)


def _depth(key: str) -> int:
    return key.count(".")
