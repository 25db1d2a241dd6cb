"""What a run has made, as trackers are told of it."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distill.report.tables import Row, cells, ordered
from distill.runs.student import STUDENT


@dataclass(frozen=True)
class Made:
    """What a run has made, in its `folder`.

    Attributes:
        figures: by model or file, what was measured of it: numbers.
        head, table: of the report, texts.
        confused: [class, answer, images] of the student on the test images, the most frequent where classes are many.
        worst: PNG or JPEG and a caption of the images that the student got wrong, being most sure.
        files: the student's weights, and what was exported.
        teacher: hash of the weights; None: it learned along.
        taught_by: files of the teacher's weights.
    """

    folder: Path
    figures: Mapping[str, Mapping[str, float]]
    head: Sequence[str]
    table: Sequence[Sequence[str]]
    confused: Sequence[tuple[str, str, int]]
    worst: Sequence[tuple[bytes, str]]
    files: Sequence[Path]
    teacher: str | None
    taught_by: Sequence[Path]


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
