"""Where a dotted name is defined, found in files without importing anything: torch would take seconds.

A name is followed from its package's folder through files, `from … import …` and plain `a = b` to the statement that
makes it.
"""

import ast
import importlib.util
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from functools import cached_property, lru_cache
from pathlib import Path


def absent(target: str) -> str | None:
    """Why there can be no such thing, in words; None where there may be."""
    package, *names = target.split(".")
    try:
        if importlib.util.find_spec(package) is None:
            return _nowhere(package)
    except (ValueError, ImportError):  # a module that was made by hand
        return None
    owner = source(package)
    for name in names:
        if owner is None:
            return None
        inside = source(f"{owner.name}.{name}")
        if inside is None:
            dynamic = re.search(r"import \*|__getattr__|globals\(|exec\(", owner.text)
            if dynamic or re.search(rf"\b{re.escape(name)}\b", owner.text):
                return None
            with suppress(SyntaxError):  # which is told where it is imported
                near = get_close_matches(name, owner.bound, n=1)
                return f"there is no '{name}' in {owner.name}{f'; did you mean {near[0]}?' if near else ''}"
            return None
        owner = inside
    return None


def _nowhere(package: str) -> str:
    """That there is no such module, and what to do where its file is in the working directory or beside it."""
    places = [Path(folder) for folder in (os.curdir, *sorted(each for each in os.listdir() if os.path.isdir(each)))]
    here = next((each for each in places if (each / f"{package}.py").is_file() or (each / package).is_dir()), None)
    if here is None:
        return f"there is no module '{package}': PYTHONPATH=FOLDER before the command names the folder that it is in"
    return f"there is no module '{package}' on Python's path, but one in {here.absolute()}: PYTHONPATH={here} finds it"


def source(module: str) -> "Source | None":
    """The module's source, found on the disk without importing any package."""
    top, *inner = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ValueError, ImportError):
        return None
    if spec is None:
        return None
    if inner or spec.submodule_search_locations:
        places = [Path(place, *inner) for place in spec.submodule_search_locations or ()]
    else:
        places = [Path(spec.origin).with_suffix("")] if str(spec.origin).endswith(".py") else []
    for place in places:
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                return _loaded(module, file)
    return Source(module, None) if any(place.is_dir() for place in places) else None


@lru_cache
def _loaded(module: str, file: Path) -> "Source":
    return Source(module, file)


class Source:
    """A module's text, and what its names stand for."""

    def __init__(self, name: str, file: Path | None):
        self.name, self.file = name, file
        self.text = "" if file is None else file.read_text(encoding="utf-8", errors="replace")

    @cached_property
    def bound(self) -> dict[str, ast.AST]:
        """Top-level statements by the names they bind; of several the last."""
        found: dict[str, ast.AST] = {}
        for node in _statements(ast.parse(self.text)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = [node.name]
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.asname or alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.Assign):
                names = [each.id for each in node.targets if isinstance(each, ast.Name)]
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                names = [node.target.id]
            else:
                continue
            for name in names:
                found[f"*{node.module}" if name == "*" else name] = node
        return found

    def imported(self, node: ast.ImportFrom) -> str:
        """The absolute name of the module that `from … import` reads."""
        if not node.level:
            return node.module
        package = self.name.split(".")
        if self.file is None or self.file.name != "__init__.py":
            package = package[:-1]
        return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])

    def definition(self, name: str) -> "tuple[Source, ast.AST] | None":
        """Where `name` is defined, through imports and plain `a = b`; a module's is (its Source, ast.Module)."""
        node = self.bound.get(name)
        if isinstance(node, ast.ImportFrom):
            module = self.imported(node)
            origin = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            there = source(module)
            found = there.definition(origin) if there and there is not self else None
            return found or _module(f"{module}.{origin}")
        if isinstance(node, ast.Import):
            alias = next(each for each in node.names if (each.asname or each.name.partition(".")[0]) == name)
            return _module(alias.name if alias.asname else name)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, (ast.Name, ast.Attribute)):
            return self.place(node.value) or (self, node)
        if node is not None:
            return self, node
        stars = [self.imported(star) for key, star in self.bound.items() if key.startswith("*")]
        found = (there.definition(name) for star in stars if (there := source(star)))
        return next(filter(None, found), None)

    def place(self, node: ast.AST) -> "tuple[Source, ast.AST] | None":
        """The definition that a name or `a.b.c` in this module stands for."""
        if isinstance(node, ast.Name):
            return self.definition(node.id)
        if isinstance(node, ast.Attribute) and (owner := self.place(node.value)):
            there, inside = owner
            if isinstance(inside, ast.Module):
                return there.definition(node.attr) or _module(f"{there.name}.{node.attr}")
        return None


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Of a module, those under `if` and `try` included."""
    for node in tree.body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            for part in (node, *getattr(node, "handlers", ())):
                yield from _statements(part)
            yield from _statements(ast.Module(node.orelse, []))


def _module(name: str) -> "tuple[Source, ast.Module] | None":
    found = source(name)
    return None if found is None else (found, ast.Module([], []))


def find(target: str) -> tuple[Source, ast.AST] | None:
    """The function or class, and the source it stands in."""
    first, *names = target.split(".")
    place = _module(first)
    for number, name in enumerate(names, 1):
        if place is None:
            return None
        owner, node = place
        if isinstance(node, ast.Module):
            inside = _module(f"{owner.name}.{name}")
            place = inside if inside and number < len(names) else owner.definition(name) or inside
        elif isinstance(node, ast.ClassDef):
            inside = [each for each in node.body if getattr(each, "name", None) == name]
            place = (owner, inside[0]) if inside else None
            if inside and not decorators(inside[0]) & {"staticmethod", "classmethod"}:
                return None  # an instance's
        else:
            return None
    return place


def decorators(node: ast.AST) -> set[str]:
    """The last names of what decorates a definition."""
    plain = (each.func if isinstance(each, ast.Call) else each for each in node.decorator_list)
    return {ast.unparse(each).rpartition(".")[2] for each in plain}
