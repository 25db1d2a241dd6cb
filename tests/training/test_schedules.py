import math

import pytest

from distill.errors import UsageError
from distill.losses.weight import check_weight, weight_at
from distill.training.schedules import cosine, multistep


def test_cosine_warms_up_then_falls_to_its_floor():
    assert [cosine(epoch, 10, warmup=2) for epoch in (0, 1, 2)] == [0, 0.5, 1]
    assert cosine(6, 10, warmup=2, floor=0.1) == pytest.approx(0.1 + 0.9 * 0.5)
    assert cosine(10, 10, warmup=2, floor=0.1) == pytest.approx(0.1)
    assert cosine(3, 10) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.3)))


def test_multistep_falls_at_every_milestone():
    factors = [multistep(epoch, 240, [150, 180, 210]) for epoch in (0, 149.9, 150, 180, 239)]
    assert factors == pytest.approx([1, 1, 0.1, 0.01, 0.001])


def test_a_weight_is_linear_between_its_points_and_constant_outside():
    ramp = [[2, 0.0], [4, 1.0]]
    assert [weight_at(ramp, epoch) for epoch in (0, 2, 3, 4, 9)] == [0, 0, 0.5, 1, 1]
    jump = [[0, 1.0], [3, 1.0], [3, 0.0]]
    assert [weight_at(jump, epoch) for epoch in (0, 2.9, 3, 5)] == [1, 1, 0, 0]
    assert weight_at(0.7, 5) == 0.7
    fall = [[150, 600.0], [240, 0.0, "cosine"]]
    assert [weight_at(fall, epoch) for epoch in (0, 150, 180, 195, 240, 300)] == pytest.approx(
        [600, 600, 450, 300, 0, 0]
    )
    check_weight("kd", fall)


@pytest.mark.parametrize(
    "weight", ["heavy", True, [], [1, 2], [[0, "a"]], [[3, 1], [1, 0]], [[0]], [[0, 1], [2, 1, "sine"]]]
)
def test_a_wrong_weight_is_refused(weight):
    with pytest.raises(UsageError, match=r"loss.kd.weight"):
        check_weight("kd", weight)
