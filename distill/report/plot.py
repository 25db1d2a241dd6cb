"""Accuracy against cost, as a picture."""

import io
from collections.abc import Sequence

from distill.report.labels import Box, nearest, place, shortened
from distill.report.marks import OUTLINES, mark
from distill.report.svg import front
from distill.report.tables import Row

FRONT = {"color": "#999999", "linestyle": "--", "linewidth": 1, "label": "_front"}  # no entry of the legend
RADIUS, FONT, LONGEST = 7, 9, 40  # of a mark in px, of names in points; signs of a name


def plot(rows: Sequence[Row], names: Sequence[str] | None = None) -> bytes:
    """Accuracy against file size and against latency, as a PNG.

    Args:
        names: of the points, where they aren't their rows': those of several runs, and with their Pareto front.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(12, 5.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("bytes", "size (kB)", 1e-3), ("latency_ms", "latency of one image on one thread (ms)", 1))
    drawn = []
    for axes, (field, label, scale) in zip(figure.subplots(1, 2), panels, strict=True):
        named = zip(rows, names or [row.name for row in rows], strict=True)
        shown = [(row, name) for row, name in named if row.top1 is not None and (getattr(row, field) or 0) > 0]
        axes.set(xscale="log", xlabel=label, ylabel="top-1 accuracy (%)")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        points = [(getattr(row, field) * scale, row.top1 * 100, row.name, name) for row, name in shown]
        drawn.append((axes, points))
        if names:
            corners = front((x, y) for x, y, _, _ in points)
            axes.plot([x for x, _ in corners], [y for _, y in corners], **FRONT)
        _mark(axes, points)
    lines = [line for axes, _ in drawn for line in axes.lines]
    handles = {line.get_label(): line for line in lines if not line.get_label().startswith("_")}
    if handles:
        columns = min(5, len(handles))
        figure.legend(
            [*handles.values()], [*handles], loc="outside lower center", ncols=columns, fontsize=FONT, frameon=False
        )
    figure.draw_without_rendering()  # the places of things are final then
    for axes, points in drawn:
        _label(axes, points)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _text(name: str) -> str:
    """A name that perhaps a stranger gave: neither mathematics nor what no font has."""
    return shortened(name, LONGEST).encode("utf-8", "replace").decode().replace("$", r"\$")


def _mark(axes, points: list[tuple[float, float, str, str]]) -> None:
    """The points (x, y, model, name), each as its model looks everywhere."""
    if not points:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="grey")
        return
    xs, ys, _, _ = zip(*points, strict=True)
    margin = max((max(ys) - min(ys)) * 0.25, 0.5)
    axes.set(xlim=(min(xs) / 1.7, max(xs) * 1.7), ylim=(min(ys) - margin, max(ys) + margin))
    for x, y, model, _ in points:
        look = mark(model)
        corners = [(across, -down) for across, down in OUTLINES[look.shape]]
        axes.plot(
            x,
            y,
            marker=[*corners, corners[0]],
            markersize=10,
            color=look.colour,
            linestyle="",
            label=_text(model),
        )


def _label(axes, points: list[tuple[float, float, str, str]]) -> list[Box]:
    """Beside each point its name, where there is room; the boxes of these, in px from the top."""
    renderer = axes.figure.canvas.get_renderer()
    window, boxes = axes.get_window_extent(renderer), []
    texts = [
        axes.annotate(
            _text(name),
            (x, y),
            xytext=(0, 0),
            textcoords="figure pixels",
            fontsize=FONT,
            color=mark(model).colour,
        )
        for x, y, model, name in points
    ]
    sizes = [(extent.width + 2, extent.height + 2) for extent in (each.get_window_extent(renderer) for each in texts)]
    places = [(x, -y) for x, y in (axes.transData.transform((x, y)) for x, y, _, _ in points)]
    free = place(places, sizes, Box(window.x0, -window.y1, window.x1, -window.y0), RADIUS)
    for text, box, (x, y) in zip(texts, free, places, strict=True):
        if box is None:
            text.remove()
            continue
        text.set_position((box.left + 1, -box.bottom + 1))
        boxes.append(box)
        near = nearest((x, y), box)
        ends = axes.transData.inverted().transform([(x, -y), (near[0], -near[1])])
        axes.plot(*ends.T, color=text.get_color(), alpha=0.45, linewidth=0.8, scalex=False, scaley=False)
    return boxes
