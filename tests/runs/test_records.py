"""What a run was made with stays what it was, though defaults change."""

from conftest import QUICK
from omegaconf import OmegaConf


def test_a_run_keeps_the_values_of_its_time(train, tmp_path, capfd):
    assert train(*QUICK, "name=old", "compress=[]", "export=[]", cwd=tmp_path) == 0
    folder = tmp_path / "outputs" / "old"
    cfg = OmegaConf.load(folder / "config.yaml")
    cfg.loss.kd.weight, cfg.loss.ce.weight = 1.0, 1.0  # defaults of an earlier version
    OmegaConf.save(cfg, folder / "config.yaml")
    assert train("run=outputs/old", "stages=[report]", "budget.bytes=1MB", cwd=tmp_path) == 0
    kept = OmegaConf.load(folder / "config.yaml")
    assert (kept.loss.kd.weight, kept.loss.ce.weight, kept.budget.bytes) == (1.0, 1.0, "1MB")
    assert train("run=outputs/old", "loss.kd.weight=0.9", cwd=tmp_path) == 2
    assert "loss" in capfd.readouterr().err
