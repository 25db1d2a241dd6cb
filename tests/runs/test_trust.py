"""A stranger's folder and files: nothing they name is imported or called, nothing they hold is unpickled or run."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import QUICK, ROOT
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from test_configs import composed
from torch import nn

import distill
from distill.errors import UserError
from distill.export import torch_export, torchscript
from distill.files import read_json, read_yaml
from distill.runs import tables, trust
from distill.schema import signatures

WORDS = ["stages=[teacher,distill]", "baseline=false", "compress=[]", "export=[]", "cache=off", "name=theirs"]


@pytest.fixture(scope="module")
def folder(train, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("trust")
    assert train(*QUICK, *WORDS, cwd=cwd) == 0
    return cwd / "outputs" / "theirs"


@pytest.fixture
def theirs(folder, tmp_path):
    """A copy of the run's folder, to be made hostile; `tmp_path / "ran"` is what its code would make."""
    copy = tmp_path / "outputs" / "theirs"
    subprocess.run(["cp", "-r", str(folder.parent.parent), str(tmp_path / "copied")], check=True)
    (tmp_path / "copied" / "outputs").rename(tmp_path / "outputs")
    return copy


def evil(ran) -> dict[str, dict]:
    """Callables that are importable, each with what makes it leave a trace."""
    path = str(ran)
    return {
        "os": {"_target_": "os.mkdir", "path": path},
        "pathlib": {
            "_target_": "pathlib.Path.write_text",
            "_args_": [{"_target_": "pathlib.Path", "_args_": [path]}, "x"],
        },
        "pickle": {"_target_": "pickle.loads", "_args_": ["x"]},
        "hub": {"_target_": "torch.hub.load", "repo_or_dir": path, "model": "net", "source": "local"},
        "pandas": {"_target_": "pandas.read_pickle", "filepath_or_buffer": path},
        "behind our prefix": {
            "_target_": "distill.networks.torchvision_models.torch.load",
            "f": path,
            "weights_only": False,
        },
        "our own, for another role": {"_target_": "distill.export.torch_export.load", "path": path},
        "a module of the folder": {"_target_": "planted.net"},
        "an attribute of torchvision": {"_target_": "torchvision.models.resnet.load_state_dict_from_url", "url": path},
        "an attribute of timm": {"_target_": "timm.models.resnet.build_model_with_cfg", "x": 1},
        "decoded later": {
            "_target_": "distill.networks.resnet_cifar.resnet",
            "depth": "${oc.decode:'{_target_: os.getcwd}'}",
        },
    }


