"""What distilling gains: settings that differ in kind × ways to weigh the teacher, each beside the student alone.

    python -m benchmarks.gain --images FOLDER --weights FOLDER --runs runs.jsonl [--only NAME ...]     train
    python -m benchmarks.gain --runs runs.jsonl --json benchmarks/gain.json                            summarise

FOLDER of images: `cifar10`, `tiny`, `clothing`, `imagenette`, each with class folders under train and test (or
val); of weights: `resnet56`, `mobilenet_v2_1.0_224`, `squeezenet1_1` as safetensors. benchmarks/gain.yaml says what a
setting and a candidate are. Every (setting, candidate, seed) is one training through distill.training.fit, last epoch,
with one thread, and one line of the file of runs, where a stopped benchmark goes on. A teacher is fitted once for all;
its answers are cached. Seeds are paired: the same initial weights and order of images for every candidate. Where a
setting has folds, seed k tests on fold k of all images, so that each image is tested once.
"""

import argparse
import json
import os
import statistics
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

import hydra
import torch
import yaml

from benchmarks.epochs import compose
from benchmarks.paired import record
from distill import types
from distill.cli import build, pilots, roles
from distill.files import CONF
from distill.networks.build import build_network
from distill.runs import verdict
from distill.runtimes.measure import accuracy_on
from distill.training import fit

DESCRIBED = Path(__file__).with_suffix(".yaml")


def images_of(setting: dict, source: Path, into: Path, fold: int) -> Path:
    """A folder of links to the setting's images: `train`, so many of each class, and `test`."""
    folder = into / f"{setting['images']}-{setting.get('per_class', 'all')}-{fold if 'folds' in setting else 'test'}"
    if folder.exists():
        return folder
    root, parts = source / setting["images"], {"train": [], "test": []}
    for split in sorted(root.iterdir()):
        for label in sorted(split.iterdir())[: setting.get("classes")]:
            files = sorted(label.iterdir())
            parts["train" if split.name == "train" else "test"] += [(split.name, label.name, file) for file in files]
    if "folds" in setting:
        pooled = parts["train"] + parts["test"]
        parts = {"test": pooled[fold :: setting["folds"]]}
        parts["train"] = [each for number, each in enumerate(pooled) if number % setting["folds"] != fold]
    with tempfile.TemporaryDirectory(dir=into) as made:
        for split, chosen in parts.items():
            taken: dict[str, int] = {}
            for origin, label, file in chosen:
                taken[label] = taken.get(label, 0) + 1
                if split == "test" or taken[label] <= setting.get("per_class", len(chosen)):
                    link = Path(made, split, label, f"{origin}-{file.name}")
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(file.resolve())
        os.rename(made, folder)
        os.mkdir(made)
    return folder


def measure(job: dict) -> dict:
    """One training, in this process."""
    torch.set_num_threads(1)
    setting, candidate, seed = job["described"], job["candidate"], job["seed"]
    root = images_of(setting, Path(job["images"]), Path(job["scratch"]), seed)
    words = [f"data.root={root}", f"store={job['scratch']}/fits", f"cache.folder={job['scratch']}/cache"]
    words += [f"data.store={job['scratch']}/packed", "cache.seed=0", *setting["words"]]
    words = [word.replace("WEIGHTS", job["weights"]) for word in words]
    with redirect_stdout(StringIO()):
        own = [*words, *job["words"], f"seed={seed}", "select=last"]
        cfg = compose(*own)
        data = build.data(cfg.data)
        needs_teacher = set(types.plain_values(cfg.loss)) - {"ce"}
        teacher = roles.teacher(compose(*words, "seed=0"), data) if needs_teacher else None
        with hydra.initialize_config_dir(CONF, version_base="1.3"), tempfile.TemporaryDirectory() as folder:
            cfg, _, data = pilots.settle(cfg, ["name=benchmark", *own], teacher, data, Path(folder))
            losses = types.plain_values(cfg.loss)
            student = build_network(cfg.student, data.num_classes, data.image_size, cfg.seed)
            found = fit.fit(student, teacher, losses, data, roles.recipe(cfg), Path(folder), roles.answers(cfg))
            chosen = json.loads(Path(folder, pilots.FILE).read_text())["chosen"] if cfg.get("recipe") else None
    test = accuracy_on(student.plain(), data.test_loader())
    run = {
        "setting": job["setting"],
        "candidate": candidate,
        "seed": seed,
        "test": test,
        "images": len(data.test),
        "validation": found["last"]["accuracy"],
    }
    return run if chosen is None else {**run, "chosen": chosen}


