"""Measurement by hand numbers, the parity check against files that must not ship, and the report's files."""

import copy
import itertools
import json
import os
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import nn

from distill.compress import flows
from distill.compress.dynamic_int8 import dynamic_int8
from distill.errors import UserError
from distill.export.torchscript import export, reload
from distill.report import page, parity, tables
from distill.report.tables import Row
from distill.runtimes import measure
from distill.types import Batch

TOLERANCE = {"logit": 1e-3, "agreement": 0.999}, {"logit": None, "agreement": 0.9}


def batches(images, labels, size=5):
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        yield Batch(images[part], labels[part], torch.full_like(labels[part], -1), 0)


def test_predict_passes_once_for_all_models():
    images, labels = torch.rand(12, 3, 2, 2), torch.arange(12)
    passes = []

    def loader():
        passes.append(1)
        yield from batches(images, labels)

    models = {"sum": lambda x: x.sum((2, 3)), "double": lambda x: x.sum((2, 3)).double() * 2}
    calls = []

    def broken(images):
        calls.append(1)
        raise UserError("broken.pte: its process died")

    logits, got, failed = measure.predict({**models, "broken": broken}, loader())
    assert len(passes) == len(calls) == 1
    assert failed == {"broken": "broken.pte: its process died"}
    assert set(logits) == set(models)
    assert torch.equal(got, labels)
    torch.testing.assert_close(logits["sum"], images.sum((2, 3)))
    torch.testing.assert_close(logits["double"], 2 * images.sum((2, 3)))
    with pytest.raises(UserError, match="test set is empty"):
        measure.predict(models, [])


def test_scores_by_hand():
    # three classes: p = softmax(log p)
    confidence = torch.tensor([[0.9, 0.05, 0.05], [0.9, 0.05, 0.05], [0.1, 0.5, 0.4], [0.2, 0.2, 0.6]])
    labels = torch.tensor([0, 1, 1, 2])  # right, wrong, right, right
    teacher = torch.eye(3)[[0, 0, 2, 2]]
    found = measure.scores(confidence.log(), labels, teacher, confidence.log() + torch.tensor([0.0, 0.25, 0.0]))
    # bins of 1/15: {0.9, 0.9} half right, {0.5} right, {0.6} right
    ece = 2 / 4 * abs(0.5 - 0.9) + 1 / 4 * (1 - 0.5) + 1 / 4 * (1 - 0.6)
    assert found == {
        "top1": 0.75,
        "top1_error": pytest.approx((0.75 * 0.25 / 4) ** 0.5),
        "macro": pytest.approx((1 + 1 / 2 + 1) / 3),
        "top5": None,
        "ece": pytest.approx(ece, abs=1e-6),
        "teacher_agreement": 0.75,
        "student_agreement": 1.0,
        "student_delta": pytest.approx(0.25, abs=1e-6),
    }


def test_ece_and_top5_against_a_plain_loop():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(500, 10), torch.randint(10, (500,))
    labels[:200] = logits[:200].argmax(1)
    highest, chosen = logits.softmax(1).max(1)
    ece = 0.0
    for number in range(15):
        inside = (highest > number / 15) & (highest <= (number + 1) / 15)
        if inside.any():
            accuracy = (chosen == labels)[inside].double().mean()
            ece += inside.double().mean() * abs(accuracy - highest[inside].double().mean())
    top5 = sum(label in row.argsort(descending=True)[:5] for row, label in zip(logits, labels, strict=True)) / 500
    found = measure.scores(logits, labels, None, None)
    assert found["ece"] == pytest.approx(ece.item(), abs=1e-5)
    assert found["top5"] == pytest.approx(top5)
    assert found["top1"] == pytest.approx((chosen == labels).double().mean().item())
    assert found["teacher_agreement"] is None
    recalls = [(chosen == labels)[labels == label].double().mean().item() for label in range(10)]
    assert found["macro"] == pytest.approx(sum(recalls) / 10)


