"""docs/python.md, done as it says: every block, from top to bottom, with smaller networks."""

import contextlib
import io
import re

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

matplotlib.use("agg")
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
SMALLER = {"teacher=resnet50": "teacher=resnet8", "student=mobilenet": "student=resnet8_tiny"}
QUICKER = 'trainer__accelerator="cpu", data__batch_size=8'
SMALLER |= {"for seed in (0, 1)": "for seed in (0,)", '(student, "static_int8")': '(student, "dynamic_int8")'}
SMALLER |= {'student="resnet8"': 'student="resnet8_tiny"', 'teacher="resnet20"': 'teacher="resnet8"'}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("python")
    generator = np.random.default_rng(0)
    for place, name in enumerate(("cat", "dog", "owl")):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(40):
            pixels = generator.integers(0, 90, (16, 16, 3), np.uint8)
            pixels[..., place] += 120
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number}.png")
    Image.fromarray(generator.integers(0, 255, (300, 200, 3), np.uint8)).save(folder / "photo.jpg")
    return folder


@pytest.mark.matrix
@pytest.mark.slow
def test_every_block_runs(photos, served_here, monkeypatch):
    monkeypatch.chdir(photos)
    space, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        for number, block in enumerate(BLOCKS):
            for name, other in SMALLER.items():
                block = block.replace(name, other)
            if "distill.train(" in block:
                epochs = ", trainer__max_epochs=4" * (number == 0)
                block = block.replace('data="photos/"', f'data="photos/", {QUICKER}{epochs}')
            exec(compile(block, f"docs/python.md, block {number}", "exec"), space)
            if number == 1:
                run, student = space["run"], space["student"]
                assert run.report.loc["teacher", "top1"] >= 0 and "test images" in run.verdict
                assert student.classes == ("cat", "dog", "owl") and student.image_size == 16
                assert [path.suffix for path in run.files].count(".pt") == 2
                assert "<table" in run._repr_html_() and run.verdict.replace("&", "") in run._repr_html_()
                assert [*run.networks] == ["teacher", "student alone", "student"]
                images = run.data.test[[0, 1], 0].images
                assert torch.allclose(run.networks["student"](images).logits, student(images), rtol=1e-4)
                measured = space["distill"].evaluate(student)
                for column in ("top1", "top1_error", "macro", "ece"):  # the report's own figures
                    assert measured[column] == run.report.loc["student", column]
                assert {*student.predict("photos/owl/7.png")} == {"cat", "dog", "owl"}
    assert len(BLOCKS) > 10 and "did you mean resnet8?" in out.getvalue()
