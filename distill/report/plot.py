"""Accuracy against cost, as a picture."""

import io

from distill.report.tables import ORDER, Row


def plot(rows: list[Row]) -> bytes:
    """Accuracy against file size and against latency, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = (("bytes", "file size (kB)", 1e-3), ("latency_ms", "latency of one image on one thread (ms)", 1))
    for axes, (field, label, scale) in zip(figure.subplots(1, 2), panels, strict=True):
        shown = [row for row in rows if row.top1 is not None and getattr(row, field) is not None]
        axes.set(xscale="log", xlabel=label, ylabel="top-1 accuracy (%)")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        _label_points(axes, [(getattr(row, field) * scale, row.top1 * 100, row.name) for row in shown])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _label_points(axes, points: list[tuple[float, float, str]]) -> None:
    """Draws the points and, beside each, its name; names keep a line's distance from each other."""
    if not points:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="grey")
        return
    xs, ys, _ = zip(*points, strict=True)
    margin = max((max(ys) - min(ys)) * 0.25, 0.5)
    low, high = min(ys) - margin, max(ys) + margin
    axes.set(xlim=(min(xs) / 1.7, max(xs) * 1.7), ylim=(low, high))
    line = 0.055  # the height of a line of text, as a share of the axes' height
    height = -line
    for x, y, name in sorted(points, key=lambda point: point[1]):
        height = max((y - low) / (high - low), height + line)
        to_the_right = x * x <= min(xs) * max(xs)  # of the point, when it is in the left half
        (point,) = axes.plot(x, y, "o" if name in ORDER else "^", markersize=8)
        axes.annotate(
            name,
            (x, y),
            xytext=(x * 1.06 if to_the_right else x / 1.06, height),
            textcoords=axes.get_xaxis_transform(),
            ha="left" if to_the_right else "right",
            va="center",
            fontsize=9,
            color=point.get_color(),
            arrowprops={
                "arrowstyle": "-",
                "color": point.get_color(),
                "alpha": 0.5,
                "relpos": (0 if to_the_right else 1, 0.5),  # the line starts at the name's near end
            },
        )
