"""What a run has made, as trackers are told of it."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from distill.report.tables import Row, cells, ordered
from distill.runs.student import STUDENT
from distill.training.trackers import Made


def made_by(rows: list[Row], folder: Path, details: Mapping, teacher: str | None, taught_by: Sequence[Path]) -> Made:
    """Of the run whose report is in `folder`; `details` as in distill.report.details, the rest as in Made."""
    rows = ordered(rows)
    head, *table = cells(rows, short=False)
    exported = [path for row in rows if (path := folder / "export" / row.name).exists()]
    worst = [
        (
            base64.b64decode(each["picture"].partition(",")[2]),
            f"{each['label']}, taken for {each['said']['student'][0]}",
        )
        for each in details["worst"]
    ]
    figures = {row.name: {key: v for key, v in asdict(row).items() if isinstance(v, (int, float))} for row in rows}
    weights = [path for path in [folder / STUDENT] if path.is_file()]
    return Made(
        folder, figures, head, table, _confusions(details["confused"]), worst, [*weights, *exported], teacher, taught_by
    )


def _confusions(confused: Mapping) -> list[tuple[str, str, int]]:
    """[class, answer, images]"""
    if "pairs" in confused:
        return [tuple(pair) for pair in confused["pairs"]]
    names = confused["names"]
    return [
        (actual, predicted, images)
        for actual, row in zip(names, confused["matrix"], strict=True)
        for predicted, images in zip(names, row, strict=True)
    ]


def _decoded(picture: str) -> bytes:
    """Of a data: URI."""
    return base64.b64decode(picture.partition(",")[2])
