"""report.html: a run on one page, from its report.json, details.json and metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import UserError
from distill.files import damaged, read_json
from distill.report import bill_page, parts, phones, svg
from distill.report.bill import FLIPS, SHOWN
from distill.report.marks import colour, mark
from distill.report.parity import remarks
from distill.report.parts import Cell, Html, text
from distill.report.tables import MISSING, ORDER, SUFFIXES, Row, cells, ordered, reference_of
from distill.runs import tables
from distill.runtimes.artifact import write

if TYPE_CHECKING:
    import pandas as pd

DETAILS = "details.json"  # beside report.json: distill.report.details
DASHES = ("", "6 3", "2 3", "9 3 2 3")
HINTS = {  # over the table's headers
    "top-1 %": "right answers, and one standard error on so many images",
    "macro %": "the mean of the classes' own top-1",
    "gain points": "top-1 in points over the {reference}",
    "as teacher %": "images that it answers as the teacher does",
    "as student %": "images that it answers as the float student does",
    "ECE": "expected calibration error: how far confidence and accuracy are apart",
    "largest Δlogit": "the largest difference of a logit from the float student's",
    "params M": "millions of learned numbers",
    "MACs M": "millions of multiply-accumulates for one image",
    "time ms": "one image on one thread, median",
    "p95 ms": "one image on one thread: 95 of 100 are faster",
    "int8 %": "of the weights: stored in int8",
    "int8 math %": "of the weights: those that the runtime multiplies in int8",
    "× eager": "times faster than the float student in eager PyTorch",
    "× float": "times faster than the float student's file of the same format",
}
SHORT = 4  # signs of a class's name that may head a column
NOT_CURVES = ("train/teacher_accuracy", "train/teacher_confidence")


def read(folder: Path) -> str:
    """The page of a run that has reported, of this version or an earlier one.

    Raises:
        UserError: its report.json is missing or damaged.
    """
    content = tables.read_report(folder)
    details = read_json(folder / DETAILS) if (folder / DETAILS).is_file() else None
    try:
        metrics = tables.curves(folder)
    except UserError:  # of a student that was given, or they are damaged: the rest can be shown
        metrics = None
    try:
        return page(content, details, metrics, phones.read(folder, rows_of(content)))
    except (LookupError, TypeError, ValueError, AttributeError):
        raise damaged(folder / "report.json", "what it says besides its rows makes no sense") from None


def rebuild(folder: Path) -> Path:
    """Writes a finished run's report.html anew. Raises UserError as `read` does."""
    file = folder / "report.html"
    write(file, read(folder).encode())
    return file


def page(
    content: Mapping,
    details: Mapping | None,
    metrics: pd.DataFrame | None,
    measured_on: Sequence[phones.Phone] = (),
) -> str:
    """HTML from what report.json says, from `distill.report.details.details`, from `distill.runs.tables.curves`, and
    from `distill.report.phones.read`.

    What an earlier version did not keep is left out, and that is said.
    """
    rows = rows_of(content)
    context = content.get("context", {})
    name = str(context.get("run", "a run"))
    body = [
        f"<header><p class='quiet'>Distill: report of a run</p><h1>{text(name)}</h1></header><main>",
        _verdict(content),
        _warnings(content, rows),
        parts.section("Models", models(rows), _caption(rows, context)),
        parts.section("Accuracy and cost", plots([(row.name, row) for row in rows])),
        parts.section("On a phone", *(_phone(phone, rows) for phone in measured_on)),
        parts.section("Where the accuracy went", *bill_page.page(content)),
        parts.section("Training", _training(metrics)),
        *_answers(rows, details),
        parts.section("What made it", _made(rows, context)),
        parts.section("Run and machine", _circumstances(content)),
        "</main>",
    ]
    return parts.document(f"{name}: report", body)


def rows_of(content: Mapping) -> list[Row]:
    """The rows of a report.json, of what this version knows of them."""
    known = {field.name for field in fields(Row)}
    return ordered([Row(**{key: value for key, value in row.items() if key in known}) for row in content["rows"]])


