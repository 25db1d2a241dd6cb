"""Where metrics and the report go besides the run's folder: Weights & Biases, TensorBoard, MLflow."""

import io
import json
import logging
import os
import re
import secrets
import shlex
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image

from distill.errors import UserError
from distill.files import atomic
from distill.progress import markdown
from distill.training.trackers import PATIENCE, Made, Tracker, flat

FIGURES = ("top1", "bytes", "latency_ms")  # of each model and file, where a tracker shows every number as a chart
STORE = "outputs/mlflow.db"
SWEEP = "sweep.json"  # is in a sweep's folder, see distill.runs.sweeps


def wandb(folder: Path, name: str, cfg: dict, project: str = "distill") -> Tracker:
    """Weights & Biases, which never asks and never waits: offline unless there is a key and the server answers."""
    _need("wandb", "logger=wandb needs Weights & Biases: pip install wandb")
    return Tracker("wandb", lambda tell: Wandb(tell, folder, name, cfg, project))


def tensorboard(folder: Path, name: str, cfg: dict) -> Tracker:
    """TensorBoard's files, in the run's folder."""
    _need("tensorboard", "logger=tensorboard needs TensorBoard: pip install tensorboard")
    return Tracker("tensorboard", lambda tell: TensorBoard(folder, cfg))


def mlflow(folder: Path, name: str, cfg: dict, experiment: str = "distill") -> Tracker:
    """MLflow: the server that MLFLOW_TRACKING_URI names, or a database in outputs/."""
    for package in ("mlflow", "sqlalchemy"):
        _need(package, "logger=mlflow needs MLflow: pip install mlflow-skinny sqlalchemy alembic")
    return Tracker("mlflow", lambda tell: MLflow(folder, name, cfg, experiment))


def _need(package: str, line: str) -> None:
    if find_spec(package) is None:
        raise UserError(line)


def _sweep(folder: Path) -> str | None:
    """The sweep that a run is a job of."""
    return folder.parent.name if (folder.parent / SWEEP).is_file() else None


def _number(folder: Path, file: str) -> str:
    """Of the tracker's run, which a run that goes on keeps."""
    path = folder / file
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            temporary.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8")[:64]


class Wandb:
    """A run of Weights & Biases; `tell` is told where it is offline."""

    def __init__(self, tell: Callable[[str], None], folder: Path, name: str, cfg: dict, project: str):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its own telemetry holds up the end, offline too
        import wandb as w

        self.wandb, self.tell = w, tell
        begin = partial(
            w.init,
            settings=w.Settings(silent=True, init_timeout=PATIENCE - 2, finish_timeout=PATIENCE - 2),
            **{"dir": folder, "name": name, "project": project, "group": _sweep(folder), "config": cfg},
            **{
                "id": os.environ.get("WANDB_RUN_ID") or _number(folder, "wandb/id"),
                "resume": "allow",
                "reinit": "create_new",
            },
        )
        try:
            self.run = begin(mode=os.environ.get("WANDB_MODE") or ("online" if self._ready() else "offline"))
        except w.errors.Error as error:
            tell(f"wandb: no answer ({' '.join(str(error).split())[:80]}); logging offline")
            w.teardown()
            self.run = begin(mode="offline")
        self.run.define_metric("*", step_metric="step")

    def _ready(self) -> bool:
        """Whether there is a key, and a server that knows it. It is asked here first: where it doesn't answer, or
        refuses, whatever wandb itself asks keeps this process from ending for long."""
        url = self.wandb.setup().settings.base_url
        key = _key(url)
        if not key:
            return False
        if why := _refusal(url, key):
            self.tell(f"wandb: {why}; logging offline")
            return False
        return bool(self.wandb.login(prompt=False, verify=False))

    def log_metrics(self, values: Mapping[str, float], step: int | None) -> None:
        self.run.log({**values, "step": step})

    def report(self, made: Made) -> None:
        w = self.wandb
        self.run.summary.update(dict(flat({"report": made.figures}, "", "/")))
        shown = {
            "report": w.Table([*made.head], [[*row] for row in made.table]),
            "accuracy and cost": w.Image(str(made.folder / "report.png")),
        }
        if made.confused:
            cells = w.Table(["Actual", "Predicted", "nPredictions"], [[*cell] for cell in made.confused])
            fields = {column: column for column in cells.columns}
            shown["confusion"] = w.plot_table("wandb/confusion_matrix/v1", cells, fields, {"title": "Confusion"})
        if made.worst:
            shown["worst images"] = [w.Image(_pixels(data), caption=said) for data, said in made.worst]
        self.run.log(shown)
        about = {name: dict(row) for name, row in made.figures.items()}
        if made.teacher:
            about["teacher"] = self._teacher(made)
        student = w.Artifact(f"student-{self.run.id}", "model", metadata=about)
        for path in made.files:
            add = student.add_dir if path.is_dir() else student.add_file
            add(str(path), name=path.relative_to(made.folder).as_posix())
        self.run.log_artifact(student)

    def _teacher(self, made: Made) -> str:
        """The name of the teacher's artifact, which this run uses; offline, where none can be used, it logs it."""
        artifact = self.wandb.Artifact(f"teacher-{made.teacher[:16]}", "model", metadata={"weights": made.teacher})
        for path in made.taught_by:
            artifact.add_reference(path.absolute().as_uri(), name=f"{path.parent.name}-{path.name}")
        (self.run.log_artifact if self.run.offline else self.run.use_artifact)(artifact)
        return artifact.name

    def close(self, failed: bool) -> None:
        offline, place = self.run.offline, Path(self.run.settings.sync_dir)
        self.run.finish(exit_code=int(failed))
        if offline:
            self.tell(f"wandb: offline; wandb sync {shlex.quote(os.path.relpath(place))} uploads this run")


