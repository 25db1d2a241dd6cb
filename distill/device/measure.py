"""A run's files on a phone, one after the other, into device.json and the report."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from distill.device import tools
from distill.device.adb import Phone
from distill.device.tools import TOOLS, Tool
from distill.errors import UserError
from distill.files import digest, read_yaml
from distill.progress import say, screen_width
from distill.report import page, phones, run_page
from distill.report.tables import Row, drawn
from distill.runs.student import STUDENT, read_description
from distill.runs.tables import read_report
from distill.types import sides


def measure(folder: Path, phone: Phone, programs: Mapping[Tool, Path]) -> list[str]:
    """Every file of the report that a program is there for; what is found is written, whatever fails besides.

    Args:
        programs: of this computer, by kind; none: those that lie on the phone.

    Returns:
        A line for each file that could not be measured, or is over the run's budget.

    Raises:
        UserError: nothing can be measured.
    """
    rows = {row.name: row for row in run_page.rows_of(read_report(folder)) if Path(row.name).name == row.name}
    files = {name: folder / "export" / name for name in rows if Path(name).suffix in {tool.suffix for tool in TOOLS}}
    files = {name: file for name, file in files.items() if file.is_file()}
    if not files:
        raise UserError(f"{folder}: no .tflite or .pte file is in its report: export=[litert], export=[executorch]")
    several = any(Path(name).suffix == ".pte" for name in files)  # images at once: it is to be told how many
    shape = (1, 3, *sides(read_description(folder / STUDENT)["image_size"])) if several else ()
    limit, every = _budget(folder)
    about = [phone.property(name) for name in ("ro.product.model", "ro.build.version.sdk", "ro.product.cpu.abi")]
    failures, timings = [], []
    with phone.folder() as place:
        ready = _programs(phone, place, programs)
        for name, file in _runnable(files, ready).items():
            tool, program = next((tool, program) for tool, program in ready.items() if tool.suffix == file.suffix)
            try:
                figures = _figures(phone, tool, program, file, rows[name], place, shape)
            except UserError as error:
                failures.append(f"{name}: {tool.runtime}: {error}")
            else:
                timings.append(
                    phones.Timing(name, rows[name].digest, programs.get(tool, Path(program)).name, **figures)
                )
    if timings:
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        measured = phones.Phone(*about, date, tuple(timings))
        phones.write(folder, measured)
        page.rebuild(folder)
        columns = [tuple(column) for column in zip(*phones.table(measured, [*rows.values()]), strict=True)]
        say(f"{measured.name}:")
        say(drawn(columns, min(120, screen_width(120))))
        say(f"{folder}: device.json, report.html, report.md")
    return failures + _over(limit, every, timings)


def _programs(phone: Phone, place: str, programs: Mapping[Tool, Path]) -> dict[Tool, str]:
    """Where each kind of program is on the phone; those of this computer are copied into the folder `place`."""
    if not programs:
        there = {tool: tools.on_the_phone(tool, phone) for tool in TOOLS}
        return {tool: program for tool, program in there.items() if program}
    ready = {}
    for tool, program in programs.items():
        tools.refuse_foreign(program, phone)
        ready[tool] = f"{place}/{tool.names[0]}"
        phone.push(program, ready[tool])
        phone.shell("chmod", "755", ready[tool])
    return ready


def _runnable(files: Mapping[str, Path], ready: Mapping[Tool, str]) -> dict[str, Path]:
    """The files that a program is there for; the others are told.

    Raises:
        UserError: there is none for any.
    """
    suffixes = {tool.suffix for tool in ready}
    found = {name: file for name, file in files.items() if file.suffix in suffixes}
    left = [name for name in files if name not in found]
    if not found:
        wanted = [tool for tool in TOOLS if any(file.suffix == tool.suffix for file in files.values())]
        named = " or ".join(f"{tool.names[0]} ({tool.runtime}, {tool.suffix})" for tool in wanted)
        raise UserError(f"no program runs {', '.join(left)}: give --benchmark the path of {named}")
    if left:
        say(f"left out, there is no program for them: {', '.join(left)}")
    return found


def _figures(
    phone: Phone, tool: Tool, program: str, file: Path, row: Row, place: str, shape: Sequence[int]
) -> dict[str, float]:
    if row.digest is None:
        raise UserError("its report is of an earlier version, without checksums of files: stages=[report] is needed")
    if digest(file) != row.digest:
        raise UserError("it is not the file that the report is of: stages=[report] measures it")
    there = f"{place}/model{file.suffix}"
    phone.push(file, there)
    return tools.run(tool, phone, program, there, shape)


def _budget(folder: Path) -> tuple[float | None, bool]:
    """The run's budget.latency_ms, None: any; and whether every file has to keep it, or one is enough."""
    budget = read_yaml(folder / "config.yaml").get("budget") if (folder / "config.yaml").is_file() else None
    budget = budget if isinstance(budget, dict) else {}
    limit = budget.get("latency_ms")
    return limit if isinstance(limit, (int, float)) else None, budget.get("files") != "one"


def _over(limit: float | None, every: bool, timings: Sequence[phones.Timing]) -> list[str]:
    """A line for each file over the budget: of the compressed ones, or of all where there are none."""
    small = [each for each in timings if Path(each.file).stem != "student"] or timings
    over = [
        f"{each.file}: {each.latency_ms:.3f} ms on the phone, over the budget of {limit:g}"
        for each in small
        if limit is not None and each.latency_ms > limit
    ]
    return over if every or len(over) == len(small) else []
