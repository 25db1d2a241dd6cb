"""The notebook runs on runs that are made here, and shows what they were."""

from pathlib import Path

import nbformat
import pytest
from conftest import QUICK, ROOT
from nbclient import NotebookClient


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
