"""docs/methods.md says of every loss what the code says."""

import json

import pytest

from benchmarks import methods
from benchmarks.losses import NAMES

HEADS = [*methods.COLUMNS, *methods.MEASURED]


@pytest.fixture(scope="module")
def rows():
    return methods.rows()


@pytest.fixture(scope="module")
def documented() -> dict[str, list[str]]:
    lines = [line for line in methods.PAGE.read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0].strip("`"): row for row in cells}


def test_every_loss_is_in_the_table(documented):
    assert list(documented) == NAMES, "python -m benchmarks.methods"


def test_every_column_agrees_with_the_code(rows, documented):
    for row in rows:
        name = row[0].strip("`")
        assert dict(zip(HEADS, row, strict=False)).items() <= dict(zip(HEADS, documented[name], strict=True)).items()


def test_the_page_is_what_the_figures_make_of_it(rows):
    figures = json.loads(methods.FIGURES.read_text())
    assert set(figures["losses"]) == set(NAMES), "python -m benchmarks.losses --json benchmarks/losses.json"
    assert methods.PAGE.read_text() == methods.page(rows, figures), "python -m benchmarks.methods"


def test_what_is_found_is_right_where_it_is_known(rows):
    found = {row[0].strip("`"): dict(zip(HEADS, row, strict=False)) for row in rows}
    assert found["ce"]["student's"] == "logits" and found["ce"]["teacher's"] == "no teacher"
    assert found["kd"]["teacher's"] == "logits" and found["kd"]["labels"] == ""
    assert found["dkd"]["labels"] == "yes" and found["dkd"]["paper"].endswith("CVPR 2022")
    assert found["nst"]["student's"] == "`stage1`, `stage2`, `stage3`" and found["nst"]["learned"] == ""
    assert found["crd"]["bank"] and not found["ickd"]["bank"]
    assert found["vid"]["learned"] and found["uskd"]["teacher's"] == "no teacher"
