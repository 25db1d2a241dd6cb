"""Which file a run says to ship."""

import pytest
from hydra import compose, initialize_config_dir
from torch import nn

from distill.cli import config
from distill.files import CONF
from distill.report.ship import advice, convolutional
from distill.report.tables import Row

CONVOLUTIONS = nn.Sequential(nn.Conv2d(3, 64, 3), nn.Flatten(), nn.Linear(64, 10))
LINEAR = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(64, 100))


def row(name, top1, size, ms, computed=0.0, **more):
    form = "eager" if "." not in name else name.rpartition(".")[2]
    return Row(
        name, top1=top1, top1_error=0.003, bytes=size, latency_ms=ms, int8_computed=computed, format=form, **more
    )


ROWS = [
    row("student", 0.88, 1_095_000, 1.7),
    row("student.pte", 0.88, 1_100_000, 0.40),
    row("student-static_int8.pte", 0.878, 314_000, 0.15, 1.0),
    row("student-static_int8.onnx", 0.879, 295_000, 0.16, 1.0),
    row("student-prune-static_int8.pte", 0.80, 179_000, 0.12, 1.0),
]


def said(rows=ROWS, failures=(), net=CONVOLUTIONS, folder="outputs/x"):
    return advice(rows, failures, net, folder)


def test_the_fastest_that_loses_nothing_to_speak_of_and_of_equals_the_smallest():
    [line] = said()
    assert line == "ship student-static_int8.onnx: 87.90 ±0.30 %, 295 kB, 0.16 ms"
    [line] = said(ROWS[:3])
    expected = "ship student-static_int8.pte: 87.80 ±0.30 %, 314 kB, 0.15 ms; 3.5 times smaller and 2.7 times as fast"
    assert line == f"{expected} as student.pte"


def test_a_file_that_failed_or_is_stale_is_not_shipped():
    [line] = said(failures=["student-static_int8.onnx: it answers otherwise"])
    assert line.startswith("ship student-static_int8.pte")
    old = [row("student", 0.88, 1, 1, student="new"), row("student.pte", 0.88, 1, 1, student="old")]
    assert said(old) == []


def test_a_file_too_inaccurate_is_not_shipped_whatever_its_speed():
    assert said([ROWS[0], ROWS[-1]]) == ["ship: none of the files comes within a point of the student's 88.00%"]


@pytest.mark.parametrize(("net", "told"), [(CONVOLUTIONS, True), (LINEAR, False)])
def test_static_int8_is_named_where_it_would_pay(net, told):
    lines = said(ROWS[:2], net=net)
    assert lines[0] == "ship student.pte: 88.00 ±0.30 %, 1,100 kB, 0.40 ms"
    assert len(lines) == 1 + told
    if told:
        assert "'stages=[compress,export,report]' compress=static_int8" in lines[1] and "run=outputs/x" in lines[1]


def test_what_convolutional_means():
    assert convolutional(CONVOLUTIONS) and not convolutional(LINEAR) and not convolutional(nn.Identity())


@pytest.mark.parametrize("name", ["android", "ios", "edge", "server"])
def test_a_target_chooses_and_the_command_line_wins(name):
    config.register(["train.py"])
    with initialize_config_dir(CONF, version_base="1.3"):
        chosen = compose("train", [f"target={name}", "name=x"])
        typed = compose("train", [f"target={name}", "name=x", "export=[torch_export]", "compress=[]"])
    assert list(chosen.compress) == ["static_int8"] and chosen.export and "torchscript" not in chosen.export
    assert list(typed.export) == ["torch_export"] and not typed.compress
