"""A loss that diverges: told, or taken back to the last checkpoint with half the rate, killed or not."""

import json

import pytest
import torch
from harness import QUICK, assert_one_line, killed, record, run
from safetensors.torch import load_file

WORDS = [
    *(*QUICK, "stages=[teacher,distill]", "baseline=false", "checkpoint_every=2", "trainer.max_epochs=3"),
    *("optimizer.lr=0.1", "schedule=multistep", "teacher.fit.epochs=1", "teacher.fit.lr=0.01", "ema=0.9"),
]

# the loss of the student is no longer finite from this step on while the rate is above this
DIVERGES = """
def change(module):
    total = module.Distill.total
    def diverging(self, *arguments):
        value, terms = total(self, *arguments)
        group = self.trainer.optimizers[0].param_groups[0]
        if self.teacher is not None and self.global_step >= {step} and group["lr"] > {rate}:
            terms[0] = value = value * float("nan")
        return value, terms
    module.Distill.total = diverging
after_import("distill.training.module", change)
"""


def state(folder):
    return load_file(folder / "outputs/x/student_last.safetensors")


def assert_same(one, other):
    a, b = state(one), state(other)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """A training of 21 steps that diverged at its 10th while its rate was above 0.03: it went back twice."""
    folder = tmp_path_factory.mktemp("twice")
    done = run(folder, *WORDS, "on_divergence=back", "name=x", fault=DIVERGES.format(step=10, rate=0.03))
    assert done.code == 0, done.err
    return folder, done


def test_it_goes_back_with_half_the_rate_and_says_so(twice):
    folder, done = twice
    assert (
        "diverged in epoch 2 (ce, kd is not finite): back to the last checkpoint with 0.5 times the rate (1 of"
        in done.out
    )
    assert "with 0.25 times the rate (2 of at most 3 times)" in done.out
    assert record(folder / "outputs/x")["setbacks"] == [12, 12]
    assert all(value.isfinite().all() for value in state(folder).values())
    checkpoint = torch.load(folder / "outputs/x/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 0.025


@pytest.mark.parametrize(
    "times", [1, pytest.param(6, marks=pytest.mark.faults), pytest.param(10, marks=pytest.mark.faults)]
)
def test_killed_after_a_setback_it_ends_with_the_same_bits(twice, tmp_path, times):
    """Before the checkpoint at the 12th step, which is the first with a smaller rate, and at others."""
    diverges = DIVERGES.format(step=10, rate=0.03)
    when = (
        killed("new.ckpt", "after", times)
        if times > 1
        else (
            "def change(divergence):\n"
            "    take = divergence.Setbacks.take\n"
            "    divergence.Setbacks.take = lambda self, error: (take(self, error), len(self.steps) == 2 and "
            "os.kill(os.getpid(), signal.SIGKILL))\n"
            "after_import('distill.training.divergence', change)\n"
        )
    )
    assert run(tmp_path, *WORDS, "on_divergence=back", "name=x", fault=diverges + when).code == -9
    assert run(tmp_path, "run=outputs/x", fault=diverges).code == 0
    assert_same(twice[0], tmp_path)
    assert record(tmp_path / "outputs/x")["setbacks"] == [12, 12]


@pytest.mark.faults
def test_after_three_times_it_ends_and_what_is_there_is_finite(tmp_path):
    done = run(tmp_path, *WORDS, "on_divergence=back", "name=x", fault=DIVERGES.format(step=1, rate=0))
    assert_one_line(done, "the loss diverged in epoch 0 (ce is not finite): lower optimizer.lr")
    assert done.out.count("back to the last checkpoint") == 3
    checkpoint = torch.load(tmp_path / "outputs/x/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 0


@pytest.mark.faults
def test_it_stops_by_default_and_can_go_back_when_continued(tmp_path):
    diverges = DIVERGES.format(step=11, rate=0.06)
    done = run(tmp_path, *WORDS, "name=x", fault=diverges)
    assert_one_line(done, "the loss diverged in epoch 1 (ce is not finite)", "on_divergence=back")
    again = run(
        tmp_path, "run=outputs/x", "on_divergence=back", "stages=[teacher,distill,export,report]", fault=diverges
    )
    assert again.code == 0, again.err
    report = json.loads((tmp_path / "outputs/x/report.json").read_text())
    assert report["context"]["diverged"] == "after 12 steps: each time back with half the rate"


WEIGHTS = """
def change(module):
    step = module.Distill.optimizer_step
    def breaking(self, *arguments, **options):
        step(self, *arguments, **options)
        if self.teacher is not None and self.global_step == {step}:
            next(self.student.parameters()).data.fill_(float("inf"))
    module.Distill.optimizer_step = breaking
after_import("distill.training.module", change)
"""


@pytest.mark.faults
@pytest.mark.parametrize("step", [9, 13])
def test_weights_that_are_not_finite_reach_no_file(tmp_path, step):
    """At a checkpoint inside an epoch, and at the epoch's last step, before validation."""
    done = run(tmp_path, *WORDS, "name=x", fault=WEIGHTS.format(step=step))
    assert_one_line(done, "diverged in epoch 1", "is not finite")
    files = tmp_path / "outputs/x/checkpoints"
    weights = torch.load(files / "last.ckpt", weights_only=True)["state_dict"]
    (best,) = files.glob("best*.safetensors")
    for value in (*weights.values(), *load_file(best).values()):
        assert not isinstance(value, torch.Tensor) or value.isfinite().all()
