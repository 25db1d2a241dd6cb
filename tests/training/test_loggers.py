"""Metrics and the report reach Weights & Biases, TensorBoard and MLflow, without an account and without a wait."""

import json
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import QUICK
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.training import loggers, trackers
from distill.training.trackers import Tracker

PICTURES = {f"worst images/{number}" for number in range(1, 13)}


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no login of the machine's
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def records(file: Path) -> list[dict]:
    """Of what wandb wrote offline."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [*map(json.loads, done.stdout.splitlines())]


def test_wandb_offline_and_tensorboard_get_curves_and_report(train, tmp_path, no_account, capfd):
    words = ["logger=[wandb,tensorboard]", "baseline=false", "compress=[]", "name=logged"]
    assert train(*QUICK, *words, cwd=tmp_path) == 0
    folder = tmp_path / "outputs" / "logged"
    [offline] = folder.glob("wandb/offline-run-*/*.wandb")
    said = capfd.readouterr().out
    assert f"wandb: offline; wandb sync outputs/logged/wandb/{offline.parent.name} uploads this run" in said
    assert "warning" not in said
    kept = "\n".join(map(json.dumps, records(offline)))
    for key in ("report/student.ptl/top1", "val/accuracy", "train/kd", "wandb/confusion_matrix/v1", "worst images"):
        assert key in kept, key
    [teacher] = {*re.findall(r"teacher-[0-9a-f]{16}(?=\W*\")", kept)}  # its artifact, which the student's names too
    for part in (teacher, "student.safetensors", "export/student.ptl", "temperature", "accuracy and cost"):
        assert part in kept, part

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/kd", "train/loss", "val/accuracy"} <= set(tags["scalars"])
    assert all(len(events.Scalars(tag)) == 2 for tag in tags["scalars"] if tag != "epoch")
    assert [event.step for event in events.Scalars("val/accuracy")] == [6, 13]
    assert {tag.partition(":")[0] for tag in tags["images"]} == {"accuracy and cost", "confusion", *PICTURES}
    [text] = events.Tensors("report/text_summary")
    assert b"| student.ptl |" in text.tensor_proto.string_val[0]
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert (folder / "metrics" / "version_0" / "metrics.csv").is_file()


def test_mlflow_gets_them_in_a_store_of_its_own(train, tmp_path, no_account, capfd):
    mlflow = pytest.importorskip("mlflow")
    words = ["logger=mlflow", "baseline=false", "compress=[]", "export=[]", "name=logged"]
    assert train(*QUICK, *words, cwd=tmp_path) == 0
    assert "warning" not in capfd.readouterr().out
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/outputs/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("distill").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["loss.kd.temperature"] == "4.0"
    assert run.data.metrics["report/student/top1"] > 0 and run.data.tags["teacher"]
    assert [each.step for each in client.get_metric_history(run.info.run_id, "train/kd")] == [6, 13]
    kept = {file.path for place in (None, "report") for file in client.list_artifacts(run.info.run_id, place)}
    assert {"report/report.html", "report/table.json", "confusion.png", "student.safetensors"} <= kept


class Notes:
    """What a tracker is told."""

    def __init__(self):
        self.told = []

    def log_metrics(self, values, step):
        self.told.append((values, step))

    def close(self, failed):
        self.told.append(failed)


def test_a_tracker_is_told_all_in_order():
    notes = Notes()
    tracker = Tracker("notes", lambda tell: notes)
    for step in range(3):
        tracker.log_metrics({"loss": 1.0}, step)
    tracker.close(failed=True)
    assert notes.told == [({"loss": 1.0}, 0), ({"loss": 1.0}, 1), ({"loss": 1.0}, 2), True]


def test_one_that_fails_is_left_out_and_one_that_hangs_is_not_waited_for(capsys, monkeypatch):
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    failing = Tracker("failing", lambda tell: 1 / 0)
    hanging = Tracker("hanging", lambda tell: threading.Event().wait())
    begun = time.monotonic()
    for tracker in (failing, hanging):
        tracker.log_metrics({"loss": 1.0}, 0)
        tracker.close()
    assert time.monotonic() - begun < 2
    assert capsys.readouterr().out.splitlines() == [
        "  warning: failing: division by zero; nothing more is logged there",
        "  warning: hanging has not answered for 0.2 s: it may lack what was logged last",
    ]


@pytest.mark.matrix  # its seconds are those of an idle machine
def test_a_server_that_is_silent_leaves_wandb_offline(tmp_path, no_account, monkeypatch):
    """Also at the end of the process, which wandb's own telemetry would hold up."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()  # and never answers
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        program = (
            "from pathlib import Path; from distill.training import loggers, trackers; loggers.PATIENCE = 1; "
            "import time; tracker = loggers.wandb(Path('.'), 'x', {}); tracker.log_metrics({'a': 1.0}, 0); "
            "tracker._thread.join(4); tracker.close(); print('closed', time.time())"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        ended = time.time()
    said = done.stdout
    assert "logging offline" in said and "wandb sync wandb/offline-run-" in said, done
    assert ended - float(said.split()[-1]) < 5


@pytest.fixture
def server():
    """(its address, a function to say the code and body of what it answers)."""
    answers = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            answers["asked"] = self.rfile.read(int(self.headers["Content-Length"])), self.headers["Authorization"]
            self.do_GET()

        def do_GET(self):
            self.send_response(answers["code"])
            self.end_headers()
            self.wfile.write(answers["body"].encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}", answers
        served.shutdown()


@pytest.mark.parametrize(
    ("code", "body", "told"),
    [
        (200, '{"data": {"viewer": {"id": "x"}}}', None),
        (200, '{"data": {"viewer": null}}', "doesn't know the key"),
        (200, "<html>", "no answer from"),
        (200, "[]", "no answer from"),
        (401, "", "doesn't know the key"),
        (403, "", "doesn't know the key"),
        (500, "", "no answer from"),
    ],
)
def test_a_key_is_asked_about_before_wandb_waits_for_it(server, code, body, told):
    url, answers = server
    answers |= {"code": code, "body": body}
    said = loggers._refusal(url, "secret")
    assert said is None if told is None else told in said and "secret" not in said
    assert answers["asked"] == (b'{"query": "query { viewer { id } }"}', "Basic YXBpOnNlY3JldA==")


@pytest.mark.parametrize(("code", "told"), [(200, False), (401, False), (404, False), (502, True)])
def test_mlflows_server_is_asked_before_it_is_waited_for(server, code, told):
    url, answers = server
    answers |= {"code": code, "body": "OK"}
    assert bool(loggers._silence(url)) is told


def test_where_nobody_listens_a_tracker_is_left_out_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert "no answer from http://127.0.0.1:1" in loggers._refusal("http://127.0.0.1:1", "key")
    begun = time.monotonic()
    tracker = Tracker("mlflow", lambda tell: loggers.MLflow(tmp_path, "x", {}, "distill"))
    tracker.log_metrics({"loss": 1.0}, 0)
    tracker.close()
    assert time.monotonic() - begun < 5
    assert re.search("warning: mlflow: no answer from http://127.0.0.1:1 .*refused", capsys.readouterr().out)


def test_a_job_belongs_to_its_sweep_and_a_run_keeps_its_number(tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    assert loggers._sweep(tmp_path / "sweep" / "job") == "sweep"
    assert loggers._sweep(tmp_path / "other") is None
    assert loggers._number(tmp_path, "wandb/id") == loggers._number(tmp_path, "wandb/id")
