"""Mistakes in a user's own files: one line that begins with the file and the line, before anything is trained."""

import sys
import textwrap

import pytest
from conftest import QUICK

HEAD = """\
import torch
from torch import nn
from distill.losses.base import Loss


"""
LOSS = """\
class Mine(Loss):
    def __init__(self, power: float = 2.0):
        super().__init__()
        self.power = power

    def build(self, student, teacher, data):
        self.scale = nn.Linear(1, 1)

    def forward(self, student, teacher, batch):
        return (student.logits - teacher.logits).abs().pow(self.power).mean()
"""
NET = """\
class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, num_classes)

    def forward(self, images):
        return self.head(self.body(images))


def net(num_classes):
    return Net(num_classes)
"""
DATA = """\
from distill.data.base import from_arrays


def squares(augment=None):
    labels = torch.arange(60) % 3
    images = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8)
    part = lambda start, end: (images[start:end], labels[start:end])
    return from_arrays(["a", "b", "c"], part(0, 40), part(40, 50), part(50, 60), augment)
"""
STEP = """\
def halve(net, finetune=None, data=None, flow="fx"):
    images = data.train[torch.arange(2), 0].images
    net(images)
    return net
"""
EXPORTER = """\
from pathlib import Path
from distill.runtimes.artifact import Artifact

FLOW = "fx"


def export(net, example, stem, metadata):
    file = Path(stem).with_suffix(".state")
    torch.jit.save(torch.jit.trace(net, example), file)
    return [artifact(file)]


def reload(stem):
    file = Path(stem).with_suffix(".state")
    return [artifact(file)] if file.is_file() else []


def artifact(file):
    return Artifact("state", file, FLOW, load)


def load(path):
    return torch.no_grad()(torch.jit.load(path))
"""
KINDS = {
    "loss": (HEAD + LOSS, "mine:\n  _target_: MODULE.Mine\n  weight: 0.1\n", ["loss=[ce,kd,mine]"]),
    "network": (HEAD + NET, None, ["student=custom", "student._target_=MODULE.net"]),
    "data": (
        HEAD + DATA,
        "_target_: MODULE.squares\nbatch_size: 8\nnum_workers: 0\naugment: ${augment}\n",
        ["data=mine"],
    ),
    "compress": (HEAD + STEP, "mine:\n  _target_: MODULE.halve\n  _partial_: true\n", ["compress=[mine]"]),
    "export": (
        HEAD + EXPORTER,
        "mine:\n  _target_: MODULE.export\n  _partial_: true\n",
        ["export=[mine]", "compress=[]"],
    ),
}
MISTAKES = [  # kind, what is there, what is there instead, and what the line says besides the file
    (
        "loss",
        "self.power = power",
        "self.power = power.lower()",
        "AttributeError: 'float' object has no attribute 'lower'",
    ),
    ("loss", "        super().__init__()\n", "", "before Module.__init__() call"),
    ("loss", "nn.Linear(1, 1)", "nn.Linear(student.features['pooled'].shape[1], 1)", "KeyError: 'pooled'"),
    (
        "loss",
        "student.logits - teacher.logits",
        "student.logits - teacher.logits[:, :3]",
        "RuntimeError: The size of tensor",
    ),
    ("loss", ".mean()", ".mean(1)", "loss mine answers with a tensor (16,)"),
    ("loss", "return (student", "(student", "loss mine answers with None"),
    ("loss", "class Mine(Loss)", "class Mine(nn.Module)", "loss mine is a Mine: expected a subclass"),
    ("loss", "def forward(self, student", "def forward(self student", "SyntaxError: "),
    ("loss", "import torch\n", "import torch\nimport notthere\n", "notthere is not installed"),
    ("loss", "teacher, batch)", "teacher)", "Mine.forward is called with (student, teacher, batch): too many"),
    ("loss", "teacher, data)", "teacher, data, images)", "Mine.build is called with (student, teacher, data): missing"),
    ("network", "forward(self, images)", "forward(self, images, mask)", "missing 1 required positional argument"),
    ("compress", 'halve(net, finetune=None, data=None, flow="fx")', "halve(net, data=None)", "unexpected keyword"),
    ("network", "return self.head(self.body(images))", "return self.haed(self.body(images))", "no attribute 'haed'"),
    ("network", "nn.Linear(8, num_classes)", "nn.Linear(9, num_classes)", "mat1 and mat2"),
    (
        "network",
        "    return Net(num_classes)",
        "    return Net(num_class)",
        "NameError: name 'num_class' is not defined",
    ),
    ("network", "    return Net(num_classes)", "    Net(num_classes)", "returns None: expected a torch.nn.Module"),
    (
        "network",
        "nn.Linear(8, num_classes)",
        "nn.Linear(8, 4)",
        "the student answers with (2, 4), expected (images, 10)",
    ),
    ("data", "torch.arange(60) % 3", "torch.arange(60.0) % 3", "labels: expected a tensor of int64"),
    (
        "data",
        "torch.arange(60) % 3",
        "torch.arange(60) % 4",
        "labels of train run from 0 to 3, and there are 3 classes",
    ),
    (
        "data",
        "(0, 256, (60, 3, 16, 16), dtype=torch.uint8)",
        "(0, 256, (60, 3, 16, 16)) / 255",
        "of uint8, from 0 to 255",
    ),
    ("data", "    return from_arrays", "    from_arrays", "returns None: expected a distill.data.base.Data"),
    ("data", "images[start:end], labels", "images[start:], labels", "one label an image"),
    ("compress", "    net(images)\n", "    net(images[:, 0])\n", "RuntimeError: "),
    ("compress", "    return net\n", "", "compress=mine returns None: expected the new network"),
    ("compress", "data.train[", "data.training[", "AttributeError: "),
    (
        "export",
        "torch.jit.trace(net, example)",
        "torch.jit.trace(net, exampl)",
        "NameError: name 'exampl' is not defined",
    ),
    ("export", "    return [artifact(file)]\n\n\ndef reload", "\n\ndef reload", "expected a list of Artifacts"),
    ("export", 'FLOW = "fx"', 'FLOWS = "fx"', "has no FLOW"),
    ("export", "torch.no_grad()(torch.jit.load(path))", "torch.jit.load(str(path) + '.gz')", "gz"),
]


