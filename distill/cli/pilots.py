"""recipe=auto: short trainings on the user's own images decide how the long one goes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from math import ceil, floor
from pathlib import Path

import torch
from hydra import compose
from omegaconf import DictConfig, open_dict

from distill import asked, types
from distill.cli import build, roles
from distill.data.base import Data
from distill.errors import UsageError
from distill.files import damaged, read_json, write_json
from distill.networks.build import build_network
from distill.progress import leads, say
from distill.runs import trust, verdict
from distill.runtimes.measure import predict
from distill.teachers.base import Teacher
from distill.training.divergence import Diverged
from distill.training.fit import fit
from distill.training.halving import LEAST, Plan, halve, plan

FILE = "pilots.json"
ALONE, CE_WEIGHT = ["loss=[ce]"], "loss.ce.weight"  # the student alone
DIFFER = 0.25  # of the validation images, answered differently by two candidates: to guess how many are needed


class Candidate:
    """A way to train the student: the run's words with some more, and a factor of the learning rate."""

    def __init__(self, cfg: DictConfig, words: list[str], own: list[str], rate: float):
        self.cfg = _composed(own, words, cfg)
        with open_dict(self.cfg):
            self.cfg.name, self.cfg.run, self.cfg.stages, self.cfg.trust = cfg.name, cfg.run, cfg.stages, cfg.trust
            self.cfg.optimizer.lr = cfg.optimizer.lr * rate
        self.alone = set(self.cfg.loss) == {"ce"}
        lr = [] if rate == 1 else [f"optimizer.lr={self.cfg.optimizer.lr:g}"]
        self.words = [*words, *lr]
        self.name = " ".join(self.words) or "as configured"

    def images(self, data: Data) -> Data:
        """`data` as this candidate augments it."""
        return build.data(self.cfg.data) if any(word.startswith("augment") for word in self.words) else data


def candidates(cfg: DictConfig, own: list[str]) -> list[Candidate]:
    """Those of conf/recipe/auto.yaml but for what the user's own words say otherwise; the student alone among them.

    Args:
        own: the words of the run's command line.
    """
    given = {word.lstrip("+~").partition("=")[0] for word in own}
    found = []
    for described in types.plain_values(cfg.recipe.candidates):
        keys = {word.lstrip("+").partition("=")[0] for word in described["words"]}
        if described["words"] != ALONE and any(_meets(key, each) for key in keys for each in given):
            continue
        words = _without_teacher(own) if described["words"] == ALONE else own
        found.append(Candidate(cfg, described["words"], words, described["rate"]))
    if not any(each.alone for each in found):
        found.insert(0, Candidate(cfg, ALONE, _without_teacher(own), 1))
    return found


def _composed(own: list[str], words: list[str], cfg: DictConfig) -> DictConfig:
    """The run's configuration with a candidate's words. Where a run is continued, they are its folder's, perhaps a
    stranger's, and may not name more than the run's own words do."""
    judged = not cfg.trust and any(word.startswith("run=") for word in asked.words())
    if judged:
        trust.check_words(words, FILE)
    found = compose("train", [*own, *words])
    if judged:
        trusted = set(trust.targets(types.plain_values(cfg)))
        trust.check(types.plain_values(found), "recipe.candidates", trusted)
    return found


def _without_teacher(words: list[str]) -> list[str]:
    """Without what chooses and weighs losses; what is said of the labels' loss stays."""
    keys = {word: word.lstrip("+~").partition("=")[0] for word in words}
    own = "loss.ce."
    return [word for word, key in keys.items() if not _meets("loss", key) or (key.startswith(own) and key != CE_WEIGHT)]


def _meets(key: str, other: str) -> bool:
    """Whether one of two dotted keys holds the other."""
    return key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.")