def test_macro_accuracy_leaves_out_classes_without_images_and_shows_a_class_that_is_lost():
    logits, labels = torch.eye(4)[[0] * 10], torch.tensor([0] * 8 + [1, 2])
    found = measure.scores(logits, labels, None, None)
    assert found["top1"] == pytest.approx(0.8) and found["macro"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_scored(value):
    logits = torch.zeros(4, 3)
    logits[2, 1] = value
    with pytest.raises(UserError, match="NaN or infinity for 1 of 4 images"):
        measure.scores(logits, torch.zeros(4, dtype=torch.int64), None, None)


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(UserError, match=r"labels run from 0 to 7, but the model has 3 classes"):
        measure.scores(torch.zeros(2, 3), torch.tensor([0, 7]), None, None)


def test_macs_of_known_layers():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # to 8 × 16 × 16
        nn.Conv2d(8, 8, 5, padding=2, groups=8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    ).eval()
    expected = 16 * 16 * 8 * (3 * 9) + 16 * 16 * 8 * 25 + 8 * 10
    assert measure.macs(net, torch.rand(4, 3, 32, 32)) == expected


def test_macs_of_int8_layers_are_those_of_the_float_network():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(8 * 5 * 5, 10)
    ).eval()
    example = torch.rand(2, 3, 15, 15)
    quantized = flows.convert(flows.prepare(net, example, "fx", observer="minmax"), "fx")
    assert measure.macs(quantized, example) == measure.macs(net, example) == 8 * 27 * 49 + 8 * 18 * 25 + 200 * 10
    assert measure.macs(dynamic_int8(net), example) == measure.macs(net, example)


def test_macs_of_attention_are_counted():
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True).eval()
    tokens = 10
    projections, attention, mlp = tokens * 16 * 16 * 4, 2 * tokens * tokens * 16, 2 * tokens * 16 * 32
    assert measure.macs(layer, torch.rand(2, tokens, 16)) == projections + attention + mlp
    assert torch.backends.mha.get_fastpath_enabled()


def test_parameters_count_alike_in_float_and_int8():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)).eval()
    assert measure.parameters(net) == (3 * 4 * 9 + 4) + 8 + (16 * 5 + 5)
    assert measure.parameters(dynamic_int8(net)) == (3 * 4 * 9 + 4) + (16 * 5 + 5)  # its BatchNorm is folded


