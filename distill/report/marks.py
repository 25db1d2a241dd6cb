"""How a model looks in every plot of every run: a colour and a shape, which follow from its name alone."""

import colorsys
import hashlib
import math
from pathlib import PurePath
from typing import NamedTuple


class Mark(NamedTuple):
    colour: str  # "#rrggbb"
    shape: str  # a key of OUTLINES


NETWORKS = {
    "teacher": Mark("#3d3d3d", "square"),
    "student alone": Mark("#d95f02", "diamond"),
    "student": Mark("#1f5fbf", "circle"),
    "student (last epoch)": Mark("#5b9bd5", "pentagon"),
}
SHAPES = {".pt": "up", ".ptl": "down", ".pte": "star", ".onnx": "plus", ".pt2": "hexagon"}  # of files, by their format
COLOURS = {  # of files, by what was done to the student
    "": "#1f5fbf",
    "dynamic_int8": "#1b8a3a",
    "weight_only_int8": "#8a6d00",
    "static_int8": "#c4161c",
    "qat_int8": "#8e44ad",
    "prune": "#c2187a",
    "low_rank": "#00838f",
    "sparsify": "#7a4a2b",
    "fp16": "#5f7a1f",
    "bf16": "#b36b00",
    "auto": "#4b3fb5",
}


def mark(name: str) -> Mark:
    """Of a report's row."""
    if name in NETWORKS:
        return NETWORKS[name]
    path = PurePath(name)
    return Mark(colour(path.stem.removeprefix("student").removeprefix("-")), SHAPES.get(path.suffix, "cross"))


def colour(name: str) -> str:
    """A colour that is dark enough on white: the known ones', or one that the letters of the name decide."""
    if name in COLOURS:
        return COLOURS[name]
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    red, green, blue = colorsys.hls_to_rgb(digest[0] / 256, 0.3 + digest[1] % 3 * 0.06, 0.55 + digest[2] % 2 * 0.3)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _polygon(corners: int, turn: float, inner: float = 1, size: float = 1) -> list[tuple[float, float]]:
    """Corners of a regular polygon, or of a star, whose odd corners are nearer to the middle."""
    angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
    radii = [size * (1 if corner % 2 == 0 else inner) for corner in range(corners)]
    return [(r * math.sin(angle), -r * math.cos(angle)) for angle, r in zip(angles, radii, strict=True)]


_W = 0.38
_PLUS = [
    *((-_W, -1), (_W, -1), (_W, -_W), (1, -_W), (1, _W), (_W, _W)),
    *((_W, 1), (-_W, 1), (-_W, _W), (-1, _W), (-1, -_W), (-_W, -_W)),
]
OUTLINES = {  # corners within the circle of radius 1, or a little out of it; y points down
    "circle": _polygon(24, 0),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "diamond": _polygon(4, 0),
    "pentagon": _polygon(5, 0),
    "hexagon": _polygon(6, 0),
    "up": _polygon(3, 0, size=1.2),
    "down": _polygon(3, math.pi, size=1.2),
    "star": _polygon(10, 0, 0.45, size=1.2),
    "plus": _PLUS,
    "cross": [((x - y) / math.sqrt(2), (x + y) / math.sqrt(2)) for x, y in _PLUS],
}
