"""The page of all options, docs/options.md, from conf/ and the signatures.

python -m benchmarks.options
"""

from pathlib import Path

from distill.cli import help

PAGE = Path(__file__).parent.parent / "docs" / "options.md"
INTRO = """# Options

Written by `python -m benchmarks.options` from `conf/` and the signatures that take the values; don't edit it.
`python train.py --help GROUP` says the same in a terminal. A network's options are `student.…` and `teacher.…`.
"""


def table(choices: list[help.Choice]) -> list[str]:
    """The choices' options, each once."""
    rows = [f"| `{o.key}` | `{o.default}` | {o.allowed} | {o.does} |" for each in choices for o in each.options]
    return ["| option | default | may be | |", "| --- | --- | --- | --- |", *dict.fromkeys(rows), ""] if rows else []


def text() -> str:
    """The page."""
    parts = [INTRO]
    for group in ["train", *help.groups()]:
        found = help.choices(group)
        listed = [
            f"- `{choice.name}`: {choice.about}" + (f" `{choice.line()}`" if choice.words else "")
            for choice in found
            if group != "train"
        ]
        own = [choice for choice in found if not choice.words]
        parts += [f"## {group}", "", *listed, *([""] if listed else []), *table(own)]
    for name in ("student", "teacher"):
        parts += [f"## What a {name} has besides", "", *table(help.role(name))]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
