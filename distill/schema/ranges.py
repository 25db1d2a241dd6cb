"""Types of options that several signatures share: what a number may be, said once and told in errors.

An option's type stands in the signature that takes it; distill/schema/values.py reads it there. Never imports torch.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval, Len
from pydantic import AfterValidator, Field, FiniteFloat

from distill.errors import UsageError
from distill.files import parse_bytes

Positive = Annotated[FiniteFloat, Gt(0)]
NotNegative = Annotated[FiniteFloat, Ge(0)]
Share = Annotated[float, Interval(ge=0, le=1)]
UpToOne = Annotated[float, Interval(gt=0, le=1)]
Inside = Annotated[float, Interval(gt=0, lt=1)]  # a share that leaves something and takes something
BelowOne = Annotated[float, Interval(ge=0, lt=1)]
Count = Annotated[int, Ge(1)]
_Px = Annotated[int, Interval(ge=1, le=8192)]
Sides = Annotated[_Px | tuple[_Px, _Px], Field(description="px of 1 to 8192, a whole number or [HEIGHT,WIDTH]")]
Number = Annotated[int, Ge(0)]
Calibration = Annotated[int, Ge(32)]  # images: a range of activations that is found on fewer is chance
Seed = Annotated[int, Interval(ge=0, le=2**63 - 1)]
OnCorrupt = Literal["stop", "skip"]  # what to do about images that can't be decoded
Positives = Annotated[Sequence[Positive], Len(1)]
Counts = Annotated[Sequence[Count], Len(1)]
_Point = tuple[NotNegative, NotNegative] | tuple[NotNegative, NotNegative, Literal["cosine"]]
Schedule = Annotated[  # over the epochs, see distill.losses.weight
    NotNegative | Annotated[Sequence[_Point], Len(1)],
    Field(description="a number of at least 0 or [[epoch, value], …] in rising epochs"),
]
Widths = tuple[Count, Count, Count]  # of three stages
Taps = Annotated[Sequence[str], Len(1)]  # names of stages or layers
TapPairs = Taps | dict[str, str]  # {the student's: the teacher's}


def _size(value: int | str) -> int | str:
    try:
        large = parse_bytes(value, "") >= 1
    except UsageError:
        large = False
    if not large:
        raise ValueError
    return value


Size = Annotated[int | str, AfterValidator(_size), Field(description="bytes or a size such as 500MB or 20GB")]


def _of_channels(values: Sequence) -> Sequence:
    if len(values) not in (1, 3):
        raise ValueError
    return values


_CHANNELS = "one number (grey images) or three (red, green, blue)"
Mean = Annotated[Sequence[FiniteFloat], AfterValidator(_of_channels), Field(description=_CHANNELS)]
Std = Annotated[Sequence[Positive], AfterValidator(_of_channels), Field(description=f"{_CHANNELS} greater than 0")]


def _rising(pair: Sequence[float]) -> Sequence[float]:
    if pair[0] > pair[1]:
        raise ValueError
    return pair


_RISING = AfterValidator(_rising)
ShareRange = Annotated[
    tuple[UpToOne, UpToOne],
    _RISING,
    Field(description="[low, high] within 0 and 1, low greater than 0"),
]
PositiveRange = Annotated[tuple[Positive, Positive], _RISING, Field(description="[low, high], low greater than 0")]


def _in_steps(first: int, step: int) -> AfterValidator:
    def check(value: int) -> int:
        if value < first or (value - first) % step:
            raise ValueError
        return value

    return AfterValidator(check)


ResNetDepth = Annotated[int, _in_steps(8, 6), Field(description="6n + 2: 8, 14, 20, 32, 44, 56, 110 …")]
WideDepth = Annotated[int, _in_steps(10, 6), Field(description="6n + 4: 10, 16, 22, 28, 40 …")]
Precision = Literal[
    "auto", "32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "16-true", 32, 64, 16, "32", "64", "16", "bf16"
]
TeacherPrecision = Literal["auto", "32-true", "bf16-mixed", "16-mixed", "int8", 32, 16, "32", "16", "bf16"]