class TensorBoard:
    """TensorBoard's event files in `folder`/tensorboard."""

    def __init__(self, folder: Path, cfg: dict):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        options = dict(flat(cfg))
        for part in hparams(options, {"val/accuracy": 0.0, "train/loss": 0.0}):  # names of curves that go beside them
            self.writer.file_writer.add_summary(part)

    def log_metrics(self, values: Mapping[str, float], step: int | None) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def report(self, made: Made) -> None:
        self.writer.add_text("report", "\n".join(markdown([made.head, *made.table])))
        pictures = {"accuracy and cost": (made.folder / "report.png").read_bytes(), "confusion": confusion(made)}
        pictures |= {f"worst images/{number}: {said}": data for number, (data, said) in enumerate(made.worst, 1)}
        for name, data in pictures.items():
            if data:
                self.writer.add_image(name, _pixels(data), dataformats="HWC")

    def close(self, failed: bool) -> None:
        self.writer.close()


class MLflow:
    """A run of MLflow."""

    def __init__(self, folder: Path, name: str, cfg: dict, experiment: str):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # its own, which holds up the end
        where = os.environ.get("MLFLOW_TRACKING_URI")
        if where and where.startswith("http") and (why := _silence(where)):  # MLflow itself would try for minutes
            raise UserError(why)
        from mlflow import MlflowClient
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        for library in ("mlflow", "alembic"):
            logging.getLogger(library).setLevel(logging.ERROR)
        if not where:
            Path(STORE).parent.mkdir(exist_ok=True)
        self.client = MlflowClient(where or f"sqlite:///{STORE}")
        self.run = self._begun(folder, name, experiment, MlflowException, bool(where))
        options = [Param(key, str(value)[:500]) for key, value in flat(cfg)]
        for first in range(0, len(options), 100):  # as many as it takes at once
            self.client.log_batch(self.run, params=options[first : first + 100])

    def _begun(self, folder: Path, name: str, experiment: str, unknown: type[Exception], elsewhere: bool) -> str:
        """Its number: that of before where the run goes on."""
        file = folder / "mlflow.id"
        if file.is_file():
            with suppress(unknown):
                number = self.client.get_run(file.read_text(encoding="utf-8")[:64]).info.run_id
                self.client.update_run(number, "RUNNING")
                return number
        found = self.client.get_experiment_by_name(experiment)
        place = None if elsewhere else Path(STORE).with_name("mlflow").absolute().as_uri()
        group = found.experiment_id if found else self.client.create_experiment(experiment, place)
        tags = {"sweep": sweep} if (sweep := _sweep(folder)) else {}
        number = self.client.create_run(group, run_name=name, tags=tags).info.run_id
        with atomic(file) as temporary:
            temporary.write_text(number, encoding="utf-8")
        return number

    def log_metrics(self, values: Mapping[str, float], step: int | None) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.run, [Metric(name, value, now, step or 0) for name, value in values.items()])

    def report(self, made: Made) -> None:
        kept = {name: {key: row[key] for key in FIGURES if key in row} for name, row in made.figures.items()}
        self.log_metrics({_allowed(name): value for name, value in flat({"report": kept}, "", "/")}, None)
        for name in ("report.md", "report.html", "report.png", "report.json"):
            self.client.log_artifact(self.run, str(made.folder / name), "report")
        columns = dict(zip(made.head, zip(*made.table, strict=True), strict=True))
        self.client.log_table(self.run, {head: [*cells] for head, cells in columns.items()}, "report/table.json")
        for number, (data, said) in enumerate(made.worst, 1):
            self.client.log_image(self.run, _pixels(data), f"worst images/{number} {_allowed(said)}.png")
        if picture := confusion(made):
            self.client.log_image(self.run, _pixels(picture), "confusion.png")
        for path in made.files:
            place = path.relative_to(made.folder).parent.as_posix()
            self.client.log_artifact(self.run, str(path), None if place == "." else place)
        if made.teacher:
            self.client.set_tag(self.run, "teacher", made.teacher)

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.run, "FAILED" if failed else "FINISHED")


