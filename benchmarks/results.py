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

from benchmarks.matrix import FORMATS, QUANTIZERS
from distill.report.jobs import over_seeds

FOLDER = Path(__file__).parent
DOCS, README = FOLDER.parent / "docs", FOLDER.parent / "README.md"
PAGE = DOCS / "results.md"
RUNTIMES = {  # report.json of the commands in docs/results.md
    "ResNet-20, CIFAR-10 JPEGs": "runtimes-resnet20.json",
    "MobileNetV2, clothing": "runtimes-mobilenet.json",
}
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


def runtimes(reports: dict[str, dict]) -> str:
    """A student's files in all runtimes, each report one command."""
    lines = [
        "| file | top-1 % | as float student % | kB | of float | latency ms | × float | × eager |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for title, report in reports.items():
        rows = report["rows"]
        eager = next(row for row in rows if row["name"] == "student")
        floats = {row["format"]: row for row in rows if Path(row["name"]).stem == "student" and row is not eager}
        lines.append(f"| **{title}** | | | | | | | |")
        for row in [eager, *sorted((row for row in rows if row["format"] in floats), key=_by_format)]:
            lines.append("| " + " | ".join(_in_runtime(row, floats.get(row["format"]), eager)) + " |")
    return "\n".join(lines)


def _by_format(row: dict) -> tuple:
    return row["format"], Path(row["name"]).stem != "student"


def _in_runtime(row: dict, plain: dict | None, eager: dict) -> list[str]:
    if row["latency_ms"] is None:  # not executed here
        return [row["name"], "", "", f"{row['bytes'] / 1000:,.0f}", _ratio(row, plain, "bytes"), "", "", ""]
    return [
        row["name"],
        f"{100 * row['top1']:.2f} ±{100 * row['top1_error']:.2f}",
        f"{100 * row['student_agreement']:.1f}",
        f"{row['bytes'] / 1000:,.0f}",
        _ratio(row, plain, "bytes"),
        f"{row['latency_ms']:.2f}",
        _ratio(plain, row, "latency_ms", ".1f") if plain else "",
        _ratio(eager, row, "latency_ms", ".1f"),
    ]


def _ratio(row: dict, other: dict | None, key: str, spec: str = ".2f") -> str:
    return "" if other is None else format(row[key] / other[key], spec)


def int8(found: dict) -> str:
    """What static int8 keeps of trained networks."""
    kinds = {"plain": "rounded", "corrected": "biases corrected", "activations only": "float weights"}
    lines = [
        "| network | test images | flow | " + " | ".join(f"{kind}: same class %, dB" for kind in kinds.values()) + " |",
        "| --- | ---: | --- | " + " | ".join("---:" for _ in kinds) + " |",
    ]
    for name, network in found.items():
        for flow in dict.fromkeys(row["flow"] for row in network["rows"]):
            rows = {row["kind"]: row for row in network["rows"] if row["flow"] == flow}
            cells = [
                f"{100 * row['agreement']:.1f}, {row['snr_db']:.1f}" if (row := rows.get(kind)) else ""
                for kind in kinds
            ]
            lines.append("| " + " | ".join([name, f"{network['images']:,}", flow, *cells]) + " |")
    return "\n".join(lines)


def matrix(cells: list[dict]) -> str:
    """Network by format by quantizer; reasons stand below."""
    place = {(each["network"], each["quantizer"], each["format"]): each for each in cells}
    formats = [each for flow in FORMATS.values() for each in flow]
    notes: dict[str, int] = {}
    lines = [
        "| network | | " + " | ".join(formats) + " |",
        "| --- | --- | " + " | ".join("---:" for _ in formats) + " |",
    ]
    for name in dict.fromkeys(each["network"] for each in cells):
        for quantizer in QUANTIZERS:
            told = [
                _cell(place.get((name, quantizer, each)), place.get((name, "float", each)), notes) for each in formats
            ]
            lines.append("| " + " | ".join([name, quantizer, *told]) + " |")
    reasons = [f"{number}. {reason}" for reason, number in notes.items()]
    return "\n".join([*lines, "", *reasons])


def _cell(cell: dict | None, plain: dict | None, notes: dict[str, int]) -> str:
    if cell is None:
        return "not tried"
    reason = cell.get("refused") or "; ".join(cell.get("failures", ()))
    if reason:
        number = notes.setdefault(reason, len(notes) + 1)
        return f"{'refused' if 'refused' in cell else 'fails'} ({number})"
    if cell is plain or plain is None or "bytes" not in plain:
        return f"{cell['bytes'] / 1000:,.0f} kB"
    return f"{cell['bytes'] / plain['bytes']:.2f}"


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
    tables = {
        PAGE: {"gain": gain(found, settings), "methods": methods(found, settings)},
        README: {"digits": digits(read("digits.json"))},
        DOCS / "compression.md": {"int8": int8(read("int8.json")["found"])},
        DOCS / "matrix.md": {"matrix": matrix(read("matrix.json")["cells"])},
        DOCS / "own-data.md": {"large": large(read("large.json")["cases"])},
        DOCS / "sweeps.md": {"overhead": overhead(read("overhead.json"))},
    }
    reports = {title: read(name) for title, name in RUNTIMES.items()}
    tables[PAGE]["runtimes"], tables[README]["runtimes"] = runtimes(reports), runtimes(dict([[*reports.items()][-1]]))
    made = {}
    for page, several in tables.items():
        text = page.read_text(encoding="utf-8")
        for mark, table in several.items():
            text = placed(text, mark, table)
        made[page] = text
    return made


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
