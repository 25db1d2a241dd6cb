"""python -m distill.device FOLDER: latency and memory of a run's .tflite and .pte files on a phone, into its report."""

import argparse
import signal
import sys
from pathlib import Path

from distill import locks
from distill.device import adb, tools
from distill.errors import UserError
from distill.progress import PLAINLY

WAIT = 10  # seconds for another process that is at work in the run's folder


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m distill.device", description=__doc__)
    parser.add_argument("folder", type=Path, help="a run that has exported and reported")
    parser.add_argument("--serial", help="which phone, where several are connected: see `adb devices`")
    parser.add_argument(
        "--benchmark",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="benchmark programs built for the phone: LiteRT's benchmark_model, ExecuTorch's executor_runner; without "
        "them those that lie on the phone in /data/local/tmp",
    )
    asked = parser.parse_args(words)
    try:
        failures = _measured(asked.folder, asked.serial, asked.benchmark)
    except UserError as error:
        failures = [str(error)]
    except KeyboardInterrupt:
        failures = ["ended before all was measured; nothing is left on the phone, nothing was written"]
    for line in failures:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failures else 0


def _measured(folder: Path, serial: str | None, programs: list[Path]) -> list[str]:
    if not (folder / "export").is_dir():
        raise UserError(f"{folder} holds no exported files: name a run's folder that has an export/")
    kinds = {tools.kind_of(program): program for program in programs}
    phone = adb.connected(serial)
    from distill.device.measure import measure  # torch

    try:
        with locks.alone(folder / ".lock", "the run's folder", WAIT):
            return measure(folder, phone, kinds)
    except locks.Held as other:
        raise UserError(f"another process is at work in {folder}, {other.owner}: wait for it, then again") from None


if __name__ == "__main__":
    sys.stdout.reconfigure(errors=PLAINLY)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what is on the phone is removed
    sys.exit(main(sys.argv[1:]))