def test_latency_takes_turns_on_one_thread_and_restores_the_number():
    calls, threads = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:

        def model(name):
            return measure.timed(lambda images: calls.append((name, len(images), torch.get_num_threads())))

        found, failed = measure.latency({"a": model("a"), "b": model("b")}, torch.rand(3, 3, 2, 2), seconds=0)
        assert torch.get_num_threads() == 2 and not failed

        def broken(images):
            raise ValueError

        def dead(images):
            raise UserError("dead: no answer")

        others, failed = measure.latency({"a": model("c"), "dead": dead}, torch.rand(1, 3, 2, 2), seconds=0)
        assert list(others) == ["a"] and failed == {"dead": "dead: no answer"}

        with pytest.raises(ValueError):
            measure.latency({"broken": broken}, torch.rand(1, 3, 2, 2), seconds=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert set(calls) == {("a", 1, 1), ("b", 1, 1), ("c", 1, 1)}
    assert [name for name, _, _ in calls if name != "c"][-80:] == [*"a" * 10, *"b" * 10] * 4
    assert all(0 < row["latency_ms"] <= row["latency_p95_ms"] for row in found.values())


def test_latency_is_that_of_a_model_whose_memory_is_warm():
    runs = itertools.cycle([100.0] * 5 + [1.0, 2.0, 3.0, 2.0, 2.0])  # of a turn
    row = measure.latency({"a": lambda _: next(runs)}, torch.rand(1, 3, 2, 2), seconds=0)[0]["a"]
    assert row["latency_ms"] == 2 and row["latency_p95_ms"] <= 3


def test_latency_is_measured_until_it_is_known():
    for scatter, turns in ((0.0, 10), (0.03, 10), (0.06, None)):  # of the turns' medians: within ±2 %, or not
        medians = itertools.cycle([1.0, 1.0 + scatter])
        calls = itertools.count()
        value = [1.0]

        def timer(_, calls=calls, medians=medians, value=value):
            if next(calls) % 10 == 0:
                value[0] = next(medians)
            return value[0]

        measure.latency({"a": timer}, torch.rand(1, 3, 2, 2), seconds=0.2)
        made = next(calls)
        assert made == 10 * (1 + turns) if turns else made > 10 * 100


def test_latency_tells_a_slow_model_from_a_fast_one():
    small, large = torch.rand(10, 10), torch.rand(400, 400)
    models = {"small": measure.timed(lambda _: small @ small), "large": measure.timed(lambda _: large @ large)}
    found, _ = measure.latency(models, torch.rand(1, 3, 2, 2), seconds=0.1)
    assert found["large"]["latency_ms"] > 3 * found["small"]["latency_ms"]


# Parity


def test_equal_answers_pass_and_each_bound_is_told():
    torch.manual_seed(0)
    student = torch.randn(100, 10)
    source = student + 0.01 * torch.randn(100, 10)
    assert parity.check("a.pt", source, source, student, student.argmax(1), *TOLERANCE) == []

    (line,) = parity.check("a.pt", source + 0.002, source, student, student.argmax(1), *TOLERANCE)
    assert line.startswith("a.pt: logits differ by up to 0.002 from the network it was exported from")
    assert "0.001" in line

    ruined = torch.randn(100, 10)
    (line,) = parity.check("a.pt", ruined, ruined, student, student.argmax(1), *TOLERANCE)
    assert "with the float student" in line
    assert "(needed: 90.00%)" in line


def test_a_file_that_answers_otherwise_may_ship_if_it_is_as_accurate():
    labels = torch.arange(100) % 4
    student, other, chance = (torch.eye(4)[labels].clone() for _ in range(3))
    student[:20] = student[:20].roll(1, 1)  # wrong on the first fifth
    other[80:] = other[80:].roll(1, 1)  # and this one on the last
    chance[:] = torch.eye(4)[0]
    exact, loose = TOLERANCE[0], {"logit": None, "agreement": 0.9, "accuracy_drop": 0.02}
    assert parity.check("a.pt", other, other, student, labels, exact, loose) == []
    (line,) = parity.check("a.pt", chance, chance, student, labels, exact, loose)
    assert "and is 55.00% less accurate (allowed: 2.00%)" in line
    worse = other.clone()
    worse[40:44] = worse[40:44].roll(1, 1)
    assert parity.check("a.pt", worse, worse, student, labels, exact, loose) != []


def test_a_file_that_was_altered_after_export_fails(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()
    images = torch.rand(50, 3, 8, 8)
    small = dynamic_int8(net)
    for name, source in (("float", net), ("int8", small)):
        for file in export(source, images, tmp_path / name, {}):
            with torch.no_grad():
                logits, student = source(images), net(images)
            assert parity.check(file.path.name, file.run(images), logits, student, student.argmax(1), *TOLERANCE) == []
            _alter_largest_tensor(file.path)
            (altered,) = (again for again in reload(tmp_path / name) if again.path == file.path)
            assert parity.check(file.path.name, altered.run(images), logits, student, student.argmax(1), *TOLERANCE)


def _alter_largest_tensor(path: Path) -> None:
    """Halves, or so, the first quarter of the largest stored tensor: clears bit 6 of every 4th byte."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = max((name for name in entries if "/constants/" in name or "/data/" in name), key=lambda n: len(entries[n]))
    data = bytearray(entries[name])
    for place in range(3, len(data) // 4, 4):
        data[place] ^= 0x40 if path.stem == "int8" else 0x80
    entries[name] = bytes(data)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for entry, content in entries.items():
            archive.writestr(entry, content)


def test_a_per_tensor_ruined_depthwise_network_fails_and_ours_passes():
    """Depthwise channels of very different sizes that BatchNorm evens out: one scale loses the small."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 1),
        nn.Conv2d(16, 16, 3, groups=16, bias=False),
        nn.BatchNorm2d(16),
        nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )
    net[1].weight.data *= torch.logspace(-4, 1, 16).view(-1, 1, 1, 1)
    net[2].eps = 1e-12
    net(torch.rand(500, 3, 6, 6))
    net[2].momentum = 1.0
    net(torch.rand(500, 3, 6, 6))
    net.eval()

    ruined = copy.deepcopy(net)
    scale = ruined[1].weight.data.abs().max() / 127
    ruined[1].weight.data = (ruined[1].weight.data / scale).round() * scale
    images = torch.rand(300, 3, 6, 6)
    with torch.no_grad():
        student, bad, good = net(images), ruined(images), dynamic_int8(net)(images)
    (line,) = parity.check("ruined.pt", bad, bad, student, student.argmax(1), *TOLERANCE)
    assert "with the float student" in line
    assert parity.check("good.pt", good, good, student, student.argmax(1), *TOLERANCE) == []


def test_nan_fails():
    logits = torch.randn(10, 3)
    broken = logits.clone()
    broken[4] = float("nan")
    assert parity.check("a.pt", broken, broken, logits, logits.argmax(1), *TOLERANCE) == [
        "a.pt: answers NaN or infinity for 1 of 10 images"
    ]
    assert "differ by up to nan" in parity.check("a.pt", logits, broken, logits, logits.argmax(1), *TOLERANCE)[0]


# The report's files

ROWS = [
    Row("student.ptl", 0.8, 0.99, 0.05, 0.9, 1.0, 1e-6, 1000, 2000, 4200, 0.5, 0.6, 0.0),
    Row("student|int8.pt", 0.81, 0.99, 0.04, 0.91, 0.98, 0.3, 1000, 2000, 1300, 0.4, 0.7, 0.97),
    Row("student (last epoch)", 0.79),
    Row("student", 0.8, 0.99, 0.05, 0.9, 1.0, 0.0, 1000, 2000, 4000, 0.7, 0.8, 0.0),
    Row("student alone", 0.75),
    Row("teacher", 0.9, 0.999, 0.02, 1.0, 0.9, 5.0, 9000, 8000, 36000, 2.0, 2.5, 0.0),
]
NAMES = ["teacher", "student alone", "student", "student (last epoch)", "student.ptl", "student|int8.pt"]


def test_the_json_holds_the_figures_in_order_with_their_circumstances(tmp_path):
    page.write(ROWS, tmp_path, {"seed": 3})
    content = json.loads((tmp_path / "report.json").read_text())
    assert [row["name"] for row in content["rows"]] == NAMES
    assert content["rows"][5]["int8_share"] == 0.97
    assert content["rows"][1]["latency_ms"] is None
    assert content["context"] == {"seed": 3}
    assert content["environment"]["torch"] == torch.__version__.partition("+")[0]
    assert content["environment"]["threads"] == torch.get_num_threads()
    assert "one thread" in content["protocol"]["latency"]


def test_speed_is_compared_with_eager_and_with_the_float_file_of_the_same_runtime():
    rows = [
        Row("student", latency_ms=6.0, int8_share=0.0),
        Row("teacher", latency_ms=12.0, int8_share=0.0),
        Row("student.onnx", latency_ms=2.0, int8_share=0.0, format="onnx"),
        Row("student-int8.onnx", latency_ms=0.5, int8_share=1.0, format="onnx"),
        Row("student-int8.pte", latency_ms=0.25, int8_share=1.0, format="executorch"),
        Row("student.pte", int8_share=0.0, format="executorch"),
    ]
    found = {row.name: (row.times_eager, row.times_float) for row in tables.compare(rows)}
    assert found == {
        "student": (1, None),
        "teacher": (0.5, None),
        "student.onnx": (3, 1),
        "student-int8.onnx": (12, 4),
        "student-int8.pte": (24, None),
        "student.pte": (None, None),
    }


def test_the_markdown_is_a_table_of_equal_rows(tmp_path):
    page.write(ROWS, tmp_path, {"seed": 3})
    text = (tmp_path / "report.md").read_text()
    lines = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[2:]}
    assert table["teacher"]["gain"] == "+15.00"
    assert table["student alone"]["gain"] == "+0.00"
    assert table["student"]["gain"] == "+5.00"
    assert table["student alone"]["bytes"] == tables.MISSING
    assert table["student.ptl"]["bytes"] == "4,200"
    assert table["studentint8.pt"]["int8 %"] == "97"
    assert "- seed: 3" in text


