"""Reading a torch.export archive without trusting it.

torch.export.load unpickles members, evaluates the text of symbolic sizes, compiles guards, imports what a tree of
inputs names, and calls whatever a node's target leads to. `sanitized` copies member by member what a plain graph of
tensors needs, and refuses the rest:

    archive_format, archive_version, byteorder, .data/*    as they are
    data/weights, data/constants                           raw tensors; none that is pickled
    models/model.json                                      without guards and remarks, each text by the rule of its key
    data/sample_inputs, data/aotinductor                   never
"""

import io
import json
import re
import zipfile
from pathlib import Path

from distill import archives
from distill.errors import UserError

COPIED = re.compile(r"archive_format|archive_version|byteorder|\.data/\w+|data/(weights/weight|constants/tensor)_\d+")
CONFIG = re.compile(r"data/(weights|constants)/\w+_config\.json")
MODEL = "models/model.json"
MOST_JSON = 50_000_000  # bytes

# What nodes may call: operators on tensors, and arithmetic of sizes.
_HIGHER = "cond|while_loop|scan|map_impl|wrap_with_set_grad_enabled|wrap_with_autocast"
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|quantized_decomposed|torchvision)\.(?!save\b|load\b|from_file\b)[a-z_]\w*(\.\w+)?"
    rf"|torch\.ops\.higher_order\.({_HIGHER})"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|torch\.sym_(int|float|max|min|not|ite|sqrt)|math\.(ceil|floor|trunc|sqrt)"
)
_NAME = re.compile(r"[A-Za-z_]\w*")  # it becomes part of a Python program
_PLAIN = re.compile(r"[\w.+\-]*")
_TREE = re.compile(r'(\s|[\[\]{}:,\d]|null|"(type|context|children_spec)"|"(builtins\.(tuple|list|dict)|null|\[\])")*')
_SYMBOL = re.compile(r"[a-z]{1,3}\d+")
_WORDS = {
    *("Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "floor", "ceiling"),
    *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Equality", "Unequality", "GreaterThan", "LessThan"),
    *("StrictGreaterThan", "StrictLessThan", "FloorDiv", "CeilDiv", "CleanDiv", "ModularIndexing", "PythonMod"),
    *("Where", "CeilToInt", "FloorToInt", "TruncToInt", "TruncToFloat", "RoundToInt", "ToFloat", "IntTrueDiv"),
    *("FloatTrueDiv", "PowByNatural", "FloatPow", "LShift", "RShift", "Identity", "True", "False", "true", "false"),
    *("positive", "integer", "nonnegative", "negative", "nonzero", "real", "finite", "precision", "evaluate"),
}


def sanitized(path: Path) -> io.BytesIO:
    """A copy of the archive in memory, of which no part runs code when torch.export.load reads it.

    Raises:
        UserError: it holds more than a plain graph, or is damaged; says what.
    """
    copied = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copied, "w", zipfile.ZIP_STORED) as copy:
            root = archive.namelist()[0].partition("/")[0]
            for member in archive.infolist():
                name = member.filename.removeprefix(f"{root}/")
                if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                    raise _Refused(f"{name} is packed")
                content = _content(archive, member, name)
                if content is not None:
                    copy.writestr(f"{root}/{name}", content)
            copy.writestr(f"{root}/data/sample_inputs/model.pt", b"")  # torch reads it as: none
    except _Refused as reason:
        raise UserError(
            f"{path} is not opened: {reason}, which is more than the plain graph of a network and could run code"
        ) from None
    except (*archives.FAULTS, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged, or no torch.export archive: {error}; export it again") from error
    copied.seek(0)
    return copied


class _Refused(Exception):
    pass


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> bytes | None:
    """What is copied of a member; None: nothing."""
    if COPIED.fullmatch(name):
        return archive.read(member)
    if not (name == MODEL or CONFIG.fullmatch(name)):
        if name.startswith(("data/sample_inputs/", "extra/")):  # not needed to run it
            return None
        raise _Refused(f"it holds {name[:80]}")
    if member.file_size > MOST_JSON:
        raise _Refused(f"{name} has {member.file_size:,} bytes")
    described = json.loads(archive.read(member))
    if name != MODEL:
        for tensor in described["config"].values():
            if tensor["use_pickle"] is not False or not re.fullmatch(r"(weight|tensor)_\d+", tensor["path_name"]):
                raise _Refused(f"{name} names pickled members")
    return json.dumps(_checked("", described)).encode()


def _checked(key: str, value):
    """Plain values, each text by the rule of its key; guards and remarks are left out."""
    if isinstance(value, dict):
        for name in value:
            _match(_PLAIN, "a name", name)
        return {name: _checked(name, child) for name, child in value.items()}
    if isinstance(value, list):
        return [] if key == "guards_code" else [_checked(key, child) for child in value]
    if isinstance(value, str) and key not in ("as_string", "as_strings"):  # an operator's argument, as it is
        if key in REMARKS:
            return ""
        if key == "expr_str":
            _check_expression(value)
        else:
            _match(_RULES.get(key, _PLAIN), key, value)
    return value


REMARKS = ("stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack", "from_node", "custom")
_RULES = {"target": _OPERATOR, "name": _NAME, "forward_arg_names": _NAME, "in_spec": _TREE, "out_spec": _TREE}


def _match(rule: re.Pattern, what: str, text: str) -> None:
    if not rule.fullmatch(text):
        raise _Refused(f"it has {what} {text[:80]!r}")


def _check_expression(text: str) -> None:
    """Arithmetic of sizes only: sympy evaluates it as Python."""
    quoted = re.findall(r"'([^']*)'", text)
    bare = re.sub(r"'[^']*'", "", text)
    words = re.findall(r"[^\W\d]\w*", bare)
    odd = re.sub(r"\d+\.\d+", "", re.sub(r"[^\W\d]\w*", "", bare))
    allowed = all(word in _WORDS or _SYMBOL.fullmatch(word) for word in words)
    if not (allowed and all(map(_SYMBOL.fullmatch, quoted)) and re.fullmatch(r"[\d\s(),=+*/%<>&|~-]*", odd)):
        raise _Refused(f"it has the size {text[:80]!r}")
