"""Values that are right each for itself and wrong together, as far as they are known before work begins."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from distill.cli.options import Trainer, hints_of
from distill.errors import UsageError
from distill.losses.weight import check_weight
from distill.schema.values import Problem, nearest

_VALIDATED = "validation follows every epoch, because it chooses what ships"
_OURS = "training here has its own, which make that it can be killed anywhere"
REFUSED = {  # options of Lightning's Trainer, and why
    "callbacks": f"{_OURS}; logger=[wandb], [tensorboard] or [mlflow] takes the figures elsewhere",
    "logger": "choose logger=[wandb], [tensorboard] or [mlflow]; CSV files are always written",
    "plugins": _OURS,
    "max_steps": "give trainer.max_epochs, the schedule's length; +trainer.limit_train_batches=N shortens an epoch",
    "min_steps": "give trainer.max_epochs",
    "max_time": "a run is as long as its trainer.max_epochs; it can be stopped anywhere and continued by run=",
    "fast_dev_run": "try a run with trainer.max_epochs=1 +trainer.limit_train_batches=2",
    "overfit_batches": "give +trainer.limit_train_batches=N, which takes other images in each epoch, or fewer images",
    "check_val_every_n_epoch": _VALIDATED,
    "val_check_interval": _VALIDATED,
    "num_sanity_val_steps": "everything is tried on two images before training",
    "enable_checkpointing": _OURS,
    "enable_progress_bar": "there is one on a terminal, and lines elsewhere",
    "enable_model_summary": "the report has the figures of every network",
    "use_distributed_sampler": _OURS,
    "reload_dataloaders_every_n_epochs": _OURS,
    "limit_test_batches": "the test set is measured whole, once",
    "limit_predict_batches": "the test set is measured whole, once",
    "barebones": _OURS,
}


def refused_options(values: Mapping) -> Iterator[Problem]:
    """Options of Lightning's Trainer that training here cannot honour."""
    honoured = [*hints_of(Trainer)]
    for key, value in values.get("trainer", {}).items():
        if key != "_target_" and key not in honoured:
            reason = REFUSED.get(key)
            unknown = f"it is none of those that training here honours: {', '.join(honoured)}{nearest(key, honoured)}"
            yield Problem(f"trainer.{key}", value, reason or unknown)


def nodes(values: Mapping) -> Iterator[Problem]:
    """What stands among a group's choices and is none."""
    for group in ("augment", "loss", "logger", "compress", "export"):
        for name, node in values.get(group, {}).items():
            if not isinstance(node, Mapping) or "_target_" not in node:
                yield Problem(
                    f"{group}.{name}",
                    node,
                    f"expected options with a _target_, as in conf/; is {name} among {group}=[…]?",
                )


def twice(overrides: list[str], values: Mapping) -> Iterator[Problem]:
    """What is chosen more than once in one group, of which Hydra keeps one."""
    for word in overrides:
        group, _, chosen = word.lstrip("+").partition("=")
        names = [name.strip() for name in chosen.strip("[]").split(",")]
        again = [name for name in names if names.count(name) > 1]
        if again and isinstance(values.get(group), Mapping):
            yield Problem(group, chosen, f"{again[0]} is named more than once")


def across(values: Mapping) -> Iterator[Problem]:
    """The rest; each value must be of its type."""
    trains = {"teacher", "cache", "distill"} & {*values["stages"]}
    yield from _losses(values["loss"], bool({"cache", "distill"} & {*values["stages"]}))
    for key, role in _roles(values):
        if len(role["mean"]) != len(role["std"]):
            yield Problem(f"{key}.std", role["std"], f"expected as many numbers as {key}.mean has, {len(role['mean'])}")
        if trains and role.get("checkpoint") and not Path(role["checkpoint"]).exists():
            yield Problem(f"{key}.checkpoint", role["checkpoint"], f"no file {role['checkpoint']}")
    yield from _lengths(values)
    yield from _precision(values)
    keep, kind = values["cache"]["keep"], values["teacher"]["_target_"].rpartition(".")[2]
    if keep in ("logits", "features") and kind in ("Ema", "Peer"):
        yield Problem(
            "cache.keep", keep, f"the teacher ({kind}) changes while it teaches; cache=off asks it every time"
        )
    if values["recipe"] and kind in ("Ema", "Peer"):
        yield Problem("recipe", "auto", f"pilots need a teacher that stays as it is, and {kind} learns along")
    members, weights = values["teacher"].get("members"), values["teacher"].get("weights")
    if members and isinstance(weights, list) and len(weights) != len(members):
        yield Problem("teacher.weights", weights, f"expected one for each of the {len(members)} members")
    sgd = values["optimizer"]
    if sgd.get("nesterov") and (not sgd.get("momentum") or sgd.get("dampening")):
        yield Problem("optimizer.nesterov", True, "expected a momentum greater than 0 with it, and no dampening")


def _losses(losses: Mapping, needed: bool) -> Iterator[Problem]:
    if not losses and needed:
        yield Problem("loss", [], "give at least one loss, e.g. 'loss=[ce,kd]'")
    weights = {name: options.get("weight") for name, options in losses.items()}
    for name, weight in weights.items():
        try:
            check_weight(name, weight)
        except UsageError as error:
            key, _, expected = str(error).partition(": ")
            yield Problem(key.partition("=")[0], weight, expected)
            return
    if weights and not any(
        weight if not isinstance(weight, list) else any(point[1] for point in weight) for weight in weights.values()
    ):
        name, weight = next(iter(weights.items()))
        yield Problem(f"loss.{name}.weight", weight, "all losses weigh 0, so there is nothing to learn")


def _roles(values: Mapping) -> Iterator[tuple[str, Mapping]]:
    """Every network that is described, with its key."""
    teacher = values["teacher"]
    parts = {"student": values["student"], "teacher": teacher, "teacher.network": teacher.get("network")}
    parts |= {f"teacher.members.{name}": member for name, member in (teacher.get("members") or {}).items()}
    yield from ((key, part) for key, part in parts.items() if isinstance(part, Mapping) and "mean" in part)


def _lengths(values: Mapping) -> Iterator[Problem]:
    """A warm-up that ends after the training does."""
    warmup = values["schedule"].get("warmup", 0)
    lengths = {"trainer.max_epochs": values["trainer"]["max_epochs"]}
    lengths |= {f"{key}.fit.epochs": role["fit"]["epochs"] for key, role in _roles(values) if "fit" in role}
    for key, epochs in lengths.items():
        if epochs and 0 < warmup >= epochs:
            yield Problem("schedule.warmup", warmup, f"expected less than {key}={epochs}")


def _precision(values: Mapping) -> Iterator[Problem]:
    precision = values["trainer"]["precision"]
    averaged = values["ema"] is not None or values["teacher"]["_target_"] == "distill.teachers.ema.Ema"
    if precision in ("16-true", "bf16-true") and averaged:
        yield Problem(
            "trainer.precision",
            precision,
            "too few digits for a moving average of weights: choose trainer.precision=bf16-mixed, or leave ema out",
        )
