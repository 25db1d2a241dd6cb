"""The bill: what each step from the teacher to a file costs, by hand; the noise of int8 layers; what reports keep."""

import json
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
from test_configs import composed
from torch import nn

from distill import export as exporting
from distill import types
from distill.compress import compress
from distill.compress.static_int8 import static_int8
from distill.data.base import from_arrays
from distill.export import torchscript
from distill.files import digest
from distill.report import bill, evaluate, layers, page, run_page
from distill.report.bill import KERNELS, SHOWN, STUDENT, TEACHER, Change
from distill.report.tables import Row
from distill.runs.verdict import on_images
from distill.runtimes import measure

CLASSES = ["a", "<b>", "c"]
LABELS = torch.arange(30) % 3


def said(wrong, sure=5.0):
    """Logits (30, 3) that are wrong on these rows only."""
    answers = LABELS.clone()
    answers[wrong] = (answers[wrong] + 1) % 3
    return nn.functional.one_hot(answers, 3) * torch.as_tensor(sure).view(-1, 1)


WAY = [
    (TEACHER, said([0])),
    (STUDENT, said([0, 1, 2])),
    ("low_rank", said([0, 1, 2])),  # as before, to the bit
    ("static_int8", said([0, 2, 4, 7], 4.0)),  # one more is right, two more are wrong
    (KERNELS, said([0, 2, 4], 4.0)),
]


def of(way, labels=LABELS):
    [item] = bill.bill({"student-x.onnx": way}, {"student-x.onnx": "onnx"}, labels, CLASSES)
    return item


def test_the_bill_by_hand():
    item = of(WAY)
    assert [step.name for step in item.steps] == [TEACHER, STUDENT, "static_int8", KERNELS]
    assert [step.top1 for step in item.steps] == pytest.approx([29 / 30, 27 / 30, 26 / 30, 27 / 30])
    counts = [(step.change.won, step.change.lost) for step in item.steps[1:]]
    assert counts == [(0, 2), (1, 2), (1, 0)] and (item.whole.won, item.whole.lost) == (1, 1)
    gains = [step.change.gain for step in item.steps[1:]]
    assert gains == pytest.approx([-2 / 30, -1 / 30, 1 / 30])
    assert item.steps[0].top1 + sum(gains) == pytest.approx(item.steps[-1].top1)  # every point is accounted for
    paired = on_images(*(logits.argmax(1) == LABELS for logits in (WAY[3][1], WAY[1][1])))
    assert (item.steps[2].change.low, item.steps[2].change.high) == (paired.low, paired.high)
    assert item.executed and item.classes == ()  # the second class wins row 1 and loses row 4


def test_without_a_teacher_it_begins_with_the_student_and_ends_where_nothing_was_executed():
    item = of(WAY[1:4])
    assert [step.name for step in item.steps] == [STUDENT, "static_int8"] and not item.executed
    assert bill.flips({"x": WAY[1:4]}, LABELS) == {}
    assert item.whole == item.steps[-1].change and item.classes == (("<b>", 10, 9, 8),)


def test_flips_come_surest_first_and_what_is_shown_of_them_is_bounded():
    sure = torch.ones(30)
    sure[[4, 7, 9]] = torch.tensor([2.0, 6.0, 3.0])
    assert bill.flips({"x": [(STUDENT, said([])), (KERNELS, said([4, 7, 9], sure))]}, LABELS)["x"].tolist() == [7, 9, 4]
    many = {f"{number}": torch.arange(200) + 100 * number for number in range(5)}
    rows = bill.shown(many)
    assert len(rows) == SHOWN == len({*rows}) and rows == sorted(rows)
    assert bill.shown({"x": torch.tensor([9, 3]), "y": torch.tensor([3])}) == [3, 9] and bill.shown({}) == []


