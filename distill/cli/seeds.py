"""`seeds=0,1,2`: one command, several seeds of the student's training, one verdict. Never imports torch."""

from distill.errors import UsageError

LEARNS = ("peer", "ema", "ensemble")  # teachers without one seed of their own


def spread(argv: list[str]) -> list[str]:
    """The command line with `seeds=0,1,2` said as Hydra's sweep: one job a seed, under one teacher and with the same
    augmentations, so that what differs is the student's training, and one verdict over all at the end.

    Raises:
        UsageError: fewer than two seeds, one twice, one that is no seed; a `seed=` beside them; a command that trains
            no student, in which a seed decides nothing.
    """
    given = [word for word in argv if word.startswith("seeds=")]
    if not given:
        return argv
    text = given[-1].partition("=")[2]
    seeds = [part.strip() for part in text.strip("[]").split(",")]
    wrong = [seed for seed in seeds if not (seed.isascii() and seed.isdigit() and int(seed) < 2**32)]
    if wrong or len({int(seed) for seed in seeds}) < max(2, len(seeds)):
        raise UsageError(f"seeds={text}: expected at least two different whole numbers from 0 on, such as seeds=0,1,2")
    others = [word for word in argv if word not in given]
    keys = {word.lstrip("+").partition("=")[0]: word.partition("=")[2] for word in others}
    if "seed" in keys:
        raise UsageError(f"seeds={text}: give either seed= or seeds=")
    if "run" in keys or ("stages" in keys and "distill" not in keys["stages"]):
        raise UsageError(
            f"seeds={text}: this command trains no student, so that all seeds would measure the same one; leave out "
            f"{'run=' if 'run' in keys else 'stages='}, or give no seeds"
        )
    fixed = {"cache.seed": seeds[0]}
    if keys.get("teacher") not in LEARNS:
        fixed["teacher.fit.seed"] = seeds[0]
    shared = [f"{key}={value}" for key, value in fixed.items() if key not in keys]
    sweep = [] if {"-m", "--multirun"} & {*others} else ["-m"]
    return [*sweep, *others, f"seed={','.join(seeds)}", *shared]
