"""Two processes train as one: one voice, one report, a memory bank that both fill."""

import json
import os
import subprocess
import sys
import time

from conftest import QUICK, ROOT


def test_two_processes_train_and_one_of_them_reports(tmp_path):
    words = ["trainer.devices=2", "trainer.strategy=ddp", "loss=[ce,kd,crd]", "loss.crd.negatives=64", "name=ddp"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *QUICK, *words, "baseline=false"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("distill: ") == 1
    assert "error" not in done.stderr.lower()
    folder = tmp_path / "outputs" / "ddp"
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    assert len(json.loads((folder / "report.json").read_text())["rows"]) == 7


def test_a_process_ends_with_the_one_that_started_it():
    """Also where it waits in a call that handles no signals, such as a rendezvous with the dead."""
    waits = "s = socket.socket(); s.bind(('', 0)); s.listen(); print('up', flush=True); s.accept()"
    child = f"import socket; from distill import signals; signals.end_with_parent(); {waits}"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    process.kill()
    process.wait()
    started = time.monotonic()
    assert process.stdout.read() == ""  # until nobody holds it open any more
    assert time.monotonic() - started < 20
