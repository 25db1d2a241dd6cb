"""What is said of images before training: stages=[check], and data.corrupt=skip."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sets import fake, imagefolder, webdataset
from test_data import make_folder, one_line
from test_data_shards import image_bytes, make_shards, write_tar

from distill.data import survey as module
from distill.data.findings import findings, uneven
from distill.errors import UserError

QUICK = [
    *("data=imagefolder", "teacher=resnet8_tiny", "student=resnet8_tiny", "trainer.max_epochs=1", "data.batch_size=8"),
    *("baseline=false", "compress=[]", "export=[]", "trainer.accelerator=cpu", "name=one"),
]


def make_set(root, side: int):
    """train and test, each image another."""
    for split, number in (("train", 8), ("test", 4)):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(number):
                content = image_bytes(label, i + 100 * (split == "test"), side)
                (root / split / name / f"{i:02}.png").write_bytes(content)
    return root


def spoil(root) -> None:
    shutil.copy(root / "train/cat/00.png", root / "test/cat/copy.png")  # leaked
    Image.open(root / "train/cat/01.png").save(root / "train/cat/again.webp", lossless=True)  # twice, in another format
    shutil.copy(root / "train/dog/02.png", root / "train/cat/two.png")  # under two labels
    (root / "train/dog/cut.png").write_bytes((root / "train/dog/03.png").read_bytes()[:400])
    (root / "train/dog/page.jpg").write_text("<html>")
    (root / "train/dog/named.jpg").write_bytes(image_bytes(1, 50, 72))
    frames = [Image.new("RGB", (72, 72), colour) for colour in ("red", "blue")]
    frames[0].save(root / "train/dog/moves.gif", save_all=True, append_images=frames[1:])
    Image.new("CMYK", (90, 120), (9, 0, 0, 0)).save(root / "train/cat/print.jpg")


TOLD = (
    "damaged: 2 images (train/dog/cut.png (image file is truncated), train/dog/page.jpg (cannot identify image file))",
    "height × width: 72 × 72 px to 120 × 90 px",
    "JPEG CMYK 1",
    "JPEG CMYK: inks as colours",
    "several frames, of which the first is seen: 1 (train/dog/moves.gif)",
    "named as another format, read as what they are: 1 (train/dog/named.jpg is PNG)",
    "test images are among those of training or validation (test/cat/copy.png = train/cat/00.png)",
    "the same image in different classes: 1 (train/cat/two.png and train/dog/02.png)",
)


def test_the_check_tells_all_and_leaves_the_rest_undone(train, tmp_path, capfd):
    root = make_set(tmp_path / "set", 72)
    spoil(root)
    words = [*QUICK, f"data.root={root}", "data.image_size=32", "data.val_fraction=0.01"]
    assert train(*words, "stages=[check]", cwd=tmp_path) == 1
    told = capfd.readouterr()
    for line in TOLD:
        assert line in told.out, line
    assert "training images that are there twice or more: 2 (" in told.out
    error = told.err.splitlines()[-1]
    assert error.startswith("error: 2 images can't be read: train/dog/cut.png (") and "data.corrupt=skip" in error

    assert train(*words, "stages=[check]", "data.corrupt=skip", "name=two", cwd=tmp_path) == 0
    told = capfd.readouterr().out
    assert "check: a step was trained" in told and all(line in told for line in TOLD)
    assert train(*words, "name=three", cwd=tmp_path) == 1  # stop
    assert "train/dog/page.jpg (cannot identify" in capfd.readouterr().err


def test_what_is_left_out_is_counted_and_named_in_output_and_report(train, tmp_path, capfd):
    root = make_set(tmp_path / "set", 72)
    (root / "train/dog/cut.png").write_bytes((root / "train/dog/03.png").read_bytes()[:400])
    words = [*QUICK, f"data.root={root}", "data.image_size=32", "data.corrupt=skip"]
    assert train(*words, "stages=[teacher,distill,report]", cwd=tmp_path) == 0
    assert "1 images are damaged and left out: train/dog/cut.png (image file is" in capfd.readouterr().out
    report = json.loads((tmp_path / "outputs/one/report.json").read_text())
    assert report["context"]["images left out"].startswith("1: train/dog/cut.png (")


@pytest.mark.parametrize("side, options", [(20, {}), (72, {}), (72, {"pack": 40})], ids=["small", "large", "packed"])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_left_out_is_as_if_it_had_never_been_there(tmp_path, kind, side, options):
    """The same rows, splits, views and keys of what is kept."""
    options = {"image_size": 16 if side == 20 else 32, "store": str(tmp_path / "store"), **options}

    def make(corrupt: str):
        if kind == "folder":
            return imagefolder(str(tmp_path / "set"), 4, 0, corrupt=corrupt, **options)
        return webdataset(f"{tmp_path}/train-*.tar", 4, 0, corrupt=corrupt, **options)

    if kind == "folder":
        make_set(tmp_path / "set", side)
    else:
        make_shards(tmp_path / "train", 2, 12, side)
    before = make("stop")
    if kind == "folder":
        broken = tmp_path / "set/train/cat/03a.png"
        broken.write_bytes((tmp_path / "set/train/cat/03.png").read_bytes()[:300])
    else:
        broken = tmp_path / "train-002.tar"
        write_tar(broken, {"bad.png": b"none", "bad.cls": b"1", "good.png": image_bytes(1, 1, side), "good.cls": b"1"})
        with pytest.raises(UserError):
            make("stop")
        assert [name.partition(" ")[0] for name in make("skip").left_out] == ["bad"]
        return
    after = make("skip")
    assert after.left_out[0].startswith("train/cat/03a.png (") and len(after.left_out) == 1
    assert after.fingerprint == before.fingerprint  # so teachers and their answers are found again
    for one, two in zip(before.train_loader(0), after.train_loader(0), strict=True):
        assert torch.equal(one.images, two.images) and torch.equal(one.index, two.index)


def test_images_are_read_once(tmp_path, monkeypatch, capsys):
    root = make_set(tmp_path / "set", 72)
    (root / "train/cat/none.png").write_bytes(b"")
    store, read, rows = tmp_path / "store", module.read_and_look, []
    monkeypatch.setattr(module, "read_and_look", lambda *args: rows.append(args[2]) or read(*args))

    def make():
        rows.clear()
        return imagefolder(str(root), 4, 0, image_size=32, store=str(store), corrupt="skip")

    before = make()
    assert len(rows) == 25
    assert make().left_out == before.left_out and not rows
    (kept,) = store.glob("*.survey.npz")
    kept.write_bytes(kept.read_bytes()[:500])
    assert make().left_out == before.left_out and len(rows) == 25 and "is damaged" in capsys.readouterr().out
    (root / "train/cat/none.png").write_bytes(image_bytes(0, 77, 72))
    assert make().left_out == () and len(make().train) == len(before.train) + 1


def test_a_class_of_damaged_images_alone_is_told(tmp_path):
    root = make_set(tmp_path / "set", 72)
    for path in (root / "test/dog").iterdir():
        path.write_bytes(b"none")
    with pytest.raises(UserError, match=r"no image of test can be read in 1 classes \(dog\)") as raised:
        imagefolder(str(root), 4, 0, corrupt="skip")
    one_line(raised)


def test_small_images_that_are_damaged_are_all_counted(tmp_path):
    root = make_folder(tmp_path, {"a": 10, "b": 10})
    for i in (2, 5, 7):
        (root / f"b/00{i}.png").write_bytes(b"none")
    with pytest.raises(UserError, match=r"b/002.png .*\(2 more can't be read: b/005.png, b/007.png\)"):
        imagefolder(str(root), 4, 0)


def test_uneven_classes_are_told_in_every_run(tmp_path):
    root = make_folder(tmp_path, {"often": 90, "seldom": 3})
    told = uneven(imagefolder(str(root), 4, 0))
    assert told.startswith("classes are uneven: 1 training images of seldom, 63 of often")
    assert uneven(fake(4, 0)) is None


def test_one_image_of_a_class_is_enough_for_splits_that_are_given(tmp_path):
    for number, split in enumerate(("train", "val", "test")):
        for label, name in enumerate("ab"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "x.png").write_bytes(image_bytes(label, number, 20))
    data = imagefolder(str(tmp_path), 4, 0)
    assert [len(split) for split in (data.train, data.val, data.test)] == [2, 2, 2]
    assert len(next(iter(data.train_loader(0))).labels) == 2
    assert "training: 2 images, 1 of each class" in list(findings(data))


def test_images_in_memory_are_compared_too():
    data = fake(4, 0)
    assert not [line for line in findings(data) if "leakage" in line or "twice" in line or "kinds" in line]
    data.test.images[3] = data.train.images[5]
    data.test.labels[3] = (data.train.labels[5] + 1) % 10
    told = list(findings(data))
    assert "leakage: 1 of 200 test images are among those of training or validation (row 3 = row 5)" in told
    assert "the same image in different classes: 1 (row 5 and row 3)" in told


def test_digests_are_of_pixels_and_shape():
    flat = np.zeros((2, 3, 3), np.uint8)
    assert module.digest(flat) == module.digest(flat.copy()) != module.digest(flat.reshape(3, 2, 3))
    assert module.digest(flat) != module.digest(flat + 1) != 0
