"""The teacher's answers, kept for a run's views."""

import time
from collections.abc import Callable, Mapping
from functools import partial

from distill.data.base import Data
from distill.errors import UsageError, UserError
from distill.losses.terms import build_losses
from distill.networks.network import Network
from distill.progress import say
from distill.teachers.base import Teacher
from distill.teachers.cache import Ask, Cached, file_of, identity, open_cache, place_of, size_of
from distill.teachers.frozen import Frozen
from distill.training.connect import connect
from distill.training.lightning import trainer as make_trainer
from distill.training.recipe import Recipe
from distill.types import Outputs

ROLE = ("checkpoint", "fit", "precision", "untrained")  # what a teacher is besides its network


class Answers:
    """Whether and where a teacher's answers are kept.

    Args:
        options: conf/cache's.
        teacher: what configuration says of the teacher.

    Raises:
        UsageError: no view at all.
    """

    def __init__(self, options: Mapping, teacher: Mapping):
        self.options, self.described, self.views = options, made_of(teacher), options["views"]
        if self.views is not None and self.views < 1:
            raise UsageError(f"cache.views={self.views}: expected at least 1, or null for a new view in every epoch")

    def of(self, teacher: Teacher, data: Data, seen: Outputs, epochs: int, device: str) -> tuple[Teacher, dict]:
        """The teacher behind its cache where one is wanted, and what `Data.train_loader` is told of the views.

        Args:
            seen: what the teacher answers to a few images, with the features that the losses read.
            device: the kind that it answers on, "cpu" or "cuda".
        """
        seed = self.options["seed"]
        if self.options["keep"] == "off":
            return teacher, {"views": self.views, "view_seed": seed}
        stored = self.stored(epochs)
        opened = open_cache(teacher, data, seen, stored, self.options, self._known_by(seen, device))
        views = self.views if opened is None else stored  # a run sees the views it asks for, kept or not
        return opened or teacher, {"views": views, "view_seed": seed}

    def stored(self, epochs: int) -> int:
        """How many views a training of so many epochs sees of each image, and so how many would be kept."""
        return min(self.views or epochs, epochs)

    def size(self, teacher: Teacher, data: Data, seen: Outputs, epochs: int) -> int:
        """Bytes that the answers of a training will take; 0 where they are not kept. Raises as `of`."""
        off = self.options["keep"] == "off"
        return 0 if off else size_of(teacher, data, seen, self.stored(epochs), self.options) or 0

    def present(self, teacher: Frozen, data: Data, seen: Outputs, epochs: int, device: str) -> tuple[int, int]:
        """How many views of a training were begun before, and how many it sees."""
        kept = {key: self.options[key] for key in ("dtype", "top_k")}
        folder = place_of(self.options, self._known_by(seen, device)(teacher, data, **kept))
        stored = self.stored(epochs)
        return sum(file_of(folder, "logits", view).is_file() for view in range(stored)), stored

    def _known_by(self, seen: Outputs, device: str) -> Callable[..., dict]:
        return partial(identity, seen=seen, described=self.described, seed=self.options["seed"], device=device)


def made_of(network: Mapping) -> dict:
    """What a network or committee is made of, without where its weights come from and what it computes in."""
    kept = {key: value for key, value in network.items() if key not in ROLE}
    if "members" in kept:
        kept["members"] = {name: made_of(member) for name, member in kept["members"].items()}
    return kept


def fill(student: Network, teacher: Teacher, losses: Mapping, data: Data, recipe: Recipe, answers: Answers) -> None:
    """Ask the teacher about every row in every view that a training of `student` will see, but for what is stored."""
    terms, _ = build_losses(losses)
    seen = connect(student, teacher, terms, data, recipe.seed + 1)
    trainer = make_trainer(recipe, student, [], [])
    teacher, views = answers.of(teacher, data, seen, recipe.epochs, trainer.strategy.root_device.type)
    if not isinstance(teacher, Cached):
        raise UserError("stages=[cache]: this run keeps no answers of its teacher, so there is nothing to fill")
    start = time.monotonic()
    trainer.predict(Ask(teacher), data.views_loader(**views), return_predictions=False)
    say(f"  filled in {time.monotonic() - start:.0f} s")
