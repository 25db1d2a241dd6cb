"""Why distilling helped or didn't: what can be measured of the teacher, the student, and how one follows the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from distill.runs.verdict import Verdict, on_images, points

if TYPE_CHECKING:
    import pandas as pd

LEAD = 0.02  # a teacher that is less ahead of the student alone has little to hand on
ASTRAY = 0.2  # less often right while training than on test images: the answers are of other images, or classes
WRONG = 0.15  # of the training images: what the student is told wrongly
BY_HEART = 0.1  # more often right on training than on validation images …
SURE = 0.95  # … and so sure of the former that little is left to be told but the labels
RISES = 0.01  # what the last quarter of the epochs added to the agreement, of the validation images


@dataclass(frozen=True)
class Figures:
    """Shares are in [0, 1]; None where one was not measured."""

    lead: Verdict | None = None  # the teacher beside the student alone, on the test images
    teacher_test: float | None = None  # how often the teacher is right, on test images,
    teacher_train: float | None = None  # as it answered in the last epoch to what the student saw,
    teacher_val: float | None = None  # on validation images
    confidence_train: float | None = None  # the mean of its largest probability, on these
    confidence_val: float | None = None
    least_teacher: float | None = None  # the least of its logits on the test images
    least_student: float | None = None
    agreement: float | None = None  # of student and teacher on validation images, in the last epoch
    agreement_added: float | None = None  # by the last quarter of the epochs


COLUMNS = {
    "teacher_train": "train/teacher_accuracy",
    "teacher_val": "val/teacher_accuracy",
    "confidence_train": "train/teacher_confidence",
    "confidence_val": "val/teacher_confidence",
}


def figures(logits: Mapping[str, Tensor], labels: Tensor, curves: pd.DataFrame | None) -> Figures:
    """What is measured of a run.

    Args:
        logits: (N, K) on the test images, of "student" and, where there are, "teacher" and "student alone".
        labels: (N,).
        curves: the metrics by epoch (see distill.runs.tables.curves); None where nothing was trained.
    """
    found = {"least_student": logits["student"].min().item()}
    if "teacher" in logits:
        right = {name: values.argmax(1) == labels for name, values in logits.items()}
        found["teacher_test"] = right["teacher"].double().mean().item()
        found["least_teacher"] = logits["teacher"].min().item()
        if "student alone" in logits:
            found["lead"] = on_images(right["teacher"], right["student alone"])
    if curves is None:
        return Figures(**found)
    columns = {column: curves[column].dropna().tolist() for column in curves}
    found |= {name: columns[column][-1] for name, column in COLUMNS.items() if columns.get(column)}
    agreed = columns.get("val/agreement", [])
    if agreed:
        found["agreement"] = agreed[-1]
    if len(agreed) > 1:
        found["agreement_added"] = agreed[-1] - agreed[-1 - max(1, len(agreed) // 4)]
    return Figures(**found)


def findings(found: Figures) -> list[str]:
    """What of these figures keeps a student from gaining, one line each, with the option that answers it."""
    told = []
    if found.lead is not None and (found.lead.gain < LEAD or found.lead.low <= 0):
        told.append(
            f"the teacher leads the student alone by {found.lead.in_points()}: there is little to hand on; a better "
            "teacher (teacher=NAME, teacher.fit.epochs=N) or a smaller student would gain more"
        )
    if found.teacher_train is not None:
        told += _taught(found)
    if found.least_student is not None and found.least_student >= 0 > (found.least_teacher or 0):
        told.append(
            f"no logit of the student is below 0 ({found.least_student:.2g} is the least, the teacher's "
            f"{found.least_teacher:.2g}): its head ends in a ReLU and cannot answer as the teacher does; "
            "SqueezeNet's is left out by student.relu_head=false"
        )
    if found.agreement_added is not None and found.agreement_added > RISES:
        told.append(
            f"agreement with the teacher still rose: {points(found.agreement_added)} points in the last quarter of the "
            f"epochs, to {found.agreement:.1%}; more epochs may gain more (trainer.max_epochs)"
        )
    return told


def _taught(found: Figures) -> list[str]:
    """Of what the teacher said in training."""
    right = f"its answers in training were right for {found.teacher_train:.1%} of the images"
    if found.teacher_test is not None and found.teacher_test - found.teacher_train > ASTRAY:
        return [
            f"the teacher is right on {found.teacher_test:.1%} of the test images, but {right}: they belong to other "
            "images or classes, or the augmentation is too strong for it (cache=off asks it anew; augment=[...])"
        ]
    told = []
    if 1 - found.teacher_train > WRONG:
        told.append(
            f"{right} only, and what it gets wrong is taught too: fit it longer (teacher.fit.epochs=N), or lean "
            "more on the labels (loss.ce.weight)"
        )
    if None not in (found.teacher_val, found.confidence_train):
        ahead = found.teacher_train - found.teacher_val
        if ahead > BY_HEART and found.confidence_train > SURE:
            told.append(
                f"the teacher knows its training images by heart (right for {found.teacher_train:.1%}, "
                f"{found.confidence_train:.1%} sure; {found.teacher_val:.1%} of the validation images) and says little "
                "more than the labels: fewer teacher.fit.epochs, a higher loss.kd.temperature or stronger augment "
                "leave more to be told"
            )
    return told
