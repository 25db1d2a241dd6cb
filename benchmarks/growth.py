"""How the cost of a cached run grows with rows, classes and batch: time and memory per image, cache bytes per row.

    python -m benchmarks.growth --json benchmarks/growth.json

Every setting is a process of its own, so that its peak memory is its own: an epoch of a tiny student that is taught
from a full cache takes turns with an epoch of the student alone, on made images of 16 px.
"""

import argparse
import json
import resource
import tempfile
from pathlib import Path

from benchmarks.paired import in_own_process, in_turns, ratio, record

START = {"rows": 4000, "classes": 10, "batch": 64}
FACTORS = (1, 2, 4, 8)


def measure(rows: int, classes: int, batch: int, rounds: int) -> dict[str, float]:
    """One setting, in this process."""
    from benchmarks.epochs import ours, setting

    with tempfile.TemporaryDirectory() as folder:
        words = ["data=fake", f"data.train_size={rows}", f"data.num_classes={classes}", "data.image_size=16"]
        words += [f"data.batch_size={batch}", "teacher=resnet8", "student=resnet8_tiny", f"cache.folder={folder}"]
        cfg, data, teacher = setting(words, None)
        contenders = {
            "alone": ours(cfg, data, None, ("ce",)),
            "cached": ours(cfg, data, teacher, ("ce", "kd"), keep="logits", views=1),
        }
        found = in_turns(contenders, rounds)
        stored = sum(file.stat().st_size for file in Path(folder).rglob("*.rows"))
    return {
        "cached_us_per_image": 1e6 * min(found["cached"]) / rows,
        "cached_to_alone": ratio(found, "cached", "alone"),
        "cache_bytes_per_row": stored / rows,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="measured epochs of each contender")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(**options.one, rounds=options.rounds)))
        return
    settings = [{**START, name: START[name] * factor} for name in START for factor in FACTORS]
    settings = [setting for number, setting in enumerate(settings) if setting not in settings[:number]]
    found = []
    for setting in settings:
        words = ["--rounds", str(options.rounds), "--one", json.dumps(setting)]
        found.append({**setting, **in_own_process("benchmarks.growth", *words)})
        print("  ".join(f"{name} {value:.4g}" for name, value in found[-1].items()), flush=True)
    record("benchmarks.growth", options.json, settings=found)


if __name__ == "__main__":
    main()