def _verdict(content: Mapping) -> str:
    verdict = content.get("verdict") if isinstance(content.get("verdict"), dict) else {}
    gain = verdict.get("gain")
    known = verdict.get("shown") is True and isinstance(gain, (int, float))
    kind = ("good" if gain > 0 else "bad") if known else ""
    line = verdict.get("sentence") or "no verdict: there is no student alone to compare with, or none was told"
    found = [line for key in ("findings", "ship") if isinstance(content.get(key), list) for line in content[key]]
    told = f"<ul>{''.join(f'<li>{text(_sentence(each))}</li>' for each in found)}</ul>" if found else ""
    return f'<p class="verdict {kind}">{text(_sentence(line))}</p>{told}'


def _sentence(line) -> str:
    line = str(line)
    return line[:1].upper() + line[1:] + ("" if line.endswith(".") else ".")


def _warnings(content: Mapping, rows: Sequence[Row]) -> str:
    """What may not ship, what is stale or slow, and what an earlier version did not tell."""
    lines = [f"May not ship: {line}" for line in content.get("failures", ())]
    lines += [*content.get("unmeasured", ()), *remarks(rows)]
    times = {row.measured for row in rows if row.measured}
    lines += [
        f"Measured before, at {time}: {', '.join(row.name for row in rows if row.measured == time)}"
        for time in sorted(times)
    ]
    return "".join(f'<p class="warn">{text(line)}.</p>' for line in lines)


def models(rows: Sequence[Row]) -> str:
    """The report's table, its first column with each model's mark."""
    headers, *body = cells(list(rows), short=True)
    headers = [*(header.replace("\n", " ") for header in headers), "× eager", "× float"]
    over = reference_of(rows)
    hints = [HINTS.get(header, "").format(reference=over.name if over else "student") for header in headers]
    lines = []
    for row, (name, *figures) in zip(rows, body, strict=True):
        times = [MISSING if each is None else f"{each:.2f}" for each in (row.times_eager, row.times_float)]
        first = Cell(parts.marked(name, mark(name)), name, "name")
        lines.append([first, *(Cell(figure, _number(figure)) for figure in [*figures, *times])])
    return parts.table(headers, lines, hints)


def _number(figure: str) -> float | None:
    found = re.match(r"[+-]?[\d.,]+(e[+-]?\d+)?", figure)
    return float(found[0].replace(",", "")) if found else None


def _caption(rows: Sequence[Row], context: Mapping) -> str:
    images = f"{context['test images']:,}" if isinstance(context.get("test images"), int) else "so many"
    reference = reference_of(rows)
    over = f" Gain: points over the {text(reference.name)}." if reference else ""
    return f'<p class="quiet">Top-1 ± one standard error on {images} test images.{over} A click on a header sorts.</p>'


def plots(named: Sequence[tuple[str, Row]]) -> str:
    """Accuracy by size and by latency, of rows under these labels; one legend, of the models."""
    panels = (("bytes", "size in kB", 1e-3), ("latency_ms", "latency of one image in ms", 1))
    drawn = []
    for field, label, scale in panels:
        measured = [(name, row) for name, row in named if row.top1 is not None and (getattr(row, field) or 0) > 0]
        points = [
            svg.Point(name, getattr(row, field) * scale, 100 * row.top1, mark(row.name)) for name, row in measured
        ]
        drawn.append(parts.figure(f"Accuracy by {label}", svg.scatter(points, label, "top-1 in %")))
    names = dict.fromkeys(row.name for _, row in named)
    return parts.side_by_side(*drawn) + parts.legend((svg.key(mark(name)), name) for name in names)


def _phone(phone: phones.Phone, rows: Sequence[Row]) -> str:
    headers, *lines = phones.table(phone, rows)
    cells = [
        [Cell(parts.marked(name, mark(name)), name, "name"), *(Cell(each, _number(each)) for each in figures)]
        for name, *figures in lines
    ]
    note = f'<p class="quiet">{text(phones.SAID)}</p>'
    return parts.figure(f"{phone.name}, {phone.date}", parts.table(headers, cells), note)


