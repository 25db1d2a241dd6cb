"""Metrics and the report reach Weights & Biases and TensorBoard, without an account and without a wait."""

from conftest import QUICK
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_wandb_offline_and_tensorboard_get_curves_and_report(train, tmp_path, monkeypatch, capfd):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no login of the machine's
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert train(*QUICK, "logger=[wandb,tensorboard]", "baseline=false", "name=logged", cwd=tmp_path) == 0
    folder = tmp_path / "outputs" / "logged"
    [offline] = folder.glob("wandb/offline-run-*/*.wandb")
    assert b"report/student.ptl/top1" in offline.read_bytes()
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"train/kd", "val/accuracy", "report/student.pt/latency_ms"} <= set(scalars)
    assert [event.step for event in events.Scalars("val/accuracy")] == [6, 13]
    assert events.Tags()["images"] == ["report"]
    assert (folder / "metrics" / "version_0" / "metrics.csv").is_file()
