"""The main job, end to end, as a user runs it."""

import json
import shutil

import pandas as pd
import pytest
import torch
from conftest import QUICK
from filelock import FileLock
from omegaconf import OmegaConf
from sets import digits

import distill
from distill.errors import UserError
from distill.export.torchscript import read_metadata
from distill.runs import run, student, tables


@pytest.fixture(scope="module")
def folder(train, tmp_path_factory):
    """A run on the digits, short but long enough to learn."""
    cwd = tmp_path_factory.mktemp("pipeline")
    words = ["teacher=resnet8", "student=resnet8_tiny", "trainer.max_epochs=8", "trainer.accelerator=cpu"]
    assert train(*words, "name=digits", cwd=cwd) == 0
    return cwd / "outputs" / "digits"


@pytest.fixture(scope="module")
def rows(folder):
    return {row["name"]: row for row in json.loads((folder / "report.json").read_text())["rows"]}


def test_the_folder_holds_what_continues_exports_and_analyses_the_run(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "run.json", "metrics", "checkpoints", "student.safetensors"} <= names
    assert {"student_last.safetensors", "export", "report.json", "report.md", "report.png"} <= names
    assert {"report.html", "details.json"} <= names
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "done"
    assert record["seed"] == 0
    assert "student=resnet8_tiny" in record["overrides"]
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert not list(folder.rglob("*.tmp"))


def test_the_report_has_a_row_for_every_network_and_every_file(rows):
    assert list(rows) == [
        "teacher",
        "student alone",
        "student",
        "student (last epoch)",
        "student-dynamic_int8.pt",
        "student-dynamic_int8.ptl",
        "student.pt",
        "student.ptl",
    ]
    for row in rows.values():
        assert 0 < row["latency_ms"] <= row["latency_p95_ms"]
        assert row["bytes"] > 0
        assert 0 <= row["ece"] <= 1
    assert rows["teacher"]["teacher_agreement"] == 1
    assert rows["student.pt"]["int8_share"] == 0
    assert rows["student-dynamic_int8.pt"]["int8_share"] > 0.9
    assert rows["student-dynamic_int8.pt"]["macs"] == rows["student"]["macs"] < rows["teacher"]["macs"]


def test_everything_learned(rows):
    assert rows["teacher"]["top1"] > 0.9
    assert rows["student alone"]["top1"] > 0.4
    assert rows["student"]["top1"] > 0.5


def test_the_figures_are_those_of_the_files(folder, rows):
    data = digits(batch_size=64, num_workers=0)
    images = data.test[torch.arange(len(data.test)), 0]
    for name in ("student.pt", "student-dynamic_int8.pt"):
        path = folder / "export" / name
        with torch.no_grad():
            file = torch.jit.load(str(path))  # one by one, as a phone asks: dynamic int8 rounds in the range of a batch
            right = torch.cat([file(image).argmax(1) for image in images.images.split(1)]) == images.labels
        assert rows[name]["top1"] == pytest.approx(right.double().mean().item(), abs=1e-6)
        assert rows[name]["bytes"] == path.stat().st_size
        assert read_metadata(path)["classes"] == data.classes
    student = distill.load_student(folder)
    with torch.no_grad():
        torch.testing.assert_close(
            student(images.images),
            torch.jit.load(str(folder / "export/student.pt"))(images.images),
            rtol=1e-3,
            atol=1e-3,
        )


def test_the_learning_rate_followed_the_schedule(folder):
    curves = tables.curves(folder)
    assert curves["epoch"].tolist() == list(range(1, 9))
    expected = [0.05 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * epoch / 8)).item()) for epoch in range(1, 9)]
    assert curves["lr"].tolist() == pytest.approx(expected, abs=1e-6)
    assert curves["train/loss"].iloc[-1] < curves["train/loss"].iloc[0]
    assert {"train/ce", "train/kd", "val/accuracy", "val/top5", "val/ece", "val/agreement"} <= set(curves)


def test_later_stages_again_on_a_finished_run(train, folder, capfd):
    before = {name: (folder / name).stat().st_mtime_ns for name in ("student.safetensors", "report.json")}
    export = folder / "export" / "student.pt"
    export.unlink()
    assert train(f"run={folder}", "stages=[export,report]", cwd=folder.parent.parent) == 0
    assert export.is_file()
    assert (folder / "student.safetensors").stat().st_mtime_ns == before["student.safetensors"]
    assert (folder / "report.json").stat().st_mtime_ns > before["report.json"]
    assert "distill:" not in capfd.readouterr().out


