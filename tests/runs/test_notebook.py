"""The notebooks, executed on a run of seconds that the first of them makes, show what they say they show."""

import json

import nbformat
import pytest
from conftest import QUICK, ROOT
from nbclient import NotebookClient

from distill import runs

BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SHOWN = {  # figures, and words of the rest that is shown
    "quick-start": (1, ["student-dynamic_int8.ptl", "test images", "student.ptl"]),
    "compare-runs": (3, ["points lost", "student alone top-1 mean", "of the latency", "0, 1"]),
    "what-the-student-learned": (4, ["right (%)", "against the student alone", "won: ", "lost: "]),
    "quantization": (2, ["dB; the same class for"]),
}
MADE = '"teacher=resnet20", "student=resnet8", data=DATA, name="digits"'
SEEDS = ["teacher.fit.seed=0", "cache.seed=0", "compress=[]", "export=[]"]


def executed(name: str, folder, smaller: str | None = None) -> tuple[int, str]:
    """The number of figures, and the text of all else that the notebook shows when it runs in `folder`."""
    book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    if smaller:
        (cell,) = (cell for cell in book.cells if MADE in cell.source)
        cell.source = cell.source.replace(MADE, smaller)
    NotebookClient(book, kernel_name="python3", timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    data = [output["data"] for output in outputs if "data" in output]
    text = " ".join(each.get("text/html", each.get("text/plain", "")) for each in data)
    text += " ".join(output["text"] for output in outputs if output.output_type == "stream")
    assert "Warning" not in text
    return sum("image/png" in each for each in data), text


@pytest.fixture(scope="module")
def folder(train, tmp_path_factory):
    """Where quick-start left its run, with two seeds of a shorter one beside it; and what it showed."""
    cwd = tmp_path_factory.mktemp("notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        shown = executed("quick-start", cwd, f'*{QUICK}, name="digits"')
        for seed in (0, 1):
            assert train(*QUICK, *SEEDS, f"seed={seed}", f"name=seed-{seed}", cwd=cwd) == 0
        yield cwd, shown


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_a_notebook_runs_and_shows_what_it_says(folder, name):
    cwd, shown = folder
    figures, text = shown if name == "quick-start" else executed(name, cwd)
    wanted, words = SHOWN[name]
    assert wanted <= figures <= wanted + 2 * (name == "what-the-student-learned")  # images won and lost, if any
    for word in words:
        assert word in text


def test_notebooks_are_kept_without_outputs_and_are_listed():
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    assert {path.stem for path in BOOKS} == {*SHOWN}
    for path in BOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code), path.name
        assert f"notebooks/{path.name}" in page


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
    table = runs.over_seeds(runs.summary(tmp_path)).set_index("options")
    assert table["seeds"].tolist() == ["0, 1", "0, 1"]
    assert table["gain"].to_dict() == pytest.approx({"loss.kd.temperature=2": 0.15, "loss.kd.temperature=4": 0.5})
    assert table["student top-1 std"].tolist() == pytest.approx([0.1 / 2**0.5, 0])
    two = table.loc["loss.kd.temperature=2"]
    assert (two["low"], two["high"]) == pytest.approx((0.15 - 12.7062 * 0.05, 0.15 + 12.7062 * 0.05), abs=1e-5)
    alone = runs.over_seeds(runs.summary(tmp_path / "a")).iloc[0]
    assert alone["runs"] == 1 and alone["gain"] == pytest.approx(0.1) and alone[["low", "high", "p"]].isna().all()
