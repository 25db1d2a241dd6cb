"""Values against types: what a type allows, in words, and what of a configuration is not allowed.

The types are those of signatures (distill/schema/signatures.py) and, for options that no target takes, of
distill/cli/options.py. Values are taken as YAML gives them: a list is a tuple too and a whole number is a number, but
true is no number, "3" is none, and null is allowed only where the type says so. Never imports torch.
"""

import json
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import GroupedMetadata
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from distill.schema.definitions import absent
from distill.schema.signatures import Object, Signature, read

HYDRAS = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_", "_mode_")
FILLED = ("num_classes", "image_size", "student", "folder", "name", "cfg")  # what the toolkit adds when it builds
Within = Callable[[str, Signature | None], Signature | None]
GIVE = "???"  # an option that isn't there
STRICT = ConfigDict(strict=True)


@dataclass(frozen=True)
class Problem:
    """A value that is not allowed: the option's dotted key, the value, and what is expected of it."""

    key: str
    value: Any
    expected: str

    def __str__(self) -> str:
        if self.value == GIVE:
            return f"{self.key} must be given: {self.key}=VALUE ({self.expected})"
        return f"{self.key}={written(self.value)}: {self.expected}"


def problems(values: Mapping, within: Within, key: str = "") -> Iterator[Problem]:
    """What is wrong in a part of a configuration.

    Args:
        values: plain, resolved.
        within: of a part's key and its target's signature, all that the part takes; None: not known.
        key: of the part.
    """
    here, target = f"{key}." if key else "", values.get("_target_")
    if target is not None and (why := absent(str(target))):
        yield Problem(f"{here}_target_", target, why)
    signature = None if target is None else read(str(target))
    if signature and (values.get("_partial_") or values.get("_args_")):
        signature = replace(signature, required=())
    takes = within(key, signature)
    for name, value in values.items():
        if takes and name not in HYDRAS and (expected := _refusal(takes, name, value, target)):
            yield Problem(f"{here}{name}", value, expected)
        if isinstance(value, Mapping):
            yield from problems(value, within, f"{here}{name}")
    for name in takes.required if takes else ():
        if name not in values and name not in FILLED:
            yield Problem(f"{here}{name}", GIVE, f"{target or key or 'a run'} needs it")


def _refusal(takes: Signature, name: str, value, target: str | None) -> str | None:
    """Why a part doesn't take this value under this name; None where it does."""
    if name in takes.types or takes.others is not None:
        return None if _makes(value) else mismatch(takes.types.get(name, takes.others), value)
    what = f"{target} takes no '{name}'" if target else f"there is no option '{name}' here"
    return f"{what}{nearest(name, [*takes.types])}"


def _makes(value) -> bool:
    """Whether a value is, or holds, something that is made of a `_target_`."""
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_makes, value.values()))
    return isinstance(value, list) and any(map(_makes, value))


def mismatch(kind: Any, value) -> str | None:
    """What was expected, where `value` is not of the type `kind`; None where it is, or pydantic has no such type."""
    if kind is Any:
        return None
    try:
        taken = TypeAdapter(kind, config=STRICT).validate_json(json.dumps(value, default=str))
        if isinstance(value, bool) == isinstance(taken, bool):  # Literal[1] takes true
            return None
    except ValidationError:
        pass
    except PydanticUserError:
        return None
    words = [str(choice) for choice in _choices(kind)]
    wrong = [str(each) for each in (value if isinstance(value, list) else [value]) if str(each) not in words]
    near = nearest(wrong[0], words) if wrong and words else ""
    text = value is not None and not isinstance(value, (str, list, dict)) and str in _parts(kind)
    hint = f""" (typed '"{written(value)}"')""" if text else ""
    return f"expected {describe(kind)}{hint}{near}"


def describe(kind: Any) -> str:
    """A type in words: "a number greater than 0", "one of best, last", "null or a list, each a whole number"."""
    parts = list(dict.fromkeys(_parts(kind)))
    words = [_describe_one(part) for part in parts if part is not type(None)]
    if "a number" in words:
        words = [word for word in words if word != "a whole number"]
    return " or ".join([*(["null"] if type(None) in parts else []), *dict.fromkeys(words)])


def _describe_one(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        base, *metadata = get_args(kind)
        said = next((each.description for each in metadata if isinstance(each, FieldInfo) and each.description), None)
        return said or describe(base) + _bounds(metadata)
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is Literal:
        choices = list(dict.fromkeys(map(written, inner)))
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    plain = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        Object: "a node with _target_",
    }
    if origin in plain:
        return plain[origin]
    if isinstance(origin, type) and issubclass(origin, tuple) and inner and ... not in inner:
        return f"[{', '.join(map(describe, inner))}]"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a mapping {name: value}" + (f", each value {describe(inner[1])}" if len(inner) == 2 else "")
    if isinstance(origin, type) and hasattr(origin, "__iter__"):
        each = [part for part in inner if part not in (..., Any)]
        return "a list" + (f", each entry {describe(each[0])}" if each else "")
    return (
        "something callable, a node with _target_" if origin is Callable else getattr(origin, "__name__", str(origin))
    )


def _bounds(metadata) -> str:
    """ " greater than 0", " from 0 to below 1", " of at least 1" """
    flat = [each for group in metadata for each in (group if isinstance(group, GroupedMetadata) else [group])]
    found = {name: getattr(each, name) for each in flat for name in ("gt", "ge", "lt", "le") if hasattr(each, name)}
    words = {"gt": "greater than", "ge": "of at least", "lt": "less than", "le": "at most"}
    said = [f"{word} {found[name]}" for name, word in words.items() if name in found]
    if "ge" in found and len(said) == 2:
        return f" from {found['ge']} to {'below ' if 'lt' in found else ''}{found.get('lt', found.get('le'))}"
    least = next((each.min_length for each in flat if getattr(each, "min_length", 0)), None)
    return (f" {' and '.join(said)}" if said else "") + (f", at least {least} of them" if least else "")


def _parts(kind: Any) -> list:
    """The members of a union, and of unions in it."""
    if get_origin(kind) in (Union, types.UnionType):
        return [part for member in get_args(kind) for part in _parts(member)]
    return [type(None) if kind is None else kind]


def _choices(kind: Any) -> list:
    """The words of all Literals in a type."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [choice for inner in get_args(kind) for choice in _choices(inner)]


def nearest(word: str, known: list[str]) -> str:
    """'; did you mean X?' where something known is near, else nothing."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def written(value) -> str:
    """A value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{name}:{written(each)}' for name, each in value.items())}}}"
    return str(value)