@pytest.mark.parametrize("name", evil(""))
@pytest.mark.parametrize("nested", [False, True], ids=["itself", "nested"])
def test_a_students_file_names_networks_only(folder, tmp_path, monkeypatch, name, nested):
    (tmp_path / "planted.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    monkeypatch.chdir(tmp_path)
    called = evil(tmp_path / "ran")[name]
    network = (
        {"_target_": "distill.networks.resnet_cifar.resnet", "depth": 8, "widths": [{"a": [called]}]}
        if nested
        else called
    )
    meta = {"network": {"taps": {}, "mean": [0], "std": [1], **network}, "classes": ["a"], "image_size": 16}
    save_file(
        load_file(folder / "student.safetensors"),
        tmp_path / "evil.safetensors",
        {k: json.dumps(v) for k, v in meta.items()},
    )
    with pytest.raises(UserError, match=r"trust=true"):
        distill.load_student(tmp_path / "evil.safetensors")
    assert not (tmp_path / "ran").exists()
    assert "planted" not in sys.modules


@pytest.mark.parametrize(
    "key",
    [
        "student",
        "teacher",
        "data",
        "loss.kd",
        "optimizer",
        "schedule",
        "trainer",
        "+trainer.callbacks",
        "+export.x",
        "+logger.x",
        "+compress.x",
        "+augment.x",
        "+data.x",
        "+cache.x",
    ],
)
@pytest.mark.parametrize("stages", ["[export,report]", "[teacher,distill]"])
def test_a_run_json_names_what_this_package_registers(train, theirs, tmp_path, capfd, key, stages):
    record = json.loads((theirs / "run.json").read_text())
    plus = "+" if key.startswith("+") else ""
    key = key.lstrip("+")
    target = f"{plus}{key}._target_=pathlib.Path.touch"
    record["overrides"] += [
        target,
        f"+{key}._args_=[{{_target_:pathlib.Path,_args_:[{tmp_path / 'ran'}]}}]",
        "trust=true",
    ]
    (theirs / "run.json").write_text(json.dumps(record))
    assert train("run=outputs/theirs", f"stages={stages}", cwd=tmp_path) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert "pathlib.Path" in error and "trust=true" in error
    assert not (tmp_path / "ran").exists()


def test_the_annotations_of_what_a_run_json_names_are_not_even_read(train, theirs, tmp_path, monkeypatch, capfd):
    ran = tmp_path / "ran"
    (tmp_path / "strange.py").write_text(
        "from typing import Annotated\nfrom pydantic import ImportString\n"
        f'def net(depth: Annotated[int, exec("import os; os.mkdir({str(ran)!r})")], name: ImportString = None): ...\n'
    )
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(ran)!r})\nx = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    record = json.loads((theirs / "run.json").read_text())
    record["overrides"] += [
        "student=custom",
        "student._target_=strange.net",
        "+student.depth=8",
        "+student.name=evil.x",
    ]
    (theirs / "run.json").write_text(json.dumps(record))
    assert train(f"run={theirs}", cwd=tmp_path) != 0
    assert "strange.net" in capfd.readouterr().err and not ran.exists()
    takes = signatures.read("strange.net")  # and if they were, nothing is called
    assert takes.types["depth"] is int and not ran.exists()


@pytest.mark.parametrize("word", ["hydra.searchpath=[pkg://planted]", "+x@hydra.callbacks=y", "~hydra.run"])
def test_hydras_own_options_are_no_words_of_a_run(train, theirs, tmp_path, capfd, word):
    record = json.loads((theirs / "run.json").read_text())
    (theirs / "run.json").write_text(json.dumps(record | {"overrides": [*record["overrides"], word]}))
    assert train("run=outputs/theirs", cwd=tmp_path) == 1
    assert "run.json is damaged, or not one of ours" in capfd.readouterr().err


def test_an_evil_student_in_a_run_that_is_exported_again(train, theirs, tmp_path, capfd):
    file = theirs / "student.safetensors"
    meta = {"network": {"_target_": "pathlib.Path.touch", "taps": {}}, "classes": ["a"] * 10, "image_size": 16}
    save_file(load_file(file), file, {k: json.dumps(v) for k, v in meta.items()})
    assert train("run=outputs/theirs", "stages=[export,report]", "export=[torchscript]", cwd=tmp_path) == 1
    assert "names pathlib.Path.touch" in capfd.readouterr().err


