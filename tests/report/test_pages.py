"""report.html and sweep.html: what they hold, of any run; and in a browser, where there is one, that nothing overlaps,
nothing of a stranger's runs, and the table sorts."""

import base64
import hashlib
import html
import itertools
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pandas as pd
import pytest
import torch

from distill.data.base import from_arrays
from distill.errors import UserError
from distill.files import write_json
from distill.report import __main__ as command
from distill.report import bill, page, run_page, sweep_page, tables
from distill.report.details import CLASSES, PAIRS, WORST, details
from distill.report.labels import Box, place, shortened
from distill.report.marks import COLOURS, NETWORKS, OUTLINES, SHAPES, mark
from distill.report.svg import INNER, Point, scatter, ticks
from distill.report.tables import Row
from distill.runs import verdict

SCRIPT = "<script>window.bad=1;alert(1)</script>"
NAMES = ["cat", SCRIPT, '"><img src=x onerror="window.bad=1">', "👩‍👩‍👧 naïve & 'x'", "日本"]
FILES = ["student.pt", "student.ptl", "student-dynamic_int8.pt", "student-prune-qat_int8.pte", "student-fp16.onnx"]


def image_set(names, images=60):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) % len(names)
    pixels = torch.randint(256, (images, 3, 12, 12), generator=generator, dtype=torch.uint8)
    return from_arrays(names, *[(pixels, labels)] * 3, None)


