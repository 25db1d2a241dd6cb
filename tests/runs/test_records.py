"""What a run was made with stays what it was, though defaults change."""

import shutil

import pytest
from conftest import QUICK
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from distill.files import read_json
from distill.networks.weights import read_metadata

NAKED = ["compress=[]", "export=[]", "baseline=false"]


def test_a_run_keeps_the_values_of_its_time(train, tmp_path, capfd):
    assert train(*QUICK, "name=old", "compress=[]", "export=[]", cwd=tmp_path) == 0
    folder = tmp_path / "outputs" / "old"
    cfg = OmegaConf.load(folder / "config.yaml")
    cfg.loss.kd.weight, cfg.loss.ce.weight = 1.0, 1.0  # defaults of an earlier version
    OmegaConf.save(cfg, folder / "config.yaml")  # without a checksum, as they wrote it
    assert train("run=outputs/old", "stages=[report]", "budget.bytes=1MB", cwd=tmp_path) == 0
    kept = OmegaConf.load(folder / "config.yaml")
    assert (kept.loss.kd.weight, kept.loss.ce.weight, kept.budget.bytes) == (1.0, 1.0, "1MB")
    assert train("run=outputs/old", "loss.kd.weight=0.9", cwd=tmp_path) == 2
    assert "loss" in capfd.readouterr().err


@pytest.fixture(scope="module")
def done(train, tmp_path_factory):
    """The folder in which a run `x` was made, with images of its own."""
    folder = tmp_path_factory.mktemp("done")
    for split, count in (("train", 12), ("test", 4)):
        for label in ("a", "b"):
            place = folder / "photos" / split / label
            place.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (16, 16), (20 * number, 99 if label == "a" else 0, 0)).save(place / f"{number}.png")
    words = [word for word in QUICK if not word.startswith("data")]
    assert train(*words, *NAKED, "data=imagefolder", "data.root=photos", "name=x", cwd=folder) == 0
    return folder


