"""`hydra/sweeper=search`: a sweep whose values Optuna chooses, by what earlier trials found.

    python train.py -m hydra/sweeper=search 'loss.kd.temperature=interval(1,8)' 'optimizer.lr=tag(log,interval(.01,.2))'

Trials are judged by validation images, never by test images. Never imports torch; Optuna only when a search begins.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf

from distill import locks
from distill.cli.sweep import as_handed_on
from distill.errors import UsageError
from distill.files import MOST, read_json
from distill.progress import say
from distill.runs import trials
from distill.runs.sweeps import is_at_work, job_name
from distill.runs.trials import DIRECTIONS, PRUNERS

if TYPE_CHECKING:
    import optuna

SAMPLERS = {"tpe": "TPESampler", "random": "RandomSampler", "gp": "GPSampler", "nsgaii": "NSGAIISampler"}
OPTIONS = {
    "trials": 20,  # of the whole study, whoever runs them
    "sampler": "tpe",
    "pruner": "median",  # ends trials whose validation accuracy is low; where there is one objective
    "objectives": ["accuracy"],  # accuracy (of validation images), bytes, latency_ms
    "seed": 0,  # of the sampler
    "params": {},  # what is searched, beside the words of the command line
}
DIGITS = 4  # of a number that is drawn


class Search(Sweeper):
    """A study in the sweep's folder, Optuna's journal, which goes on by the same command. Several processes, on this
    machine or on others that see the folder, may work on it; a trial whose process was killed is finished by the next.

    Raises:
        UsageError: an option is wrong, Optuna is not installed, or the folder holds another study.
    """

    def __init__(self, trials, sampler, pruner, objectives, seed, params):
        self.trials, self.seed, self.params = trials, seed, dict(params or {})
        self.objectives = [objectives] if isinstance(objectives, str) else list(objectives or [])
        for name, value, least in (("trials", trials, 1), ("seed", seed, 0)):
            if type(value) is not int or value < least:
                raise UsageError(f"hydra.sweeper.{name}={value}: expected a whole number of at least {least}")
        known = [*DIRECTIONS]
        if not self.objectives or any(each not in known for each in self.objectives):
            raise UsageError(f"hydra.sweeper.objectives={self.objectives}: expected some of {', '.join(known)}")
        self.sampler = _choice("sampler", sampler, SAMPLERS)
        self.pruner = "none" if pruner is None or len(self.objectives) > 1 else pruner
        _choice("pruner", self.pruner, PRUNERS)

    def setup(self, *, hydra_context, task_function, config: DictConfig) -> None:
        self.config, self.context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        root = Path(self.config.hydra.sweep.dir)
        words = [f"{key}={value}" for key, value in self.params.items()] + list(arguments)
        parsed = OverridesParser.create(config_loader=self.context.config_loader).parse_overrides(words)
        fixed = [as_handed_on(each) for each in parsed if not each.is_sweep_override()]
        space = {o.get_key_element(): o for o in parsed if o.is_sweep_override()}
        if not space:
            raise UsageError(
                "hydra/sweeper=search: nothing is to be searched: KEY=A,B, 'KEY=interval(LOW,HIGH)', or with a "
                "logarithmic scale 'KEY=tag(log,interval(LOW,HIGH))'"
            )
        root.mkdir(parents=True, exist_ok=True)
        study = self._study(root, space)
        OmegaConf.save(self.config, root / "multirun.yaml")
        while True:
            with contextlib.ExitStack() as held:
                batch = self._batch(root, study, space, held)
                if not batch:
                    return
                jobs = {number: [*fixed, *varied] for number, varied in batch.items()}
                for number, job in jobs.items():
                    trials.note(root / job_name(str(root), job, number), number)
                self.launcher.launch(list(jobs.values()), min(jobs))
                for number, job in jobs.items():
                    self._tell(study, number, root / job_name(str(root), job, number))

    def _study(self, root: Path, space: Mapping[str, Override]) -> optuna.Study:
        optuna = trials.load_optuna()
        study = optuna.create_study(
            storage=trials.storage(root),
            study_name=trials.NAME,
            pruner=trials.pruner(self.pruner),
            directions=[DIRECTIONS[each] for each in self.objectives],
            load_if_exists=True,
        )
        described = {
            "objectives": self.objectives,
            "space": {key: each.input_line for key, each in space.items()},
            "pruner": self.pruner,
        }
        before = study.user_attrs.get("described", described)
        for part, now in described.items():
            if before.get(part) != now:
                raise UsageError(
                    f"{root} holds a study with another {part}, {before.get(part)} and not {now}: give the same, or "
                    "another name (sweep=NAME)"
                )
        study.set_user_attr("described", described)
        return study

    def _batch(self, root: Path, study: optuna.Study, space, held: contextlib.ExitStack) -> dict[int, list[str]]:
        """As many trials as the launcher runs at a time, their words by number: those that a killed process left, then
        new ones. Each is locked until `held` ends."""
        found: dict[int, list[str]] = {}
        many = getattr(self.launcher, "many", 1) or 1
        with locks.alone(root / ".study.lock", "the study"):
            known = study.get_trials(deepcopy=False)
            running = [each for each in known if not each.state.is_finished()]
            for trial in running:
                if len(found) < many and self._claim(root, trial.number, held):
                    if "words" in trial.user_attrs:
                        found[trial.number] = list(trial.user_attrs["words"])
                    else:  # killed while its values were drawn
                        study.tell(trial.number, state=trials.load_optuna().trial.TrialState.FAIL)
            begun = sum("words" in each.user_attrs for each in known)
            while len(found) < many and begun < self.trials:
                trial = self._asked(study, begun)
                self._claim(root, trial.number, held)
                varied = [f"{key}={_drawn(trial, key, each)}" for key, each in space.items()]
                trial.set_user_attr("words", varied)
                found[trial.number] = varied
                begun += 1
        return found

    def _asked(self, study: optuna.Study, number: int) -> optuna.Trial:
        """A new trial. Its sampler's seed follows from how many were before it, so that a study that goes on draws what
        it would have drawn, and nothing twice."""
        optuna = trials.load_optuna()
        study.sampler = getattr(optuna.samplers, self.sampler)(seed=(self.seed * 100_003 + number) % 2**32)
        return study.ask()

    def _claim(self, root: Path, number: int, held: contextlib.ExitStack) -> bool:
        """Whether nobody else is at work on the trial."""
        try:
            held.enter_context(locks.alone(trials.lock(root, number), f"trial {number}", 0))
        except locks.Held:
            return False
        return True

    def _tell(self, study: optuna.Study, number: int, run: Path) -> None:
        """What came of a trial's run; one that lacks an objective has failed, and that is said. One at which another
        process still is, a job whose search was killed, is nobody's to tell yet."""
        if is_at_work(run):
            return
        states = trials.load_optuna().trial.TrialState
        status = read_json(run / "run.json", MOST).get("status") if (run / "run.json").is_file() else "failed"
        values = trials.figures(run) if status == "done" else {}
        lacking = [each for each in self.objectives if each not in values]
        if status == "pruned":
            study.tell(number, state=states.PRUNED)
        elif lacking:
            if status == "done":
                say(f"warning: {run.name} has no {' and no '.join(lacking)} to be judged by (stages=, export=)")
            study.tell(number, state=states.FAIL)
        else:
            study.tell(number, [values[each] for each in self.objectives])


def _choice(option: str, value, choices: Mapping[str, str]) -> str:
    if value not in choices:
        raise UsageError(f"hydra.sweeper.{option}={value}: expected one of {', '.join(choices)}")
    return choices[value]


def _drawn(trial: optuna.Trial, key: str, override: Override) -> str:
    """A value of an option's space: of what is listed one; of an interval a number, whole of int(interval(…))."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        low, high, log = value.start, value.end, "log" in value.tags
        if isinstance(low, int) and isinstance(high, int):
            return str(trial.suggest_int(key, low, high, log=log))
        return f"{trial.suggest_float(key, low, high, log=log):.{DIGITS}g}"
    if isinstance(value, RangeSweep) and all(isinstance(each, int) for each in (value.start, value.stop, value.step)):
        last = value.start + (value.stop - value.start - 1) // value.step * value.step
        return str(trial.suggest_int(key, value.start, last, step=value.step))
    return trial.suggest_categorical(key, list(override.sweep_string_iterator()))
