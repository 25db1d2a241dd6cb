"""Where the seconds of a command go: `python benchmarks/parts.py WORDS…` does what `python -m distill WORDS…` does, and
prints as its last line, in JSON, for every job and each part of it: seconds of the clock, and of processors.

Its own imports are no more than what the command needs in any case. Parts are nested: "job" holds the others, "report"
holds "latency". What was done in a job's processes counts once they have ended.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from importlib import import_module

PARTS = {  # module and function
    "images": ("distill.cli.build", "data"),
    "rehearsal": ("distill.cli.rehearsal", "rehearse"),
    "teacher": ("distill.cli.roles", "teacher"),
    "student alone": ("distill.cli.roles", "student_alone"),
    "training": ("distill.cli.roles", "distil"),
    "compress": ("distill.compress", "compress"),
    "export": ("distill.export", "export"),
    "report": ("distill.report.evaluate", "evaluate"),
    "latency": ("distill.runtimes.measure", "latency"),
    "pages": ("distill.report.page", "write"),
}
jobs: list[dict[str, list[float]]] = []


def now() -> tuple[float, float]:
    """Seconds of the clock, and of this process and those that it has waited for."""
    used = [resource.getrusage(which) for which in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.time(), sum(each.ru_utime + each.ru_stime for each in used)


@contextmanager
def part(name: str) -> Iterator[None]:
    before = now()
    try:
        yield
    finally:
        totals = jobs[-1].get(name, (0, 0))
        jobs[-1][name] = [total + end - start for total, end, start in zip(totals, now(), before, strict=True)]


def timed(name: str, module: str, function: str) -> None:
    place = import_module(module)
    real = getattr(place, function)

    @wraps(real)
    def measured(*args, **options):
        with part(name):
            return real(*args, **options)

    setattr(place, function, measured)


def main() -> None:
    began = float(os.environ["BEGAN"]), 0.0
    sys.path.insert(0, os.environ["PYTHONPATH"].partition(os.pathsep)[0])
    from distill.cli import pipeline
    from distill.cli.command import command

    importing, run = pipeline.importing, pipeline.pipeline

    def since() -> list[float]:
        return [end - start for end, start in zip(now(), began, strict=True)]

    @contextmanager
    def imported():
        """All modules that a run needs, and what is timed of them, before it looks for them."""
        with importing():
            if len(jobs) == 1:
                with part("imports"):
                    for module, _ in PARTS.values():
                        import_module(module)
                    module = import_module("distill.training.module")
                for name, place in PARTS.items():
                    timed(name, *place)
                stepped = module.Distill.on_train_batch_end

                def step(*args, **options):
                    jobs[-1].setdefault("first step, since the command began", since())
                    return stepped(*args, **options)

                module.Distill.on_train_batch_end = step
            yield

    def job(cfg):
        jobs.append({"begin, since the command began": since()})
        with part("job"):
            return run(cfg)

    pipeline.importing = imported
    try:
        command(job)()
    finally:
        print(json.dumps(jobs))


if __name__ == "__main__":
    main()
