"""What each option may be: in a terminal and on docs/options.md."""

import re

import pytest
from conftest import ROOT
from omegaconf import OmegaConf
from test_configs import FILES, composed

from benchmarks import options as page
from distill.cli import config, help
from distill.errors import UsageError


def test_the_page_is_that_of_the_code():
    assert (ROOT / "docs" / "options.md").read_text(encoding="utf-8") == page.text(), "python -m benchmarks.options"


@pytest.mark.parametrize("group", ["train", *help.groups(), "student"])
def test_a_group_fits_eighty_columns_and_names_its_choices(group, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help.page(group)
    long = [line for line in text.splitlines() if len(line) > 80 and " " in line.strip()]
    assert long == []
    for file in FILES:
        if file.parent.name == ("network" if group == "student" else group):
            assert re.search(rf"^{re.escape(file.stem)}: \S", text, re.M), file


def test_an_option_says_what_it_may_be_and_does(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert "loss.dkd.temperature=4.0   a number greater than 0\n" in help.page("loss") + "\n"
    assert "trainer.precision=auto   one of auto, 32-true" in help.page("trainer")
    assert "cache.top_k=null   null or a whole number of at least 1; keep only so many" in help.page("cache")
    assert "teacher.fit.epochs=null   null or a whole number" in help.page("teacher")
    assert "  student.checkpoint=null   null or text" in help.page("student")


def test_every_option_of_the_default_job_is_on_the_page():
    listed = [each for group in ["train", *help.groups()] for each in help.choices(group)]
    listed += [each for name in ("student", "teacher") for each in help.role(name)]
    known = {option.key for each in listed for option in each.options}
    known |= {key.replace("student.", "teacher.", 1) for key in known}
    cfg = composed("loss=[ce,kd,crd]", "compress=prune", "export=[onnx]")
    values = [key for key in config.keys(cfg) if not OmegaConf.is_config(OmegaConf.select(cfg, key))]
    missing = {key for key in values if not key.endswith("_") and not any(f"{key}.".startswith(f"{k}.") for k in known)}
    assert {key for key in missing if not key.startswith("hydra")} == set()


def test_no_such_group_names_the_nearest():
    with pytest.raises(UsageError, match="--help lost: no such group; did you mean loss"):
        help.choices("lost")


def test_help_of_a_group_is_quick_and_ends_well(train, tmp_path, capfd):
    assert train("--help", "compress", cwd=tmp_path) == 0
    assert "compress.prune.ratio=0.5" in capfd.readouterr().out
    assert train("--help", "compres", cwd=tmp_path) == 2
    assert "did you mean compress" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
