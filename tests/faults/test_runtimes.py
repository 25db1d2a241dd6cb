"""Files whose runtime crashes, hangs or talks nonsense: they fail with the reason, all else is reported."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from harness import QUICK, assert_one_line, run, started, until

WORDS = [*QUICK, "trainer.max_epochs=1", "baseline=false", "compress=[]", "name=x"]
AGAIN = ["run=outputs/x", "stages=[report]"]

# what the process that serves a file of this name does instead of loading it
SERVES = """
if "distill.runtimes.serve" in sys.orig_argv and sys.orig_argv[-1].endswith("/{file}"):
    import json, pkgutil
    dumps = json.dumps
    def load(path):
        {loading}
        def model(images):
            {answering}
        return model
    pkgutil.resolve_name = lambda name: load
"""
FAULTS = {  # name: what is done on loading, what on being asked, what is told
    "crashes": ("pass", "os.kill(os.getpid(), signal.SIGSEGV)", "its process died (signal 11)"),
    "is killed": ("os.kill(os.getpid(), signal.SIGKILL)", "pass", "its process died (signal 9)"),
    "exits": ("print('no licence', flush=True); os._exit(3)", "pass", "its process died (exit code 3: no licence)"),
    "raises": ("raise RuntimeError('unknown operator')", "pass", "RuntimeError: unknown operator"),
    "garbage": ("json.dumps = lambda head: 'Segmentation fault'", "return images[:, 0, 0, :10]", "can't be read"),
    "a list": ("json.dumps = lambda head: '[1, 2]'", "return images[:, 0, 0, :10]", "can't be read"),
    "no time": ("json.dumps = lambda head: dumps({'shape': head['shape']})", "return images[:, 0, 0, :10]", "be read"),
    "huge": ("json.dumps = lambda head: dumps({'shape': [10**9, 10**9]})", "return images", "[1000000000, 1000000000]"),
    "classes": ("pass", "return images[:, 0, 0, :7]", "with [1, 7], expected logits [1, 10]"),
    "images": ("pass", "return images[1:, 0, 0, :10]", "with [0, 10], expected logits [1, 10]"),
    "map": ("pass", "return images", "with [1, 3, 16, 16], expected logits [1, 10]"),
}
HANGS = ("time.sleep(1000)", "pass")
IMPATIENT = "after_import('distill.runtimes.serve', lambda serve: setattr(serve, 'LIMIT', 2))\n"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run with all that is needed to report it: student.pt and student.ptl."""
    folder = tmp_path_factory.mktemp("exported")
    assert run(folder, *WORDS, "stages=[teacher,distill,export]").code == 0
    return folder


def serves(file: str, name: str) -> str:
    loading, answering, *_ = FAULTS[name]
    return SERVES.format(file=file, loading=loading, answering=answering)


def reported(folder: Path, exported: Path, fault: str, *failing: str):
    """The end of a report stage in a copy of the run; the files that don't fail have their figures."""
    shutil.copytree(exported, folder, dirs_exist_ok=True)
    done = run(folder, *AGAIN, fault=fault)
    report = json.loads((folder / "outputs/x/report.json").read_text())
    measured = {row["name"] for row in report["rows"] if "." in row["name"]}
    assert measured == {"student.pt", "student.ptl"} - {*failing}
    assert all(any(line.startswith(f"{file}: ") for line in report["failures"]) for file in failing)
    assert {"teacher", "student"} < {row["name"] for row in report["rows"]}
    return done


def test_a_file_that_crashes_and_one_that_does_not(exported, tmp_path):
    done = reported(tmp_path, exported, serves("student.pt", "crashes"), "student.pt")
    assert_one_line(done, "student.pt: its process died (signal 11)")


@pytest.mark.faults
def test_files_that_fail_in_two_ways(exported, tmp_path):
    faults = {"student.pt": "garbage", "student.ptl": "images"}
    fault = "".join(serves(file, name) for file, name in faults.items())
    done = reported(tmp_path, exported, fault, *faults)
    assert_one_line(done, "student.pt: its process answers what can't be read", "with [0, 10], expected logits [1, 10]")


@pytest.mark.faults
@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_fails(exported, tmp_path, name):
    done = reported(tmp_path, exported, serves("student.pt", name), "student.pt")
    assert_one_line(done, "student.pt: ", FAULTS[name][-1])


@pytest.mark.faults
def test_a_file_that_hangs(exported, tmp_path):
    fault = IMPATIENT + SERVES.format(file="student.pt", loading=HANGS[0], answering=HANGS[1])
    assert_one_line(reported(tmp_path, exported, fault, "student.pt"), "student.pt: no answer within 3 s")


@pytest.mark.faults
def test_a_run_that_is_killed_leaves_no_process_that_hangs(exported, tmp_path):
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    loading = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); {HANGS[0]}"
    process = started(tmp_path, *AGAIN, fault=SERVES.format(file="student.pt", loading=loading, answering="pass"))
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not Path("/proc", (tmp_path / "pid").read_text()).exists() or _zombie(tmp_path), 20)


def _zombie(folder: Path) -> bool:
    return "State:\tZ" in Path("/proc", (folder / "pid").read_text(), "status").read_text()