def test_a_loss_beyond_chance_is_a_line_with_its_steps_and_the_way_out():
    labels = LABELS.repeat(20)

    def answers(wrong):
        logits = nn.functional.one_hot(labels, 3).float()
        logits[:wrong] = logits[:wrong].roll(1, 1)
        return logits

    ways = {"student-x.onnx": [(STUDENT, answers(0)), ("x", answers(60)), (KERNELS, answers(60) * 2)]}
    items = bill.bill(ways, {"student-x.onnx": "onnx"}, labels, CLASSES)
    line = bill.remark(items, [{"network": "student-x", "step": "x", "command": "python train.py x"}])
    assert line.startswith("student-x.onnx loses -10.00 (") and "x -10.00, kernels +0.00" in line
    assert line.endswith("in int8: python train.py x")
    cheap = [{"network": "student-x", "step": "y", "command": "python train.py x"}]
    assert bill.remark(items, cheap).endswith("kernels +0.00")  # it is not int8 that costs
    assert bill.remark([of(WAY)], []) is None  # one image more or less is chance


# What is kept


LAYERS = {
    "network": "student-x",
    "step": "static_int8",
    "images": 64,
    "of": 9,
    "layers": [{"name": "conv<1>", "alone": 20.5, "changed": 0.25, "together": {"onnx": 18.25, "fx": None}}],
    "spare": "compress.static_int8.skip=[conv<1>]",
    "command": "python train.py 'compress.static_int8.skip=[conv<1>]'",
}


def test_it_is_read_back_as_it_was_told():
    told = json.loads(json.dumps(bill.told([of(WAY), of(WAY[1:4])], [LAYERS])))
    assert bill.read({"bill": told}) == [of(WAY), of(WAY[1:4])] and bill.layers_of({"bill": told}) == [LAYERS]
    assert bill.read({}) == bill.layers_of({}) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda told: told["files"][0]["steps"][1]["change"].update(low=1e999),
        lambda told: told["files"][0]["steps"][1]["change"].update(gain="1"),
        lambda told: told["files"][0]["steps"][1].update(change=None),
        lambda told: told["files"][0]["steps"][0].update(top1=float("inf")),
        lambda told: told["files"][0].update(classes=[["a", 0, 0, 0]]),
        lambda told: told["files"][0].update(classes=[["a", -3, 1, 1]]),
        lambda told: told["files"][0].pop("whole"),
        lambda told: told["files"][0].update(steps=[]),
        lambda told: told["layers"][0]["layers"][0].update(alone=float("inf")),
        lambda told: told["layers"][0].update(images="many"),
        lambda told: told.update(files=7),
    ],
)
def test_one_that_no_run_wrote_is_a_damaged_report(damage):
    told = json.loads(json.dumps(bill.told([of(WAY)], [LAYERS])))
    content = {"rows": [asdict(Row("student", 0.5))], "bill": told}
    assert "conv&lt;1&gt;" in run_page.page(content, None, None)
    damage(content["bill"])
    with pytest.raises((LookupError, TypeError, ValueError, AttributeError)):
        run_page.page(content, None, None)


def test_what_was_measured_before_keeps_its_bill(tmp_path):
    earlier = replace(of(WAY), file="student-y.onnx")
    told = bill.told([earlier, replace(earlier, file="gone.onnx")], [{**LAYERS, "network": "student-y"}])
    page.write([Row("student", 0.5)], tmp_path, {}, bill=told)
    rows = [Row("student-y.onnx", 0.5, measured="before"), Row("student-x.onnx", 0.5)]
    now = bill.with_earlier(bill.told([of(WAY)], [LAYERS]), rows, tmp_path)
    assert [each["file"] for each in now["files"]] == ["student-x.onnx", "student-y.onnx"]
    assert [each["network"] for each in now["layers"]] == ["student-x", "student-y"]
    (tmp_path / "report.json").write_text("{")
    assert bill.with_earlier(bill.told([of(WAY)], []), rows, tmp_path) == bill.told([of(WAY)], [])