def jobs(options, described: dict, done: set) -> list[dict]:
    """What is still to be trained, seed by seed, so that a stopped benchmark has whole comparisons."""
    found = []
    for name, setting in described["settings"].items():
        if options.only and name not in options.only:
            continue
        for seed in range(setting.get("folds", setting.get("seeds", 3))):
            for candidate in setting["candidates"]:
                if (name, candidate, seed) not in done:
                    words = [word for part in candidate.split(", ") for word in described["candidates"][part]]
                    found.append({"setting": name, "described": setting, "candidate": candidate, "seed": seed})
                    found[-1] |= {"words": words, "scratch": str(options.runs.resolve().parent / "gain")}
                    found[-1] |= {"images": str(options.images), "weights": str(options.weights)}
    return found


def summary(runs: list[dict]) -> dict[str, dict]:
    """By setting: the best student alone, and every candidate beside it, mean ± standard deviation over the seeds that
    both have, gain, 95 % interval and p of the paired differences (see distill.runs.verdict.over_seeds)."""
    tests: dict[str, dict[str, dict[int, float]]] = {}
    images = {}
    for run in runs:
        tests.setdefault(run["setting"], {}).setdefault(run["candidate"], {})[run["seed"]] = run["test"]
        images[run["setting"]] = run["images"]
    found = {}
    for setting, by_candidate in tests.items():
        alone = [name for name in by_candidate if name.startswith("alone")]
        best = max(alone, key=lambda name: (len(by_candidate[name]), statistics.mean(by_candidate[name].values())))
        reference = by_candidate[best]
        rows = {}
        for name, seeds in by_candidate.items():
            common = sorted(seeds.keys() & reference.keys())
            values = [seeds[seed] for seed in common]
            row = {"seeds": len(common), "mean": statistics.mean(values)}
            if len(common) > 1:
                row["standard deviation"] = statistics.stdev(values)
                gains = [seeds[seed] - reference[seed] for seed in common]
                told = verdict.over_seeds(gains, images[setting])
                row |= {"gain": told.gain, "low": told.low, "high": told.high, "p": told.p, "shown": told.shown}
            rows[name] = row
        found[setting] = {"test images": images[setting], "best alone": best, "candidates": rows}
    return found


def table(found: dict[str, dict]) -> str:
    """The summary as Markdown; shares as points."""
    lines = [
        "| setting | candidate | seeds | top-1 % | gain | 95 % interval |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for setting, rows in found.items():
        ranked = sorted(rows["candidates"].items(), key=lambda row: -row[1]["mean"])
        for name, row in ranked:
            cells = [setting, name, str(row["seeds"]), f"{100 * row['mean']:.1f}", "", ""]
            if "gain" in row:
                cells[3] += f" ± {100 * row['standard deviation']:.1f}"
                if name != rows["best alone"]:
                    cells[4:] = f"{100 * row['gain']:+.1f}", f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, help="folder of the sets of images; without it nothing is trained")
    parser.add_argument("--weights", type=Path, help="folder of the teachers' weights")
    parser.add_argument("--runs", type=Path, required=True, help="file of the runs, a line each")
    parser.add_argument("--only", nargs="*", help="settings")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings at a time")
    parser.add_argument("--json", type=Path, help="where to write the summary")
    options = parser.parse_args()
    runs = [json.loads(line) for line in options.runs.read_text().splitlines()] if options.runs.exists() else []
    if options.images:
        described = yaml.safe_load(DESCRIBED.read_text())
        left = jobs(options, described, {(run["setting"], run["candidate"], run["seed"]) for run in runs})
        Path(options.runs.resolve().parent, "gain").mkdir(parents=True, exist_ok=True)
        with get_context("spawn").Pool(options.jobs) as pool, options.runs.open("a") as file:
            for run in pool.imap_unordered(measure, left):
                runs.append(run)
                file.write(json.dumps(run) + "\n")
                file.flush()
                print(json.dumps(run), flush=True)
    found = summary(runs)
    print(table(found))
    record("benchmarks.gain", options.json, settings=yaml.safe_load(DESCRIBED.read_text()), found=found, runs=runs)


if __name__ == "__main__":
    main()
