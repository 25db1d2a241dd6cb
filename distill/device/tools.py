"""The runtimes' own benchmark programs: how each is called, and what it prints.

LiteRT      benchmark_model     a line of statistics in µs behind each of its two phases, warm-up and runs:
                                count=50 first=61 curr=58 min=55 max=70 avg=57.5 std=2 p5=55 median=57 p95=62
                                (without the last three in older ones), and
                                Overall peak memory footprint (MB) via periodic monitoring: 13.18
ExecuTorch  executor_runner     Iteration 3 of 50: 1.234000 ms
                                Model executed successfully 50 time(s) in 61.700000 ms.
                                on Android into the system's log, under the tag ExecuTorch. A file that takes several
                                images is asked about as many as it takes, unless --input_shapes says otherwise.
"""

import re
import shlex
import statistics
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.device.adb import HOME, Hung, Phone, last_line
from distill.errors import UserError

RUNS, WARM_UP = 50, 5
LIMIT = 120  # seconds for a file
PID = "distill-pid"  # before the number of the process on the phone
MACHINES = {3: "x86", 40: "armeabi-v7a", 62: "x86_64", 183: "arm64-v8a"}  # ELF's e_machine: Android's ABI
TAG = "ExecuTorch"


@dataclass(frozen=True)
class Tool:
    """A kind of benchmark program."""

    suffix: str  # of the files that it runs
    runtime: str
    names: tuple[str, ...]  # in the program's file name
    words: Callable[[str, Sequence[int]], list[str]]  # (file on the phone, shape of the images) -> arguments
    read: Callable[[str], dict[str, float]]  # what it printed -> figures of report.phones.Timing


def _litert(place: str, shape: Sequence[int]) -> list[str]:
    return [
        f"--graph={place}",
        "--num_threads=1",
        f"--num_runs={RUNS}",
        f"--warmup_runs={WARM_UP}",
        f"--max_secs={LIMIT // 2}",
        "--use_xnnpack=true",
        "--report_peak_memory_footprint=true",
    ]


def _executorch(place: str, shape: Sequence[int]) -> list[str]:
    return [
        f"--model_path={place}",
        "--method_name=forward",
        f"--input_shapes={'x'.join(map(str, shape))}",
        f"--num_executions={RUNS + WARM_UP}",
        "--cpu_threads=1",
    ]


NUMBER = r"([\d.]+(?:e[+-]?\d+)?)"
STATISTICS = {  # its names, and those of report.phones.Timing
    "avg": "mean_ms",
    "median": "median_ms",
    "std": "std_ms",
    "min": "min_ms",
    "max": "max_ms",
    "p95": "p95_ms",
}


def read_litert(said: str) -> dict[str, float]:
    """Raises UserError where it has no statistics."""
    lines = re.findall(r"^.*\bcount=\d+ .*$", said, re.MULTILINE)
    found = dict(re.findall(rf"(\w+)={NUMBER}", lines[-1])) if lines else {}
    average = re.search(rf"Inference \(avg\): {NUMBER}", said)
    if "avg" not in found and average is None:
        raise UserError(f"it gave no latency: {last_line(said)}")
    figures = {name: float(found[key]) / 1000 for key, name in STATISTICS.items() if key in found}
    figures.setdefault("mean_ms", float(average[1]) / 1000 if average else 0.0)
    peak = re.search(rf"Overall peak memory footprint \(MB\) via periodic monitoring: {NUMBER}", said)
    runs = int(float(found.get("count", RUNS)))
    return {"runs": runs, **figures, **({"peak_mb": float(peak[1])} if peak else {})}