@pytest.fixture
def copy(done, tmp_path):
    """A copy of it with all that lies around it, which goes on there."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    return tmp_path / "outputs" / "x"


def records(run):
    return {name: (run / name).read_bytes() for name in ("run.json", "config.yaml", "images.json")}


def test_a_refused_continuation_changes_nothing(train, copy, capfd):
    for name in ("student.safetensors", "student_last.safetensors"):
        (copy / name).unlink()  # cut before the end of training
    before = records(copy)
    assert train("run=outputs/x", "stages=[report]", cwd=copy.parents[1]) == 1
    assert "distill stage is not finished" in capfd.readouterr().err
    assert train("run=outputs/x", "optimizer.lr=7", cwd=copy.parents[1]) == 2
    assert train("run=outputs/x", "stages=[export]", "export=nothing", cwd=copy.parents[1]) == 2
    assert records(copy) == before
    assert train("run=outputs/x", cwd=copy.parents[1]) == 0
    assert read_json(copy / "run.json")["stages"] == ["teacher", "distill", "compress", "export", "report"]


def test_what_changes_is_named_key_by_key_and_what_changes_no_bit_is_taken(train, copy, capfd):
    again = ["run=outputs/x", "stages=[teacher,distill,report]"]
    assert train(*again, "optimizer.lr=0.03", "ema=0.9", cwd=copy.parents[1]) == 2
    error = capfd.readouterr().err
    assert "optimizer.lr 0.05 → 0.03" in error and "ema none → 0.9" in error and "force=true" in error
    assert train(*again, "data.num_workers=1", "checkpoint_every=3", "trainer.devices=1", cwd=copy.parents[1]) == 0
    said = capfd.readouterr().out
    assert "changed: checkpoint_every 500 → 3, which changes no bit" in said and "devices" not in said
    assert "changed: data.num_workers" in said
    assert train(*again, "ema=0.9", "force=true", cwd=copy.parents[1]) == 0
    assert read_json(copy / "report.json")["context"]["went on although"] == "ema none → 0.9"
    assert "ema none → 0.9" in (copy / "report.md").read_text()
    assert train(*again, "loss=[ce]", cwd=copy.parents[1]) == 2
    assert "loss.kd._target_" in capfd.readouterr().err


def test_a_run_goes_on_from_any_folder(train, copy, tmp_path_factory, capfd):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (copy / "student.safetensors").unlink()
    shutil.rmtree(copy.parents[1] / "outputs" / "fits")
    assert train(f"run={copy}", cwd=elsewhere) == 0
    assert list(elsewhere.iterdir()) == []  # all paths are those of the first command
    photos = copy.parents[1] / "photos"
    photos.rename(elsewhere / "moved")
    assert train(f"run={copy}", "stages=[report]", cwd=elsewhere) in (1, 2)
    assert train(f"run={copy}", "stages=[report]", "data.root=moved", cwd=elsewhere) == 0
    assert "changed: data.root" in capfd.readouterr().out
    assert OmegaConf.load(copy / "config.yaml").data.root == "moved"
    assert train("run=outputs/x", "stages=[report]", cwd=copy.parents[1]) == 0  # which is still found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda photos: Image.new("RGB", (16, 16)).save(photos / "train" / "a" / "new.png"), ["1 image", "new"]),
        (lambda photos: (photos / "train" / "b" / "3.png").unlink(), ["1 image", "3.png"]),
        (
            lambda photos: [(photos / split / "a").rename(photos / split / "c") for split in ("train", "test")],
            ["a", "c"],
        ),
        (lambda photos: (photos / "test" / "a" / "1.png").unlink(), ["1.png"]),
    ],
)
def test_images_that_changed_are_named_before_anything_is_touched(train, copy, capfd, change, words):
    change(copy.parents[1] / "photos")
    before = records(copy)
    assert train("run=outputs/x", "stages=[report]", cwd=copy.parents[1]) == 1
    error = capfd.readouterr().err
    assert "its images are not those it began with" in error and "force=true" in error
    assert all(word in error for word in words), error
    assert records(copy) == before
    if "a" not in words:  # other classes need another head
        stages = "stages=[teacher,distill,report]"  # another teacher: it depends on its images
        assert train("run=outputs/x", stages, "force=true", cwd=copy.parents[1]) == 0
        assert "photos" in (copy / "config.yaml").read_text()
        assert read_json(copy / "report.json")["context"]["went on although"]


DAMAGES = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "binary": lambda content: bytes(range(256)),
    "a list": lambda content: b"[1, 2]",
    "without keys": lambda content: b"{}",
    "null": lambda content: b"null",
    "a changed value": lambda content: content.replace(b"accelerator", b"acceleratos"),
    "deep": lambda content: b"[" * 100_000,
    "gone": None,
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["run.json", "config.yaml"])
def test_a_damaged_record_is_named_with_the_way_on(train, copy, capfd, name, how):
    if DAMAGES[how] is None:
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(DAMAGES[how]((copy / name).read_bytes()))
    contents = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != ".lock"}
    assert train("run=outputs/x", "stages=[report]", cwd=copy.parents[1]) in (1, 2)
    [error] = capfd.readouterr().err.splitlines()
    assert error.startswith("error: ") and name in error, error
    assert "another name=" in error or (name, how) == ("run.json", "gone"), error  # then it is no run
    assert {path: path.read_bytes() for path in contents} == contents


@pytest.mark.parametrize("how", ["truncated", "empty", "binary", "no metadata", "other classes"])
def test_a_damaged_student_is_named(train, copy, capfd, how):
    file = copy / "student.safetensors"
    tensors, metadata = load_file(file), read_metadata(file)
    if how in DAMAGES:
        file.write_bytes(DAMAGES[how](file.read_bytes()))
    elif how == "no metadata":
        save_file(tensors, file)
    else:
        save_file(tensors, file, metadata | {"classes": "["})
    assert train("run=outputs/x", "stages=[report]", cwd=copy.parents[1]) == 1
    assert "student.safetensors" in capfd.readouterr().err.splitlines()[-1]
