"""Runs beside each other: whose records are read once, and whose columns are what they say."""

import json

import pytest
from PIL import Image

from distill import locks
from distill.report import sweeps
from distill.report.plot import plot
from distill.report.svg import front
from distill.report.tables import Row
from distill.runs import tables, trials


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep of three finished runs, in outputs/sweeps/x."""
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "outputs" / "sweeps" / "x"
    root.mkdir(parents=True)
    (root / "sweep.json").write_text(json.dumps({"fixed": ["student=resnet8"], "command": ["seed=0,1,2"]}))
    for seed in range(3):
        run = root / f"seed={seed}"
        run.mkdir()
        words = ["student=resnet8", f"seed={seed}"]
        choices = {"teacher": "resnet20", "student": "resnet8", "data": "digits"}
        record = {"choices": choices, "overrides": words, "versions": {}, "created": f"2030-01-0{seed + 1}"}
        (run / "run.json").write_text(json.dumps(record | {"status": "done", "error": None}))
        (run / "config.yaml").write_text(
            f"seed: {seed}\nloss: {{ce: {{}}}}\ndata: {{}}\nteacher: {{}}\nstudent: {{}}\n"
        )
        rows = [{"name": "student", "top1": 0.9, "student": "0123456789abcdef", "command": "python train.py"}]
        (run / "report.json").write_text(json.dumps({"rows": rows, "context": {"test images": 100}}))
    return root


def test_a_models_student_is_the_networks_name(sweep):
    """Not the hash of its weights, by which a report knows stale files."""
    assert tables.models(sweep)["student"].tolist() == ["resnet8"] * 3


def test_a_changed_record_is_warned_of_once(sweep, capsys):
    file = sweep / "seed=1" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"checksum": "0"}))
    sweeps.finish(sweep)
    assert capsys.readouterr().out.count("warning: ") == 1


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"status": "done"}'])
def test_a_damaged_run_is_told_once_and_with_its_error(sweep, capsys, damage):
    (sweep / "seed=1" / "run.json").write_text(damage)
    assert not sweeps.finish(sweep)
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if "seed=1" in line and line.startswith("failed: ")]
    assert "run.json" in line and "nan" not in line and out.count(line.removeprefix("failed: seed=1: ")) == 1
    assert "2 of 3 jobs are done" in out
    assert line in (sweep / "sweep.md").read_text()


def test_a_run_that_was_killed_is_told_by_its_state(sweep, capsys):
    file = sweep / "seed=2" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "running"}))
    assert not sweeps.finish(sweep)
    assert "failed: seed=2: it is running" in capsys.readouterr().out


@pytest.mark.parametrize("lock", ["seed=2/.lock", ".trial-7.lock"])
def test_a_run_at_which_another_process_is_has_not_failed(sweep, capsys, lock):
    trials.note(sweep / "seed=2", 7)
    file = sweep / "seed=2" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "running"}))
    with locks.alone(sweep / lock, "the run's folder"):
        assert sweeps.finish(sweep)
    said = capsys.readouterr().out
    assert "2 of 3 jobs are done" in said and "another process is at work on it: seed=2" in said
    assert "failed" not in said


@pytest.mark.parametrize("file", ["run.json", "config.yaml", "report.json"])
@pytest.mark.parametrize("damage", ["", "{", "[]"])
def test_a_damaged_run_is_left_out_of_the_tables_with_a_line(sweep, capsys, file, damage):
    (sweep / "seed=1" / file).write_text(damage)
    for read in (tables.summary, tables.models):
        assert read(sweep)["run"].tolist() == ["seed=0", "seed=2"]
        [line] = capsys.readouterr().out.splitlines()
        assert line.startswith("warning: ") and f"seed=1/{file}" in line
    assert {folder.name for folder in tables.folders(sweep)} == {"seed=0", "seed=1", "seed=2"}


@pytest.mark.parametrize("damage", ["", "[]", '{"fixed": 3}'])
def test_a_sweep_whose_record_is_damaged_is_shown_without_its_options(sweep, capsys, damage):
    (sweep / "sweep.json").write_text(damage)
    table = tables.summary(sweep)
    assert table["run"].tolist() == ["seed=0", "seed=1", "seed=2"]
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: ") and "sweep.json" in line
    assert sweeps.finish(sweep)
    assert "sweep.json" in (sweep / "sweep.html").read_text()


def test_a_sweeps_picture_has_its_front(sweep, monkeypatch):
    """Through the runs than which none is both better and smaller."""
    assert front([(3, 5), (1, 2), (2, 1), (2.5, 2), (4, 4)]) == [(1, 2), (3, 2), (3, 5)]
    for seed, (top1, size) in enumerate([(0.8, 1000), (0.9, 3000), (0.7, 2000)]):
        rows = [{"name": "student", "top1": top1, "bytes": size, "latency_ms": 1.0 + seed}]
        (sweep / f"seed={seed}" / "report.json").write_text(json.dumps({"rows": rows, "context": {}}))
    drawn = {}
    monkeypatch.setattr("distill.report.plot.front", lambda points: drawn.setdefault("front", front(points)))
    sweeps.finish(sweep)
    assert drawn["front"] == [(1.0, 80.0), (3.0, 80.0), (3.0, 90.0)]  # kB, %
    with Image.open(sweep / "sweep.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
    assert plot([Row("$\\x{$\ud800.pt", top1=0.5, bytes=3)])[1:4] == b"PNG"  # a stranger's name
