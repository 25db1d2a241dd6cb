"""Finished runs as tables: for notebooks, and the table at the end of a sweep."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import DamagedError, UserError
from distill.files import MOST, damaged, read_json, read_yaml
from distill.progress import say
from distill.runs.records import choices, read_record
from distill.runs.sweeps import damaged_records, varied

if TYPE_CHECKING:
    import pandas as pd


LONGEST = 100 * MOST  # bytes of a file of metrics
SAME = ["teacher", "student", "data", "loss", "options"]  # of runs that differ in nothing but their seed
TEXTS = ("name", "format", "measured", "command", "student", "digest")  # of a report's row


def folders(root: str | Path = "outputs") -> list[Path]:
    """The folders of all runs under `root`, oldest first; at the end those whose record is damaged."""

    def begun(folder: Path) -> tuple[bool, str, str]:
        try:
            return False, read_record(folder, changed=True)["created"], str(folder)
        except UserError:
            return True, "", str(folder)

    return sorted((file.parent for file in Path(root).rglob("run.json")), key=begun)


def models(*roots: str | Path) -> pd.DataFrame:
    """One row for every model of every reported run under `roots`: what the run was, and the model's figures.

    Columns: run, folder, teacher, student, data, loss, seed, overrides, options (those but for seed and name: runs with
    the same options are repetitions of each other), then those of `distill.report.tables.Row`
    (`name` is the model's: "teacher", "student alone", "student", a file's name). A run whose records are damaged is
    left out, and that is said.
    """
    import pandas as pd

    def reported(folder: Path) -> list[dict]:
        if not (folder / "report.json").is_file():
            return []
        identity = _identity(folder, _record(folder))  # its "student" is the network, a row's the hash of weights
        return [identity | row | identity for row in read_report(folder)["rows"]]

    return pd.DataFrame(_of_all(roots, reported))


def summary(*roots: str | Path) -> pd.DataFrame:
    """One row a run: what it was, a column for each option that its sweep varies, its status and error, the accuracies
    of teacher, student alone and student, the gain over the student alone (all in [0, 1]), and of its smallest file the
    name, accuracy, bytes and latency in ms. A run whose records are damaged is left out, and that is said."""
    import pandas as pd

    for line in damaged_records(folder for root in roots for folder in folders(root)):
        say(f"warning: {line}")
    return pd.DataFrame(_of_all(roots, lambda folder: [summarised(folder)]))


def _of_all(roots: Iterable[str | Path], read: Callable[[Path], list[dict]]) -> list[dict]:
    """What `read` finds in every run under `roots`, and a warning for each in which it can't."""
    rows = []
    for folder in (folder for root in roots for folder in folders(root)):
        try:
            rows += read(folder)
        except UserError as error:
            say(f"warning: {folder} is left out: {error}")
    return rows


def summarised(folder: Path) -> dict:
    """A run's row of `summary`."""
    record = _record(folder)
    row = _identity(folder, record)
    row |= {key: _plain(value) for key, value in varied(folder.parent, record["overrides"]).items() if key not in row}
    row["status"], row["error"] = record.get("status"), record.get("error")
    if (folder / "report.json").is_file():
        report = read_report(folder)
        by_name = {model["name"]: model for model in report["rows"]}
        for name in ("teacher", "student alone", "student"):
            row[f"{name} top-1"] = by_name.get(name, {}).get("top1")
        row["test images"] = report["context"].get("test images")
        if None not in (row["student alone top-1"], row["student top-1"]):
            row["gain"] = row["student top-1"] - row["student alone top-1"]
        if smallest := smallest_file(report["rows"]):
            row |= {"file": smallest["name"], "file top-1": smallest["top1"]}
            row |= {"bytes": smallest["bytes"], "latency_ms": smallest.get("latency_ms")}
    return row


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """One row for all finished runs of `summary` that differ in the seed alone, with means and standard deviations.

    Columns: those of SAME; seeds (as text), runs (their number), test images, mean and std of "student alone top-1" and
    "student top-1"; of the gain the mean, its 95 % interval (low, high) and the p-value of no gain, over the seeds
    alone (see distill.runs.verdict.over_seeds), and the verdict in words. Shares in [0, 1]; of a single run std,
    interval and p are NaN. A seed that was run twice counts once.
    """
    import pandas as pd

    from distill.runs import verdict

    if "gain" not in table:
        return pd.DataFrame()
    same, rows = [key for key in SAME if key in table], []
    done = table[table["status"] == "done"].dropna(subset=["gain"])
    for values, runs in done.groupby(same, sort=False, dropna=False):
        runs = runs.drop_duplicates("seed").sort_values("seed")
        images = int(runs["test images"].iloc[0])
        row = dict(zip(same, values, strict=True))
        row |= {"seeds": ", ".join(str(int(seed)) for seed in runs["seed"]), "runs": len(runs), "test images": images}
        for name in ("student alone top-1", "student top-1"):
            row |= {f"{name} mean": runs[name].mean(), f"{name} std": runs[name].std()}
        row |= {"gain": runs["gain"].mean(), "low": math.nan, "high": math.nan, "p": math.nan, "verdict": None}
        if len(runs) > 1:
            found = verdict.over_seeds(runs["gain"].tolist(), images)
            row |= {"low": found.low, "high": found.high, "p": found.p, "verdict": str(found)}
        rows.append(row)
    return pd.DataFrame(rows)