def test_the_plot_is_drawn_with_and_without_figures(tmp_path):
    for rows in (ROWS, [Row("student", 0.8)], ROWS[:1]):
        page.write(rows, tmp_path, {})
        image = imread(tmp_path / "report.png")  # (H, W, 4)
        assert image.shape[0] >= 500
        assert image[..., :3].std() > 0.01  # something is drawn


def test_the_terminal_table_fits_120_columns_and_loses_no_name():
    long = Row("student-prune-dynamic_int8-something_even_longer.ptl", 0.5, 1, 1, 1, 1, 123.456, 10**9, 10**10, 10**9)
    text = tables.table([*ROWS, long])
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert "…" not in text
    names = "".join(re.sub(r" +\d+\.\d\d .*", "", line).strip() for line in lines).replace(" ", "")  # without figures
    assert all(name.replace(" ", "") in names for name in [*NAMES, long.name])
    assert "\x1b" not in text


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120])
def test_the_table_fits_the_terminal(width, monkeypatch):
    """Of a narrow one what matters most: names, accuracy, bytes and time."""
    rows = [replace(row, top1_error=0.0123, macro=0.5, macs=row.macs and 123_400_000) for row in ROWS]
    monkeypatch.setenv("COLUMNS", str(width))
    text = tables.table(rows)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text and "80.00 ±1.2" in text and "kB" in text and "ms" in text
    assert ("ECE" in text) == (width > 80) and "gain" in text
    rule = next(line for line in text.splitlines() if "──" in line)
    wide = len(text.splitlines()[0])
    assert len(rule) == wide <= width


