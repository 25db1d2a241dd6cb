"""Many short trainings, few longer ones: what a budget pays for, and who goes on."""

from functools import partial

import pytest

from distill.training.halving import halve, plan
from distill.training.schedules import cosine, multistep, squeezed


@pytest.mark.parametrize(
    ("candidates", "budget", "full", "rungs"),
    [
        (12, 1, 5, None),
        (12, 3, 10, ((3, 1),)),
        (12, 5, 5, ((5, 1),)),  # all of them once, where halving pays for three
        (12, 9, 30, ((3, 3),)),
        (12, 30, 100, ((3, 10),)),  # the last at least a tenth of the full training
        (12, 60, 100, ((6, 4), (3, 12))),
        (12, 60, 20, ((12, 1), (4, 3), (3, 9))),
        (2, 100, 100, ((2, 50),)),
    ],
)
def test_a_budget_pays_for(candidates, budget, full, rungs):
    found = plan(candidates, budget, full)
    assert (found and found.rungs) == rungs
    assert found is None or found.cost <= budget


def test_the_best_go_on_and_the_reference_with_them():
    asked = []

    def score(candidate, epochs):
        asked.append((candidate, epochs))
        return {0: 0.1, 1: 0.5, 2: 0.9, 3: 0.8, 4: 0.3, 5: 0.2, 6: 0.4}[candidate]

    alone, usual = (lambda each: each in (0, 1)), (lambda each: each == 5)
    alive = halve(range(7), plan(7, 16, 10), score, [alone, usual])
    assert asked == [*((each, 1) for each in range(7)), (1, 3), (2, 3), (5, 3)]  # 1: the better one of its kind
    assert alive == [2, 1, 5]
    assert halve(range(3), plan(3, 3, 3), lambda *_: 0.5, [lambda each: each == 2]) == [
        0,
        1,
        2,
    ]  # a tie keeps the order


def test_a_pilot_goes_through_the_whole_schedule():
    whole = partial(cosine, warmup=5)
    pilot = partial(squeezed, schedule=whole, full=50)
    assert [pilot(epoch, 10) for epoch in (0.5, 1, 5, 10)] == [whole(epoch, 50) for epoch in (2.5, 5, 25, 50)]
    steps = partial(squeezed, schedule=partial(multistep, milestones=[150, 180]), full=240)
    assert [steps(epoch, 24) for epoch in (14.9, 15, 18)] == pytest.approx([1, 0.1, 0.01])
