"""A search's study and its trials on the disk: what a trial tells while it trains, and what it is worth in the end.

Never imports torch; Optuna only where there is a study.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from distill import locks
from distill.errors import UsageError
from distill.files import read_json, write_json

if TYPE_CHECKING:
    import optuna

STUDY = "study.log"  # Optuna's journal in a sweep's folder
NAME = "sweep"  # of the one study in it
FILE = "trial.json"  # in a run's folder: of which study it is which trial
PRUNERS = {
    "none": "NopPruner",
    "median": "MedianPruner",
    "hyperband": "HyperbandPruner",
    "halving": "SuccessiveHalvingPruner",
}
DIRECTIONS = {"accuracy": "maximize", "bytes": "minimize", "latency_ms": "minimize"}


def load_optuna():
    """The module.

    Raises:
        UsageError: it is not installed.
    """
    try:
        found = import_module("optuna")
    except ImportError:
        raise UsageError("a search needs Optuna: pip install 'distill[search]' (pip install optuna)") from None
    found.logging.set_verbosity(found.logging.WARNING)
    return found


def study_of(folder: Path) -> optuna.Study:
    """The study of the sweep in `folder`, as it is now."""
    found = load_optuna()
    return found.load_study(study_name=NAME, storage=storage(folder))


def pruner(name: str) -> optuna.pruners.BasePruner:
    """Of PRUNERS. It is no part of what a study keeps."""
    return getattr(load_optuna().pruners, PRUNERS[name])()


def storage(folder: Path) -> optuna.storages.JournalStorage:
    journal = import_module("optuna.storages.journal")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_optuna().storages.JournalStorage(journal.JournalFileBackend(str(folder / STUDY)))


def note(run: Path, number: int) -> None:
    """Say in a run's folder, which is a sweep's, that it is the trial `number` of the sweep's study."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(run / FILE, {"number": number})


def lock(root: Path, number: int) -> Path:
    """Of a trial: whoever trains it holds it, from before its run begins."""
    return root / f".trial-{number}.lock"


def is_taken(run: Path) -> bool:
    """Whether the run is a trial that another process is at, or about to begin."""
    return (run / FILE).is_file() and locks.held(lock(run.parent, read_json(run / FILE)["number"]))


def judge(run: Path) -> Callable[[int, float], bool] | None:
    """What a run that is a trial asks after each epoch: (epoch, validation accuracy) to whether to go on; None where it
    is none, or its study has more than one objective and prunes nothing."""
    if not (run / FILE).is_file() or not (run.parent / STUDY).is_file():
        return None
    study = study_of(run.parent)
    study.pruner = pruner(study.user_attrs.get("described", {}).get("pruner", "median"))
    number = read_json(run / FILE)["number"]
    found = next((each for each in study.get_trials(deepcopy=False) if each.number == number), None)
    if found is None or found.state.is_finished() or len(study.directions) > 1:
        return None
    trial = load_optuna().trial.Trial(study, found._trial_id)

    def goes_on(epoch: int, accuracy: float) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an epoch that a killed run had told already
            trial.report(accuracy, epoch)
        return not trial.should_prune()

    return goes_on


def figures(run: Path) -> dict[str, float]:
    """What a finished run is worth, by DIRECTIONS: its student's validation accuracy in [0, 1], and of its smallest
    exported file bytes and latency. What it lacks is left out."""
    from distill.runs.student import STUDENT, read_description
    from distill.runs.tables import read_report, smallest_file

    found = {}
    if (run / STUDENT).is_file():
        found["accuracy"] = float(read_description(run / STUDENT)["val_accuracy"])
    rows = read_report(run)["rows"] if (run / "report.json").is_file() else []
    if file := smallest_file(rows):
        found |= {key: file[key] for key in ("bytes", "latency_ms") if file.get(key) is not None}
    return found


def told(folder: Path) -> list[str]:
    """What to say of a sweep's study, if it is one: the best trials, and how many ended how."""
    if not (folder / STUDY).is_file():
        return []
    study = study_of(folder)
    objectives = study.user_attrs["described"]["objectives"]
    ended: dict[str, int] = {}
    for trial in study.get_trials(deepcopy=False):
        ended[trial.state.name.lower()] = ended.get(trial.state.name.lower(), 0) + 1
    lines = ["trials: " + ", ".join(f"{count} {state}" for state, count in sorted(ended.items()))]
    best = study.best_trials if ended.get("complete") else []
    for trial in best[:10]:
        values = ", ".join(f"{name} {value:.4g}" for name, value in zip(objectives, trial.values, strict=True))
        which = "best" if len(objectives) == 1 else "none is better in all objectives"
        lines.append(f"{which}: {' '.join(trial.user_attrs['words'])}: {values} (accuracy: of validation images)")
    return lines
