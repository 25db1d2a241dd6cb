"""A run's files on a phone, with an `adb` that is a script: what is asked of it, what it may answer, and what may fail.

The script's phone is a folder: /data/local/tmp is one in it, and its shell is this machine's. No real phone is asked.
"""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from torch import nn

from distill.device import __main__ as command
from distill.device import adb, tools
from distill.device.tools import read_executorch, read_litert
from distill.errors import UserError
from distill.files import digest, write_yaml
from distill.networks.weights import save_weights
from distill.report import page, phones
from distill.report.tables import Row

FAKE = r"""#!/bin/sh
printf '%s\n' "$*" >> "$FAKE/asked"
[ -e "$FAKE/dead" ] && { echo "error: device 'A1' not found" >&2; exit 1; }
case "$1" in
  devices) echo "* daemon started successfully"; echo "List of devices attached"; cat "$FAKE/devices"; exit 0;;
  -s) echo "$2" >> "$FAKE/serials"; shift 2;;
esac
case "$1" in
  push) cp -- "$2" "$FAKE/tmp${3#/data/local/tmp}" && echo "$2: 1 file pushed";;
  shell)
    cd "$FAKE/tmp"
    PATH="$FAKE/bin:$PATH" exec sh -c "$(printf '%s' "$2" | sed "s#/data/local/tmp#$FAKE/tmp#g")";;
esac
"""
GETPROP = """#!/bin/sh
case "$1" in
  ro.product.model) echo "Pixel <8>";;
  ro.build.version.sdk) echo 34;;
  ro.product.cpu.abi) echo arm64-v8a;;
  ro.product.cpu.abilist) echo arm64-v8a,armeabi-v7a;;
esac
"""
LOGCAT = """#!/bin/sh
echo "$*" > "$FAKE/logcat-asked"; cat "$FAKE/log"
"""
LITERT = """#!/bin/sh
echo "$*" >> "$FAKE/litert-asked"
test -s "${1#--graph=}" || { echo "ERROR: Failed to load model"; exit 1; }
echo "INFO: STARTING!"
echo "INFO: count=9 first=9000 curr=60 min=55 max=9000 avg=1057.5 std=2 p5=55 median=58 p95=62"
echo "INFO: count=50 first=6100 curr=5800 min=5500 max=1.2e+04 avg=5750.5 std=200 p5=5500 median=5700 p95=6200"
echo "INFO: Inference timings in us: Init: 92, First inference: 9000, Warmup (avg): 1057.5, Inference (avg): 5750.5"
echo "INFO: Overall peak memory footprint (MB) via periodic monitoring: 13.1797"
"""
EXECUTORCH = """#!/bin/sh
echo "$*" >> "$FAKE/executorch-asked"; sleep 0.2
for i in 1 2 3 4 5 6 7 8 9; do
  echo "I executorch:executor_runner.cpp:9] Iteration $i of 9: $i.500000 ms" >> "$FAKE/log"
done
echo "I executorch:executor_runner.cpp:9] Model executed successfully 9 time(s) in 49.5 ms." >> "$FAKE/log"
echo "OutputX 0: tensor(sizes=[1, 10], [1.0])"
"""
IMAGE = {"image_size": 24, "classes": ["a", "b"], "network": {"_target_": "x"}, "prepared": None}


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The phone's folder; its one phone is ready."""
    folder = tmp_path / "phone"
    for name in ("bin", "tmp", "path"):
        (folder / name).mkdir(parents=True)
    script(folder / "path" / "adb", FAKE)
    script(folder / "bin" / "getprop", GETPROP)
    script(folder / "bin" / "logcat", LOGCAT)
    (folder / "log").touch()
    (folder / "devices").write_text("A1\tdevice\n")
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", f"{folder / 'path'}:{os.environ['PATH']}")
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    return folder


FILES = {"student.tflite": "litert", "student-static_int8.tflite": "litert", "student-static_int8.pte": "executorch"}


@pytest.fixture
def run(tmp_path):
    """A run's folder, in a name that a shell would take apart."""
    folder = tmp_path / 'a run\'s $(touch bad) "folder"'
    (folder / "export").mkdir(parents=True)
    for name in FILES:
        (folder / "export" / name).write_bytes(name.encode())
    rows = [
        Row(name, 0.5, bytes=9, latency_ms=2.0, format=kind, digest=digest(folder / "export" / name))
        for name, kind in FILES.items()
    ]
    page.write([Row("student", 0.5, bytes=9, latency_ms=3.0), *rows], folder, {"run": "x"})
    save_weights(nn.Linear(1, 1), folder / "student.safetensors", {k: json.dumps(v) for k, v in IMAGE.items()})
    return folder