def test_what_the_user_names_or_trusts_is_run(train, tmp_path, capfd, monkeypatch):
    """A network of the user's own: at once, continued by trust=true, or by naming it again."""
    (tmp_path / "mine_for_trust.py").write_text(
        "from torch import nn\n\n"
        "def net(num_classes):\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
        "nn.Linear(4, num_classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ["student=custom", "student._target_=mine_for_trust.net"]
    words = [
        *[word for word in QUICK if not word.startswith("student=")],
        *own,
        *WORDS[:-1],
        "loss=[ce,kd]",
        "name=mine",
    ]
    assert train(*words, cwd=tmp_path) == 0
    again = ["run=outputs/mine", "stages=[export]", "export=[torchscript]"]
    assert train(*again, cwd=tmp_path) == 1
    assert "mine_for_trust.net as student" in capfd.readouterr().err
    assert train(*again, "student._target_=mine_for_trust.net", cwd=tmp_path) == 0
    assert train(*again, "trust=true", cwd=tmp_path) == 0
    assert train(*again, cwd=tmp_path) == 1  # trust is not remembered
    with pytest.raises(UserError, match="mine_for_trust"):
        distill.load_student(tmp_path / "outputs/mine")
    assert distill.load_student(tmp_path / "outputs/mine", trust=True)(torch.rand(1, 3, 16, 16)).shape == (1, 10)


def test_what_a_config_dir_registers_is_known(tmp_path, monkeypatch):
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text("mine:\n  _target_: mine.Mine\n  weight: 1\n")
    described = {"loss": {"mine": {"_target_": "mine.Mine", "weight": 1}}}
    with pytest.raises(UserError, match=r"mine\.Mine as loss"):
        trust.check(described, "a folder")
    monkeypatch.setattr(sys, "argv", ["train.py", "--config-dir", str(tmp_path)])
    trust.check(described, "a folder")
    with pytest.raises(UserError, match=r"mine\.Mine as student"):
        trust.check({"student": described["loss"]["mine"]}, "a folder")


@pytest.mark.parametrize(
    "words",
    [
        ["teacher=ensemble", "student=simkd", "augment=[flip,mixup]", "optimizer=adamw", "schedule=multistep"],
        ["teacher=peer", "student=timm", "student.name=resnet18", "logger=[wandb,tensorboard]", "cache=features"],
        ["teacher=ema", "student=deit_tiny", "loss=[ce,deit,crd]", "compress=[prune,auto]", "export=[onnx,executorch]"],
    ],
)
def test_what_the_package_has_is_known(words):
    trust.check(OmegaConf.to_container(composed(*words), resolve=True), "x")


def test_libraries_models_and_optimizers_are_known():
    trust.check({"student": {"_target_": "torchvision.models.resnet18"}}, "x")
    trust.check({"student": {"_target_": "timm.models.resnet.resnet18"}}, "x")
    trust.check({"optimizer": {"_target_": "torch.optim.RMSprop"}}, "x")
    for argument in ({"pretrained_cfg": {"url": "http://x"}}, {"name": "hf-hub:x/y"}, {"checkpoint_path": "x"}):
        with pytest.raises(UserError, match="from elsewhere"):
            trust.check({"teacher": {"_target_": "timm.models.resnet.resnet18", **argument}}, "x")


# records: YAML and JSON


def bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    return "\n".join(lines + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)])


@pytest.mark.parametrize(
    "text",
    [
        bomb(),
        "a: !!python/object/apply:os.mkdir [ran]",
        "a: !!python/name:os.system",
        "[" * 5000,
        "- 1",
        "a: [",
        "x" * 10**7,
        "a: *b",
        "\x00",
        "a: " + "9" * 5000,
    ],
    ids=["bomb", "python tag", "python name", "deep", "a list", "cut", "huge", "no anchor", "nul", "digits"],
)
def test_a_hostile_config_yaml_is_one_line(train, theirs, tmp_path, capfd, text):
    (theirs / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="damaged, or not one of ours"):
        read_yaml(theirs / "config.yaml")
    assert train("run=outputs/theirs", "stages=[report]", cwd=tmp_path) == 1
    assert "config.yaml is damaged" in capfd.readouterr().err.splitlines()[-1]
    assert tables.summary(tmp_path / "outputs").empty
    [line] = capfd.readouterr().out.splitlines()
    assert "theirs is left out" in line and "config.yaml is damaged" in line
    assert not (tmp_path / "ran").exists()


NESTED = '{"choices": {}, "created": "", "versions": {}, "overrides": [["seed=0"]]}'


