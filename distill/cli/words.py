"""What is typed, and what Python gives, as words of Hydra's grammar. Never imports torch."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString

from distill.cli import paths
from distill.cli.config import groups
from distill.errors import UsageError
from distill.files import CONF, config_dirs
from distill.runs.records import PATHS


def spelled(words: Sequence[str]) -> list[str]:
    """The words with every path in them quoted where Hydra's grammar would read it otherwise, and with `data=FOLDER`
    said as data=imagefolder data.root=FOLDER."""
    found = []
    for word in words:
        key, is_given, value = word.partition("=")
        data = is_given and key == "data" and _is_folder(value)
        found += ["data=imagefolder", f"data.root={value}"] if data else [word]
    return paths.quoted(found)


def _is_folder(value: str) -> bool:
    """Whether the value of data= is a folder's path and no choice of the group."""
    places = [Path(folder, "data") for folder in (CONF, *config_dirs())]
    choices = {file.relative_to(place).with_suffix("").as_posix() for place in places for file in place.rglob("*.yaml")}
    if not value or value in choices:
        return False
    return os.sep in value or value.startswith(("~", ".")) or os.path.isdir(value)


def written(options: Mapping) -> list[str]:
    """Python's values as words: {"student": "resnet8", "trainer__max_epochs": 3} → student=resnet8 …

    Two underscores stand for a dot. A mapping under a group's name sets its options; a list chooses several of a
    group.

    Raises:
        UsageError: a value that no option can have.
    """
    return [word for key, value in options.items() for word in _written(key.replace("__", "."), value)]


def _written(key: str, value) -> Iterator[str]:
    if isinstance(value, Mapping) and key in groups():
        for name, each in value.items():
            yield f"{key}.{name}={_value(f'{key}.{name}', each)}"
    elif key in groups():
        names = [value] if isinstance(value, (str, os.PathLike)) else value
        if value is None or isinstance(value, bool) or not isinstance(names, Sequence):
            raise UsageError(f"{key}={value!r}: expected the name of a choice, or a list of names")
        text = ",".join(map(os.fspath, names))
        yield f"{key}={text}" if names is not value else f"{key}=[{text}]"
    else:
        yield f"{key}={_value(key, value)}"


def _value(key: str, value) -> str:
    """One value in Hydra's grammar."""
    if hasattr(value, "tolist"):  # NumPy's and torch's numbers
        value = value.tolist()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        return quoted(os.path.expanduser(text) if key.rpartition(".")[2] in PATHS else text)
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{quoted(str(name))}:{_value(key, each)}' for name, each in value.items())}}}"
    if isinstance(value, (Sequence, set, frozenset)):
        return f"[{','.join(_value(key, each) for each in value)}]"
    raise UsageError(f"{key}={value!r}: expected text, a number, True, False, None, a list or a mapping of such")


def quoted(text: str) -> str:
    """`text` as Hydra's grammar takes it for itself, whatever signs it has."""
    if text.isascii() and text.replace("_", "").replace("/", "").replace("-", "").replace(".", "").isalnum():
        return text if not _reads_as_other(text) else f"'{text}'"
    escaped = text.replace("\\", "\\\\") if "${" in text else text
    return QuotedString(text=escaped.replace("${", "\\${"), quote=Quote.single).with_quotes()


def _reads_as_other(text: str) -> bool:
    """Whether bare text is a number, a truth value or null to Hydra."""
    return not isinstance(OverridesParser.create().parse_override(f"key={text}").value(), str)
