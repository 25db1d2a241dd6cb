"""Files that are whole or not there, and files of others: read without running anything, and no more than expected."""

import glob
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from distill import asked
from distill.errors import DamagedError, UsageError, UserError

PACKAGE = Path(__file__).parent
CONF = str(PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf")  # this package's configuration
MOST = 1_000_000  # bytes of a record of ours (run.json, config.yaml, fit.json); they have a few thousand


DAY = 24 * 3600  # seconds after which another machine's temporary file is nobody's


def _machine() -> str:
    """This host and what numbers its processes: another boot or container of the same name is another one."""
    numbering = b""
    with suppress(OSError):
        numbering = Path("/proc/sys/kernel/random/boot_id").read_bytes() + os.readlink("/proc/self/ns/pid").encode()
    host = re.sub(r"[^\w-]", "-", socket.gethostname(), flags=re.ASCII)[:32] or "host"
    return f"{host}-{hashlib.sha256(numbering).hexdigest()[:6]}"


MACHINE = _machine()


def lives(pid: int, since: int | None = None) -> bool:
    """Whether a process of this machine runs: the one that `started` then, where that is known."""
    if Path("/proc/self/stat").exists():
        found = started(pid)
        return found is not None and since in (None, found)
    if os.name == "nt":  # where asking a process ends it
        return True
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def started(pid: int) -> int | None:
    """When a process of this machine began, in the kernel's ticks; None where it is gone, or that is not known."""
    try:
        state, *fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
        return None if state in "ZX" else int(fields[18])
    except (OSError, ValueError, IndexError):
        return None


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Write to the yielded temporary path, a file or a folder; it takes `path`'s place only when all is on the disk.

    A kill or a full disk leaves the old file as it was. Of several processes that write it at once, on this machine or
    on others, each has a temporary file of its own, and the last one's stays; what killed ones left is removed.

    Raises:
        OSError: it can't be written; `filename` is `path`.
    """
    temporary = own_temporary(path)
    sweep(path.parent, path.name)
    try:
        yield temporary
        for part in _files(temporary):
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        _replace(temporary, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        _remove(temporary)


def _replace(new: Path, path: Path) -> None:
    """No system call puts a folder in another's place: a kill in between leaves none."""
    if not (new.is_dir() and path.exists()):
        os.replace(new, path)
        return
    old = own_temporary(path.with_name(f"{path.name}.old"))
    os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        os.replace(old, path)
        raise
    _remove(old)


def _files(path: Path) -> Iterator[Path]:
    """A file itself, or those in a folder."""
    yield from (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size(path: Path) -> int:
    """Bytes of a file, or of all that is in a folder."""
    return sum(file.stat().st_size for file in _files(Path(path)))


def digest(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, or of all files in a folder with their names."""
    if path.is_file():
        found = hashlib.sha256()
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                found.update(part)
        return found.hexdigest()
    told = [f"{part.relative_to(path).as_posix()} {digest(part)}" for part in sorted(path.rglob("*")) if part.is_file()]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def own_temporary(path: Path) -> Path:
    """A name beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{MACHINE}.{os.getpid()}.tmp")


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files, of `name` or of any, whose writers are gone: known of this machine, by their age of
    others."""
    for left in folder.glob(f".{'*' if name is None else glob.escape(name)}.*.tmp"):
        written, _, pid = left.name.removesuffix(".tmp").rpartition(".")
        with suppress(OSError):
            ours = written.endswith(f".{MACHINE}") and pid.isdigit()
            if not lives(int(pid)) if ours else _now(folder) - left.stat().st_mtime > DAY:
                _remove(left)


def _now(folder: Path) -> float:
    """The time by the clock that stamps the files of a folder, which may be another machine's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder that goes with the block. Those of killed processes of this machine go now."""
    ours = f"distill-{MACHINE}."
    for left in Path(tempfile.gettempdir()).glob(f"{ours}*.*"):
        pid = left.name.removeprefix(ours).partition(".")[0]
        if pid.isdigit() and not lives(int(pid)):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{ours}{os.getpid()}.") as folder:
        yield Path(folder)


CHECKSUM = "checksum"  # in a file of ours: of all the rest that it says


def write_json(path: Path, content: dict) -> None:
    """`content` with its checksum, whole or not at all; `read_json` compares it."""
    with atomic(path) as temporary:
        temporary.write_text(sealed(content), encoding="utf-8")


def sealed(content: dict) -> str:
    """`content` as JSON with its checksum."""
    plain = json.loads(json.dumps(content, allow_nan=False))
    return json.dumps({**plain, CHECKSUM: _checksum(plain)}, indent=2, ensure_ascii=False) + "\n"


def write_yaml(path: Path, text: str) -> None:
    """YAML under a comment with its checksum, whole or not at all; `read_yaml` compares it."""
    with atomic(path) as temporary:
        temporary.write_text(f"{_YAML_HEAD}{_text_checksum(text)}\n{text}", encoding="utf-8")


_YAML_HEAD = "# checksum of what follows: "  # above it: a file that is cut short keeps it


def _text_checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def content_key(described) -> str:
    """16 hex digits for plain values: the name, or part of it, of what is made from them and from nothing else."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def stamp(stat: os.stat_result) -> tuple[int, int]:
    """What changes when a file does: its bytes and time of change, ns."""
    return stat.st_size, stat.st_mtime_ns


def stamp_line(name: str, stamp: Sequence[int]) -> bytes:
    """A line that changes when the file does, or what it is called."""
    return f"{name}\t{stamp[0]}\t{stamp[1]}\n".encode("utf-8", "surrogateescape")


def read_json(path: Path, most: int = 50 * MOST, changed: bool = False) -> dict:
    """The JSON object in a file, without its checksum.

    Args:
        most: bytes that are read; a longer file is none of ours.
        changed: also one that was changed since it was written.

    Raises:
        UserError: it is missing, too long, no JSON object, or (DamagedError) not what `write_json` wrote.
    """
    found = _object(path, most, lambda text: json.loads(text, object_pairs_hook=_once, parse_constant=_number), "JSON")
    checksum = found.pop(CHECKSUM, None)  # files of earlier versions have none
    if checksum is not None and checksum != _checksum(found) and not changed:
        raise damaged(path, "its checksum differs: was it changed by hand?")
    return found


def _once(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def _number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def damaged(path: Path, what: str) -> DamagedError:
    """For a file of ours whose content makes no sense."""
    return DamagedError(f"{path} is damaged, or not one of ours ({what})")


def read_yaml(path: Path, changed: bool = False) -> dict:
    """The YAML mapping in a file: plain values only, without tags, anchors and aliases (a few aliases of aliases are
    gigabytes).

    Args:
        changed: also of one that was changed since it was written.

    Raises:
        UserError: it is missing, too long, no such mapping, or (DamagedError) not what `write_yaml` wrote.
    """

    def parse(text: str):
        head, _, rest = text.partition("\n")
        if head.startswith(_YAML_HEAD) and head[len(_YAML_HEAD) :] != _text_checksum(rest) and not changed:
            raise ValueError("it was cut short or changed: its checksum differs")
        return yaml.load(text, Loader=_PlainLoader)

    return _object(path, MOST // 4, parse, "YAML")


class _PlainLoader(yaml.SafeLoader):
    """Plain values, each written out where it stands."""

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.events.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.YAMLError("anchors and aliases are not read")
        return super().compose_node(parent, index)


def _object(path: Path, most: int, parse, kind: str) -> dict:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe's end may never come
            raise ValueError("it is no file")
        with open(path, encoding="utf-8") as file:
            text = file.read(most + 1)
        if len(text) > most:
            raise ValueError(f"it is longer than {most:,} characters")
        if not text.strip():
            raise ValueError("it is empty")
        found = parse(text)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise damaged(path, reason[:200]) from None
    if not isinstance(found, dict):
        raise damaged(path, "it is empty" if found is None else f"{kind} of a {type(found).__name__}")
    return found


UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: str | int, option: str) -> int:
    """ "20GB" → 20 000 000 000; a plain number is bytes.

    Raises:
        UsageError: neither.
    """
    number, unit = str(text).strip(), 1
    for name, factor in UNITS.items():
        if number.lower().endswith(name.lower()):
            number, unit = number[: -len(name)], factor
    try:
        return int(float(number) * unit)
    except (ValueError, OverflowError):
        raise UsageError(f"{option}={text}: expected bytes or a size such as 500MB or 20GB") from None


def human(size: int) -> str:
    """Bytes in the largest unit that leaves at least one of it."""
    for name, factor in reversed(UNITS.items()):
        if size >= factor:
            return f"{size / factor:.1f} {name}"
    return f"{size} bytes"


def config_dirs(argv: list[str] | None = None) -> list[str]:
    """The folders of the user's own configuration that the command line names."""
    argv = asked.words() if argv is None else argv
    folders = []
    for flag, value in zip(argv, [*argv[1:], ""], strict=False):
        if flag in ("--config-dir", "-cd"):
            folders.append(value)
        elif flag.startswith("--config-dir="):
            folders.append(flag.partition("=")[2])
    return folders