def _training(metrics: pd.DataFrame | None) -> str:
    if metrics is None:
        return '<p class="quiet">No metrics: nothing was trained in this run, or they are gone.</p>'
    columns = {name: metrics[["epoch", name]].dropna() for name in metrics if name != "epoch"}
    columns = {name: found for name, found in columns.items() if len(found)}
    terms = {name: name.removeprefix("train/") for name in columns if name.startswith("train/")}
    panels = (
        (
            "Training: the loss and its terms, unweighted",
            {k: v for k, v in terms.items() if k not in NOT_CURVES},
            "loss",
        ),
        ("Validation accuracy", {"val/accuracy": "student", "val/teacher_accuracy": "teacher"}, "accuracy"),
        ("Agreement with the teacher on validation images", {"val/agreement": "student"}, "agreement"),
        ("Learning rate", {"lr": "learning rate"}, "rate"),
    )
    drawn = []
    for title, labels, ylabel in panels:
        lines = [
            svg.Curve(label, columns[name]["epoch"].tolist(), columns[name][name].tolist(), _colour(label), dash)
            for (name, label), dash in zip(labels.items(), cycle(DASHES), strict=False)
            if name in columns
        ]
        if lines:
            keys = parts.legend((svg.key_line(line.colour, line.dash), line.label) for line in lines)
            drawn.append(parts.figure(title, svg.curves(lines, "epoch", ylabel), keys))
    return parts.side_by_side(*drawn)


def _colour(label: str) -> str:
    """Of a curve: a model's own, or one for a term's name."""
    return mark(label).colour if label in ORDER else colour(label)


def _answers(rows: Sequence[Row], details: Mapping | None) -> list[str]:
    if details is None:
        return [
            '<p class="warn">Classes, confusions, worst images and calibration are not shown: this report is of an '
            "earlier version, which did not keep them. <code>python train.py run=FOLDER stages=[report]</code> "
            "measures them.</p>"
        ]
    try:
        return [
            parts.section("Classes", _confused(details["confused"]), _classes(rows, details["classes"])),
            parts.section("Worst images", _worst(details["worst"])),
            parts.section("Flips", _flips(details.get("flips", ()))),
            parts.section("Calibration", _calibration(rows, details["calibration"])),
        ]
    except (LookupError, TypeError, ValueError, AttributeError):
        return [
            f'<p class="warn">{DETAILS} is damaged, or not one of ours: what it says of the answers is left out.</p>'
        ]


def compared(rows: Sequence[Row], told: Mapping) -> list[str]:
    """The models that are shown beside each other: the networks, and the smallest file."""
    files = [row for row in rows if Path(row.name).suffix in SUFFIXES and row.bytes and row.name in told]
    smallest = [min(files, key=lambda row: row.bytes).name] if files else []
    return [name for name in ORDER[:3] if name in told] + smallest


def _confused(found: Mapping) -> str:
    if "pairs" in found:
        lines = [
            [Cell(str(label), str(label), "name"), Cell(str(said), str(said)), Cell(f"{count:,}", count)]
            for label, said, count in found["pairs"]
        ]
        title = "The student's most frequent confusions"
        return parts.figure(title, parts.table(["class", "answered", "images"], lines)) if lines else ""
    names, matrix = found["names"], found["matrix"]
    numbers = range(1, len(names) + 1)
    short = all(len(str(name)) <= SHORT for name in names)  # else columns have numbers, which rows explain
    head = "".join(
        f'<th scope="col" title={parts.quoted(name)}>{text(name if short else number)}</th>'
        for number, name in zip(numbers, names, strict=True)
    )
    body = []
    for number, name, counts in zip(numbers, names, matrix, strict=True):
        total = sum(counts) or 1
        shades = (
            f'<td style="background:rgba({"27,138,58" if column == number else "196,22,28"},'
            f'{0.6 * (count / total) ** 0.5:.2f})">'
            f"{f'{count:,}' if count else ''}</td>"
            for column, count in enumerate(counts, 1)
        )
        body.append(
            f'<tr><th scope="row" class="name">{text(name if short else f"{number} {name}")}</th>{"".join(shades)}</tr>'
        )
    return parts.figure(
        "Confusion of the student: a row a class, a column an answer",
        f'<div class="scroll"><table class="confusion"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>",
    )