def test_another_compression_on_a_finished_run(train, folder, capfd):
    copy = folder.with_name("plain-int8")
    shutil.copytree(folder, copy)
    words = [f"run={copy}", "stages=[compress,export,report]", "compress.dynamic_int8.conv=float"]
    assert train(*words, cwd=folder.parent.parent) == 0
    told = capfd.readouterr().out
    assert "warning: dynamic int8 reached only 3% of the weights" in told
    assert "compress.dynamic_int8.conv=weight_only" in told
    words = [f"run={copy}", "stages=[compress,export,report]", "compress=weight_only_int8"]
    assert train(*words, cwd=folder.parent.parent) == 0  # what was set in the other step is forgotten
    assert (copy / "export" / "student-weight_only_int8.pt").is_file()
    report = json.loads((copy / "report.json").read_text())
    made = {row["name"]: row["command"].partition("stages=")[2] for row in report["rows"]}
    assert made == {
        **dict.fromkeys(["teacher", "student alone", "student", "student (last epoch)"], ""),
        **dict.fromkeys(["student.pt", "student.ptl"], "[compress,export,report]' compress=weight_only_int8"),
        **{f"student-weight_only_int8.{kind}": made["student.pt"] for kind in ("pt", "ptl")},
        **{
            f"student-dynamic_int8.{kind}": "[compress,export,report]' compress.dynamic_int8.conv=float"
            for kind in ("pt", "ptl")
        },
    }
    assert "Measured before" in (copy / "report.html").read_text(encoding="utf-8")


def test_weights_one_has_are_compressed_and_measured_without_training(train, folder, capfd):
    """No teacher, no baseline, no epochs of the student; fine-tuning goes by the labels; it can be gone on with."""
    cwd = folder.parent.parent
    student = ["student=resnet8_tiny", f"student.checkpoint={folder / 'student.safetensors'}"]
    words = [*student, "stages=[compress,export,report]", "compress=prune", "compress.prune.epochs=1", "name=own"]
    loose = ["tolerance.compressed.accuracy_drop=1", "tolerance.compressed.least=0"]
    assert train(*words, *loose, cwd=cwd) == 0
    told = capfd.readouterr().out
    assert "fitting" not in told and "distill:" not in told and "fine-tuning under ce for 1 epochs" in told
    rows = {row["name"]: row for row in json.loads((folder.with_name("own") / "report.json").read_text())["rows"]}
    before = {row["name"]: row for row in json.loads((folder / "report.json").read_text())["rows"]}
    assert list(rows) == ["student", "student-prune.pt", "student-prune.ptl", "student.pt", "student.ptl"]
    assert rows["student"]["top1"] == before["student"]["top1"]
    assert rows["student-prune.pt"]["macs"] < rows["student"]["macs"]
    said = (folder.with_name("own") / "report.md").read_text()
    assert "its weights were given" in said and "teacher: none" in said and "teacher: resnet" not in said
    row = tables.summary(cwd / "outputs").set_index("run").loc["own"]
    assert row["teacher"] == "none" and row["student"] == "resnet8_tiny"
    words = ["run=outputs/own", "stages=[compress,export,report]", "compress=dynamic_int8"]
    assert train(*words, cwd=cwd) == 0
    assert (folder.with_name("own") / "export" / "student-dynamic_int8.pt").is_file()
    assert train("run=outputs/own", "stages=[distill]", cwd=cwd) == 2
    assert "start a new run" in capfd.readouterr().err


def test_weights_that_answer_at_chance_or_for_other_classes_are_refused_at_once(train, folder, tmp_path, capfd):
    cwd = folder.parent.parent
    state = student.rebuild(folder / "student.safetensors").net.state_dict()
    for name, value, said in (("chance", torch.zeros_like, "which is chance"), ("fewer", lambda w: w[:7], "head")):
        heads = {key: value(state[key]) for key in ("linear.weight", "linear.bias")}
        torch.save(state | heads, tmp_path / f"{name}.pt")
        words = ["student=resnet8_tiny", f"student.checkpoint={tmp_path / name}.pt", "stages=[export,report]"]
        assert train(*words, f"name={name}", cwd=cwd) in (1, 2)
        error = capfd.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and (said in error or "classes" in error), error
        assert not (folder.with_name(name) / "export").exists()


def test_a_finished_run_is_not_continued_with_another_configuration(train, folder, capfd):
    assert train(f"run={folder}", "loss.kd.temperature=2", cwd=folder.parent.parent) == 2
    assert "another configuration (loss.kd" in capfd.readouterr().err
    assert OmegaConf.load(folder / "config.yaml").loss.kd.temperature == 4


