"""The table of all losses, docs/methods.md, from the code itself and from the figures of benchmarks/losses.json.

python -m benchmarks.methods
"""

import copy
import json
import re
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.losses import NAMES, ROWS, Step, connected, made
from distill import losses
from distill.losses.base import Loss
from distill.losses.weight import weight_at
from distill.types import Batch, Outputs

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
FIGURES = Path(__file__).parent / "losses.json"
TEACHER, STUDENT = "resnet56", "resnet20"
COLUMNS = ["loss", "method", "paper", "student's", "teacher's", "labels", "learned", "bank", "weight"]
MEASURED = ["time", "memory"]
INTRO = """# Methods

Written by `python -m benchmarks.methods` from the code; don't edit it.

Every method is a file in `conf/loss` and one in `distill/losses`, and any of them go together: `'loss=[ce,kd,at]'`.

- **student's**, **teacher's**: what the loss reads of each network: its logits, where the value depends on them, and
  taps. No teacher: the loss does without.
- **labels**: whether it reads them.
- **learned**: parameters that are trained along with the student and then dropped; **bank**: a memory with a row for
  each of {rows:,} training images.
- **weight**: the default, in front of the unweighted term.
- **time**, **memory**: of a training step, divided by those of `kd`; memory is what is kept for the backward pass.

Left out: KD by singular vectors (Lee et al., ECCV 2018). Its loss compares products of singular vectors of consecutive
layers, and the sign of each is arbitrary: the released code aligns the student's to the teacher's, whose own still
decide the value, so that it changes with the library that computes them. A form that doesn't depend on them would be
another method, and of relations between layers there is `fsp`.
"""


def paper(name: str) -> tuple[str, str]:
    """The method's name and its publication, from the first paragraph of its file."""
    text = Path(losses.__path__[0], f"{name}.py").read_text().split('"""')[1]
    method, _, source = " ".join(text.partition("\n\n")[0].split()).rstrip(".").partition(": ")
    source = re.sub(r", (§|eq\.|alg\.)[^;]*", "", source)
    return method, source if re.search(r"\b(19|20)\d\d\b", source) else ""


def noise(outputs: Outputs) -> Outputs:
    """Random values of the same shapes."""
    features = {name: torch.randn_like(value) for name, value in outputs.features.items()}
    return Outputs(torch.randn_like(outputs.logits), features)


def reads(loss: Loss, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, bool]:
    """Whether the value changes with the student's logits, the teacher's logits, and the labels.

    Args:
        student, teacher: of which only the shapes matter; fresh networks would answer one class to everything.
    """

    @torch.no_grad()
    def value(student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        torch.manual_seed(0)
        return copy.deepcopy(loss)(student, teacher, batch)

    torch.manual_seed(0)
    student, teacher = noise(student), noise(teacher)
    before = value(student, teacher, batch)
    others = {
        "student": (student._replace(logits=student.logits.roll(1, dims=0)), teacher, batch),
        "teacher": (student, teacher._replace(logits=teacher.logits.roll(1, dims=0)), batch),
        "labels": (student, teacher, batch._replace(labels=batch.labels.roll(1))),
    }
    return {name: not torch.equal(before, value(*changed)) for name, changed in others.items()}


def row(name: str, step: Step, kd: Step, batch: Batch) -> list[str]:
    """The columns that need no measurement."""
    loss = step.terms[name]
    with torch.no_grad():
        step.student.eval()
        student, teacher = step.student(batch.images), (step.teacher or kd.teacher)(batch)
    found = reads(loss, student, teacher, batch)
    read = {
        side: ", ".join(["logits"] * found[side] + [f"`{tap}`" for tap in getattr(loss, f"{side}_taps")])
        for side in ("student", "teacher")
    }
    learned = sum(parameter.numel() for parameter in loss.parameters() if parameter.requires_grad)
    bank = sum(buffer.nbytes for buffer in loss.buffers() if buffer.shape[:1] == (ROWS,))
    weight = step.weights[name]
    return [
        f"`{name}`",
        *paper(name),
        read["student"],
        read["teacher"] if loss.needs_teacher else "no teacher",
        "yes" if found["labels"] else "",
        f"{learned:,}" if learned else "",
        f"{bank / 1e6:.0f} MB" if bank else "",
        f"{weight_at(weight, float('inf')):g}",
    ]


def rows() -> list[list[str]]:
    """One for every loss."""
    data = made()
    batch = data.train[torch.arange(16), 0]
    steps, left_out = connected(TEACHER, STUDENT, data)
    assert not left_out, left_out
    return [row(name, *steps[name], batch) for name in NAMES]


def page(rows: list[list[str]], figures: dict) -> str:
    """The whole of docs/methods.md."""
    lines = [" | ".join([*COLUMNS, *MEASURED]), "|".join(["---"] * len([*COLUMNS, *MEASURED]))]
    for cells in rows:
        found = figures["losses"].get(cells[0].strip("`"))
        measured = [f"{found[key]:.2f}" for key in ("time_ratio", "saved_ratio")] if found else ["", ""]
        lines.append(" | ".join([*cells, *measured]))
    versions = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    source = (
        f"Measured by `{figures['command']}`: {figures['pair']}, batches of {figures['batch']}, {figures['steps']} "
        f"steps each, {figures['threads']} thread(s) of {figures['cpu']}, {versions}. `deit` and `simkd` have students "
        "of their own and are compared with `kd` on these."
    )
    table = "\n".join(f"| {line} |" for line in lines)
    return f"{INTRO.format(rows=ROWS)}\n{table}\n\n{source}\n"


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(rows(), json.loads(FIGURES.read_text())))


if __name__ == "__main__":
    main()