@pytest.mark.parametrize(
    "text",
    ["[" * 10**5, "{}", "[]", "{", '{"overrides": 1}', '{"overrides": [1]}', NESTED, "9" * 9000, " " * 2 * 10**6],
)
def test_a_hostile_run_json_is_one_line(train, theirs, tmp_path, capfd, text):
    (theirs / "run.json").write_text(text)
    assert train("run=outputs/theirs", cwd=tmp_path) == 1
    assert "run.json is damaged" in capfd.readouterr().err.splitlines()[-1]
    assert tables.summary(tmp_path / "outputs").empty
    [line] = capfd.readouterr().out.splitlines()
    assert "theirs is left out" in line and "run.json is damaged" in line


@pytest.mark.parametrize("commands", [1, "x", [1], ["seed=0"], [["seed=0", 2]], [["hydra.run.dir=x"]], {"a": 1}])
def test_commands_that_no_run_has_given_are_one_line(train, theirs, tmp_path, capfd, commands):
    record = json.loads((theirs / "run.json").read_text())
    (theirs / "run.json").write_text(json.dumps(record | {"commands": commands}))
    assert train("run=outputs/theirs", "trust=true", cwd=tmp_path) == 1
    assert "nothing that makes sense of its commands" in capfd.readouterr().err.splitlines()[-1]
    assert tables.summary(tmp_path / "outputs").empty


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="damaged"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "meta",
    [
        {"network": "["},
        {"network": "[" * 10**5},
        {"network": "{}", "classes": '"ab"', "image_size": "16"},
        {"network": "{}", "classes": '["a"]', "image_size": "1e9"},
        {"network": "{}", "classes": '["a"]', "image_size": "100000"},
    ],
)
def test_a_students_file_whose_description_makes_no_sense(tmp_path, meta):
    save_file({"a": torch.zeros(1)}, tmp_path / "odd.safetensors", meta)
    with pytest.raises(UserError, match="is damaged"):
        distill.load_student(tmp_path / "odd.safetensors")


# archives


class Makes:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
    return torch_export.export(net, torch.rand(2, 3, 8, 8), tmp_path_factory.mktemp("pt2") / "net", {})[0].path