@pytest.fixture
def programs(tmp_path):
    return [
        script(tmp_path / "android_aarch64_benchmark_model", LITERT),
        script(tmp_path / "executor_runner", EXECUTORCH),
    ]


def device(*words):
    return command.main([str(word) for word in words])


def found(run):
    [phone] = phones.read(run)
    return {timing.file: timing for timing in phone.timings}


def test_every_file_is_measured_and_nothing_stays_on_the_phone(fake, run, programs, capsys):
    assert device(run, "--benchmark", *programs) == 0
    [phone] = phones.read(run)
    assert (phone.model, phone.sdk, phone.abi) == ("Pixel <8>", "34", "arm64-v8a")
    timings = found(run)
    assert {*timings} == {*FILES}
    small = timings["student-static_int8.tflite"]
    assert (small.mean_ms, small.median_ms, small.p95_ms, small.runs) == (5.7505, 5.7, 6.2, 50)
    assert (small.max_ms, small.peak_mb, small.tool) == (12.0, 13.1797, "android_aarch64_benchmark_model")
    torched = timings["student-static_int8.pte"]
    assert (torched.runs, torched.mean_ms, torched.median_ms) == (4, 8.0, 8.0)  # 6.5 to 9.5: five warm up
    assert 0 < torched.peak_mb < 100  # this machine's sh
    assert not list((fake / "tmp").iterdir()) and not Path("bad").exists()
    asked = (fake / "litert-asked").read_text()
    assert "--num_threads=1" in asked and "--num_runs=50" in asked
    asked = (fake / "executorch-asked").read_text()
    assert "--input_shapes=1x3x24x24" in asked and "--method_name=forward" in asked and "--cpu_threads=1" in asked
    assert re.fullmatch(r"-d --pid=\d+ -s ExecuTorch:V\n", (fake / "logcat-asked").read_text())
    assert {*(fake / "serials").read_text().split()} == {"A1"}
    for report in ("report.html", "report.md"):
        text = (run / report).read_text(encoding="utf-8")
        assert "5.70" in text and "13.2" in text and "<8>" not in text.replace("\\<8\\>", ""), report
    assert "5.70" in capsys.readouterr().out
    assert json.loads((run / "device.json").read_text())["phones"][0]["date"].startswith("20")


def test_a_later_report_keeps_it_and_leaves_out_files_that_changed(fake, run, programs):
    assert device(run, "--benchmark", *programs) == 0
    rows = [Row("student", 0.5), Row("student.tflite", 0.5, digest=found(run)["student.tflite"].digest)]
    page.write([*rows, Row("student-static_int8.pte", 0.5, digest="another")], run, {})
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "## On Pixel" in text and "| student.tflite |" in text.partition("## On")[2]
    assert "student-static_int8.pte" not in text.partition("## On")[2]


def test_another_program_s_figures_are_added(fake, run, programs):
    assert device(run, "--benchmark", programs[0]) == 0 and {*found(run)} == {name for name in FILES if "tf" in name}
    assert device(run, "--benchmark", programs[1]) == 0 and {*found(run)} == {*FILES}
    script(fake / "bin" / "getprop", GETPROP.replace("Pixel", "Galaxy"))
    assert device(run, "--benchmark", programs[1]) == 0
    assert [len(phone.timings) for phone in phones.read(run)] == [3, 1]


def test_programs_that_lie_on_the_phone_are_used_and_stay(fake, run, programs):
    (fake / "tmp" / "benchmark_model").write_text(LITERT)
    (fake / "tmp" / "benchmark_model").chmod(0o755)
    assert device(run) == 0 and {*found(run)} == {name for name in FILES if "tf" in name}
    assert [file.name for file in (fake / "tmp").iterdir()] == ["benchmark_model"]


def test_the_budget_is_the_phone_s(fake, run, programs, capsys):
    rest = "data: {a: 1}, teacher: {a: 1}, student: {a: 1}, loss: {a: 1}"
    (run / "run.json").write_text(json.dumps({"overrides": [], "choices": {}}))
    write_yaml(run / "config.yaml", f"{{budget: {{latency_ms: 6}}, {rest}}}")
    assert device(run, "--benchmark", *programs) == 1
    error = capsys.readouterr().err
    assert error == "error: student-static_int8.pte: 8.000 ms on the phone, over the budget of 6\n"
    assert {*found(run)} == {*FILES}
    for limit, code in ((6, 0), (5, 1)):  # where one file is enough
        write_yaml(run / "config.yaml", f"{{budget: {{latency_ms: {limit}, files: one}}, {rest}}}")
        assert device(run, "--benchmark", *programs) == code


