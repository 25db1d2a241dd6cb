"""A run from Python, and what it leaves."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from distill.api.session import session
from distill.errors import UsageError, UserError

if TYPE_CHECKING:
    import pandas as pd

    from distill.data.base import Data
    from distill.networks.network import Network
    from distill.networks.student import Student

SEVERAL = "several devices train in processes of their own, which only a command can start: distill {} …"


class Run:
    """A run on the disk, finished or not.

    Args:
        folder: outputs/NAME.
        trust: its student may be a network that its folder names and that isn't this package's, torchvision's or
            timm's: code that it names is run.

    Raises:
        UserError: it is no run's folder.
    """

    def __init__(self, folder: str | os.PathLike, trust: bool = False):
        self.folder, self.trust = Path(folder).expanduser(), trust
        if not (self.folder / "run.json").is_file():
            raise UsageError(f"{self.folder} is not the folder of a run (no run.json in it)")

    @cached_property
    def student(self) -> Student:
        """The student, on the CPU: a plain network with `classes`, `image_size`, `preprocess` and `predict`.

        Raises:
            UserError: it isn't trained yet, its file is damaged, or `trust` would have to allow it.
        """
        from distill.runs.student import load_student

        return load_student(self.folder, self.trust)

    @property
    def networks(self) -> dict[str, Network]:
        """The report's networks by name ("teacher", "student alone", "student"; those that the run has), on the CPU, to
        look into: images (N, 3, H, W) in [0, 1] to `logits` (N, K) and the `features` named by `record`.

        Raises:
            UserError: one isn't trained yet, its file is damaged, or `trust` would have to allow it.
        """
        return self._opened[0]

    @property
    def data(self) -> Data:
        """The run's images, `train`, `val` and `test`, with its loaders.

        Raises:
            UserError: they can't be read, or `trust` would have to allow their class.
        """
        return self._opened[1]

    @cached_property
    def _opened(self) -> tuple[dict[str, Network], Data]:
        from distill.api.model import opened

        return opened(self.folder, self.trust)

    @property
    def report(self) -> pd.DataFrame:
        """A row for each model and each file that was measured, by name; columns are the fields of
        distill.report.tables.Row: shares in [0, 1], latencies in ms.

        Raises:
            UserError: there is no report yet.
        """
        import pandas as pd

        return pd.DataFrame(self._read()["rows"]).set_index("name").dropna(axis="columns", how="all")

    @property
    def verdict(self) -> str | None:
        """Whether distilling helped, in a sentence; None where no student alone was trained to compare with."""
        found = self._read().get("verdict")
        return found and str(found.get("sentence"))

    @property
    def curves(self) -> pd.DataFrame:
        """Losses, rate and validation accuracy by epoch, see distill.runs.tables.curves."""
        from distill.runs.tables import curves

        return curves(self.folder)

    @property
    def files(self) -> list[Path]:
        """What was exported, for phones and other runtimes."""
        listed = (self.folder / "export" / name for name in self.report.index)
        return sorted(path for path in listed if path.exists())

    def _read(self) -> dict:
        from distill.runs.tables import read_report

        if not (self.folder / "report.json").is_file():
            raise UserError(f"{self.folder} has no report yet: distill.train({f'run={self.folder}'!r}) goes on")
        return read_report(self.folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        try:
            table, said = self.report.to_html(float_format="{:.4g}".format), self.verdict or ""
        except UserError as error:
            table, said = "", str(error)
        return f"<p><b>{html.escape(str(self.folder))}</b> {html.escape(said)}</p>{table}"


def train(*words: str, config_dir: str | os.PathLike | None = None, **options) -> Run:
    """Distil, compress, export and measure, as `python train.py` does with the same words; what is done is printed.

        distill.train("teacher=resnet50", "student=mobilenet", data="photos/")
        distill.train(student="resnet8", loss=["ce", "kd"], trainer__max_epochs=3, compress=[])
        distill.train(run="outputs/NAME")          # goes on where it stopped

    Args:
        words: as on the command line, in Hydra's grammar.
        config_dir: a folder of your own configuration, as --config-dir.
        options: the same by name. Two underscores stand for a dot (or give **{"trainer.max_epochs": 3}); a list
            chooses several of a group; a mapping under a group's name sets its options. `data` may be a folder of
            images. Values need no quoting.

    Raises:
        UsageError: words or options are wrong.
        UserError: what else the command line would end with, a file that may not ship among it. What was made until
            then is in the run's folder.
        KeyboardInterrupt: Ctrl-C, or the notebook's stop button; what was trained is saved, and the run can go on.
    """
    from distill.cli import words as grammar
    from distill.cli.pipeline import pipeline

    said = [*map(_plain, words), *grammar.written(options)]
    with session(_on_one_device(said), config_dir) as cfg:
        from hydra.core.hydra_config import HydraConfig

        folder = Path(HydraConfig.get().runtime.output_dir)
        _refuse_several(cfg.trainer.get("devices"))
        pipeline(cfg)
    return Run(folder, trust=bool(cfg.trust))


def load(folder: str | os.PathLike, trust: bool = False) -> Run:
    """The run in a folder: `distill.load("outputs/NAME").student`; see `Run`."""
    return Run(folder, trust)


def _plain(word: str) -> str:
    if not isinstance(word, str):
        raise UsageError(f"{word!r}: expected words such as 'student=resnet8', or options by name (student='resnet8')")
    return word


def _on_one_device(said: Sequence[str]) -> list[str]:
    """The words; where there are several devices, with the first one chosen unless they choose."""
    keys = {word.lstrip("+").partition("=")[0] for word in said}
    if keys & {"trainer.devices", "run"}:
        return [*said]
    from distill.cli.command import importing

    with importing():
        import torch
    return [*said, "trainer.devices=1"] if torch.cuda.device_count() > 1 else [*said]


def _refuse_several(devices) -> None:
    if devices in ("auto", 1, "1", None) or (not isinstance(devices, (str, int)) and len(devices) == 1):
        return
    raise UsageError(f"trainer.devices={devices}: {SEVERAL.format(f'trainer.devices={devices}')}")
