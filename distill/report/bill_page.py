"""The bill in report.html and report.md: pictures, a table, the classes that lose most, the layers, the flips."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from distill.report import parts, svg
from distill.report.bill import KERNELS, STUDENT, TEACHER, Change, Item, in_points, layers_of, read
from distill.report.marks import NETWORKS, mark
from distill.report.parts import Cell, text
from distill.report.tables import MISSING

PICTURES = 12  # of files at most
WORSE, BETTER, SAME = "#c4161c", "#1b8a3a", "#888888"  # of changes whose interval leaves out 0, and of others
RUNTIMES = {"fx": "TorchScript", "xnnpack": "ExecuTorch, LiteRT", "onnx": "ONNX Runtime, OpenVINO"}  # by flow
SAID = (
    "Points of top-1 against the step before, on the same {images} test images, with the 95 % interval of a paired "
    "difference. Compression steps are asked in PyTorch, {kernels} is the file in its runtime beside that."
)
NOISE = (
    "Signal to noise in dB on {images} training images: of the logits where that layer alone is int8, and of its "
    "output where all before it are. Lower is worse; 6 dB is twice the error."
)


def page(content: Mapping) -> list[str]:
    """Parts of report.html from what report.json says.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: it is none that a run wrote.
    """
    items, layers = read(content), layers_of(content)
    if not items:
        return []
    pictures = [parts.figure(item.file, _picture(item)) for item in items if _of_interest(item)][:PICTURES]
    note = f'<p class="quiet">{text(SAID.format(images=_images(content), kernels=KERNELS))}</p>'
    return [
        parts.side_by_side(*pictures) if pictures else "",
        parts.figure("What each step costs", _table(items), note),
        _classes(items),
        *map(_layers, layers),
    ]


class Lines(NamedTuple):
    """For report.md."""

    table: list[list[str]]  # header first; nothing where there is no bill
    said: str  # below it
    layers: list[tuple[str, str | None]]  # a line for each network in int8, and the command that spares the worst


def markdown(content: Mapping) -> Lines:
    """From what report.json says. Raises as `page` does."""
    items, told = read(content), []
    for each in layers_of(content):
        worst = ", ".join(f"{layer['name']} ({_decibels(layer['alone'])} alone)" for layer in each["layers"][:3])
        told.append((f"{each['network']}, int8 in {each['of']} layers, most noise from {worst}", each.get("command")))
    return Lines(_rows(items, KERNELS), SAID.format(images=_images(content), kernels=KERNELS), told)


def _of_interest(item: Item) -> bool:
    """Whether more was done to it than to be written, or it answers otherwise."""
    return any(step.name not in (TEACHER, STUDENT, KERNELS) for step in item.steps) or item.whole.lost + item.whole.won


def _images(content: Mapping) -> str:
    found = content.get("context", {}).get("test images")
    return f"{found:,}" if isinstance(found, int) else "so many"


def _picture(item: Item) -> str:
    stages, before = [], None
    for step in item.steps:
        level, change = 100 * step.top1, step.change
        if change is None:
            stages.append(svg.Stage(step.name, level, f"{level:.2f} %", NETWORKS[step.name].colour))
        else:
            interval = (before + 100 * change.low, before + 100 * change.high)
            stages.append(svg.Stage(step.name, level, in_points(change), _shade(change), before, *interval))
        before = level
    stages.append(svg.Stage(Path(item.file).suffix or item.file, before, f"{before:.2f} %", mark(item.file).colour))
    told = "" if item.executed else '<p class="quiet">Not executed here: what its runtime does is not known.</p>'
    return svg.waterfall(stages, "top-1 in %") + told


def _shade(change: Change) -> str:
    return (BETTER if change.gain > 0 else WORSE) if change.shown else SAME


def _rows(items: Sequence[Item], kernels: str) -> list[list[str]]:
    """Header, and a line for each file: its start, what each step changed, where it ended, and the flips."""
    if not items:
        return []
    first = items[0].steps[0].name
    names = dict.fromkeys(step.name for item in items for step in item.steps[1:] if step.name != KERNELS)
    headers = ["file", f"{first} %", *names, kernels, "file %", "right → wrong", "wrong → right"]
    lines = []
    for item in items:
        changes = {step.name: step.change for step in item.steps[1:]}
        cells = [in_points(changes[name]) if name in changes else MISSING for name in (*names, KERNELS)]
        start, end = (f"{100 * step.top1:.2f}" for step in (item.steps[0], item.steps[-1]))
        if not item.executed:
            cells[-1], end = "not executed", MISSING
        flips = [f"{count:,}" if item.executed else MISSING for count in (item.whole.lost, item.whole.won)]
        lines.append([item.file, start if item.steps[0].name == first else MISSING, *cells, end, *flips])
    return [headers, *lines]


def _table(items: Sequence[Item]) -> str:
    headers, *lines = _rows(items, KERNELS)
    hints = ["", "top-1 where the bill begins", *[""] * (len(headers) - 5)]
    hints += ["top-1 of the file", "images that the float student has right and the file wrong", "and the reverse"]
    rows = [
        [Cell(parts.marked(line[0], mark(line[0])), line[0], "name"), *(Cell(each, _number(each)) for each in line[1:])]
        for line in lines
    ]
    return parts.table(headers, rows, hints)


def _number(cell: str) -> float | None:
    try:
        return float(cell.partition(" ")[0].replace(",", ""))
    except ValueError:
        return None


def _classes(items: Sequence[Item]) -> str:
    rows = []
    for item in items:
        for name, images, before, after in item.classes if item.executed else ():
            shares = [Cell(f"{100 * right / images:.1f}", right / images) for right in (before, after)]
            lost = (before - after) / images
            rows.append(
                [
                    Cell(parts.marked(item.file, mark(item.file)), item.file, "name"),
                    Cell(name, name, "text"),
                    Cell(f"{images:,}", images),
                    *shares,
                    Cell(f"{-100 * lost:+.1f}", -lost),
                ]
            )
    if not rows:
        return ""
    headers = ["file", "class", "test images", "student %", "file %", "points"]
    return f"<details><summary>Classes that lose most</summary>{parts.table(headers, rows)}</details>"


def _layers(told: Mapping) -> str:
    """Of one network."""
    flows = [*dict.fromkeys(flow for layer in told["layers"] for flow in layer["together"])]
    headers = ["layer", "alone: dB", "alone: other class %"]
    headers += [f"together: dB, {RUNTIMES.get(flow, flow)}" for flow in flows]
    rows = [
        [
            Cell(str(layer["name"]), str(layer["name"]), "name"),
            Cell(_decibel(layer["alone"]), layer["alone"]),
            Cell(f"{100 * layer['changed']:.1f}", layer["changed"]),
            *(Cell(_decibel(layer["together"].get(flow)), layer["together"].get(flow)) for flow in flows),
        ]
        for layer in told["layers"]
    ]
    note = f'<p class="quiet">{text(NOISE.format(images=told["images"]))}</p>'
    way = ""
    if told.get("spare"):
        way = f"<p>Left in float, the worst: <code>{text(told['spare'])}</code></p><pre>{text(told['command'])}</pre>"
    title = f"{told['network']}: the layers that int8 hurts most, {len(rows)} of {told['of']}"
    return parts.figure(title, parts.table(headers, rows), note, way)


def _decibel(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def _decibels(value: float | None) -> str:
    return "no noise" if value is None else f"{value:.1f} dB"
