"""python -m distill.report FOLDER: report.html of a finished run, or sweep.html of a folder of runs, written anew."""

import sys
from pathlib import Path

from distill.errors import UserError
from distill.progress import PLAINLY, say


def main(words: list[str]) -> int:
    from distill.report import run_page, sweep_page

    if len(words) != 1 or words[0].startswith("-"):
        say(__doc__)
        return 2
    folder = Path(words[0])
    try:
        say((run_page.rebuild if (folder / "run.json").is_file() else sweep_page.rebuild)(folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors=PLAINLY)
    sys.exit(main(sys.argv[1:]))
