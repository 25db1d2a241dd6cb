"""Processes and memory that fail while a run works: one line, the way on, and then the same bits."""

import os
import signal

import pytest
import torch
from harness import QUICK, assert_one_line, finished, leftovers, record, run, started, wait_for
from omegaconf import OmegaConf
from safetensors.torch import load_file

from distill import asked
from distill.cli import faults
from distill.errors import UserError

TRAINS = [*QUICK, "baseline=false", "stages=[teacher,distill]", "data.num_workers=1", "trainer.max_epochs=3"]

# the process that loads images kills itself where the run is at this point
WORKER = """
def change(base):
    whole = base.Split.__getitem__
    def dying(split, index):
        import torch.utils.data
        if torch.utils.data.get_worker_info() is not None and {when}:
            {what}
        return whole(split, index)
    base.Split.__getitem__ = dying
    {more}
after_import("distill.data.base", change)
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def assert_same(one, other):
    a, b = load_file(one / "student.safetensors"), load_file(other / "student.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "when",
    [
        "split.training and index[1] == 2",
        pytest.param("not split.training and len(split) == 40", marks=pytest.mark.faults),
    ],
    ids=["train", "val"],
)
def test_a_killed_loader_is_told_and_the_run_goes_on(tmp_path, when):
    done = run(tmp_path, *TRAINS, "name=x", fault=WORKER.format(when=when, what=KILL, more=""))
    goes_on = f"python train.py run={tmp_path}/outputs/x goes on"
    assert_one_line(done, "error: DataLoader worker (pid", "lower data.num_workers", goes_on)
    assert record(tmp_path / "outputs/x")["status"] == "failed" and not leftovers(tmp_path)
    assert run(tmp_path, f"run={tmp_path}/outputs/x").code == 0
    assert run(tmp_path, *TRAINS, "name=whole").code == 0
    assert_same(tmp_path / "outputs/x", tmp_path / "outputs/whole")


@pytest.mark.faults
def test_a_loader_that_hangs_is_not_waited_for_without_end(tmp_path):
    hangs = WORKER.format(when="index[1] == 1", what="time.sleep(1000)", more="base.WAIT = 5")
    done = run(tmp_path, *TRAINS, "name=x", fault=hangs)
    assert_one_line(done, "no images came for 5 s", f"python train.py run={tmp_path}/outputs/x goes on")


@pytest.mark.faults
@pytest.mark.parametrize("stage", ["cache", "report"])
def test_a_killed_loader_in_other_stages(tmp_path, stage):
    words = [*QUICK, "baseline=false", "data.num_workers=1", "trainer.max_epochs=1", "name=x"]
    stages = {
        "cache": (["stages=[teacher,cache]"], "split.training"),
        "report": ([], "not split.training and os.path.exists('outputs/x/export/student.pt')"),
    }
    more, when = stages[stage]
    done = run(tmp_path, *words, *more, fault=WORKER.format(when=when, what=KILL, more=""))
    assert_one_line(done, "DataLoader worker", "python train.py run=")


EXHAUSTED = """
def change(module):
    import torch
    step = module.Distill.training_step
    def exhausted(self, batch, batch_idx):
        if {when}:
            raise {error}
        return step(self, batch, batch_idx)
    module.Distill.training_step = exhausted
after_import("distill.training.module", change)
"""
CUDA = 'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB")'
CPU = 'RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can\'t allocate memory: you")'


def test_memory_exhausted_at_the_start_names_the_batch_that_fits(tmp_path):
    fault = EXHAUSTED.format(when="len(batch.images) > 5", error=CUDA)
    done = run(tmp_path, *QUICK, "name=x", fault=fault)
    assert_one_line(done, "memory has run out (2.00 GiB more were asked for) with data.batch_size=16")
    assert "data.batch_size=4 fits, which was tried (trainer.accumulate_grad_batches=4 " in done.error
    assert "fitting" not in done.out  # told before the teacher is trained


@pytest.mark.faults
@pytest.mark.parametrize("error", [CUDA, CPU], ids=["cuda", "cpu"])
def test_memory_exhausted_in_training_names_the_batch_to_try(tmp_path, error):
    fault = EXHAUSTED.format(when="self.teacher is not None and self.current_epoch == 1", error=error)
    done = run(tmp_path, *QUICK, "stages=[teacher,distill]", "baseline=false", "name=x", fault=fault)
    assert_one_line(done, "memory has run out", f"python train.py run={tmp_path}/outputs/x goes on")
    assert "data.batch_size=8 instead of 16 (trainer.accumulate_grad_batches=2 " in done.error
    assert (tmp_path / "outputs/x/checkpoints/last.ckpt").exists()


@pytest.mark.faults
def test_memory_that_the_system_does_not_give(tmp_path):
    """A real limit, which training with this batch passes."""
    limited = "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, resource.RLIM_INFINITY))\n"
    words = ["data.train_size=4000", "data.image_size=64", "data.batch_size=4000", "student=resnet20"]
    done = run(tmp_path, *QUICK, *words, "name=x", fault=limited)
    assert_one_line(done, "memory has run out", "data.batch_size=4000")


@pytest.mark.parametrize(
    ("batch", "steps", "told"),
    [
        (16, None, "data.batch_size=8 instead of 16 (trainer.accumulate_grad_batches=2 "),
        (7, 4, "data.batch_size=3 instead of 7 (trainer.accumulate_grad_batches=8 "),
        (1, None, "a smaller network"),
    ],
)
def test_memory_exhausted_names_the_batch_to_try(tmp_path, batch, steps, told):
    cfg = OmegaConf.create({"data": {"batch_size": batch}, "trainer": {"accumulate_grad_batches": steps}})
    with pytest.raises(UserError) as raised, faults.told(cfg, tmp_path):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB")
        except RuntimeError as error:
            raise ValueError("a step failed") from error
    assert told in str(raised.value) and f"{asked.again(f'run={tmp_path}')} goes on" in str(raised.value)


def test_what_is_no_fault_of_the_machine_keeps_its_line():
    assert not faults.exhausted(ValueError("memory")) and faults.worker(ValueError("a worker")) is None
    assert faults.disk(FileNotFoundError(2, "No such file or directory", "a")) is None


@pytest.mark.faults
def test_a_run_that_is_stopped_for_a_while_goes_on(tmp_path):
    """As a laptop that sleeps: nothing counts on time having passed, or not."""
    process = started(tmp_path, *QUICK, "trainer.max_epochs=20", "stages=[teacher,distill]", "name=x")
    wait_for(process, "distill:")
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    process.send_signal(signal.SIGCONT)
    assert finished(process).code == 0


def test_an_operation_without_a_deterministic_form_is_named(tmp_path):
    cfg = OmegaConf.create({"data": {"batch_size": 4}, "trainer": {}})
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(UserError, match="deterministic=true: put_ has no such form"), faults.told(cfg, tmp_path):
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    finally:
        torch.use_deterministic_algorithms(False)
