"""The notebook runs on runs that are made here, and shows what they were."""

import json
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import QUICK, ROOT
from nbclient import NotebookClient

from distill.runs import tables


@pytest.fixture(scope="module")
def outputs(train, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("notebook")
    assert train("-m", *QUICK, "seed=0,1", cwd=cwd) == 0
    return cwd / "outputs"


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_runs_on_finished_runs(notebook: Path, outputs, monkeypatch):
    monkeypatch.setenv("DISTILL_RUNS", str(outputs))
    book = nbformat.read(notebook, as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), "commit notebooks without outputs"
    NotebookClient(book, kernel_name="python3", timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs_of = [output for cell in book.cells for output in cell.get("outputs", [])]
    figures = [output for output in outputs_of if "image/png" in output.get("data", {})]
    text = " ".join(output["data"].get("text/plain", "") for output in outputs_of if "data" in output)
    assert len(figures) == 2
    for word in ("student-dynamic_int8.ptl", "teacher_agreement", "resnet8_tiny", "points lost", "mean"):
        assert word in text


def test_only_runs_that_differ_in_their_seed_are_pooled(tmp_path):
    """Two temperatures of two seeds each: two lines, each with its own mean, deviation and count."""
    for name, words, gain in [
        ("a", ["loss.kd.temperature=2", "seed=0"], 0.10),
        ("b", ["seed=1", "loss.kd.temperature=2", "name=b"], 0.20),
        ("c", ["loss.kd.temperature=4", "seed=0"], 0.50),
        ("d", ["loss.kd.temperature=4", "seed=1"], 0.50),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        choices = {"teacher": "t", "student": "s", "data": "d"}
        record = {"choices": choices, "overrides": words, "created": name, "versions": {}, "status": "done"}
        (folder / "run.json").write_text(json.dumps(record))
        (folder / "config.yaml").write_text(
            f"loss: {{ce: 1, kd: 1}}\nseed: {next(w for w in words if 'seed=' in w)[-1]}\n"
        )
        rows = [{"name": "student", "top1": 0.3 + gain}, {"name": "student alone", "top1": 0.3}]
        (folder / "report.json").write_text(json.dumps({"rows": rows, "context": {"test images": 100}}))
    book = nbformat.read(ROOT / "notebooks/analysis.ipynb", as_version=4)
    (cell,) = (cell.source for cell in book.cells if 'if "gain" in summary' in cell.source)
    names = {"summary": tables.summary(tmp_path), "pd": pd}
    exec(cell, names)
    table = names["table"].reset_index().set_index("options")
    assert table.loc["loss.kd.temperature=2", ["mean", "seeds"]].tolist() == pytest.approx([15, 2])
    assert table.loc["loss.kd.temperature=2", "std"] == pytest.approx(10 / 2**0.5)
    assert table.loc["loss.kd.temperature=4", ["mean", "std", "seeds"]].tolist() == pytest.approx([50, 0, 2])
    assert table.loc["loss.kd.temperature=4", "error"] == pytest.approx(100 * ((0.8 * 0.2 + 0.3 * 0.7) / 100) ** 0.5)
