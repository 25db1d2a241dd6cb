"""Folders that can't be written to or are gone, and disks that are full, wherever the run is."""

import os
import subprocess
import tempfile

import pytest
from harness import QUICK, assert_one_line, full, killed, leftovers, record, run
from safetensors.torch import load_file

from distill import files

SHORT = [*QUICK, "trainer.max_epochs=1", "baseline=false", "compress=[]"]
TRAINS = [*QUICK, "trainer.max_epochs=1", "stages=[teacher,distill]"]


@pytest.fixture
def read_only():
    """`read_only(folder)`: nobody can write there any more, not even root; skips where that can't be made."""
    made = []

    def make(folder):
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        made.append(folder)
        if os.geteuid() == 0:  # root writes all the same, but not into a file system that is mounted so
            done = [["mount", "--bind", folder, folder], ["mount", "-o", "remount,ro,bind", folder]]
            if any(subprocess.run(command, capture_output=True).returncode for command in done):
                pytest.skip("root, and may not mount")

    yield make
    for folder in made:
        subprocess.run(["umount", folder], capture_output=True)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_store_and_a_cache_that_are_read_only_are_read(tmp_path, read_only):
    assert run(tmp_path, *TRAINS, "name=first").code == 0
    read_only(tmp_path / "outputs/fits")
    read_only(tmp_path / "outputs/cache")
    done = run(tmp_path, *TRAINS, "name=second")
    assert done.code == 0, done.err
    assert done.out.count("before, read from") == 2 and "warning" not in done.out
    first, second = (load_file(tmp_path / f"outputs/{name}/student.safetensors") for name in ("first", "second"))
    assert all(first[key].equal(second[key]) for key in first)


@pytest.mark.faults
def test_a_store_and_a_cache_that_are_read_only_and_lack_something(tmp_path, read_only):
    assert run(tmp_path, *TRAINS, "name=first").code == 0
    read_only(tmp_path / "outputs/fits")
    read_only(tmp_path / "outputs/cache")
    more = run(tmp_path, *TRAINS, "trainer.max_epochs=2", "teacher.fit.epochs=1", "baseline=false", "name=more")
    assert more.code == 0, more.err
    assert more.out.count("the teacher answers what is not stored") == 1
    fitted = run(tmp_path, *TRAINS, "seed=3", "teacher.fit.seed=3", "name=fitted")
    assert_one_line(fitted, "store=outputs/fits: what is fitted once can't be written there", "give another folder")


@pytest.mark.faults
def test_a_run_folder_that_becomes_read_only(tmp_path, read_only):
    assert run(tmp_path, *TRAINS, "baseline=false", "name=x").code == 0
    read_only(tmp_path / "outputs/x")
    assert_one_line(run(tmp_path, "run=outputs/x", "stages=[export]"), f"{tmp_path}/outputs/x")


FILES = [
    *("config.yaml", "run.json", "new.ckpt", "best*.safetensors", "metrics.csv", "fit.json", "weights.safetensors"),
    *("*.rows", "student_last.safetensors", "student.safetensors", "identity.json"),
]
REPORTED = ["student.pt", "report.json", "report.md", "report.png", "README.md", "classes.txt"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, *TRAINS, "baseline=false", "name=x").code == 0
    return load_file(folder / "outputs/x/student.safetensors")


@pytest.mark.faults
@pytest.mark.parametrize("room", [0, 3000])
@pytest.mark.parametrize("file", [*FILES, "new.ckpt 2", "new.ckpt 3", *REPORTED])
def test_a_disk_that_is_full_at_any_file_is_told_and_the_run_goes_on(tmp_path, whole, file, room):
    """`new.ckpt`: the rehearsal's, then the teacher's, then the student's."""
    file, _, times = file.partition(" ")
    words = [*(TRAINS if file in FILES else SHORT), "baseline=false", "name=x"]
    done = run(tmp_path, *words, fault=full(file, room, int(times or 1)))
    if done.code:
        assert_one_line(done, "make room", str(tmp_path))
        assert os.strerror(27) in done.error or "is the disk full" in done.error
    assert not leftovers(tmp_path)
    assert run(tmp_path, *words).code == 0
    again = load_file(tmp_path / "outputs/x/student.safetensors")
    assert all(whole[key].equal(again[key]) for key in whole)


@pytest.mark.faults
@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_a_full_disk_at_a_logger(tmp_path, logger):
    file = "events.out*" if logger == "tensorboard" else "*.wandb"
    done = run(tmp_path, *TRAINS, "baseline=false", "name=x", f"logger=[{logger}]", fault=full(file))
    assert "Traceback" not in done.err, done.err
    if done.code:
        assert_one_line(done, "make room")
    assert run(tmp_path, *TRAINS, "baseline=false", "name=x", f"logger=[{logger}]").code == 0


