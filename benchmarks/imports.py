"""Who uses whom: the rooms of a package (its folders, and the modules that lie loose), from the sources' imports.

    python -m benchmarks.imports [FOLDER]

prints for distill/, or the package in FOLDER, the loose modules, the arrows between rooms, those that run back up
against distill.ROOMS (for a package that has other rooms: none), and the circles between files.
"""

import ast
import sys
from collections.abc import Iterable
from pathlib import Path

ROOMS = (  # from the user down to the ground; imports point downwards only
    *(
        "api",
        "cli",
        "device",
        "report",
        "runs",
        "training",
        "export",
        "compress",
        "teachers",
        "networks",
        "data",
        "runtimes",
        "losses",
        "schema",
    ),
    *("locks", "files", "archives", "processes", "progress", "signals", "types", "asked", "called", "own", "errors"),
)


def modules(package: Path) -> dict[str, Path]:
    """{dotted name: file} of a package's modules; a folder goes by its own name."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(package: Path) -> dict[str, set[str]]:
    """{module: the package's modules that it imports}, wherever in the file, but for typing alone."""
    known = modules(package)
    uses = {}
    for name, file in known.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):  # what only a type checker sees
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                node.body = []
        named = {
            module if (module := f"{node.module}.{alias.name}") in known else node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        named |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        uses[name] = {other for other in named if other in known and other != name and other != package.name}
    return uses


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def arrows(uses: dict[str, set[str]]) -> dict[tuple[str, str], list[str]]:
    """{(room, room it uses): the imports between them}."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, others in uses.items():
        for other in others:
            if "." in name and room(name) != room(other):
                found.setdefault((room(name), room(other)), []).append(f"{name} → {other}")
    return found


def circles(uses: dict[str, set[str]]) -> list[list[str]]:
    """The groups of files that import each other, directly or around corners."""

    def reached(start: str) -> set[str]:
        seen, ahead = set(), [*uses.get(start, ())]
        while ahead:
            if (name := ahead.pop()) not in seen:
                seen.add(name)
                ahead += uses.get(name, ())
        return seen

    reach = {name: reached(name) for name in uses}
    groups = {frozenset({a} | {b for b in reach[a] if a in reach.get(b, ())}) for a in uses if a in reach[a]}
    return sorted(sorted(group) for group in groups)


def backwards(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The arrows that do not point downwards in ROOMS."""
    place = {name: number for number, name in enumerate(ROOMS)}
    return sorted(pair for pair in pairs if place.get(pair[0], -1) >= place.get(pair[1], len(ROOMS)))


def loose(package: Path) -> list[str]:
    return sorted(file.stem for file in package.glob("*.py") if not file.stem.startswith("__"))


def main(folder: str = "distill") -> None:
    package = Path(folder).resolve()
    uses = imports(package)
    found = arrows(uses)
    names = {name for pair in found for name in pair}
    print(f"{len(uses)} modules, {len(loose(package))} of them loose: {', '.join(loose(package))}")
    print(f"{len(found)} arrows between {len(names)} rooms")
    for name in [*(name for name in ROOMS if name in names), *sorted(names - {*ROOMS})]:
        print(f"  {name:9} → {', '.join(sorted(other for one, other in found if one == name)) or 'nothing'}")
    if names <= {*ROOMS}:
        print(f"backwards: {[line for pair in backwards(found) for line in found[pair]] or 'none'}")
    print(f"circles between files: {circles(uses) or 'none'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
