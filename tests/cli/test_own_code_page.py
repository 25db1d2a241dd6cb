"""docs/own-code.md, done as it says."""

import re
import shlex
import sys

import pytest
from conftest import QUICK, ROOT

from distill.files import read_json

PAGE = (ROOT / "docs" / "own-code.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}
DOES = {  # what of a run shows that it was used
    "A loss": ["stages=[teacher,distill]"],
    "A network": ["stages=[teacher,distill]"],
    "An image set": ["stages=[teacher,distill]"],
    "A compression step": ["stages=[teacher,distill,compress]"],
    "An exporter": ["stages=[teacher,distill,export,report]", "compress=[]"],
}


@pytest.mark.parametrize("title", SECTIONS)
def test_each_example_runs_as_it_stands(train, tmp_path, monkeypatch, capfd, title):
    section = SECTIONS[title]
    for name, text in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", section, re.S):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    [command] = re.findall(r"```sh\nPYTHONPATH=\. distill (.*)\n```", section)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = shlex.split(command)
    keys = {word.lstrip("+").partition("=")[0] for word in words}
    others = [word for word in QUICK if word.partition("=")[0] not in keys]
    others = [word for word in others if not (title == "An image set" and word.startswith("data."))]
    assert train(*words, *others, *DOES[title], "baseline=false", "name=x", cwd=tmp_path) == 0, capfd.readouterr().err
    folder = tmp_path / "outputs" / "x"
    if title == "A loss":
        assert "train/norms" in (folder / "metrics/version_0/metrics.csv").read_text()
    if title == "An exporter":
        [row] = [row for row in read_json(folder / "report.json")["rows"] if row["format"] == "frozen"]
        assert row["name"] == "student.frozen" and row["bytes"] > 0
    if title == "A compression step":
        assert read_json(folder / "run.json")["compressed"] == ["clip", "dynamic_int8"]


def test_every_section_has_an_example():
    assert SECTIONS.keys() == DOES.keys()