@pytest.mark.matrix
def test_a_run_older_than_an_option_goes_on_with_what_the_option_is_by_default(train, folder, capfd):
    copy = folder.with_name("older")
    shutil.copytree(folder, copy)
    cfg = OmegaConf.load(copy / "config.yaml")
    del cfg.teacher.precision
    OmegaConf.save(cfg, copy / "config.yaml")
    assert train(f"run={copy}", "stages=[report]", "teacher.precision=bf16-mixed", cwd=folder.parent.parent) == 2
    assert "another configuration (teacher." in capfd.readouterr().err
    assert train(f"run={copy}", "stages=[report]", cwd=folder.parent.parent) == 0
    assert OmegaConf.load(copy / "config.yaml").teacher.precision == "auto"


def test_a_run_that_another_process_is_at_work_in_is_left_alone(train, folder, capfd, monkeypatch):
    monkeypatch.setattr(run, "PATIENCE", 0.1)
    before = (folder / "run.json").read_text()
    with FileLock(folder / ".lock"):
        assert train(f"run={folder}", "stages=[report]", cwd=folder.parent.parent) == 1
    assert "another process is at work in" in capfd.readouterr().err
    assert (folder / "run.json").read_text() == before


def test_a_file_that_is_not_its_source_fails_the_run_and_stays(train, folder, capfd):
    copy = folder.with_name("altered")
    shutil.copytree(folder, copy)
    exported = copy / "export" / "student.ptl"
    other = torch.jit.load(str(folder / "export" / "student-dynamic_int8.pt"))
    other._save_for_lite_interpreter(str(exported))
    assert train(f"run={copy}", "stages=[report]", cwd=folder.parent.parent) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: student.ptl: ") and "signal to noise" in error
    assert exported.is_file()
    assert json.loads((copy / "run.json").read_text())["status"] == "failed"
    assert "student.ptl" in (copy / "report.md").read_text()


def test_load_student_refuses_what_it_would_have_to_trust(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(UserError, match="distill stage is not finished"):
        distill.load_student(tmp_path)
    state = load_file(folder / "student.safetensors")
    save_file(state, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="does not say which network"):
        distill.load_student(tmp_path / "bare.safetensors")
    run = {"_target_": "os.mkdir", "path": str(tmp_path / "ran")}
    for network in (run, {"_target_": "distill.networks.resnet_cifar.resnet", "depth": run, "widths": [{"a": [run]}]}):
        meta = {
            "network": json.dumps({"taps": {}, "mean": [0], "std": [1], **network}),
            "classes": '["a"]',
            "image_size": "1",
        }
        save_file(state, tmp_path / "evil.safetensors", meta)
        with pytest.raises(UserError, match=r"os.mkdir as student, which is not one of this package's"):
            distill.load_student(tmp_path / "evil.safetensors")
        assert not (tmp_path / "ran").exists()


@pytest.mark.matrix
def test_a_sweep_has_a_folder_a_job_and_ends_with_a_table(train, tmp_path, capfd):
    words = ["-m", *QUICK, "trainer.max_epochs=1", "student=resnet8_tiny,resnet8", "loss.kd.temperature=2,1e39"]
    words = [word for word in words if word not in ("student=resnet8_tiny", "trainer.max_epochs=2")]
    code = train(*words, cwd=tmp_path)
    told = capfd.readouterr()
    table = tables.summary(tmp_path / "outputs" / "sweeps")
    assert len(table) == 4
    assert table["run"].iloc[0] == "student=resnet8_tiny,kd.temperature=2"
    assert sorted(table["student"]) == ["resnet8", "resnet8", "resnet8_tiny", "resnet8_tiny"]
    done = table[table["status"] == "done"]
    assert len(done) == 2  # the other temperature diverges
    assert code == 1
    assert "2 of 4 jobs are done, in outputs/sweeps" in told.out
    assert told.err.count("error: the loss diverged") == 2
    assert (done["gain"] - (done["student top-1"] - done["student alone top-1"])).abs().max() < 1e-9
    # the teacher was fitted once for all of them
    assert told.out.count("teacher: fitting") == 1
    assert len(list((tmp_path / "outputs" / "fits").glob("teacher-*"))) == 1
    models = tables.models(tmp_path / "outputs")
    assert isinstance(models, pd.DataFrame)
    assert set(models["name"]) >= {"teacher", "student alone", "student", "student.pt", "student-dynamic_int8.ptl"}