NOWHERE = {
    "home that can't be written": lambda folder: {"HOME": "/proc/1/nowhere"},
    "no temporary folder": lambda folder: {"TMPDIR": str(folder / "none")},
    "a language without signs": lambda folder: {"LC_ALL": "C"},
}


@pytest.mark.faults
@pytest.mark.parametrize("which", [*NOWHERE, "no home"])
def test_surroundings_that_lack_something(tmp_path, which):
    if which == "no home":
        done = run(tmp_path, *SHORT, "name=x", fault="os.environ.pop('HOME', None)\n")
    else:
        done = run(tmp_path, *SHORT, "name=x", env=NOWHERE[which](tmp_path))
    assert done.code == 0, done.err
    assert record(tmp_path / "outputs/x")["status"] == "done"


def test_temporary_folders_of_killed_processes_go_and_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gone = subprocess.Popen(["true"])
    gone.wait()
    names = [f"distill-{files.MACHINE}.{pid}.x" for pid in (gone.pid, os.getpid(), os.getppid())]
    names += [f"distill-elsewhere.{gone.pid}.x", "distill-mine"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    with files.scratch() as folder:
        (folder / "file").write_text("x")
        assert {path.name for path in tmp_path.iterdir()} == {*names[1:], folder.name}
    assert {path.name for path in tmp_path.iterdir()} == {*names[1:]}


def test_leftovers_in_a_folder_go_whatever_they_belong_to(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead, live, fresh = (
        tmp_path / f".logits-0000.rows.{machine}.{pid}.tmp"
        for machine, pid in ((files.MACHINE, gone.pid), (files.MACHINE, os.getppid()), ("elsewhere", gone.pid))
    )
    for path in (dead, live, fresh):
        path.touch()
    files.sweep(tmp_path)
    assert not dead.exists() and live.exists() and fresh.exists()
    os.utime(fresh, (0, 0))
    files.sweep(tmp_path, "other.rows")
    assert fresh.exists()
    files.sweep(tmp_path, "logits-0000.rows")
    assert not fresh.exists() and live.exists()


@pytest.mark.faults
def test_a_temporary_folder_that_is_full_or_of_a_killed_run(tmp_path):
    """The rehearsal's."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    here = {"TMPDIR": str(temporary)}
    done = run(tmp_path, *SHORT, "name=x", fault=full("new.ckpt"), env=here)
    assert_one_line(done, str(temporary), "make room")
    assert not [*temporary.glob("distill-*")]
    assert run(tmp_path, *SHORT, "name=x", fault=killed("new.ckpt", "after"), env=here).code == -9
    assert len([*temporary.glob("distill-*")]) == 1
    assert run(tmp_path, *SHORT, "stages=[teacher,distill]", "name=x", env=here).code == 0
    assert not [*temporary.glob("distill-*")]


@pytest.mark.faults
@pytest.mark.parametrize("jump", [-(10**7), 10**7])
def test_a_clock_that_jumps(tmp_path, whole, jump):
    fault = f"now = time.time\ncalls = []\ntime.time = lambda: (calls.append(0), now() + len(calls) % 2 * {jump})[1]\n"
    assert run(tmp_path, *TRAINS, "baseline=false", "name=x", fault=fault).code == 0
    again = load_file(tmp_path / "outputs/x/student.safetensors")
    assert all(whole[key].equal(again[key]) for key in whole)


@pytest.mark.faults
def test_a_working_directory_that_is_gone(tmp_path):
    place = tmp_path / "gone"
    place.mkdir()
    done = run(place, *SHORT, "name=x", fault="import shutil; shutil.rmtree(os.getcwd())\n")
    assert done.code in (1, 2) and "Traceback" not in done.err and len(done.err.splitlines()) == 1, done.err
    assert "working directory" in done.error or "No such file or directory" in done.error


GONE = """
def change(module):
    check = module.Distill.on_train_batch_end
    def gone(self, outputs, batch, batch_idx):
        if self.teacher is not None and self.trainer.max_epochs > 1 and self.global_step == 10:
            import shutil
            shutil.rmtree("outputs/x")
        return check(self, outputs, batch, batch_idx)
    module.Distill.on_train_batch_end = gone
after_import("distill.training.module", change)
"""


@pytest.mark.faults
def test_a_run_folder_that_vanishes(tmp_path):
    done = run(tmp_path, *QUICK, "baseline=false", "stages=[teacher,distill]", "name=x", fault=GONE)
    assert_one_line(done, "outputs/x")