def read_executorch(said: str) -> dict[str, float]:
    """Raises UserError where it has no times."""
    times = [float(time) for time in re.findall(rf"Iteration \d+ of \d+: {NUMBER} ms", said)][WARM_UP:]
    if times:
        ordered = sorted(times)
        return {
            "runs": len(times),
            "mean_ms": statistics.fmean(times),
            "median_ms": statistics.median(times),
            "std_ms": statistics.pstdev(times),
            "min_ms": ordered[0],
            "max_ms": ordered[-1],
            "p95_ms": ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))],
        }
    whole = re.search(rf"executed successfully (\d+) time\(s\) in {NUMBER} ms", said)
    if whole is None or int(whole[1]) == 0:
        hint = "; a runner without logs tells none: build it with -DEXECUTORCH_ENABLE_LOGGING=ON"
        raise UserError(f"it gave no latency: {last_line(said)}{hint}")
    return {"runs": int(whole[1]), "mean_ms": float(whole[2]) / int(whole[1])}


TOOLS = (
    Tool(".pte", "ExecuTorch", ("executor_runner",), _executorch, read_executorch),
    Tool(".tflite", "LiteRT", ("benchmark_model", "benchmark"), _litert, read_litert),
)


def kind_of(program: Path) -> Tool:
    """By its name.

    Raises:
        UserError: it is missing, or of no known kind.
    """
    if not program.is_file():
        raise UserError(f"--benchmark {program}: there is no such file")
    for tool in TOOLS:
        if any(name in program.name for name in tool.names):
            return tool
    known = ", ".join(f"{tool.names[0]} ({tool.runtime})" for tool in TOOLS)
    raise UserError(f"--benchmark {program}: its name is of no known program: {known}")


def refuse_foreign(program: Path, phone: Phone) -> None:
    """Raises UserError where the program is built for another processor than the phone's."""
    with open(program, "rb") as file:
        head = file.read(20)
    if head[:4] != b"\x7fELF" or len(head) < 20:
        return  # the phone will say what it is
    built = MACHINES.get(struct.unpack("<H" if head[5] == 1 else ">H", head[18:20])[0], "another processor")
    known = phone.property("ro.product.cpu.abilist") or phone.property("ro.product.cpu.abi")
    if known and built not in known.split(","):
        raise UserError(f"{program.name} is built for {built}, and the phone executes {known}")


def on_the_phone(tool: Tool, phone: Phone) -> str | None:
    """Where the program lies already, as the runtimes' own instructions put it."""
    return next((f"{HOME}/{name}" for name in tool.names[:1] if phone.has(f"{HOME}/{name}")), None)


def run(tool: Tool, phone: Phone, program: str, place: str, shape: Sequence[int]) -> dict[str, float]:
    """What the program finds of a file, both on the phone.

    Raises:
        UserError: it can't be executed, fails, hangs, or says nothing of use.
    """
    command = " ".join(map(shlex.quote, [program, *tool.words(place, shape)]))
    watch = "while kill -0 $p 2>/dev/null; do grep VmHWM /proc/$p/status 2>/dev/null; sleep 0.02; done"
    folder = shlex.quote(place.rpartition("/")[0])
    try:
        code, said = phone.script(f"cd {folder}; {command} & p=$!; echo {PID} $p; {watch}; wait $p", seconds=LIMIT)
    except Hung as hung:
        if process := _process(hung.said):
            phone.shell("kill", "-9", process)
        raise UserError(f"no end within {LIMIT} s: it was ended") from None
    process = _process(said)
    if tool.suffix == ".pte" and process and "executed successfully" not in said:
        said += phone.shell("logcat", "-d", f"--pid={process}", "-s", f"{TAG}:V")[1]
    if code:
        raise UserError(_why(code, said))
    figures = tool.read(said)
    if peaks := re.findall(r"VmHWM:\s*(\d+) kB", said):
        figures.setdefault("peak_mb", int(peaks[-1]) / 1024)
    return figures


def _process(said: str) -> str | None:
    found = re.search(rf"{PID} (\d+)", said)
    return found and found[1]


def _why(code: int, said: str) -> str:
    if code in (126, 127):
        return f"the phone can't execute it (exit code {code}: {last_line(said)}): is it built for this phone?"
    if "unknown command line flag 'input_shapes'" in said:
        return "it has no --input_shapes, so it would ask about several images at once: build a newer one"
    return f"exit code {code}: {last_line(said)}"
