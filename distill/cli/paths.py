"""Paths on the command line: as the shell hands them over, whatever signs are in them. Never imports torch."""

import os

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from distill.runs.records import PATHS

KEYS = {*PATHS, "run", "classes"}  # last words of options that name files or folders


def quoted(argv: list[str]) -> list[str]:
    """The command line with paths that Hydra's grammar would take for something else, or not at all, in quotes:
    `data.root=photos [new]`, `teacher.checkpoint=lr=0.1.pt`, `data.root=2024`; and `~` as the home folder.

    What is in quotes already, an interpolation, and a sweep over several paths stay what they are.
    """
    sweeps = bool({"-m", "--multirun"} & {*argv})
    return [_quoted(word, sweeps) if _is_path(word) else word for word in argv]


def _is_path(word: str) -> bool:
    key, equals, _ = word.partition("=")
    return bool(equals) and not key.startswith("-") and key.lstrip("+").split(".")[-1] in KEYS


def _quoted(word: str, sweeps: bool) -> str:
    key, _, value = word.partition("=")
    stays = value in ("", "null") or "${" in value or (len(value) > 1 and value[0] == value[-1] and value[0] in "'\"")
    if stays:
        return word
    value = os.path.expanduser(value)
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={value}")
        swept = parsed.is_sweep_override()
        if (swept and sweeps and not os.path.exists(value)) or (not swept and isinstance(parsed.value(), str)):
            return f"{key}={value}"
    except HydraException:
        pass
    return f"{key}={QuotedString(text=value, quote=Quote.single).with_quotes()}"