def _classes(rows: Sequence[Row], found: Mapping) -> str:
    listed = found["listed"]
    names = compared(rows, listed[0]["right"]) if listed else []
    lines = []
    for each in listed:
        images = each["images"]
        line = [Cell(str(each["name"]), str(each["name"]), "name"), Cell(f"{images:,}", images)]
        for name in names:
            share = each["right"][name] / images if images else None
            error = (share * (1 - share) / images) ** 0.5 if images else None
            line.append(Cell(MISSING if share is None else f"{100 * share:.1f} ±{100 * error:.1f}", share))
        lines.append(line)
    rest = "" if found["of"] == len(listed) else f", the {len(listed)} of {found['of']:,} that the student knows least"
    table = parts.table(["class", "test images", *(f"{name} %" for name in names)], lines)
    return parts.figure(f"Accuracy by class ± one standard error{rest}", table)


def _worst(found: Sequence[Mapping]) -> str:
    if not found:
        return "<p>The student answered every test image rightly.</p>"
    return (
        '<p class="quiet">What the student was most sure of, and wrong: the label, and who answered what, how '
        f"confidently; right answers are shaded.</p>{_cards(found)}"
    )


def _flips(found: Sequence[Mapping]) -> str:
    if not found:
        return ""
    return (
        f'<p class="quiet">What the float student has right and a file has wrong: {FLIPS} images of each file, those '
        f"that it is surest of, {SHOWN} at most.</p>{_cards(found)}"
    )


def _cards(found: Sequence[Mapping]) -> str:
    """Images with their label, and who answered what."""
    cards = []
    for each in found:
        picture = each["picture"]
        if not re.fullmatch(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/]*={0,2}", picture):
            raise ValueError("no picture of ours")
        answers: dict[str, list[str]] = {}
        for name, (answer, sure) in each["said"].items():
            answers.setdefault(answer, []).append(f"{name} {100 * sure:.0f}%")
        kinds = {answer: " class=right" if answer == each["label"] else "" for answer in answers}
        said = "".join(
            f"<li{kinds[answer]}><b>{text(answer)}</b>: {text(', '.join(names))}</li>"
            for answer, names in answers.items()
        )
        cards.append(
            f'<div class="card"><img src="{picture}" alt=""><b>{text(each["label"])}</b> '
            f'<span class="quiet">{text(each["image"])}</span><ul>{said}</ul></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _calibration(rows: Sequence[Row], found: Mapping) -> str:
    names = compared(rows, found)
    lines = [svg.Curve("as sure as right", [0, 1], [0, 1], "#999999", "3 3")]
    for name, dash in zip(names, cycle(DASHES), strict=False):
        lines.append(
            svg.Curve(
                name, [each[1] for each in found[name]], [each[2] for each in found[name]], mark(name).colour, dash
            )
        )
    keys = parts.legend((svg.key_line(line.colour, line.dash), line.label) for line in lines)
    drawn = parts.figure("Right answers by confidence", svg.curves(lines, "confidence", "accuracy", (0, 1)), keys)
    counts = [
        [
            Cell(parts.marked(name, mark(name)), name, "name"),
            *(Cell(f"{100 * share:.1f}", share) for share in (sure, right)),
            Cell(f"{n:,}", n),
        ]
        for name in names
        for n, sure, right in found[name]
    ]
    table = parts.table(["model", "confidence %", "right %", "images"], counts)
    return parts.side_by_side(drawn, f"<details><summary>The bins in numbers</summary>{table}</details>")


def _made(rows: Sequence[Row], context: Mapping) -> str:
    commands = dict.fromkeys(row.command for row in rows if row.command)
    pairs = [
        (", ".join(row.name for row in rows if row.command == command), Html(f"<code>{text(command)}</code>"))
        for command in commands
    ]
    unknown = ", ".join(row.name for row in rows if not row.command)
    if pairs and unknown:
        pairs.append((unknown, "a command of an earlier version, which was not recorded"))
    again = f"<p>All of it again:</p><pre>{text(context['command'])}</pre>" if context.get("command") else ""
    return (parts.values(pairs) if pairs else "") + again


def _circumstances(content: Mapping) -> str:
    shown = []
    for title in ("context", "environment", "protocol"):
        values = content.get(title)
        if isinstance(values, dict) and values:
            pairs = [(key, value) for key, value in values.items() if key != "command"]
            name = {"context": "Run", "environment": "Machine and versions", "protocol": "How it was measured"}[title]
            shown.append(parts.figure(name, parts.values(pairs)))
    return parts.side_by_side(*shown)
