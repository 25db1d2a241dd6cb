"""The tables of README.md and docs/results.md that stand in files of benchmarks/: written anew between their marks.

    python -m benchmarks.results

The README's are of two commands: `python train.py name=digits`, whose report.json is benchmarks/digits.json, and
`python train.py seeds=0,1,2,3,4 sweep=digits 'compress=[]' 'export=[]' hydra/launcher=processes
hydra.launcher.side_by_side=2`, whose sweep.csv is benchmarks/digits-seeds.csv.
"""

import json
import re
import textwrap
from pathlib import Path

import pandas as pd
import yaml
from scipy.stats import spearmanr

from distill.report.jobs import over_seeds

FOLDER = Path(__file__).parent
PAGE, README = FOLDER.parent / "docs" / "results.md", FOLDER.parent / "README.md"
IMAGES, SWEEPS = FOLDER.parent / "docs" / "own-data.md", FOLDER.parent / "docs" / "sweeps.md"
SHOWN = ("teacher", "student alone", "student", "student-dynamic_int8.ptl", "student.ptl")  # of the default job
METHODS = "tiny resnet8 5 methods"


def digits(report: dict) -> str:
    """The default job's models, and its verdict."""
    lines = [
        "| model | top-1 % | agrees with teacher % | ECE | kB | latency ms | stored, computed in int8 % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    by_name = {row["name"]: row for row in report["rows"]}
    for row in map(by_name.get, SHOWN):
        cells = [
            row["name"],
            f"{100 * row['top1']:.2f} ±{100 * row['top1_error']:.2f}",
            f"{100 * row['teacher_agreement']:.1f}",
            f"{row['ece']:.3f}",
            f"{row['bytes'] / 1000:,.0f}",
            f"{row['latency_ms']:.2f}",
            f"{100 * row['int8_share']:.0f}, {100 * row['int8_computed']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    [seeds] = over_seeds(pd.read_csv(FOLDER / "digits-seeds.csv"))
    seeds = seeds.partition("seeds ")[2].replace(" (mean ± standard deviation)", "", 1)
    told = f"Its verdict: {report['verdict']['sentence']}. Over seeds {seeds}."
    return "\n".join([*lines, "", *textwrap.wrap(told, 118)])


def gain(found: dict, settings: dict) -> str:
    """The default beside the student alone, `recipe=auto` and the better published method."""
    lines = [
        "| setting | test images | seeds | alone | default | gain | 95 % interval | `recipe=auto` | best published |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, setting in settings.items():
        row, measured = setting.get("row"), found.get(name)
        if not row or not measured or row["default"] not in measured["candidates"]:
            continue
        candidates = measured["candidates"]
        default = candidates[row["default"]]
        there = [each for each in row["published"] if each in candidates]
        best = max(there, key=lambda each: candidates[each]["mean"], default=None)
        cells = [
            row["title"],
            f"{measured['test images']:,}",
            str(default["seeds"]),
            score(candidates[measured["best alone"]]),
            score(default),
            *difference(default),
            score(candidates[row["auto"]]) if row["auto"] in candidates else "",
            f"{best.partition(',')[0]} {score(candidates[best])}" if best else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def methods(found: dict, settings: dict) -> str:
    """Methods by their gain, beside what was published of them, and the rank correlation of the two."""
    published = settings[METHODS]["published"]
    lines = [
        "| method | top-1 % | gain | 95 % interval | published, CIFAR-100, ResNet-56 → 20 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    pairs = []
    for candidate, row in sorted(found[METHODS]["candidates"].items(), key=lambda item: -item[1]["mean"]):
        name = candidate.partition(",")[0]
        name = {".1:.9 T4": "kd", "alone": "none: the student alone"}.get(name, name)
        own = ("", "") if candidate == found[METHODS]["best alone"] else difference(row)
        lines.append("| " + " | ".join([name, score(row), *own, str(published.get(name, ""))]) + " |")
        if name in published:
            pairs.append((row["mean"], published[name]))
    rank = spearmanr(*zip(*pairs, strict=True))
    told = f"Rank correlation of the two, over {len(pairs)} methods: {rank.statistic:.2f} (p = {rank.pvalue:.2f})."
    return "\n".join([*lines, "", told])


def large(cases: dict) -> str:
    """Images that a processor loads in a second, beside the better of torchvision's ways, from large.json."""
    lines = [
        "| 224 px | workers | torchvision v2 | ours | × | 95 % interval | `data.pack=256` | × | 95 % interval |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case, row in cases.items():
        what, workers = case.removesuffix(" workers").rsplit(", ", 1)
        each = {name: contender["processor"] for name, contender in row.items()}
        theirs = max(one["images/s"] for name, one in each.items() if name.startswith("torchvision"))
        cells = [what, workers, f"{theirs:,.0f}"]
        for name in ("ours", "ours, data.pack=256"):
            one = each[name]
            cells += [f"{one['images/s']:,.0f}", f"{one['ratio']:.2f}", f"{one['low']:.2f} to {one['high']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def overhead(found: dict) -> str:
    """Seconds of a sweep's jobs by part, from overhead.json."""
    parts = ("rehearsal", "training", "export", "report", "latency", "pages", "job")
    lines = [
        "| processor seconds | first step | " + " | ".join(parts[:-1]) + " | whole later job |",
        "| --- |" + " ---: |" * (len(parts) + 1),
    ]
    for name, jobs in found["seconds"].items():
        first = jobs["first job"]["first step, since the command began"]
        each = [first, *(jobs["a later job"][part] for part in parts)]
        cells = [f"{seconds['processor']:.1f}" for seconds in each]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    same = "the same" if found["side_by_side"]["same losses"] else "not the same"
    told = f"Jobs side by side (`hydra/launcher=processes`) log losses that are {same} to the last digit."
    return "\n".join([*lines, "", told])


def score(row: dict) -> str:
    deviation = row.get("standard deviation")
    return f"{100 * row['mean']:.1f}" + ("" if deviation is None else f" ± {100 * deviation:.1f}")


def difference(row: dict) -> tuple[str, str]:
    if "gain" not in row:
        return "", ""
    return f"{100 * row['gain']:+.1f}", f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"


def placed(text: str, mark: str, made: str) -> str:
    """`text` with what is `made` between its marks."""
    pattern = rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)"
    text, count = re.subn(pattern, lambda match: f"{match[1]}{made}\n{match[2]}", text, flags=re.S)
    assert count == 1, f"there are no marks for {mark}"
    return text


def read(name: str) -> dict:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def pages() -> dict[Path, str]:
    """The pages with their tables as the files have them."""
    found = read("gain.json")["found"]
    settings = yaml.safe_load((FOLDER / "gain.yaml").read_text(encoding="utf-8"))["settings"]
    results = PAGE.read_text(encoding="utf-8")
    for make in (gain, methods):
        results = placed(results, make.__name__, make(found, settings))
    readme = placed(README.read_text(encoding="utf-8"), "digits", digits(read("digits.json")))
    images = placed(IMAGES.read_text(encoding="utf-8"), "large", large(read("large.json")["cases"]))
    sweeps = placed(SWEEPS.read_text(encoding="utf-8"), "overhead", overhead(read("overhead.json")))
    return {PAGE: results, README: readme, IMAGES: images, SWEEPS: sweeps}


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
