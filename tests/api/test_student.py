"""A student sees a photo exactly as its evaluation did, and is compressed and exported as by a run's stages."""

import numpy as np
import pytest
import torch
from conftest import QUICK
from PIL import Image

import distill
from distill.data.imagefolder import imagefolder
from distill.data.prepare import Preparation, described_as, preparation
from distill.errors import UserError
from distill.networks.student import Student

GENERATOR = np.random.default_rng(0)


def pixels(height: int, width: int) -> np.ndarray:
    coarse = GENERATOR.integers(0, 255, (8, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def photos(folder, height: int, width: int) -> None:
    """Every kind of photo in two classes: EXIF, grey, CMYK, 16 bits, a palette, transparency, a progressive JPEG."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        image = Image.fromarray(pixels(height, width))
        place = folder / name
        image.save(place / "turned.jpg", exif=exif, quality=90)
        image.save(place / "progressive.jpg", progressive=True)
        image.convert("L").save(place / "grey.jpg")
        image.convert("CMYK").save(place / "cmyk.jpg")
        Image.fromarray(pixels(height, width)[..., 0].astype(np.uint16) * 257).save(place / "sixteen.png")
        image.convert("P").save(place / "palette.png")
        image.convert("RGBA").rotate(20).save(place / "transparent.png")
        image.save(place / "plain.png")
        image.convert("1").save(place / "bits.png")
        image.save(place / "frames.gif", save_all=True, append_images=[image])


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((300, 225), {"image_size": 32}),  # a JPEG is decoded at a part of it
        ((300, 225), {"image_size": [24, 48]}),
        ((300, 200), {"image_size": 32, "pack": 40}),
        ((40, 50), {"image_size": 32}),
        ((32, 32), {}),
    ],
    ids=str,
)
def test_a_prepared_file_has_the_pixels_of_the_test_image(tmp_path, size, options):
    photos(tmp_path / "photos", *size)
    data = imagefolder(str(tmp_path / "photos"), store=str(tmp_path / "store"), **options)
    prepare = preparation(data)
    assert described_as(prepare.described(), data.image_size) == prepare
    for split in (data.test, data.val):
        source = split.source if isinstance(split.images, torch.Tensor) else split.images
        files = [tmp_path / "photos" / name for name in source.entries()[0]]
        expected = split[list(range(len(split))), 0].images
        assert len(files) == len(expected) >= 2
        assert torch.equal(prepare(files), expected)
        assert torch.equal(prepare(files[0].read_bytes()), expected[0])
        with open(files[0], "rb") as file:
            assert torch.equal(prepare(file), expected[0])


def test_an_image_in_memory_is_the_file_without_loss(tmp_path):
    original = pixels(70, 90)
    Image.fromarray(original).save(tmp_path / "photo.png")
    prepare = Preparation(32)
    wanted = prepare(tmp_path / "photo.png")
    tensor = torch.from_numpy(original.copy()).permute(2, 0, 1)
    for same in (original, Image.open(tmp_path / "photo.png"), str(tmp_path / "photo.png"), tensor, original[None][0]):
        assert torch.equal(prepare(same), wanted)
    assert torch.equal(prepare(original[None]), wanted[None]) and torch.equal(prepare(tensor[None]), wanted[None])
    assert (prepare(original / 255) - wanted).abs().max() < 2 / 255  # resized without rounding
    grey = original[..., 0]
    assert torch.equal(prepare(grey), prepare(Image.fromarray(grey)))
    assert torch.equal(prepare(grey.astype(np.uint16) * 256), prepare(grey))
    assert torch.equal(prepare(grey[..., None]), prepare(torch.from_numpy(grey.copy())))
    assert torch.equal(prepare(np.dstack([original, np.full((70, 90), 255, np.uint8)])), wanted)


@pytest.mark.parametrize(
    ("image", "told"),
    [
        ("nowhere.jpg", r"cannot read the image nowhere\.jpg \(No such file"),
        ([], "there is no image in an empty list"),
        (3, "expected a path, a Pillow image"),
        (b"no image", "cannot read the image the image"),
        (np.zeros((3, 20, 20), np.uint8), "expected an array"),
        (np.full((20, 20, 3), 3.0), r"floating-point pixels in \[0, 1\], not from 3 to 3"),
        (torch.zeros(20, 20, 3), "expected a tensor"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "of uint8, or of floating point"),
        (Image.new("F", (8, 8)), "floating-point values have no range"),
    ],
    ids=lambda part: part if isinstance(part, str) else type(part).__name__,
)
def test_what_is_no_image_is_told(image, told):
    with pytest.raises(UserError, match=told):
        Preparation(32)(image)


class Means(torch.nn.Module):
    """Logits that are the mean of each colour."""

    def forward(self, images):
        return 20 * images.mean((2, 3))


def test_predictions_are_names_and_probabilities():
    student = Student(Means(), ["red", "green", "blue"], image_size=16, mean=[0.1] * 3, std=[2.0] * 3)
    green = np.zeros((20, 30, 3), np.uint8)
    green[..., 1] = 255
    found = student.predict(green)
    assert [*found] == ["green", "red", "blue"] and sum(found.values()) == pytest.approx(1)
    assert found["green"] == pytest.approx(1 / (1 + 2 * np.exp(-10)), rel=1e-5)
    assert student.predict([green, green], top=1) == [{"green": found["green"]}] * 2
    images = student.preprocess([green] * 130)
    assert torch.equal(student(images), 20 * ((images - 0.1) / 2).mean((2, 3)))
    assert len(student.predict([green] * 130)) == 130 and student.training  # as it was
    with pytest.raises(UserError, match="3 logits for 2 classes"):
        Student(Means(), ["red", "green"], image_size=16).predict(green)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["baseline=false", "stages=[teacher,distill]", "name=x", "teacher.fit.epochs=1"]
        return distill.train(*QUICK, *words).student


def test_a_compressed_student_is_exported_as_what_it_is(student, served_here, tmp_path, monkeypatch):
    monkeypatch.chdir(student.folder.parents[1])
    small = distill.compress(student, "fp16")
    assert small.classes == student.classes and small.compressed.steps == ("fp16",)
    [script, lite] = distill.export(small, tmp_path / "mobile")
    assert script.path.name == "student-fp16.pt" and lite.path.name == "student-fp16.ptl"
    images = torch.rand(2, 3, 16, 16)
    assert torch.allclose(script.run(images), small(images), atol=1e-2)
    assert {"README.md", "classes.txt"} <= {path.name for path in (tmp_path / "mobile").iterdir()}
    with pytest.raises(distill.UsageError, match="compressed for another runtime than onnx's"):
        distill.export(small, tmp_path / "mobile", "onnx")
    with pytest.raises(distill.UsageError, match="is compressed already, by fp16"):
        distill.compress(small, "fp16")


def test_what_is_not_like_the_student_raises(student, served_here, tmp_path, monkeypatch):
    monkeypatch.chdir(student.folder.parents[1])
    with pytest.raises(UserError, match=r"low_rank: top-1 agrees with the float student on .* \(needed: 200"):
        distill.compress(
            student,
            "low_rank",
            compress__low_rank__energy=0.3,
            tolerance__compressed={"agreement": 2.0, "accuracy_drop": None},
        )
    with pytest.raises(UserError, match=r"student\.pt.*: logits differ .* \(needed: 990"):
        distill.export(student, tmp_path / "mobile", tolerance__file={"snr": 990})


def test_images_must_be_the_students(student, tmp_path, monkeypatch):
    monkeypatch.chdir(student.folder.parents[1])
    photos(tmp_path / "photos", 20, 20)
    with pytest.raises(UserError, match="classes that the student doesn't know: a, b; it knows class0"):
        distill.evaluate(student, tmp_path / "photos")
    with pytest.raises(distill.UsageError, match="the student takes 16 px, and these images have 32 px"):
        distill.evaluate(student, "fake")
    with pytest.raises(distill.UsageError, match="this student is of no run"):
        distill.evaluate(Student(Means(), "abc", 16))
    with pytest.raises(distill.UsageError, match="Means: expected a student"):
        distill.evaluate(Means())


def test_classes_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, name in enumerate(("blue", "red")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        image = np.zeros((20, 20, 3), np.uint8)
        image[..., 2 * (1 - place)] = 200
        for number in range(10):
            Image.fromarray(image + np.uint8(number)).save(tmp_path / "photos" / name / f"{number}.png")
    student = Student(Means(), ["red", "green", "blue"], 16, preprocess=Preparation(16, None))
    found = distill.evaluate(student, "photos", images="all")
    assert found["top1"] == 1 and found["images"] == 20
    assert distill.evaluate(student, "photos")["images"] == 4


def test_a_file_without_preparation_is_read_as_images_of_its_size_usually_are():
    assert described_as(None, 32) == Preparation(32, None) and described_as(None, 224).resize == 256 / 224
    for wrong in ({"resize": "1"}, {"resize": 0}, {"pack": [0, 1]}):
        with pytest.raises(UserError):
            described_as(wrong, 32)
