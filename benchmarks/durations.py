"""tests/slow.txt: the tests that take longest and their seconds, so that the others are quick together.

pytest --durations=0 -vv > durations.log; python -m benchmarks.durations durations.log
"""

import re
import sys
from pathlib import Path

QUICK = 180  # CPU seconds that all others may take
FILE = Path(__file__).parents[1] / "tests" / "slow.txt"


def slow(log: str) -> dict[str, float]:
    """Of the durations that pytest printed, the tests without which the rest takes QUICK, with their seconds;
    parametrized ones together."""
    taken: dict[str, float] = {}
    for seconds, name in re.findall(r"^([\d.]+)s (?:call|setup|teardown) +(\S+?)(?:\[.*)?$", log, re.M):
        taken[name] = taken.get(name, 0) + float(seconds)
    ranked = sorted(taken, key=lambda name: -taken[name])
    left, found = sum(taken.values()), {}
    for name in ranked:
        if left <= QUICK:
            break
        found[name] = taken[name]
        left -= taken[name]
    return found


if __name__ == "__main__":
    found = slow(Path(sys.argv[1]).read_text(encoding="utf-8"))
    head = "# Tests that take long, by `python -m benchmarks.durations`: pytest -m 'not slow' leaves them out\n"
    lines = (f"{found[name]:.0f} {name}" for name in sorted(found))
    FILE.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(found)} slow tests in {FILE}")