def smallest_file(rows: list[dict]) -> dict | None:
    """Of a report's rows, the one of the smallest measured file."""
    files = [row for row in rows if "." in row["name"] and None not in map(row.get, ("top1", "bytes"))]
    return min(files, key=lambda row: row["bytes"], default=None)


def swept(folder: Path) -> list[str]:
    """The options that a run's sweep varies; none where it is in no sweep."""
    return list(varied(folder.parent, read_record(folder, changed=True)["overrides"]))


def _plain(text: str) -> str | float:
    """A number where the word is one."""
    for kind in (int, float):
        with suppress(ValueError):
            if math.isfinite(value := kind(text)):
                return value
    return text


def read_report(folder: Path) -> dict:
    """A run's report.json: "rows", "context" and the rest.

    Raises:
        UserError: it is not one that a run wrote.
    """
    found = read_json(folder / "report.json")
    rows, context = found.get("rows"), found.get("context")
    if not (isinstance(rows, list) and isinstance(context, dict) and all(map(_is_row, rows))):
        raise damaged(folder / "report.json", "its rows or its context")
    return found


def _is_row(row) -> bool:
    """Whether it is a model's: texts under TEXTS, finite numbers or nothing under other names."""
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        return False
    texts = [value for name, value in row.items() if name in TEXTS]
    numbers = [value for name, value in row.items() if name not in TEXTS]
    fine = all(value is None or (type(value) in (int, float) and math.isfinite(value)) for value in numbers)
    return fine and all(value is None or isinstance(value, str) for value in texts)


def curves(folder: str | Path) -> pd.DataFrame:
    """A run's metrics by epoch, counted from 1: losses, learning rate, validation accuracy, ECE, agreement.

    A resumed run writes a file an attempt; a later attempt's figures replace an earlier one's.

    Raises:
        UserError: the folder has no metrics, or what are none.
    """
    import pandas as pd

    files = [file for file in Path(folder).glob("metrics/version_*/metrics.csv") if file.is_file()]
    files.sort(key=lambda file: int(re.sub(r"\D", "", file.parent.name) or 0))
    frames = [frame for file in files if file.stat().st_size and len(frame := _metrics(file))]
    if not frames:
        raise UserError(f"{folder} has no metrics yet (no metrics/version_*/metrics.csv)")
    table = pd.concat(frames).groupby("epoch").last().reset_index()
    return table.assign(epoch=table["epoch"] + 1)


def _metrics(file: Path) -> pd.DataFrame:
    """Numbers by column, "epoch" among them."""
    import pandas as pd

    try:
        if file.stat().st_size > LONGEST:
            raise ValueError(f"it is longer than {LONGEST:,} bytes")
        found = pd.read_csv(file)
        found["epoch"] = found["epoch"].astype("int64")
        return found.astype({name: "float64" for name in found if name != "epoch"})
    except (ValueError, KeyError, OverflowError, OSError) as error:  # pandas' own are ValueErrors
        raise damaged(file, " ".join(str(error).split())[:200]) from None


def _record(folder: Path) -> dict:
    """A run's record; that it was changed since it was written is said."""
    try:
        return read_record(folder)
    except DamagedError as error:
        record = read_record(folder, changed=True)
        say(f"warning: {str(error).partition(':')[0]}")
        return record


def _identity(folder: Path, record: dict) -> dict:
    cfg = read_yaml(folder / "config.yaml", changed=True)
    texts = all(isinstance(text, str) for text in record["choices"].values())
    if not (isinstance(cfg.get("loss"), dict) and type(cfg.get("seed")) is int and texts):
        raise damaged(folder / "config.yaml", "its loss or seed, or the record's choices")
    return {
        "run": folder.name,
        "folder": str(folder),
        **choices(record),
        "loss": "+".join(cfg["loss"]),
        "seed": cfg["seed"],
        "overrides": " ".join(record["overrides"]),
        "options": " ".join(sorted(word for word in record["overrides"] if not word.startswith(("seed=", "name=")))),
    }
