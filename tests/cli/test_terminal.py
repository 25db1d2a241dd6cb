"""What a person sees of a run: on terminals of any width or none, with few signs, without colours."""

import re
import sys

import pandas as pd
import pytest
from conftest import QUICK

from distill import progress
from distill.progress import on_a_terminal, plain, say
from distill.report import jobs, tables
from distill.report.tables import Row
from distill.training import lines

ROWS = [
    Row("teacher", 0.9912, top1_error=0.0041, macro=0.98, ece=0.0114, bytes=1_095_000, latency_ms=2.04),
    Row("student alone", 0.94, top1_error=0.01, macro=0.93, ece=0.1138, bytes=307_000, latency_ms=0.68),
    Row("student", 0.9812, top1_error=0.0058, macro=0.97, ece=0.0172, bytes=307_000, latency_ms=0.68),
    Row(
        "student-prune-dynamic_int8.ptl",
        0.97,
        top1_error=0.006,
        macro=0.96,
        bytes=131_000,
        latency_ms=0.64,
        format="lite",
    ),
]


@pytest.mark.parametrize("width", [20, 40, 80, 120])
def test_a_table_line_is_never_wider_than_the_terminal(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    found = tables.table(ROWS).splitlines()
    assert max(map(len, found)) <= width
    figures = [f"{100 * row.top1:.2f} ±{100 * row.top1_error:.1f}" for row in ROWS]
    assert [re.search(r"\d+\.\d+ ±\d\.\d", line)[0] for line in found if re.search(r"\d ±", line)] == figures
    if width >= 80:
        assert any("gain" in line for line in found[:3]) and "+4.12" in "".join(found)
        assert "gain: in top-1, over the student alone" in " ".join(line.strip() for line in found)
    assert not any(line.startswith(("±", "Δ")) for line in found[0].split())


@pytest.mark.parametrize("width", [40, 80, 160])
def test_a_sweeps_table_fits_too_and_names_what_differs(width):
    table = pd.DataFrame(
        [
            {
                "run": str(run),
                "overrides": f"data=fake loss.kd.temperature={run} student=a_network_of_a_long_name_{run}",
                "status": "done" if run else "damaged",
                "student alone top-1": 0.5,
                "student top-1": 0.51 if run else None,
                "gain": 0.01 if run else None,
                "file": "student-dynamic_int8.pt",
                "bytes": 123_456_789,
            }
            for run in range(3)
        ]
    )
    found = jobs.terminal(table, width)
    assert max(map(len, found.splitlines())) <= width
    assert "gain" in found and found.count("51.00") == found.count("+1.00") == 2 and "damaged" in found
    assert "data=fake" not in found and "temper" in found


class Ascii:
    """A stdout of few signs."""

    def __init__(self):
        self.encoding, self.told = "ascii", ""

    def write(self, text):
        self.told += text.encode("ascii").decode()

    def flush(self): ...

    def isatty(self):
        return True


def test_signs_that_an_output_lacks_have_plain_ones(monkeypatch):
    out = Ascii()
    monkeypatch.setattr(sys, "stdout", out)
    found = tables.table(ROWS, 80)
    say(found)  # Ascii raises where a sign is left
    assert "98.12 +-0.6" in out.told and "----" in out.told and "?" not in out.told
    assert max(map(len, found.splitlines())) <= 80
    assert plain("größe → 3 × …") == "gr??e -> 3 x ..."


@pytest.mark.parametrize(("term", "found"), [("xterm", True), ("dumb", False)])
def test_a_dumb_terminal_has_no_bar(term, found, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Ascii())
    monkeypatch.setenv("TERM", term)
    assert on_a_terminal() == found


def test_the_bar_speaks_as_the_lines_do_and_goes(train, tmp_path, capfd, monkeypatch):
    """Nothing is told twice, nothing of Lightning's numbers, no colour, and no file that was not written."""
    for module in (progress, lines):
        monkeypatch.setattr(module, "on_a_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    words = [*QUICK, "baseline=false", "cache=off", "export=[]", "compress=[]", "name=bar"]
    assert train(*words, cwd=tmp_path) == 0
    out = capfd.readouterr().out
    shown = [part.split("\r")[-1].strip() for part in out.split("\n")]  # what stays on the screen
    bars = re.findall(r"\r( *epoch \d/\d: batch [^\r\n]*)", out)
    assert bars and all(re.search(r"batch \d+/\d+ \|.*\| .* left", bar) and len(bar) <= 80 for bar in bars)
    assert not any("|" in line for line in shown)
    assert "v_num" not in out and "it/s" not in out and "\x1b" not in out and "Validation" not in out
    told = [line for line in shown if line]
    assert len(told) == len(set(told)), told
    (last,) = (line for line in told if "report.html" in line)
    assert "export" not in last
    written = {path.name for path in (tmp_path / "outputs" / "bar").iterdir()}
    assert set(last.partition(": ")[2].split(", ")) <= written