def test_the_errors_and_the_test_sets_size_are_told(tmp_path):
    rows = [replace(row, top1_error=0.0123, macro=0.5) for row in ROWS]
    page.write(rows, tmp_path, {"test images": 1234}, ["student.ptl: logits differ"])
    text = (tmp_path / "report.md").read_text()
    assert "| student | 80.00 ±1.23 | 50.00 | +5.00 |" in text
    assert "one standard error on 1,234 test images" in text and "- student.ptl: logits differ" in text
    page.write(ROWS, tmp_path, {})
    assert "macro" not in (tmp_path / "report.md").read_text().lower()


def test_rows_of_other_compressions_stay_while_their_files_do(tmp_path):
    """Not those measured again, of networks, of files that are gone or were written anew."""
    (tmp_path / "export").mkdir()
    files = {"a.pt": 10, "b.pt": 20, "gone.pt": 30, "other.pt": 41}
    for name, size in files.items():
        if name != "gone.pt":
            (tmp_path / "export" / name).write_bytes(bytes(size))
    first = [
        Row("student", 0.5),
        *(Row(name, 0.5, bytes=min(size, 40), format="torchscript") for name, size in files.items()),
    ]
    assert tables.with_earlier(first, tmp_path) == (first, [])
    page.write(first, tmp_path, {}, ["b.pt: bad", "a.pt: bad", "compress for fx: failed"])
    again = [Row("student", 0.6), Row("a.pt", 0.6, bytes=10, format="torchscript")]
    rows, failures = tables.with_earlier(again, tmp_path)
    assert [(row.name, row.top1) for row in rows] == [("student", 0.6), ("a.pt", 0.6), ("b.pt", 0.5)]
    assert rows[2].measured and failures == ["b.pt: bad"]
    page.write(rows, tmp_path, {}, failures)
    assert f"Measured before, at {rows[2].measured}: b.pt" in (tmp_path / "report.md").read_text()
    assert tables.with_earlier(again, tmp_path)[0][2].measured == rows[2].measured
    for damaged in ("{", "[]", '{"rows": 3, "environment": {}}', '{"rows": [{"nam": 1}], "environment": {"time": 1}}'):
        (tmp_path / "report.json").write_text(damaged)
        assert tables.with_earlier(again, tmp_path) == (again, [])


def test_nan_is_no_figure(tmp_path):
    with pytest.raises(ValueError):
        page.write([Row("student", float("nan"))], tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_earlier_report(tmp_path, monkeypatch):
    page.write(ROWS, tmp_path, {})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*report\.json.*No space left on device"):
        page.write(ROWS[:1], tmp_path, {})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
