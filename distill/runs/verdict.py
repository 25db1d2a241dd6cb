"""Whether distilling helped: the student beside the student alone, on the same test images or over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from scipy.stats import binomtest, norm, t
from torch import Tensor

LEVEL = 0.05  # of tests, and what intervals leave out
POWER = 0.8  # with which a gain of SMALL is to be shown, where it is said how many images that takes
SMALL = 0.01  # one point
SURE = float(norm.ppf(1 - LEVEL / 2))


@dataclass(frozen=True)
class Verdict:
    """A difference of accuracies; shares in [-1, 1]."""

    gain: float
    low: float  # of the 95 % interval
    high: float
    p: float  # of no difference, two-sided
    images: int  # of the test set
    seeds: int = 1
    won: int | None = None  # images that the first answers rightly and the second doesn't
    lost: int | None = None
    images_for_a_point: int | None = None  # how many would show a gain of one point; None: not said

    @property
    def shown(self) -> bool:
        return bool(self.p < LEVEL and not self.low <= 0 <= self.high)

    def in_points(self) -> str:
        interval = f"95 % interval {points(self.low)} to {points(self.high)}"
        return f"{points(self.gain)} points ({interval}, p = {self.p:.2g})"

    def __str__(self) -> str:
        by = self.in_points()
        on = f"{self.images:,} test images" + (f", {self.seeds} seeds" if self.seeds > 1 else "")
        if self.shown:
            return f"distilling {'helped' if self.gain > 0 else 'HURT'}: {by} against the student alone on {on}"
        more = f"; about {self.images_for_a_point:,} would show one point" if self.images_for_a_point else ""
        return f"no gain can be shown with {on}: {by} against the student alone{more}"


def images_for(difference: float, differing: float) -> int:
    """How many images show a `difference` of two models' accuracies, of which a share `differing` is answered rightly
    by one of them alone, with POWER at LEVEL."""
    return ceil((SURE + float(norm.ppf(POWER))) ** 2 * differing / difference**2)


def on_images(first: Tensor, second: Tensor) -> Verdict:
    """Two models on the same images.

    p is McNemar's exact test (the binomial one of the images that only one of them answers rightly); the interval is
    Agresti and Min's (Statistics in Medicine 24, 2005): Wald's of a paired difference after adding 1/2 to each of the
    four counts, which keeps its level where few images differ.

    Args:
        first, second: whether each of N images was answered rightly, (N,) bool.
    """
    images = len(first)
    won, lost = int((first & ~second).sum()), int((second & ~first).sum())
    total, differing, difference = images + 2, won + lost + 1, won - lost
    centre = difference / total
    half = SURE * (differing - difference**2 / total) ** 0.5 / total
    needed = images_for(SMALL, max(won + lost, 1) / images)
    return Verdict(
        gain=difference / images,
        low=max(-1.0, centre - half),
        high=min(1.0, centre + half),
        p=float(binomtest(won, won + lost).pvalue) if won + lost else 1.0,
        images=images,
        won=won,
        lost=lost,
        images_for_a_point=needed if needed > images else None,
    )


def of(logits: Mapping[str, Tensor], labels: Tensor) -> Verdict | None:
    """The student beside the student alone, from their logits (N, K) and labels (N,); None where one is missing."""
    if not {"student", "student alone"} <= logits.keys():
        return None
    return on_images(*(logits[name].argmax(1) == labels for name in ("student", "student alone")))


def over_seeds(gains: Sequence[float], images: int) -> Verdict:
    """The mean of the gains of at least two seeds, each against the student alone of the same seed, with Student's
    interval and paired t-test. It covers what a seed changes (initial weights, order), not what other test images
    would."""
    count = len(gains)
    mean = sum(gains) / count
    error = (sum((gain - mean) ** 2 for gain in gains) / (count - 1) / count) ** 0.5
    half = float(t.ppf(1 - LEVEL / 2, count - 1)) * error
    p = float(2 * t.sf(abs(mean) / error, count - 1)) if error else float(mean == 0)
    return Verdict(mean, mean - half, mean + half, p, images, seeds=count)


def points(share: float) -> str:
    return f"{100 * share:+.1f}"