def _key(url: str) -> str | None:
    """The one that `wandb login` left for this server, or WANDB_API_KEY's."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    file = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    with suppress(OSError, NetrcParseError):
        if file.is_file() and (found := netrc(file).authenticators(urlsplit(url).hostname)):
            return found[2]
    return None


def _silence(url: str) -> str | None:
    """Why MLflow's server can't be used; None where it answers, be it that it wants to know who asks."""
    try:
        urlopen(f"{url.rstrip('/')}/health", timeout=PATIENCE / 2).close()
    except HTTPError as error:
        return f"no answer from {url} ({error})" if error.code >= 500 else None
    except (OSError, ValueError) as error:
        return f"no answer from {url} ({getattr(error, 'reason', error)})"
    return None


def _refusal(url: str, key: str) -> str | None:
    """Why W&B's server takes nothing with this key; None where it knows whose it is."""
    who = {
        "Content-Type": "application/json",
        "Authorization": f"Basic {b64encode(f'api:{key}'.encode()).decode()}",
    }
    question = json.dumps({"query": "query { viewer { id } }"}).encode()
    try:
        with urlopen(Request(f"{url}/graphql", question, who), timeout=PATIENCE / 2) as answer:
            known = (json.load(answer).get("data") or {}).get("viewer")
    except HTTPError as error:
        if error.code not in (401, 403):
            return f"no answer from {url} ({error})"
        known = None
    except (OSError, ValueError, AttributeError) as error:
        return f"no answer from {url} ({getattr(error, 'reason', error)})"
    return None if known else f"{url} doesn't know the key (WANDB_API_KEY, or wandb login)"


def _allowed(name: str) -> str:
    return re.sub(r"[^\w/. -]", "-", name, flags=re.ASCII)[:200]


def _pixels(picture: bytes) -> np.ndarray:
    """(H, W, 3) uint8 of a PNG or JPEG."""
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))


def confusion(made: Made) -> bytes | None:
    """The confusion matrix as a PNG: of the classes that are among `made.confused`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not made.confused:
        return None
    names = [*dict.fromkeys(name for actual, predicted, _ in made.confused for name in (actual, predicted))]
    cells = np.zeros((len(names), len(names)))
    for actual, predicted, images in made.confused:
        cells[names.index(actual), names.index(predicted)] = images
    side = 3 + 0.3 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.imshow(cells, cmap="Blues")
    axes.set(xlabel="student's answer", ylabel="class", xticks=range(len(names)), yticks=range(len(names)))
    axes.set_xticklabels(names, rotation=90)
    axes.set_yticklabels(names)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
