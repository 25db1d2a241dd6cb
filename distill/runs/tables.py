"""Finished runs as tables: for notebooks, and the table at the end of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import UserError
from distill.files import read_json, read_yaml
from distill.runs.records import read_record

if TYPE_CHECKING:
    import pandas as pd


def folders(root: str | Path = "outputs") -> list[Path]:
    """The folders of all runs under `root`, oldest first."""
    found = [file.parent for file in Path(root).rglob("run.json")]
    return sorted(found, key=lambda folder: (read_record(folder)["created"], str(folder)))


def models(*roots: str | Path) -> pd.DataFrame:
    """One row for every model of every reported run under `roots`: what the run was, and the model's figures.

    Columns: run, folder, teacher, student, data, loss, seed, overrides, options (those but for seed and name: runs with
    the same options are repetitions of each other), then those of `distill.report.tables.Row`
    (`name` is the model's: "teacher", "student alone", "student", a file's name).
    """
    import pandas as pd

    rows = []
    for folder in (folder for root in roots for folder in folders(root)):
        if (folder / "report.json").is_file():
            rows += [_identity(folder) | row for row in read_json(folder / "report.json")["rows"]]
    return pd.DataFrame(rows)


def summary(*roots: str | Path) -> pd.DataFrame:
    """One row a run: its status, the accuracies of teacher, student alone and student, the gain over the student
    alone (all in [0, 1]), and of its smallest file the name, accuracy, bytes and latency in ms."""
    import pandas as pd

    rows = []
    for folder in (folder for root in roots for folder in folders(root)):
        row = {key: value for key, value in _identity(folder).items() if key != "folder"}
        row["status"] = read_record(folder)["status"]
        if (folder / "report.json").is_file():
            by_name = {model["name"]: model for model in read_json(folder / "report.json")["rows"]}
            for name in ("teacher", "student alone", "student"):
                row[f"{name} top-1"] = by_name.get(name, {}).get("top1")
            row["test images"] = read_json(folder / "report.json")["context"].get("test images")
            if row["student alone top-1"] is not None:
                row["gain"] = row["student top-1"] - row["student alone top-1"]
            files = [model for name, model in by_name.items() if "." in name and model["top1"] is not None]
            if files:
                smallest = min(files, key=lambda model: model["bytes"])
                row |= {"file": smallest["name"], "file top-1": smallest["top1"]}
                row |= {"bytes": smallest["bytes"], "latency_ms": smallest["latency_ms"]}
        rows.append(row)
    return pd.DataFrame(rows)


def curves(folder: str | Path) -> pd.DataFrame:
    """A run's metrics by epoch, counted from 1: losses, learning rate, validation accuracy, ECE, agreement.

    A resumed run writes a file an attempt; a later attempt's figures replace an earlier one's.

    Raises:
        UserError: the folder has no metrics.
    """
    import pandas as pd

    files = sorted(
        Path(folder).glob("metrics/version_*/metrics.csv"),
        key=lambda file: int(file.parent.name.partition("_")[2]),
    )
    frames = [frame for file in files if file.stat().st_size and len(frame := pd.read_csv(file))]
    if not frames:
        raise UserError(f"{folder} has no metrics yet (no metrics/version_*/metrics.csv)")
    table = pd.concat(frames).groupby("epoch").last().reset_index()
    return table.assign(epoch=table["epoch"] + 1)


def _identity(folder: Path) -> dict:
    record, cfg = read_record(folder), read_yaml(folder / "config.yaml")
    return {
        "run": folder.name,
        "folder": str(folder),
        **record["choices"],
        "loss": "+".join(cfg["loss"]),
        "seed": cfg["seed"],
        "overrides": " ".join(record["overrides"]),
        "options": " ".join(sorted(word for word in record["overrides"] if not word.startswith(("seed=", "name=")))),
    }


SHOWN = [
    "run",
    "overrides",
    "status",
    "student alone top-1",
    "student top-1",
    "gain",
    "file",
    "file top-1",
    "bytes",
    "latency_ms",
]
