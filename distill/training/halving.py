"""Successive halving (Jamieson and Talwalkar, AISTATS 2016): many short trainings, few longer ones, by a budget."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

ETA = 3  # of ETA candidates one goes on, for ETA times as long
LEAST = 0.1  # of the full training: what is shorter says little of it


@dataclass(frozen=True)
class Plan:
    """How many candidates are trained for how many epochs, rung by rung."""

    rungs: tuple[tuple[int, int], ...]

    @property
    def cost(self) -> int:
        """Epochs in all."""
        return sum(count * epochs for count, epochs in self.rungs)


def plan(candidates: int, budget: int, full: int) -> Plan | None:
    """The most candidates, then the longest last trainings, that `budget` epochs pay for: halved down to ETA, or all of
    them once where that is all that is paid for. The last ones are at least LEAST as long as the full training of
    `full` epochs; None: it doesn't even pay for two.
    """
    found = [
        each
        for count in range(2, candidates + 1)
        for first in range(1, budget // count + 1)
        for each in (Plan(((count, first),)), _rungs(count, first))
        if each.cost <= budget and each.rungs[-1][1] >= LEAST * full
    ]
    return max(found, key=lambda each: (each.rungs[0][0], each.rungs[-1][1]), default=None)


def _rungs(count: int, epochs: int) -> Plan:
    rungs = [(count, epochs)]
    while count > ETA:
        count, epochs = max(ETA, count // ETA), epochs * ETA
        rungs.append((count, epochs))
    return Plan(tuple(rungs))


def halve(
    candidates: Sequence[int],
    plan: Plan,
    score: Callable[[int, int], float],
    anchors: Sequence[Callable[[int], bool]],
) -> list[int]:
    """The candidates that reach the last rung, the best first.

    Args:
        score: (candidate, epochs) to what is to be large.
        anchors: which candidates the others are compared with in the end: of each kind the best always goes on.
    """
    alive = list(candidates)
    for count, epochs in plan.rungs:
        kept = {next(each for each in alive if anchor(each)) for anchor in anchors}
        for each in alive:
            if len(kept) < count:
                kept.add(each)
        alive = sorted(sorted(kept), key=lambda each: -score(each, epochs))  # of equals the one that stands first
    return alive