def planned(cfg: DictConfig, count: int, validation: int) -> Plan:
    """What the budget pays for.

    Raises:
        UsageError: less than two trainings of a tenth of the full one, or validation images that couldn't tell them
            apart.
    """
    share, full = cfg.recipe.share, cfg.trainer.max_epochs
    found = plan(count, floor(share * full + 1e-9), full)
    if found is None:
        least = 2 * ceil(LEAST * full)
        raise UsageError(
            f"recipe.share={share:g} of {full} epochs pays for {share * full:g} epochs of short trainings, and two "
            f"candidates take {least}: recipe.share={ceil(100 * least / full) / 100:g} or more, or a longer training "
            "(trainer.max_epochs)"
        )
    needed = verdict.images_for(cfg.recipe.tell_apart, DIFFER)
    if validation < needed:
        raise UsageError(
            f"recipe=auto chooses on validation images; {validation} are too few: {needed} are needed for "
            f"{100 * cfg.recipe.tell_apart:.0f} points (data.val_fraction, or recipe.tell_apart for a coarser choice)"
        )
    return found


def check(cfg: DictConfig, own: list[str], data: Data) -> None:
    """What can be known before the teacher is fitted.

    Raises:
        UsageError: see `planned`.
    """
    if cfg.get("recipe"):
        planned(cfg, len(candidates(cfg, own)), len(data.val))


def settle(
    cfg: DictConfig, own: list[str], teacher: Teacher | None, data: Data, folder: Path
) -> tuple[DictConfig, tuple[DictConfig, Data], Data]:
    """The configuration that the pilots choose, that of the best student alone among them with its images, and the
    images as the former augments them. Without recipe=auto all as they are.

    What was measured is in `folder`/pilots.json; there a killed search goes on, and later stages read its choice.
    """
    if not cfg.get("recipe"):
        return cfg, (cfg, data), data
    tried = candidates(cfg, own)
    search = Search(tried, planned(cfg, len(tried), len(data.val)), cfg.trainer.max_epochs, teacher, data, folder)
    best, alone, lines = search.run()
    for line in lines:
        say(line)
    chosen = tried[best]
    return chosen.cfg, (tried[alone].cfg, data), chosen.images(data)


def told(folder: Path) -> dict:
    """What the report says of the pilots."""
    found = _read(folder / FILE)
    return {"recipe": "; ".join(" ".join(line.split()) for line in found["table"])} if "table" in found else {}


def _read(path: Path) -> dict:
    """What a search wrote, or nothing where none did.

    Raises:
        UserError: it is not what one writes.
    """
    found = {"pilots": {}} if not path.is_file() else read_json(path)
    kinds = {"candidate": str, "epochs": int, "accuracy": float, "seconds": float, "right": str}
    pilots, table = found.get("pilots"), found.get("table", [])
    rows = pilots.values() if isinstance(pilots, dict) else [None]
    good = all(isinstance(row, dict) and all(type(row.get(key)) is kind for key, kind in kinds.items()) for row in rows)
    if not good or not isinstance(table, list) or not all(isinstance(line, str) for line in table):
        raise damaged(path, "its pilots or its table")
    return found


