"""Kill a search anywhere, again and again, alone or beside another: every trial is trained once, and to its end."""

import random
import signal
import time

import pytest
from harness import QUICK, finished, run, started

from distill.files import read_json
from distill.runs import tables, trials

pytest.importorskip("optuna", reason="the search's extra is not installed: pip install -e '.[search]'")
pytestmark = pytest.mark.faults

WORDS = [*QUICK, "-m", "hydra/sweeper=search", "loss.kd.temperature=interval(1.0,8.0)", "sweep=x", "baseline=false"]
WORDS += ["hydra.sweeper.sampler=random", "compress=[]", "export=[]", "checkpoint_every=2"]
TRIALS = 6
FORMS = {
    "one": (1, ["hydra.sweeper.pruner=none"]),
    "side by side": (1, ["hydra.sweeper.pruner=none", "hydra/launcher=processes", "hydra.launcher.side_by_side=2"]),
    "two": (2, ["hydra.sweeper.pruner=none"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_search_killed_ten_times_loses_no_trial_and_doubles_none(tmp_path, form):
    many, words = FORMS[form]
    words, draw, kills = [*WORDS, f"hydra.sweeper.trials={TRIALS}", *words], random.Random(0), 0
    while kills < 10:
        at_work = [started(tmp_path, *words, start_new_session=True) for _ in range(many)]
        time.sleep(draw.uniform(3, 12))
        for process in at_work:
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
            finished(process)
        if len(ended(tmp_path)) == TRIALS:  # before it was killed ten times: on with another
            (tmp_path / "outputs/sweeps/x").rename(tmp_path / f"finished{kills}")
    done = [finished(process) for process in [started(tmp_path, *words) for _ in range(many)]]
    assert all(each.code == 0 for each in done), done
    if not any(f"{TRIALS} of {TRIALS} jobs are done" in each.out for each in done):
        assert f"{TRIALS} of {TRIALS} jobs are done" in run(tmp_path, *words).out, done
    for root in (tmp_path / "outputs/sweeps/x", *tmp_path.glob("finished*")):
        found = trials.study_of(root).trials
        kept = [each for each in found if "words" in each.user_attrs]
        assert [each.state.name for each in kept] == ["COMPLETE"] * TRIALS
        assert len({each.user_attrs["words"][0] for each in kept}) == TRIALS
        runs = [*root.glob("*/run.json")]
        assert len(runs) == TRIALS and {read_json(file)["status"] for file in runs} == {"done"}
        for trial in kept:
            [name] = trial.user_attrs["words"]
            place = root / name.removeprefix("loss.")
            assert trial.value == trials.figures(place)["accuracy"]
            assert tables.curves(place)["epoch"].tolist() == [1, 2]


def ended(folder):
    root = folder / "outputs/sweeps/x"
    if not (root / trials.STUDY).is_file():
        return []
    return [each for each in trials.study_of(root).trials if each.state.name == "COMPLETE"]
