"""Plots as SVG: points with names, and curves. All that is text in them is escaped."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from rich.cells import cell_len

from distill.report.labels import Box, nearest, place, shortened
from distill.report.marks import OUTLINES, Mark

WIDTH, HEIGHT = 440, 320
INNER = Box(52, 12, WIDTH - 14, HEIGHT - 42)  # of the axes
FONT = 11  # px, monospace: so that a text's width is known without a browser
ADVANCE, LINE = 0.62 * FONT, 1.3 * FONT
RADIUS = 5.5
LONGEST = 26  # signs of a point's label; the legend has the whole name
MOST = 400  # points of a curve
NAMED, STAGE = 18, 24  # signs of a waterfall's label, px of its row


class Point(NamedTuple):
    label: str
    x: float
    y: float
    mark: Mark


class Curve(NamedTuple):
    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    dash: str = ""  # as SVG's stroke-dasharray


class Stage(NamedTuple):
    """A row of a waterfall: from one value to the next, which lies between `low` and `high`; or just a value."""

    label: str
    value: float
    said: str  # at its right
    colour: str
    before: float | None = None
    low: float | None = None
    high: float | None = None


class Scale(NamedTuple):
    """From values to px; `whole` numbers are named on it where it has no others."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log10(each) if self.log else each for each in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / (high - low)


def scatter(points: Sequence[Point], xlabel: str, ylabel: str) -> str:
    """Points with positive x on a logarithmic axis, each with its label where there is room, and the line of those that
    none is better than in both."""
    if not points:
        return nothing()
    xs, ys = [point.x for point in points], [point.y for point in points]
    margin = max((max(ys) - min(ys)) * 0.2, 0.5)
    across = Scale(min(xs) / 1.6, max(xs) * 1.6, INNER.left, INNER.right, log=True)
    down = Scale(min(ys) - margin, max(ys) + margin, INNER.bottom, INNER.top)
    places = [(across(point.x), down(point.y)) for point in points]
    labels = [shortened(point.label, LONGEST) for point in points]
    boxes = place(places, [(ADVANCE * cell_len(label), LINE) for label in labels], INNER, RADIUS)
    body = [_axes(across, down, xlabel, ylabel), _front(points, across, down)]
    for (x, y), box, point in zip(places, boxes, points, strict=True):
        if box is not None:
            near = nearest((x, y), box)
            body.append(
                f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{near[0]:.1f}" y2="{near[1]:.1f}" stroke="{point.mark.colour}" '
                'stroke-opacity=".45"/>'
            )
    body += [outline(point.mark, x, y, RADIUS, point.label) for (x, y), point in zip(places, points, strict=True)]
    for box, label, point in zip(boxes, labels, points, strict=True):
        if box is not None:
            body.append(
                f'<text class="label" x="{box.left:.1f}" y="{box.bottom - 0.3 * FONT:.1f}" '
                f'fill="{point.mark.colour}">{escape(label)}</text>'
            )
    return _svg(body, f"{ylabel} by {xlabel}")


