"""The house: which modules lie loose, and that imports point one way. docs/architecture.md says what lives where."""

import re

import pytest
from conftest import ROOT
from hydra.utils import get_object
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import distill
from benchmarks import imports
from distill.files import read_json
from distill.networks.weights import read_metadata
from distill.runs.moved import present, renamed

PACKAGE = ROOT / "distill"
USES = imports.imports(PACKAGE)


def test_only_the_ground_lies_loose():
    assert imports.loose(PACKAGE) == [
        "archives",
        "asked",
        "called",
        "errors",
        "files",
        "locks",
        "own",
        "processes",
        "progress",
        "signals",
        "types",
    ]


def test_every_folder_is_a_room_and_imports_point_downwards():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name not in ("__pycache__", "conf")}
    assert folders | set(imports.loose(PACKAGE)) == set(imports.ROOMS)
    found = imports.arrows(USES)
    assert [line for pair in imports.backwards(found) for line in found[pair]] == []


def test_no_files_import_each_other():
    assert imports.circles(USES) == []


def test_a_wrong_import_would_be_seen():
    uses = {"distill.data.base": {"distill.training.fit"}, "distill.training.fit": {"distill.data.base"}}
    assert imports.backwards(imports.arrows(uses)) == [("data", "training")]
    assert imports.circles(uses) == [["distill.data.base", "distill.training.fit"]]


def test_the_page_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert {name for name in imports.ROOMS if f"`{name}" in page} == set(imports.ROOMS)
    for path in re.findall(r"`(distill/[\w/.]+)`", page):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("distill.models.resnet_cifar.resnet", "distill.networks.resnet_cifar.resnet"),
        ("distill.models.simkd.simkd", "distill.networks.simkd.simkd"),
        ("distill.schedules.cosine", "distill.training.schedules.cosine"),
        ("distill.loggers.wandb", "distill.training.loggers.wandb"),
        ("distill.teachers.Committee", "distill.teachers.committee.Committee"),
        ("distill.teachers.Peer", "distill.teachers.peer.Peer"),
        ("distill.teachers.Ema", "distill.teachers.ema.Ema"),
        ("distill.runs.SweepTable", "distill.report.sweeps.SweepTable"),
        ("distill.runs.sweeps.SweepTable", "distill.report.sweeps.SweepTable"),
    ],
)
def test_names_of_earlier_versions_lead_to_what_is_there_now(old, new):
    described = {"a": [{"_target_": old, "body": {"_target_": old}}], "b": old}
    assert renamed(described) == {"a": [{"_target_": new, "body": {"_target_": new}}], "b": old}
    assert OmegaConf.to_container(present(OmegaConf.create(described))) == renamed(described)
    assert renamed({"_target_": "distill.modelsish.x"}) == {"_target_": "distill.modelsish.x"}
    assert callable(get_object(new))


@pytest.mark.matrix
def test_a_run_of_the_old_names_is_loaded_and_goes_on(train, quick, tmp_path):
    assert train(*quick, "name=old", "teacher=ema", "baseline=false", cwd=tmp_path) == 0
    folder = tmp_path / "outputs" / "old"
    for file in ("config.yaml", "student.safetensors", "student_last.safetensors"):
        content = (folder / file).read_bytes()
        names = {b"distill.networks.resnet_cifar": b"distill.models.resnet_cifar", b"teachers.ema.Ema": b"teachers.Ema"}
        names |= {b"distill.training.schedules": b"distill.schedules"}
        if file.endswith("yaml"):
            for new, old in names.items():
                content = content.replace(new, old)
            content = content.partition(b"\n")[2]  # the checksum, which they did not have
            assert b"distill.models" in content and b"distill.teachers.Ema" in content
        else:
            tensors, metadata = load_file(folder / file), read_metadata(folder / file)
            metadata["network"] = metadata["network"].replace("distill.networks", "distill.models")
            save_file(tensors, folder / file, metadata)
            continue
        (folder / file).write_bytes(content)
    distill.load_student(folder)
    assert train("run=outputs/old", "stages=[export,report]", cwd=tmp_path) in (0, 1)  # chance may miss a bound
    assert read_json(folder / "run.json")["stages"] == ["export", "report"]
    words = ["student=custom", "student._target_=distill.models.resnet_cifar.resnet", "+student.depth=8"]
    words += ["name=new", "stages=[check]", *(word for word in quick if not word.startswith("student="))]
    assert train(*words, cwd=tmp_path) == 0
