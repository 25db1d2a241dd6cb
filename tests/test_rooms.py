"""The house: which modules lie loose, and that imports point one way. docs/architecture.md says what lives where."""

import re

import pytest
from conftest import ROOT

from benchmarks import imports
from distill.runs.moved import MOVED, renamed

PACKAGE = ROOT / "distill"
USES = imports.imports(PACKAGE)


def test_only_the_ground_lies_loose():
    assert imports.loose(PACKAGE) == ["errors", "files", "progress", "types"]


def test_every_folder_is_a_room_and_imports_point_downwards():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name not in ("__pycache__", "conf")}
    assert folders | set(imports.loose(PACKAGE)) == set(imports.ROOMS)
    found = imports.arrows(USES)
    assert [line for pair in imports.backwards(found) for line in found[pair]] == []


def test_no_files_import_each_other():
    assert imports.circles(USES) == []


def test_a_wrong_import_would_be_seen():
    uses = {"distill.data.base": {"distill.training.fit"}, "distill.training.fit": {"distill.data.base"}}
    assert imports.backwards(imports.arrows(uses)) == [("data", "training")]
    assert imports.circles(uses) == [["distill.data.base", "distill.training.fit"]]


def test_the_page_names_every_room():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert {name for name in imports.ROOMS if f"`{name}" in page} == set(imports.ROOMS)
    for path in re.findall(r"`(distill/[\w/.]+)`", page):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("old", MOVED)
def test_names_of_earlier_versions_lead_to_what_is_there_now(old):
    new = renamed({"a": [{"_target_": f"{old}.b"}]})["a"][0]["_target_"]
    assert new == f"{MOVED[old]}.b"
    parts = MOVED[old].split(".")
    module = ROOT.joinpath(*parts)
    assert module.is_dir() or module.with_suffix(".py").is_file() or module.parent.with_suffix(".py").is_file()
    assert renamed({"_target_": "distill.modelsish.x", "b": "distill.models"}) == {
        "_target_": "distill.modelsish.x",
        "b": "distill.models",
    }
