"""What a function or class takes, read off its source without importing it.

The text of each annotation is evaluated with Python's own types and those of the modules in KNOWN. What cannot be found
or evaluated is `Any`, so that nothing is refused that might be right.
"""

import ast
import builtins
import importlib
import re
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Annotated, Any, Literal, Union

from pydantic_core import core_schema

from distill.schema.definitions import Source, decorators, find

KNOWN = (
    "typing",
    "typing_extensions",
    "collections.abc",
    "annotated_types",
    "pydantic",
    "pathlib",
    "distill.schema.ranges",
)
LAZY = ("Iterable", "Collection", "Iterator", "Reversible")  # pydantic doesn't look into them, and YAML gives lists
BUILTINS = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
OPEN_BASES = re.compile(r"Enum|str|int|float|dict|list|Dict|Mapping|Protocol|Tuple")  # YAML's values may be theirs


class Object:
    """Stands for a class that no number, word or truth value of YAML can be."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source, handler):
        return core_schema.union_schema([core_schema.dict_schema(), core_schema.list_schema()])


class Types(Mapping):
    """Types by parameter, evaluated when they are asked for: most name classes whose files are long."""

    def __init__(self, owner: Source, written: Mapping[str, tuple[ast.AST | None, ast.AST | None]]):
        self.owner, self.written = owner, written  # annotation and default

    def __getitem__(self, name: str) -> Any:
        return evaluate(self.owner, *self.written[name])

    def __contains__(self, name) -> bool:
        return name in self.written

    def __iter__(self):
        return iter(self.written)

    def __len__(self) -> int:
        return len(self.written)


@dataclass(frozen=True)
class Signature:
    """What a callable takes by name.

    Attributes:
        types: by parameter; Any: not known.
        required: those without a default.
        others: the type of any others; None: it takes none.
    """

    types: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    others: Any = None


def read(target: str) -> Signature | None:
    """The signature of a dotted name; None where no source tells it."""
    try:
        found = find(target)
        return None if found is None else _signature(*found)
    except (RecursionError, OSError, SyntaxError, ValueError):
        return None


def _signature(owner: Source, node: ast.AST) -> Signature | None:
    if isinstance(node, ast.FunctionDef):
        return _of_function(owner, node, skip="classmethod" in decorators(node))
    if not isinstance(node, ast.ClassDef):
        return None
    methods = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
    foreign = decorators(node) - {"dataclass"}  # which may make it in a way of its own
    if "__new__" in methods or node.keywords or (foreign and "__init__" not in methods):
        return None
    if "__init__" in methods:
        return _of_function(owner, methods["__init__"], skip=True)
    bases = [place for base in node.bases if (place := owner.place(base)) and isinstance(place[1], ast.ClassDef)]
    inherited = next(filter(None, (_signature(*base) for base in bases)), None)
    if "dataclass" not in decorators(node):
        return inherited or (None if node.bases else Signature())
    above = inherited or Signature(others=Any if node.bases else None)
    fields = [each for each in node.body if isinstance(each, ast.AnnAssign) and not _no_field(each)]
    types = Types(owner, {each.target.id: (each.annotation, each.value) for each in fields})
    required = tuple(each.target.id for each in fields if each.value is None)
    return Signature(ChainMap(types, above.types), (*above.required, *required), above.others)


def _no_field(node: ast.AnnAssign) -> bool:
    return any(word in ast.unparse(node.annotation) for word in ("ClassVar", "KW_ONLY"))


def _of_function(owner: Source, node: ast.FunctionDef, skip: bool) -> Signature:
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    pairs = [*zip(positional, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    pairs = pairs[skip:]
    types = Types(owner, {argument.arg: (argument.annotation, default) for argument, default in pairs})
    required = tuple(argument.arg for argument, default in pairs if default is None)
    foreign = decorators(node) - {"staticmethod", "classmethod"}  # which may take more or less than it says
    others = evaluate(owner, arguments.kwarg.annotation) if arguments.kwarg else Any if foreign else None
    return Signature(types, () if foreign else required, others)


def evaluate(owner: Source, annotation: ast.AST | None, default: ast.AST | None = None) -> Any:
    """The type that an annotation of a module stands for. A default of None allows None."""
    if annotation is None:
        return Any
    try:
        found = _type(owner, annotation)
    except Exception:  # an annotation that Python itself would refuse, or one that is not known here
        return Any
    nothing = isinstance(default, ast.Constant) and default.value is None
    return Union[found, None] if nothing else found  # noqa: UP007


def _type(owner: Source, node: ast.AST) -> Any:
    if isinstance(node, ast.Constant):
        return _type(owner, ast.parse(node.value, mode="eval").body) if isinstance(node.value, str) else node.value
    if isinstance(node, (ast.Name, ast.Attribute)):
        return _named(owner, node)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return Union[_type(owner, node.left), _type(owner, node.right)]  # noqa: UP007
    if isinstance(node, (ast.Tuple, ast.List)):
        return [_type(owner, each) for each in node.elts]
    if not isinstance(node, ast.Subscript):
        return Any
    generic = _type(owner, node.value)
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if generic in (Any, Object):
        return generic
    if generic is Literal:
        nested = (ast.Name, ast.Attribute)
        return Literal[tuple(_type(owner, each) if isinstance(each, nested) else _literal(each) for each in parts)]
    if generic is Annotated:
        metadata = [made for each in parts[1:] if (made := _metadata(owner, each)) is not None]
        return Annotated[(_type(owner, parts[0]), *metadata)] if metadata else _type(owner, parts[0])
    inner = tuple(_type(owner, each) for each in parts)
    return generic[inner if len(inner) > 1 else inner[0]]


def _named(owner: Source, node: ast.Name | ast.Attribute) -> Any:
    known = _known(owner, node)
    if known is not None:
        return known
    place = owner.place(node)
    if place is None:
        return Any
    there, found = place
    if isinstance(found, ast.ClassDef):
        return Any if any(OPEN_BASES.search(ast.unparse(base)) for base in found.bases) else Object
    return _type(there, found.value) if isinstance(found, (ast.Assign, ast.AnnAssign)) else Any


def _known(owner: Source, node: ast.AST) -> Any:
    """What a name stands for where it is a builtin or comes from one of KNOWN; None where it is neither."""
    if isinstance(node, ast.Attribute):
        module = _known(owner, node.value)
        name = node.attr
        return _taken(module, name) if isinstance(module, ModuleType) else None
    if not isinstance(node, ast.Name):
        return None
    bound = owner.bound.get(node.id)
    for alias in getattr(bound, "names", ()):
        if (alias.asname or alias.name.partition(".")[0]) != node.id:
            continue
        if isinstance(bound, ast.ImportFrom) and owner.imported(bound) in KNOWN:
            return _taken(importlib.import_module(owner.imported(bound)), alias.name)
        if isinstance(bound, ast.Import) and (alias.name if alias.asname else node.id) in KNOWN:
            return importlib.import_module(alias.name)
    if bound is None and node.id == "object":
        return Any
    return BUILTINS.get(node.id) if bound is None else None


def _taken(module: ModuleType, name: str) -> Any:
    return Sequence if name in LAZY else getattr(module, name)


def _metadata(owner: Source, node: ast.AST) -> Any:
    """A bound of `Annotated`, such as Gt(0); None for what is not one of KNOWN's."""
    made = _known(owner, node.func if isinstance(node, ast.Call) else node)
    if made is None or not isinstance(node, ast.Call):
        return made
    if made in BUILTINS.values():  # what bounds a type is said by KNOWN, and nothing else is called
        return None
    try:
        arguments = [_literal(each) for each in node.args]
        return made(*arguments, **{each.arg: _literal(each.value) for each in node.keywords})
    except ValueError:  # of something of the module's own
        return None


def _literal(node: ast.AST) -> Any:
    """A literal, or arithmetic of literals such as 2**31."""
    parts = (ast.Constant, ast.UnaryOp, ast.BinOp, ast.operator, ast.unaryop, ast.Tuple, ast.Load)
    if not all(isinstance(each, parts) for each in ast.walk(node)):
        raise ValueError("not a literal")
    return eval(compile(ast.Expression(node), "annotation", "eval"), {"__builtins__": {}})