def own(folder, monkeypatch, kind: str, source: str, module: str) -> list[str]:
    """The words that use a file of the user's."""
    _, yaml, words = KINDS[kind]
    (folder / f"{module}.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, module, raising=False)
    if yaml is not None:
        (folder / "conf" / kind).mkdir(parents=True)
        (folder / "conf" / kind / "mine.yaml").write_text(textwrap.dedent(yaml).replace("MODULE", module))
        words = ["--config-dir", "conf", *words]
    keys = {word.partition("=")[0] for word in words}
    others = [word for word in QUICK if word.partition("=")[0] not in keys]
    if kind == "data":
        others = [word for word in others if not word.startswith("data.")]
    return [word.replace("MODULE", module) for word in [*words, *others, "baseline=false"]]


@pytest.mark.parametrize(("kind", "there", "instead", "said"), MISTAKES)
def test_a_mistake_in_ones_own_file_is_told_with_its_line(
    train, tmp_path, monkeypatch, capfd, kind, there, instead, said
):
    source = KINDS[kind][0]
    assert there in source
    module = f"wrong_{kind}_{MISTAKES.index((kind, there, instead, said))}"
    words = own(tmp_path, monkeypatch, kind, source.replace(there, instead), module)
    assert train(*words, cwd=tmp_path) in (1, 2)
    told = capfd.readouterr()
    [line] = [line for line in told.err.splitlines() if line.startswith("error: ")]
    assert said in line and "Error in call" not in line and "full_key" not in line
    if "expected (images" not in said:
        assert line.startswith(f"error: {module}.py:"), line
    assert "fitting" not in told.out and not list(tmp_path.rglob("*.safetensors"))


def test_what_ones_own_code_does_to_test_images_no_file_is_to_do(train, tmp_path, monkeypatch, capfd):
    source = DATA.replace("    return from_arrays", "    made = from_arrays") + "    return doubled(made)\n"
    source += """

def doubled(data):
    from dataclasses import replace
    mine = lambda images, uniforms, size: (images // 2 * 2)
    mine.count = 0
    return replace(data, test=replace(data.test, transform=mine))
"""
    words = own(tmp_path, monkeypatch, "data", HEAD + source, "own_test_images")
    assert train(*words, "export=[onnx]", "export.onnx.resize=true", cwd=tmp_path) == 1
    told = capfd.readouterr()
    assert "error: export.onnx.resize=true: the test images of this set are prepared by function, which" in told.err
    assert "fitting" not in told.out and not list(tmp_path.rglob("*.safetensors"))


def test_a_module_that_is_not_found_names_the_path_and_where_its_file_is(train, tmp_path, capfd):
    (tmp_path / "mine_lost.py").write_text(HEAD + NET)
    words = ["student=custom", *(word for word in QUICK if not word.startswith("student="))]
    assert train(*words, "student._target_=mine_lost.net", cwd=tmp_path) == 2
    assert (
        f"there is no module 'mine_lost' on Python's path, but one in {tmp_path}: PYTHONPATH=."
        in capfd.readouterr().err
    )
    assert train(*words, "student._target_=mine_gone.net", cwd=tmp_path) == 2
    assert "there is no module 'mine_gone': PYTHONPATH=FOLDER" in capfd.readouterr().err