def curves(lines: Sequence[Curve], xlabel: str, ylabel: str, bounds: tuple[float, float] | None = None) -> str:
    """Lines over a common axis; `bounds`: of y, at least."""
    values = [y for line in lines for y in line.ys]
    if not values:
        return nothing()
    low, high = min(values + list(bounds or ())), max(values + list(bounds or ()))
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1
    xs = [x for line in lines for x in line.xs]
    first, last = min(xs), max(xs)
    whole = all(float(x).is_integer() for x in xs) and last > 1
    across = Scale(first, last if last > first else first + 1, INNER.left, INNER.right, whole=whole)
    down = Scale(low - margin, high + margin, INNER.bottom, INNER.top)
    body = [_axes(across, down, xlabel, ylabel)]
    for line in lines:
        step = max(1, math.ceil(len(line.xs) / MOST))
        kept = [*zip(line.xs, line.ys, strict=True)][::step]
        if step > 1:
            kept.append((line.xs[-1], line.ys[-1]))
        corners = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in kept)
        look = f'stroke="{line.colour}" stroke-width="1.8"' + (f' stroke-dasharray="{line.dash}"' if line.dash else "")
        body.append(f'<polyline points="{corners}" fill="none" {look}><title>{escape(line.label)}</title></polyline>')
        if len(kept) <= 20:
            body += [f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="2.2" fill="{line.colour}"/>' for x, y in kept]
    return _svg(body, f"{ylabel} by {xlabel}")


def waterfall(stages: Sequence[Stage], xlabel: str) -> str:
    """Values that follow from each other, downwards: a bar from each to the next, with its interval as a line."""
    left, right = ADVANCE * (NAMED + 1), WIDTH - ADVANCE * (max(len(stage.said) for stage in stages) + 1)
    values = [each for stage in stages for each in (stage.value, stage.low, stage.high) if each is not None]
    margin = (max(values) - min(values)) * 0.05 or 0.5
    across = Scale(min(values) - margin, max(values) + margin, left, right)
    height = STAGE * len(stages)
    body, end = [], -math.inf
    for value in ticks(across.low, across.high):
        x, words = across(value), f"{value:.5g}"
        half = ADVANCE * len(words) / 2
        body.append(f'<line class="grid" x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{height}"/>')
        if x - half > end + 4:
            body.append(f'<text class="tick" x="{x:.1f}" y="{height + 13}" text-anchor="middle">{words}</text>')
            end = x + half
    for number, stage in enumerate(stages):
        y, x = STAGE * (number + 0.5), across(stage.value)
        base = y + 0.35 * FONT
        body.append(f'<text x="0" y="{base:.1f}">{escape(shortened(stage.label, NAMED))}</text>')
        body.append(f'<text x="{WIDTH}" y="{base:.1f}" text-anchor="end">{escape(stage.said)}</text>')
        if stage.before is None:
            body.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{stage.colour}"/>')
        else:
            start, end = sorted((x, across(stage.before)))
            width = max(end - start, 1.5)
            body.append(
                f'<rect x="{start:.1f}" y="{y - 6:.1f}" width="{width:.1f}" height="12" fill="{stage.colour}"/>'
            )
        if stage.low is not None and stage.high is not None:
            ends = across(stage.low), across(stage.high)
            body.append(f'<line x1="{ends[0]:.1f}" y1="{y:.1f}" x2="{ends[1]:.1f}" y2="{y:.1f}" stroke="#1c1c1c"/>')
            body += [
                f'<line x1="{x:.1f}" y1="{y - 3:.1f}" x2="{x:.1f}" y2="{y + 3:.1f}" stroke="#1c1c1c"/>' for x in ends
            ]
        if number + 1 < len(stages):
            under = f'y1="{y:.1f}" x2="{x:.1f}" y2="{y + STAGE:.1f}" stroke="#777" stroke-dasharray="1 2"'
            body.append(f'<line x1="{x:.1f}" {under}/>')
    middle = (left + right) / 2
    under = f'<text class="tick" x="{middle:.1f}" y="{height + 28}" text-anchor="middle">{escape(xlabel)}</text>'
    return _svg([*body, under], ", ".join(f"{stage.label} {stage.said}" for stage in stages), height + 34)


def nothing() -> str:
    return '<p class="quiet">Not measured.</p>'


def outline(mark: Mark, x: float, y: float, radius: float, title: str = "") -> str:
    """A mark's shape around (x, y)."""
    corners = " ".join(f"{x + radius * across:.1f},{y + radius * down:.1f}" for across, down in OUTLINES[mark.shape])
    told = f"<title>{escape(title)}</title>" if title else ""
    look = f'fill="{mark.colour}" stroke="#fff" stroke-width=".8"'
    return f'<polygon class="mark" points="{corners}" {look}>{told}</polygon>'


def key(mark: Mark) -> str:
    """A mark for a legend."""
    return _key(16, outline(mark, 8, 8, 6.5))


def key_line(colour: str, dash: str = "") -> str:
    """A curve for a legend."""
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return _key(26, f'<line x1="1" y1="8" x2="25" y2="8" stroke="{colour}" stroke-width="2.2"{dashed}/>')


def _key(width: int, body: str) -> str:
    return f'<svg class="key" viewBox="0 0 {width} 16" width="{width}" height="16" aria-hidden="true">{body}</svg>'


def ticks(low: float, high: float, log: bool = False, whole: bool = False) -> list[float]:
    """Round numbers between two others, about five; `whole` ones."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1, 2, 3, 5), (1, 3), (1,)):
            found = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
            if len(found) <= 7:
                break
        return found if len(found) > 1 else ticks(low, high)
    raw = max((high - low) / 5, 1 if whole else 0)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(
        factor for factor in ((1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)) if factor * unit >= 0.8 * raw
    )
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _axes(across: Scale, down: Scale, xlabel: str, ylabel: str) -> str:
    parts = []
    middle = (INNER.left + INNER.right) / 2

    def text(x: float, y: float, words: str, anchor: str, turn: str = "") -> str:
        return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{escape(words)}</text>'

    end = -math.inf
    for value in ticks(across.low, across.high, across.log, across.whole):
        x, words = across(value), f"{value:g}"
        half = ADVANCE * len(words) / 2
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{INNER.top}" x2="{x:.1f}" y2="{INNER.bottom}"/>')
        if x - half > end + 4 and x + half < WIDTH:
            parts.append(text(x, INNER.bottom + 14, words, "middle"))
            end = x + half
    for value in ticks(down.low, down.high):
        y = down(value)
        parts.append(f'<line class="grid" x1="{INNER.left}" y1="{y:.1f}" x2="{INNER.right}" y2="{y:.1f}"/>')
        parts.append(text(INNER.left - 5, y + 0.35 * FONT, f"{value:.5g}", "end"))
    parts.append(text(middle, HEIGHT - 8, xlabel, "middle"))
    upright = (INNER.top + INNER.bottom) / 2
    parts.append(text(11, upright, ylabel, "middle", f' transform="rotate(-90 11 {upright:.1f})"'))
    return "".join(parts)


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the line through the points (x, y) than which none has both more y and less x: the Pareto front."""
    best, corners = -math.inf, []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if y > best:
            corners += [(x, best), (x, y)] if corners else [(x, y)]
            best = y
    return corners


def _front(points: Sequence[Point], across: Scale, down: Scale) -> str:
    corners = front((point.x, point.y) for point in points)
    return f'<polyline class="front" points="{" ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in corners)}"/>'


FAMILY = "ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace"


def _svg(body: Sequence[str], title: str, height: float = HEIGHT) -> str:
    look = f'font-family="{FAMILY}" font-size="{FONT}"'
    view = f'viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}"'
    return f'<svg class="plot" {view} {look}>{"".join(body)}</svg>'