# What may be wrong


@pytest.mark.parametrize(
    ("devices", "words", "told"),
    [
        ("", [], "no phone: connect one and switch on USB debugging"),
        ("A1\tunauthorized\n", [], "the phone A1 has not allowed this computer"),
        ("A1\toffline\n", [], "adb calls it 'offline'"),
        ("A1\tno permissions (user in plugdev group); see [x]\n", [], "adb calls it 'no permissions"),
        ("A1\tdevice\nB2\tdevice\n", [], "several phones: choose one by --serial: A1, B2"),
        ("A1\tdevice\n", ["--serial", "C3"], "no phone C3: adb knows A1"),
        ("A1\tdevice\nB2\tunauthorized\n", ["--serial", "B2"], "the phone B2 has not allowed"),
    ],
)
def test_a_phone_that_is_not_there_is_one_line(fake, run, programs, capsys, devices, words, told):
    (fake / "devices").write_text(devices)
    assert device(run, "--benchmark", programs[0], *words) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (run / "device.json").exists() and (fake / "asked").read_text() == "devices\n"


def test_one_of_several_phones_is_chosen(fake, run, programs, monkeypatch):
    (fake / "devices").write_text("A1\tdevice\nB2\tdevice\nC3\toffline\n")
    assert device(run, "--benchmark", programs[0], "--serial", "B2") == 0
    assert {*(fake / "serials").read_text().split()} == {"B2"}
    monkeypatch.setenv("ANDROID_SERIAL", "A1")
    assert adb.connected(None).serial == "A1"


def test_no_adb(run, programs, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device(run, "--benchmark", programs[0]) == 1
    assert "no adb on PATH: install Android's platform-tools" in capsys.readouterr().err


def elf(machine):
    return b"\x7fELF\x02\x01" + bytes(12) + machine.to_bytes(2, "little") + bytes(9)


def test_programs_that_can_not_run(fake, run, programs, capsys, tmp_path):
    def told(*paths):
        assert device(run, "--benchmark", *paths) == 1
        return capsys.readouterr().err

    assert "there is no such file" in told(tmp_path / "benchmark_model")
    assert "its name is of no known program: executor_runner (ExecuTorch)" in told(script(tmp_path / "other", "x"))
    (tmp_path / "benchmark_model").write_bytes(elf(62))
    line = told(tmp_path / "benchmark_model")
    assert "benchmark_model is built for x86_64, and the phone executes arm64-v8a,armeabi-v7a" in line
    (tmp_path / "benchmark_model").write_bytes(elf(183))  # right, and damaged
    assert told(tmp_path / "benchmark_model").count("is it built for this phone?") == 2
    assert not (run / "device.json").exists() and not list((fake / "tmp").iterdir())
    script(
        tmp_path / "executor_runner", "#!/bin/sh\necho \"ERROR: unknown command line flag 'input_shapes'\"; exit 1\n"
    )
    assert "it has no --input_shapes" in told(tmp_path / "executor_runner")
    script(tmp_path / "executor_runner", "#!/bin/sh\necho done\n")
    assert "it gave no latency: done; a runner without logs tells none" in told(tmp_path / "executor_runner")


def test_a_run_without_files_for_the_program(fake, run, programs, capsys, tmp_path):
    (run / "export" / "student-static_int8.pte").unlink()
    assert device(run, "--benchmark", programs[1]) == 1
    error = capsys.readouterr().err
    assert "give --benchmark the path of benchmark_model (LiteRT, .tflite)" in error
    assert device(run) == 1 and "no program runs student" in capsys.readouterr().err
    for name in FILES:
        (run / "export" / name).unlink(missing_ok=True)
    assert device(run, "--benchmark", programs[1]) == 1
    assert "no .tflite or .pte file is in its report" in capsys.readouterr().err
    assert device(tmp_path / "nowhere") == 1 and "holds no exported files" in capsys.readouterr().err
    (run / "report.json").unlink()
    assert device(run, "--benchmark", programs[1]) == 1 and "report.json" in capsys.readouterr().err


def test_a_file_that_is_not_the_report_s_is_not_measured_and_the_others_are(fake, run, programs, capsys):
    (run / "export" / "student.tflite").write_bytes(b"another")
    assert device(run, "--benchmark", *programs) == 1
    assert capsys.readouterr().err.startswith("error: student.tflite: LiteRT: it is not the file that the report is of")
    assert {*found(run)} == {*FILES} - {"student.tflite"}
    row = Row("student.tflite", 0.5, bytes=7, format="litert")
    page.write([Row("student", 0.5), row], run, {})
    assert device(run, "--benchmark", *programs) == 1
    assert "of an earlier version, without checksums" in capsys.readouterr().err


def test_a_program_that_hangs_is_ended(fake, run, programs, capsys, monkeypatch):
    script(programs[0], f"#!/bin/sh\necho $$ >> {fake}/pids\nexec sleep 60\n")
    monkeypatch.setattr(tools, "LIMIT", 1)
    start = time.monotonic()
    assert device(run, "--benchmark", *programs) == 1
    assert time.monotonic() - start < 30
    error = capsys.readouterr().err
    assert error.count("no end within 1 s: it was ended") == 2 and {*found(run)} == {"student-static_int8.pte"}
    for pid in map(int, (fake / "pids").read_text().split()):
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]