def test_the_markdown_names_every_step_and_what_spares_the_worst_layers(tmp_path):
    told = bill.told([of(WAY), replace(of(WAY[1:4]), file="student-x.mlpackage")], [LAYERS])
    page.write([Row("student", 0.5)], tmp_path, {"test images": 30}, bill=told)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| file | teacher % | student | static_int8 | kernels | file % | right → wrong | wrong → right |" in text
    change = of(WAY).steps[2].change
    assert f"-3.33 ({100 * change.low:+.2f} to {100 * change.high:+.2f})" in text
    assert "| student-x.mlpackage | – | – | " in text and "| not executed | – | – | – |" in text
    assert f"`{LAYERS['command']}`" in text and "conv\\<1\\> (20.5 dB alone)" in text and "same 30 test images" in text


# Layers


class Net(nn.Module):
    """Layers that the flows change or fold: padding by a word, batch norm, ReLU in place, a ReLU6, no bias."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.six = nn.ReLU6()
        self.linear = nn.Linear(8, 10)

    def forward(self, images):
        hidden = self.six(self.second(self.relu(self.norm(self.conv(images)))))
        return self.linear(hidden.mean((2, 3)))


@pytest.fixture(scope="module")
def data():
    pixels = torch.randint(256, (64, 3, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return from_arrays([str(number) for number in range(10)], *[(pixels, torch.arange(64) % 10)] * 3, None)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    made = Net().train()
    for _ in range(3):
        made(torch.rand(32, 3, 12, 12))
    return made.eval()


@pytest.mark.parametrize("flow", ["fx", "onnx", pytest.param("xnnpack", marks=pytest.mark.matrix)])
def test_noise_is_that_of_the_layers_own_output(net, data, flow):
    small = static_int8(net, data=data, images=64, flow=flow)
    images = data.test[torch.arange(24), 0].images
    found = layers.noise(net, small, images)
    assert [*found] == ["conv", "second", "linear"]
    with torch.no_grad():  # of the last layer, whose output the answer is
        wanted, came = (each(images).double() for each in (net, small))
    ratio = wanted.square().sum() / (came - wanted).square().sum()
    assert abs(found["linear"] - 10 * ratio.log10().item()) < 0.05
    assert found["conv"] > found["second"] > 20  # it adds up


def test_a_layer_that_stays_float_adds_nothing(net, data):
    spared = static_int8(net, data=data, images=64, skip=["second"])
    assert [*layers.noise(net, spared, data.test[torch.arange(24), 0].images)] == ["conv", "linear"]


@pytest.mark.parametrize("flow", ["fx", pytest.param("onnx", marks=pytest.mark.matrix)])
def test_weights_that_are_not_the_float_ones_rounded_are_compared_with_themselves(net, data, flow):
    images = data.test[torch.arange(24), 0].images
    tuned = Net().eval()
    tuned.load_state_dict(net.state_dict())
    with torch.no_grad():
        tuned.linear.weight.mul_(1.2)  # as a fine-tuning moves them
        tuned.second.weight.add_(0.02)
    small = static_int8(tuned, data=data, images=64, flow=flow)
    with_itself, moved = layers.noise(net, small, images), layers.noise(tuned, small, images)
    assert all(with_itself[name] > moved[name] - 1 > 20 for name in moved)  # nothing of what training moved is noise
    narrow = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(576, 10)).eval()
    assert layers.noise(narrow, small, images) == {}  # another network


def test_the_worst_layer_is_named_with_the_option_that_spares_it(data, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Conv2d(3 if not n else 8, 8, 3), nn.ReLU()) for n in range(3)), nn.Flatten())
    net = nn.Sequential(net, nn.Linear(288, 10)).eval()
    net[0][1][0].weight.data[:, 0] *= 300  # one channel's range costs the others their precision
    steps = {"static_int8": _partial(skip=["0.0.0"])}
    made, failures = compress(steps, net, data, None, ["fx"])
    told = layers.told("student-static_int8", {"fx": net}, made, steps, data, tmp_path)
    assert failures == [] and told["network"] == "student-static_int8" and told["of"] == 3
    first, *others = told["layers"]
    assert first["name"] == "0.1.0" and {*first["together"]} == {"fx"}
    assert all(first["alone"] < other["alone"] - 6 for other in others)
    assert told["spare"] == "compress.static_int8.skip=[0.0.0,0.1.0]"
    words = f"run={tmp_path} 'stages=[compress,export,report]' 'compress=[static_int8]' '{told['spare']}'"
    assert told["command"].endswith(words) and told["step"] == "static_int8"
    assert layers.told("student-x", {"fx": net}, {"fx": {"x": net}}, {}, data, tmp_path) is None


def _partial(**options):
    return partial(static_int8, images=64, **options)


def test_layers_of_a_large_network_are_measured_on_few_images(net, data, tmp_path, monkeypatch, capsys):
    steps = {"static_int8": _partial(skip=["second"])}
    made, _ = compress(steps, net, data, None, ["fx"])
    monkeypatch.setattr(layers, "MACS", 1)
    steps = {"static_int8": _partial(skip="auto")}  # that left the same one in float
    told = layers.told("student-static_int8", {"fx": net}, made, steps, data, tmp_path)
    assert told["images"] == layers.LEAST and told["of"] == 2
    assert told["spare"].startswith("compress.static_int8.skip=[second,")
    capsys.readouterr()
    monkeypatch.setattr(layers, "noise", lambda *given: 1 / 0)
    assert layers.told("student-static_int8", {"fx": net}, made, steps, data, tmp_path) is None
    assert "the layers of student-static_int8 are left out: ZeroDivisionError" in capsys.readouterr().out


# From the network to the page


@pytest.fixture(scope="module")
def tolerance():
    return types.plain_values(composed().tolerance)


class Plain:
    def __init__(self, net):
        self.net = net

    def plain(self):
        return self.net


def test_a_run_s_files_are_asked_at_every_step(net, data, tmp_path, tolerance, monkeypatch):
    monkeypatch.setattr(measure, "latency", lambda timers, example: ({name: {} for name in timers}, {}))

    def half(net, finetune=None, data=None, flow="fx"):
        made = Net().eval()
        made.load_state_dict(net.state_dict())
        with torch.no_grad():
            made.linear.weight[:5] = 0
        return made

    made, _ = compress({"half": half, "static_int8": _partial()}, net, data, None, ["fx"])
    name, exporters = "student-half-static_int8", {"torchscript": torchscript.export}
    nets = {"student": {"fx": net}, name: {"fx": made["fx"]["static_int8"]}}
    files, _ = exporting.export(nets, exporters, tmp_path, data, {})
    files = {key: [file for file in several if file.path.suffix == ".pt"] for key, several in files.items()}
    files["student"] = [replace(files["student"][0], elsewhere="macOS only")]
    rows, *_, labels, ways = evaluate.evaluate({"student": Plain(net)}, nets, files, data, tolerance, {name: made})
    written = {file.path.name: digest(file.path) for several in files.values() for file in several}
    assert {row.name: row.digest for row in rows if row.format != "eager"} == written
    assert [station for station, _ in ways[f"{name}.pt"]] == [STUDENT, "half", "static_int8", KERNELS]
    assert [station for station, _ in ways["student.pt"]] == [STUDENT]  # not executed here
    files[name] = [replace(files[name][0], elsewhere="macOS only")]
    *_, ways = evaluate.evaluate({"student": Plain(net)}, nets, files, data, tolerance, {name: made})
    assert [station for station, _ in ways[f"{name}.pt"]] == [STUDENT, "half", "static_int8"]
    wanted = {STUDENT: net, "half": made["fx"]["half"], "static_int8": made["fx"]["static_int8"]}
    for station, logits in ways[f"{name}.pt"]:
        torch.testing.assert_close(logits, measure.predict({"net": wanted[station]}, data.test_loader())[0]["net"])
    assert len(labels) == 64


def test_an_interval_is_a_difference_of_accuracies():
    with pytest.raises(ValueError, match="accuracies"):
        Change(0.1, 0.2, 0.1, 1, 0)
    assert asdict(Change(0.1, -0.1, 0.2, 1, 0))["won"] == 1 and not Change(0.1, -0.1, 0.2, 1, 0).shown