def changed(source, path, change) -> None:
    """A copy of a zip file with `change(name, content)` for each member; None leaves it out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            content = change(member.filename, old.read(member))
            if content is not None:
                new.writestr(member.filename, content)


def test_our_own_archive_holds_nothing_pickled_and_answers(archive):
    with zipfile.ZipFile(archive) as file:
        assert [file.getinfo(name).file_size for name in file.namelist() if "sample_inputs" in name] == [0]
    assert torch_export.load(archive)(torch.rand(3, 3, 8, 8)).shape == (3, 5)


def test_a_pickled_sample_is_left_out(archive, tmp_path):
    """As torch.export.save writes one; a hostile one is not read either."""
    for content in (pickle.dumps(Makes(tmp_path / "ran")), saved({"x": Makes(tmp_path / "ran")})):
        changed(archive, tmp_path / "evil.pt2", lambda name, old, new=content: new if "sample_inputs" in name else old)
        torch_export.load(tmp_path / "evil.pt2")(torch.rand(1, 3, 8, 8))
        assert not (tmp_path / "ran").exists()


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def in_json(**replaced):
    """A change of texts in models/model.json."""

    def change(name, content):
        if name.endswith("models/model.json"):
            for old, new in replaced.items():
                text, count = re.subn(HOLES[old], lambda found, new=new: new, content.decode())
                assert count
                content = text.encode()
        return content

    return change


HOLES = {
    "size": r"Symbol\('s\d+', positive=True, integer=True\)",
    "operator": r"torch\.ops\.aten\.linear\.default",
    "guards": r'"guards_code": \[\]',
    "tree": r"builtins\.tuple",
    "placeholder": r'"name": "p_3_weight"',
}


@pytest.mark.parametrize(
    "change",
    [
        in_json(size="__import__('os').mkdir('ran')"),
        in_json(size="Symbol('s77').__class__"),
        in_json(size="exec('s77')"),
        in_json(operator="torch.serialization.os.mkdir"),
        in_json(operator="torch.hub.load"),
        in_json(operator="torch.ops.aten.save.default"),
        in_json(operator="torch.ops.load_library"),
        in_json(tree="collections.defaultdict"),
        in_json(placeholder="\"name\": \"x=__import__('os').mkdir('ran')\""),
        lambda name, content: (
            content.replace(b'"use_pickle": false', b'"use_pickle": true') if "weights_config" in name else content
        ),
        lambda name, content: content.replace(b"weight_0", b"custom_obj_0") if "weights_config" in name else content,
    ],
    ids=["import", "attribute", "exec", "os", "hub", "save", "library", "tree", "argument", "pickled", "object"],
)
def test_a_hostile_archive_is_refused(archive, tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    changed(archive, tmp_path / "evil.pt2", change)
    with pytest.raises(UserError, match="is not opened"):
        torch_export.load(tmp_path / "evil.pt2")
    assert not (tmp_path / "ran").exists()


def test_guards_are_not_compiled(archive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changed(archive, tmp_path / "evil.pt2", in_json(guards="\"guards_code\": [\"__import__('os').mkdir('ran')\"]"))
    torch_export.load(tmp_path / "evil.pt2")(torch.rand(1, 3, 8, 8))
    assert not (tmp_path / "ran").exists()


def test_libraries_and_packed_members_in_an_archive(archive, tmp_path):
    changed(archive, tmp_path / "evil.pt2", lambda name, content: content)
    with zipfile.ZipFile(tmp_path / "evil.pt2", "a") as file:
        file.writestr("archive/data/aotinductor/model/net.so", b"x")
    with pytest.raises(UserError, match="aotinductor"):
        torch_export.load(tmp_path / "evil.pt2")
    changed(archive, tmp_path / "bomb.pt2", lambda name, content: content)
    with zipfile.ZipFile(tmp_path / "bomb.pt2", "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/weights/weight_9", bytes(10**7))
    with pytest.raises(UserError, match="is packed"):
        torch_export.load(tmp_path / "bomb.pt2")


class Writes(nn.Module):
    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x):
        torch.save(x, self.path)
        return x


class Maps(Writes):
    def forward(self, x):
        return torch.from_file(self.path, shared=True, size=10) + x.sum()


@pytest.mark.parametrize("kind", [Writes, Maps])
def test_torchscript_that_reaches_files_is_refused(tmp_path, kind):
    script = torch.jit.script(kind(str(tmp_path / "ran")))
    torch.jit.save(script, tmp_path / "evil.pt")
    (tmp_path / "evil.ptl").write_bytes(script._save_to_buffer_for_lite_interpreter())
    for load, name in ((torchscript.load_script, "evil.pt"), (torchscript.load_lite, "evil.ptl")):
        with pytest.raises(UserError, match="reaches files"):
            load(tmp_path / name)


def test_a_files_process_takes_no_modules_from_the_working_directory(archive, tmp_path):
    (tmp_path / "zipfile.py").write_text("import os\nos.mkdir('ran')\n")
    (tmp_path / "numpy.py").write_text("import os\nos.mkdir('ran')\n")
    program = (
        "import sys; sys.path[0] = ''; from pathlib import Path; import torch\n"
        "sys.path[0] = sys.argv[2]\n"
        "from distill.export import torch_export\nfrom distill.runtimes import serve\n"
        "artifact = torch_export.reload(Path(sys.argv[1]))[0]\n"
        "with serve.serve({'x': artifact}) as served: print(served['x'](torch.rand(1, 3, 8, 8)).shape)\n"
    ).replace("sys.path[0] = ''; ", "sys.path.pop(0); sys.path.insert(0, sys.argv[2]); ")
    done = subprocess.run(
        [sys.executable, "-c", program, str(archive.with_suffix("")), str(ROOT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "(1, 5)" in done.stdout.replace("torch.Size([1, 5])", "(1, 5)"), done.stderr
    assert not (tmp_path / "ran").exists()