def answers(labels, classes, wrong=0.3):
    """Logits (N, K) of networks and files that are mostly right."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name in [*NETWORKS, *FILES]:
        said = torch.where(torch.rand(len(labels), generator=generator) < wrong, (labels + 1) % classes, labels)
        found[name] = torch.nn.functional.one_hot(said, classes) * 3.0 + torch.rand(
            len(labels), classes, generator=generator
        )
    return found


def rows_of(logits, labels):
    rows = []
    for number, (name, values) in enumerate(logits.items()):
        top1 = (values.argmax(1) == labels).double().mean().item()
        kind = "eager" if name in NETWORKS else "torchscript"
        rows.append(Row(name, top1, top1_error=0.02, bytes=1000 + number, latency_ms=1 + number / 100, format=kind))
    return rows


METRICS = pd.DataFrame(
    {
        "epoch": [1, 2, 3],
        "train/loss": [3.0, 2.0, 1.5],
        f"train/{SCRIPT}": [1.0, 0.9, 0.8],
        "val/accuracy": [0.3, 0.5, 0.6],
        "val/teacher_accuracy": [0.9, 0.9, 0.9],
        "val/agreement": [0.3, 0.5, 0.6],
        "lr": [0.1, 0.05, 0.0],
    }
)


@pytest.fixture
def reported(tmp_path):
    """A folder with the report of a run whose every name is hostile."""
    data = image_set(NAMES)
    labels = data.test.labels
    logits = answers(labels, len(NAMES))
    context = {
        "run": SCRIPT,
        "test images": len(labels),
        "command": f"python train.py 'name={SCRIPT}'",
        "data root": NAMES[2],
    }
    ways = {
        name: [*((each, logits[each]) for each in ("teacher", "student")), ("kernels", logits[name])] for name in FILES
    }
    ways[FILES[2]].insert(2, (SCRIPT, logits[FILES[0]]))
    told = details(logits, labels, data, bill.flips(ways, labels))
    helped = verdict.of(logits, labels)
    layer = {"name": SCRIPT, "alone": 20.0, "changed": 0.5, "together": {"onnx": 18.0}}
    noisy = {
        "network": SCRIPT,
        "step": SCRIPT,
        "images": 64,
        "of": 3,
        "layers": [layer],
        "spare": SCRIPT,
        "command": SCRIPT,
    }
    costs = bill.told(bill.bill(ways, dict.fromkeys(FILES, "onnx"), labels, NAMES), [noisy])
    rows = rows_of(logits, labels)
    page.write(rows, tmp_path, context, [f"{SCRIPT}: bad"], helped, details=told, metrics=METRICS, bill=costs)
    return tmp_path


def pictured(folder):
    """The images that are shown."""
    told = json.loads((folder / "details.json").read_text())
    assert told["worst"] and told["flips"]
    return told["worst"] + told["flips"]


def test_the_page_holds_what_a_run_found(reported):
    text = (reported / "report.html").read_text(encoding="utf-8")
    body = text[text.index("<body>") :]
    assert body.index('class="verdict') < body.index("<table")
    for title in (
        *("Models", "Accuracy and cost", "Where the accuracy went", "Training", "Classes", "Worst images", "Flips"),
        *("Calibration", "What made it"),
    ):
        assert f"<h2>{title}</h2>" in body
    assert (
        "60 test images" in body and "±2.0" in body and body.count("data:image/png;base64,") == len(pictured(reported))
    )
    for escaped in map(html.escape, NAMES):
        assert escaped in body
    assert text.count("<script") == 1 and "<img src=x" not in text
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", text) and "@import" not in text


def test_its_own_script_is_the_only_one_that_its_policy_lets_run(reported):
    text = (reported / "report.html").read_text(encoding="utf-8")
    script = text[text.index("<script>") + 8 : text.index("</script>")]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in text
    assert "default-src 'none'" in text


def test_details_by_hand():
    data = image_set(["a", "b", "c"], images=6)  # labels 0 1 2 0 1 2
    labels = data.test.labels
    probabilities = torch.tensor([[0.9, 0.05, 0.05], [0.7, 0.2, 0.1], [0.1, 0.1, 0.8]] * 2)
    found = details({"student": probabilities.log()}, labels, data)
    assert found["confused"] == {"names": ["a", "b", "c"], "matrix": [[2, 0, 0], [2, 0, 0], [0, 0, 2]]}
    assert [(each["name"], each["images"], each["right"]["student"]) for each in found["classes"]["listed"]] == [
        ("b", 2, 0),
        ("a", 2, 2),
        ("c", 2, 2),
    ]
    assert found["calibration"]["student"] == [[2, 0.7, 0.0], [2, 0.8, 1.0], [2, 0.9, 1.0]]
    assert [(each["image"], each["label"], each["said"]) for each in found["worst"]] == [
        ("test image 1", "b", {"student": ["a", 0.7]}),
        ("test image 4", "b", {"student": ["a", 0.7]}),
    ]


def test_a_page_does_not_grow_with_classes_images_or_epochs(tmp_path):
    classes, images = 1000, 5000
    data = image_set([f"class {number}" for number in range(classes)], images)
    labels = data.test.labels
    logits = {
        name: values for name, values in answers(labels, classes).items() if name in ("teacher", "student", FILES[0])
    }
    ways = {FILES[0]: [("student", logits["student"]), ("kernels", logits[FILES[0]])]}
    told = details(logits, labels, data, bill.flips(ways, labels))
    assert len(told["flips"]) == bill.FLIPS
    assert len(told["classes"]["listed"]) == CLASSES and told["classes"]["of"] == classes
    assert len(told["confused"]["pairs"]) == PAIRS and len(told["worst"]) == WORST
    assert all(len(bins) <= 15 for bins in told["calibration"].values())
    epochs = pd.DataFrame({"epoch": range(1, 20_001), "train/loss": torch.rand(20_000).tolist()})
    page.write(rows_of(logits, labels), tmp_path, {}, details=told, metrics=epochs)
    assert (tmp_path / "report.html").stat().st_size < 300_000
    assert "the 100 of 1,000 that the student knows least" in (tmp_path / "report.html").read_text(encoding="utf-8")


# colours, shapes, labels


def test_models_differ_in_colour_or_shape_and_look_alike_everywhere():
    names = [*NETWORKS, *(f"student{step and '-'}{step}{suffix}" for step in COLOURS for suffix in SHAPES)]
    looks = [mark(name) for name in names]
    assert len(set(looks)) == len(names)
    assert {look.shape for look in looks} <= set(OUTLINES)
    assert mark("student-prune-qat_int8.pte") == mark("student-prune-qat_int8.pte") != mark("student-prune-fp16.pte")
    for look in [*looks, mark("student-prune-qat_int8.pte"), mark(SCRIPT)]:
        red, green, blue = (int(look.colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
        assert 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.62  # to be read on white


@pytest.mark.parametrize("kind", ["one place", "a line", "spread", "corners"])
@pytest.mark.parametrize("count", [1, 8, 20])
def test_no_label_overlaps_another_a_point_or_the_edge(kind, count):
    generator = torch.Generator().manual_seed(count)
    spread = {"one place": 0, "a line": 0, "spread": 300, "corners": 300}[kind]
    points = []
    for number in range(count):
        x, y = (torch.rand(2, generator=generator) * spread).tolist()
        x, y = (100 + 8.0 * number, 150.0) if kind == "a line" else (60 + x, 20 + y * 0.8)
        points.append((INNER.left + 1, INNER.top + 1) if kind == "corners" and number % 2 else (x, y))
    sizes = [(60 + 12 * (number % 9), 14.0) for number in range(count)]
    boxes = place(points, sizes, INNER, 5.5)
    found = [box for box in boxes if box is not None]
    assert len(found) >= min(count, 10)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(found, 2))
    assert all(box.inside(INNER) for box in found)
    marks = [Box(x - 5.5, y - 5.5, x + 5.5, y + 5.5) for x, y in points]
    assert not any(box.overlaps(point) for box in found for point in marks)


def test_labels_that_have_no_room_are_left_to_the_legend():
    crowd = [(100.0, 100.0)] * 300
    boxes = place(crowd, [(100.0, 14.0)] * 300, INNER, 5.5)
    assert None in boxes and sum(box is not None for box in boxes) > 10


def test_the_plot_survives_odd_figures():
    look = mark("student.pt")
    assert "Not measured" in scatter([], "x", "y")
    for points in (
        [Point("a", 1e-3, 0.0, look)],
        [Point(SCRIPT, 5.0, 50.0, look)] * 3,
        [Point("a", 1, 0, look), Point("b", 1e9, 100, look)],
    ):
        drawn = scatter(points, "x", "y")
        assert "nan" not in drawn and "inf" not in drawn and "<script" not in drawn
    assert ticks(94.2, 99.9) == [95, 96, 97, 98, 99] and ticks(1, 2, whole=True) == [1, 2]
    assert len(shortened("student-prune-dynamic_int8-something.ptl", 26)) == 26


# runs of other versions, and broken ones


def run_folder(folder, report=None):
    """What a finished run leaves, as far as tables read it."""
    folder.mkdir(parents=True)
    record = {"choices": {"teacher": "t", "student": "s", "data": "d"}, "overrides": ["seed=0"], "created": "2026"}
    write_json(folder / "run.json", {**record, "versions": {}, "status": "done"})
    (folder / "config.yaml").write_text("loss: {ce: {}}\nseed: 0\ndata: {}\nteacher: {}\nstudent: {}\n")
    if report is not None:
        (folder / "report.json").write_text(report if isinstance(report, str) else json.dumps(report))
    return folder


EARLY = {"rows": [{"name": "student", "top1": 0.5, "an_old_figure": 1}], "context": {"run": "early"}}


def test_a_run_of_an_earlier_version_is_shown_with_a_line(tmp_path, capsys):
    folder = run_folder(tmp_path / "runs" / "early", EARLY)
    assert command.main([str(folder)]) == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "50.00" in text and "earlier version" in text
    assert command.main([str(tmp_path / "runs")]) == 0
    assert "early was reported by an earlier version" in (tmp_path / "runs" / "sweep.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "report", ["{", "[]", "", '{"rows": 3, "context": {}}', '{"rows": [], "context": {}, "checksum": "0"}']
)
def test_a_broken_report_is_one_line_and_keeps_no_other_run_from_being_shown(tmp_path, capsys, report):
    broken = run_folder(tmp_path / "a", report)
    run_folder(tmp_path / "b", EARLY)
    assert command.main([str(broken)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "report.json is damaged" in line
    assert command.main([str(tmp_path)]) == 0
    text = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    assert "report.json is damaged" in text and "50.00" in text and "2 runs" in text


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ({}, True),
        ({"rows": []}, True),
        ({"rows": [{"name": "\ud800.pt", "top1": 0.5, "bytes": 1, "latency_ms": -1}]}, True),
        ({"verdict": [1], "findings": {"a": 1}, "environment": "none"}, True),
        (
            {"verdict": {"gain": SCRIPT, "shown": True, "sentence": SCRIPT}, "context": {SCRIPT: {SCRIPT: [SCRIPT]}}},
            True,
        ),
        ({"failures": 3}, False),
    ],
)
def test_a_strangers_report_is_shown_escaped_or_is_one_line(tmp_path, capsys, said, shown):
    folder = run_folder(tmp_path / "theirs", {**EARLY, **said})
    assert command.main([str(folder)]) == (0 if shown else 1)
    if not shown:
        assert "report.json is damaged" in capsys.readouterr().err
    assert command.main([str(tmp_path)]) == 0
    for file in tmp_path.rglob("*.html"):
        assert file.read_text(encoding="utf-8").count("<script") == 1


def test_a_folder_without_runs_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        assert command.main([str(tmp_path / folder)]) == 1
        assert "no" in capsys.readouterr().err
    assert not list((tmp_path / "empty").iterdir())
    with pytest.raises(UserError, match="holds no runs"):
        sweep_page.page(tmp_path / "empty")


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"classes": 1, "confused": 2, "calibration": 3, "worst": 4},
        {"confused": {"pairs": [[1]]}, "classes": {}, "worst": [], "calibration": {}},
        {
            "confused": {"pairs": []},
            "classes": {"of": 0, "listed": []},
            "worst": [{"picture": 'x" onerror="alert(1)', "said": {}, "label": "a", "image": "b"}],
            "calibration": {},
        },
    ],
)
def test_details_that_make_no_sense_are_left_out(told):
    text = run_page.page({"rows": [{"name": "student", "top1": 0.5}], "context": {}}, told, None)
    assert "details.json is damaged" in text and "onerror" not in text


def test_a_sweep_shows_every_run(tmp_path):
    rows = [Row("student alone", 0.5), Row("student", 0.6, bytes=10, latency_ms=1.0)]
    for number in range(3):
        folder = run_folder(tmp_path / str(number))
        page.write(
            [*rows, Row("student.pt", 0.6, bytes=5, latency_ms=0.5, format="torchscript")], folder, {"test images": 9}
        )
    run_folder(tmp_path / "10")
    text = sweep_page.page(tmp_path)
    order = re.findall(r'data-sort="(\d+)">(?:<a href="\d+/report.html">)?\d+', text)
    assert order == ["0", "1", "2", "10"]
    assert "+10.00" in text and "4 runs" in text and 'href="2/report.html"' in text and 'href="10/' not in text


# every row says what made it


def test_rows_keep_the_command_that_made_them_and_stale_files_are_named(tmp_path):
    (tmp_path / "export").mkdir()
    for name in ("student.pt", "student-a.pt", "student-b.pt", "student-lost.pte"):
        (tmp_path / "export" / name).write_bytes(bytes(10))

    def report(names, now):
        rows = [Row("student", 0.5), *(Row(name, 0.5, bytes=10, format="torchscript") for name in names)]
        rows, _ = tables.with_earlier(rows, tmp_path, now)
        page.write(rows, tmp_path, {})
        return {row.name: row for row in rows}

    first = report(
        ["student.pt", "student-a.pt"], tables.Now("one", "one", "x", [*tables.ORDER, "student.pt", "student-a.pt"])
    )
    assert {row.command for row in first.values()} == {"one"} and tables.stale([*first.values()]) == []
    again = report(["student.pt", "student-b.pt"], tables.Now("two", "one", "x", ["student.pt", "student-b.pt"]))
    made = {"student": "one", "student.pt": "two", "student-b.pt": "two", "student-a.pt": "one"}
    assert {name: row.command for name, row in again.items()} == made
    assert tables.stale([*again.values()]) == []
    measured = report(["student.pt", "student-b.pt"], tables.Now("three", "one", "x", []))  # nothing was made
    assert {name: row.command for name, row in measured.items()} == made
    other = report(["student.pt"], tables.Now("four", "one", "y", [*tables.ORDER, "student.pt"]))
    assert tables.stale([*other.values()]) == ["student-a.pt", "student-b.pt"]
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "student-a.pt is stale: it was made from a student that has changed since" in text
        assert "student-lost.pte is in export/ and was not measured" in text
        assert "four" in text and "two" in text


# in a browser


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no chromium is installed")
    return found


MEASURE = """
addEventListener("load",function(){
  function box(e){var b=e.getBoundingClientRect();return [b.left,b.top,b.right,b.bottom]}
  var plots=[...document.querySelectorAll("svg.plot")].map(function(svg){return {
    texts:[...svg.querySelectorAll("text")].map(function(t){return [t.textContent,...box(t)]}),
    marks:[...svg.querySelectorAll(".mark")].map(box)}});
  var table=document.querySelector("table.sortable"),orders=[];
  [...table.querySelectorAll("th button")].slice(0,2).forEach(function(button){
    for(var i=0;i<2;i++){
      button.click();
      orders.push([...table.tBodies[0].rows].map(function(row){return row.cells[0].textContent.trim()}))}});
  parent.postMessage(JSON.stringify({plots:plots,orders:orders,bad:window.bad===undefined?null:window.bad,
    width:innerWidth,wide:document.documentElement.scrollWidth,scripts:document.scripts.length,
    images:document.querySelectorAll("img").length}),"*");
});
"""
FRAME = """<!doctype html><iframe src="probe.html" width="{width}" height="900" style="border:0"></iframe>
<pre id="measured"></pre><script>
addEventListener("message",function(told){{document.getElementById("measured").textContent=told.data}})
</script>"""


def measured(browser, file, width, policy, tmp_path):
    """What a page measures of itself in a browser's frame of this width: with its policy, which here lets the measuring
    script run too, or with none, so that only escaping protects it."""
    text = file.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(MEASURE.encode()).digest()).decode()
    text = text.replace("script-src ", f"script-src 'sha256-{digest}' ")
    if not policy:
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    (tmp_path / "probe.html").write_text(
        text.replace("</body>", f"<script>{MEASURE}</script></body>"), encoding="utf-8"
    )
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    options = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"]
    options += ["disable-component-update", "disable-sync", f"user-data-dir={tmp_path / 'profile'}", "dump-dom"]
    options += ["virtual-time-budget=5000", "window-size=1400,1000"]
    done = subprocess.run(
        [browser, *(f"--{option}" for option in options), frame.as_uri()], capture_output=True, timeout=120, check=False
    )
    found = re.search(r'<pre id="measured">(.+?)</pre>', done.stdout.decode("utf-8", "replace"), re.DOTALL)
    assert found, done.stderr.decode("utf-8", "replace")[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize(("width", "policy"), [(1280, True), (390, False)])
def test_in_a_browser(browser, reported, tmp_path, width, policy):
    found = measured(browser, reported / "report.html", width, policy, tmp_path)
    assert found["width"] == width and found["wide"] <= width  # no part of the page is wider
    assert found["bad"] is None and found["scripts"] == 2  # ours, and the one that measures
    assert found["images"] == len(pictured(reported))
    assert len(found["plots"]) == 7 + len(FILES)
    for plot in found["plots"]:
        for (one, *first), (other, *second) in itertools.combinations(plot["texts"], 2):
            assert not _overlap(first, second), (one, other)
        labels = [each for each in plot["texts"] if each[0] in {shortened(name, 26) for name in [*NETWORKS, *FILES]}]
        assert not any(_overlap(label[1:], point) for label in labels for point in plot["marks"])
    assert sum(len(plot["marks"]) for plot in found["plots"]) == 2 * len([*NETWORKS, *FILES])
    first, second, falling, rising = found["orders"]
    assert first == second[::-1] and sorted(first) == sorted([*NETWORKS, *FILES])
    rows = {row["name"]: row["top1"] for row in json.loads((reported / "report.json").read_text())["rows"]}
    assert [rows[name] for name in falling] == sorted(rows.values(), reverse=True)
    assert [rows[name] for name in rising] == sorted(rows.values())


def _overlap(one, other, slack=0.5):
    """Whether boxes (left, top, right, bottom) in px share more than a hair."""
    return all(max(one[at], other[at]) + slack < min(one[at + 2], other[at + 2]) - slack for at in (0, 1))


def test_a_sweep_in_a_browser(browser, tmp_path):
    for number in range(6):
        rows = [Row("student alone", 0.5), Row("student", 0.6 + number % 2 / 100, bytes=1000 + number, latency_ms=1.0)]
        file = replace(rows[1], name="student-dynamic_int8.pt", bytes=400 + number, format="torchscript")
        page.write([*rows, file], run_folder(tmp_path / str(number)), {"test images": 9})
    sweep_page.rebuild(tmp_path)
    found = measured(browser, tmp_path / "sweep.html", 390, True, tmp_path)
    assert found["wide"] <= 390 and found["orders"][1] == list("012345") and found["orders"][0] == list("543210")
    for plot in found["plots"]:
        for (one, *first), (other, *second) in itertools.combinations(plot["texts"], 2):
            assert not _overlap(first, second), (one, other)