class Search:
    """Successive halving over candidates, by validation accuracy."""

    def __init__(self, tried: list[Candidate], plan: Plan, full: int, teacher: Teacher, data: Data, folder: Path):
        self.tried, self.plan, self.full, self.teacher, self.data = tried, plan, full, teacher, data
        self.usual = next((number for number, each in enumerate(tried) if not each.words), 0)
        self.folder, self.file = folder / "pilots", folder / FILE
        self.found = _read(self.file)["pilots"]

    def run(self) -> tuple[int, int, list[str]]:
        """The best candidate, the best student alone, and what there is to say."""
        if not self.found:
            rungs = ", then ".join(f"{count} for {epochs} epochs" for count, epochs in self.plan.rungs)
            say(f"pilots: {rungs}; {self.plan.cost} epochs in all")
        kinds = [lambda each: self.tried[each].alone, lambda each: each == self.usual]
        alive = halve(range(len(self.tried)), self.plan, self.score, kinds)
        alone = next(each for each in alive if self.tried[each].alone)
        best, sentence = self.chosen(alive)
        if best != alone:
            sentence += f"; against the student alone {self.compared(best, alone).in_points()}"
        lines = [*self.table(), f"pilots: {self.tried[best].name}: {sentence}"]
        self.write(chosen=self.tried[best].words, table=lines)
        return best, alone, lines

    def chosen(self, alive: Sequence[int]) -> tuple[int, str]:
        """The best by validation accuracy where it is shown to be better than the configured way, else that; and in
        which words. A lead by chance costs: DKD, ahead by 0.8 points in pilots of one epoch, lost a point in five."""
        first, usual = alive[0], self.usual
        if first == usual:
            return usual, "as configured, which nothing is ahead of"
        found = self.compared(first, usual)
        if not found.shown:
            return usual, f"as configured; {self.tried[first].name} is ahead, and not shown to be: {found.in_points()}"
        if self.tried[first].alone:
            sentence = "nothing beats the student alone, so that is what is trained and shipped"
            return first, f"better than as configured by {found.in_points()}; {sentence}"
        return first, f"better than as configured by {found.in_points()}"

    def compared(self, first: int, second: int) -> verdict.Verdict:
        """Two candidates of the last rung, on the validation images."""
        _, epochs = self.plan.rungs[-1]
        right = [self.pilot(each, epochs)["right"] for each in (first, second)]
        return verdict.on_images(*(torch.tensor([sign == "1" for sign in each]) for each in right))

    def score(self, number: int, epochs: int) -> float:
        return self.pilot(number, epochs)["accuracy"]

    def pilot(self, number: int, epochs: int) -> Mapping:
        """One short training, or what it found before: its validation accuracy and on which images it was right."""
        candidate = self.tried[number]
        key, folder = f"{candidate.name}, {epochs} epochs", self.folder / f"{number}-{epochs}"
        if key not in self.found:
            start = time.monotonic()
            cfg = candidate.cfg
            data = candidate.images(self.data)
            squeeze = epochs / self.full
            recipe = roles.recipe(cfg)
            schedule = {"_target_": "distill.training.schedules.squeezed", "_partial_": True, "full": self.full}
            recipe = recipe.changed(
                epochs=epochs,
                early_stopping=None,
                on_divergence="stop",
                compile=False,
                schedule={**schedule, "schedule": recipe.schedule},
            )
            losses = {name: squeezed(options, squeeze) for name, options in types.plain_values(cfg.loss).items()}
            network = build_network(cfg.student, data.num_classes, data.image_size, cfg.seed)
            answers = None if candidate.alone else roles.answers(cfg)
            teacher = None if candidate.alone else self.teacher
            say(f"pilot {candidate.name}: {epochs} epochs")
            try:
                fit(network, teacher, losses, data, recipe, folder, answers)
                logits, labels, _ = predict({"student": network.plain()}, data.val_loader())
                right = logits["student"].argmax(1) == labels
            except Diverged:
                right = torch.zeros(len(data.val), dtype=torch.bool)  # a rate that is too high
            self.found[key] = {
                "candidate": candidate.name,
                "epochs": epochs,
                "accuracy": right.double().mean().item(),
                "seconds": round(time.monotonic() - start, 1),
                "right": "".join("01"[bit] for bit in right.tolist()),
            }
            self.write()
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # also where a kill left them
        return self.found[key]

    def write(self, **more) -> None:
        if leads():
            write_json(self.file, {"pilots": self.found, **more})

    def table(self) -> list[str]:
        """What was tried and what it cost, the longest and best first."""
        rows = sorted(self.found.values(), key=lambda row: (-row["epochs"], -row["accuracy"]))
        error = (0.25 / len(self.data.val)) ** 0.5
        spent = sum(row["epochs"] for row in rows)
        head = (
            f"pilots: {spent} epochs, {spent / self.full:.0%} of the full training's; standard error ±{100 * error:.1f}"
        )
        return [
            head,
            *(
                f"  {row['accuracy']:6.1%}  {row['epochs']:3} epochs  {row['seconds']:5.0f} s  {row['candidate']}"
                for row in rows
            ),
        ]


def squeezed(options: Mapping, factor: float) -> dict:
    """A loss's options with the epochs of its weight's schedule multiplied by `factor`."""
    weight = options["weight"]
    points = [[epoch * factor, value] for epoch, value in weight] if isinstance(weight, list) else weight
    return {**options, "weight": points}