def test_interrupted_nothing_stays_on_the_phone(fake, run, programs, capsys, monkeypatch):
    def interrupted(*given):
        assert list((fake / "tmp").iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(tools, "run", interrupted)
    assert device(run, "--benchmark", programs[0]) == 1
    assert capsys.readouterr().err.startswith("error: ended before all was measured")
    assert not list((fake / "tmp").iterdir()) and not (run / "device.json").exists()


@pytest.mark.matrix
def test_ended_midway_nothing_stays_on_the_phone(fake, run, programs):
    script(programs[0], f"#!/bin/sh\necho $$ >> {fake}/pids\nexec sleep 3\n")
    words = [sys.executable, "-m", "distill.device", str(run), "--benchmark", str(programs[0])]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while not (fake / "pids").exists() and time.monotonic() < end:
            time.sleep(0.05)
        process.terminate()
        _, error = process.communicate(timeout=60)
    assert (
        process.returncode == 1 and error.startswith("error: ended before all was measured") and error.count("\n") == 1
    )
    assert not list((fake / "tmp").iterdir()) and not (run / "device.json").exists()


def test_a_phone_that_is_unplugged_midway(fake, run, programs, capsys):
    script(programs[1], EXECUTORCH + 'touch "$FAKE/dead"\n')
    script(programs[0], LITERT)
    assert device(run, "--benchmark", *programs) == 1  # .pte comes first in the report
    error = capsys.readouterr().err
    assert error.count("device 'A1' not found") >= 2 and error.count("\n") == 3
    assert not (run / "device.json").exists()  # its log could not be read any more
    (fake / "dead").unlink()
    script(programs[1], EXECUTORCH)
    script(programs[0], LITERT + 'case "$1" in *) touch "$FAKE/dead";; esac\n')
    assert device(run, "--benchmark", *programs) == 1
    assert {*found(run)} == {"student-static_int8.pte", "student-static_int8.tflite"}  # until then


# What programs print


OLD = "count=50 first=249042 curr=250889 min=247067 max=254474 avg=249684 std=1442"
NEW = "INFO: count=9 first=1 curr=1 min=1 max=3e+06 avg=1.24027e+06 std=2565 p5=1 median=1239807 p95=2"
SHORT = "Inference timings in us: Init: 1, First inference: 2, Warmup (avg): 3, Inference (avg): 2.95e+06"


@pytest.mark.parametrize(
    ("said", "mean", "median"), [(OLD, 249.684, None), (NEW, 1240.27, 1239.807), (SHORT, 2950.0, None)]
)
def test_litert_s_figures(said, mean, median):
    figures = read_litert(said)
    assert figures["mean_ms"] == pytest.approx(mean) and figures.get("median_ms") == (median and pytest.approx(median))


def test_executorch_s_figures():
    assert read_executorch("Model executed successfully 50 time(s) in 61.700000 ms.") == {"runs": 50, "mean_ms": 1.234}
    for read in (read_litert, read_executorch):
        with pytest.raises(UserError, match="no latency: Error: bad"):
            read("I loaded\nError: bad\nbye")


def test_a_damaged_record_is_left_out(run, capsys):
    for text in ("{", '{"phones": 3}', '{"phones": [{"model": "x"}]}', '{"phones": [{"timings": [{"mean_ms": "1"}]}]}'):
        (run / "device.json").write_text(text)
        assert phones.read(run) == [] and "device.json is left out" in capsys.readouterr().out
    timing = phones.Timing("a", "b", "c", 5, 1.0)
    for wrong in ({"mean_ms": float("inf")}, {"runs": None}, {"tool": 3}):
        with pytest.raises(ValueError, match="no timing"):
            replace(timing, **wrong)


def test_help_is_there_at_once():
    start = time.monotonic()
    words = [sys.executable, "-X", "importtime", "-m", "distill.device", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--serial" in done.stdout and " torch" not in done.stderr and time.monotonic() - start < 5
