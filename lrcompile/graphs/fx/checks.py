"""Whether the text of a serialised program is plain data: what torch would evaluate, generate code from, or resolve."""

from __future__ import annotations

import ast
import importlib
import json
import keyword
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch.utils import _pytree as pytree

from lrcompile.errors import InvalidInputError, UnsupportedError
from lrcompile.program import BUILTINS, lookup

_NAME = re.compile(r"[A-Za-z_]\w*|", re.ASCII)
_PATH = re.compile(r"[\w.@$-]*", re.ASCII)
_WORD = re.compile(r"[^\x00-\x1f'\"\\{}()]*")
_SYMBOL = re.compile(r"[a-z]+\d+", re.ASCII)
_LONGEST = 20_000
_OUTPUTS = "transformers.modeling_outputs."

OPERATORS = frozenset(
    {f"_operator.{name.partition('.')[2]}" for name in BUILTINS if name.startswith("operator.")}
    | {name for name in BUILTINS if not name.startswith("operator.")}
    | {f"_operator.{name}" for name in ("pos", "pow", "lshift", "rshift")}
    | {"torch.sym_ite", "torch.sym_sqrt", "torch._sym_sqrt"}
)
HIGHER = frozenset(
    f"torch.ops.higher_order.{name}" for name in ("wrap_with_set_grad_enabled", "wrap_with_autocast", "cond")
)
ASSERTS = frozenset(
    f"torch.ops.aten.{name}"
    for name in (
        "_assert_scalar.default", "_assert_async.msg", "_assert_async.default", "_assert_tensor_metadata.default",
        "sym_constrain_range.default", "sym_constrain_range_for_size.default", "sym_size.int", "sym_stride.int",
        "sym_numel.default", "sym_storage_offset.default",
    )
)  # fmt: skip
TREES = frozenset({
    "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict",
    "torch.fx.immutable_collections.immutable_list", "torch.fx.immutable_collections.immutable_dict",
})  # fmt: skip
SYMBOLIC = frozenset({
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "Max", "Min", "Abs", "FloorDiv", "CeilDiv",
    "CleanDiv", "ModularIndexing", "Where", "PythonMod", "CeilToInt", "FloorToInt", "LShift", "RShift", "PowByNatural",
    "FloatPow", "FloatTrueDiv", "IntTrueDiv", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat",
    "Identity", "IsNonOverlappingAndDenseIndicator", "Equality", "Unequality", "Eq", "Ne", "StrictLessThan", "LessThan",
    "StrictGreaterThan", "GreaterThan", "And", "Or", "Not", "Piecewise", "ExprCondPair",
})  # fmt: skip


def check_program(spec: Any) -> None:
    """Walks a serialised program.

    Raises:
        InvalidInputError: it holds something that is not plain data; what and where is named.
        UnsupportedError: operations or containers of other packages.
    """
    try:
        for guard in spec.get("guards_code", []):
            check_guard(guard)
        for symbol in spec.get("range_constraints", {}):
            check_path(symbol)
        for entry in spec["graph_module"]["module_call_graph"]:
            for side in ("in_spec", "out_spec"):
                if entry.get("signature"):
                    check_tree(entry["signature"][side], arguments=side == "in_spec")
        _walk(spec, "")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"malformed program: {type(error).__name__} {error}"[:200]) from error


def _walk(value: Any, key: str) -> None:
    if isinstance(value, dict):
        if "target" in value and "inputs" in value:
            check_operator(value["target"])
        for name, item in value.items():
            if key in _NAMED:
                check_name(name)
            if name == "metadata":  # text about where a node came from; torch resolves names in it, and calls nothing
                continue
            _walk(item, name)
    elif isinstance(value, list):
        for item in value:
            _walk(item, key)
    elif isinstance(value, str) and key in _TEXTS:
        _TEXTS[key](value)


def check_name(text: str) -> None:
    """A name of a node: torch writes it into code that it generates."""
    if not _NAME.fullmatch(text) or keyword.iskeyword(text):
        raise InvalidInputError(f"{text[:60]!r} is no name of a node")


def check_path(text: str) -> None:
    """A dotted name of a tensor or module."""
    if not _PATH.fullmatch(text):
        raise InvalidInputError(f"{text[:60]!r} is no name of a tensor")


def check_word(text: Any) -> None:
    """A key or constant that stands between quotes in code that torch generates."""
    if not isinstance(text, int) and not (isinstance(text, str) and _WORD.fullmatch(text)):
        raise InvalidInputError(f"{str(text)[:60]!r} is no plain text")


def check_operator(text: str) -> None:
    """An operation of torch's own, looked up among those that neither touch files nor raw memory."""
    if text in OPERATORS or text in HIGHER or text in ASSERTS:
        return
    if not text.startswith("torch.ops.aten."):
        raise UnsupportedError(f"the operation {text[:80]!r} is not one of torch's own", where=text[:80])
    lookup(text.removeprefix("torch.ops."))


def check_tree(text: str, *, arguments: bool = False) -> None:
    """Containers of inputs or outputs: torch's registry knows them, and their keys are plain.

    Args:
        arguments: of a call; keywords become arguments of a function that torch generates.
    """
    node = json.loads(text)[1]
    _check_node(node)
    if arguments:
        for name in json.loads(node["children_spec"][1]["context"]):
            check_name(name)


def _check_node(node: Any) -> None:
    kind, context = node["type"], node["context"]
    if kind is not None and kind.startswith(_OUTPUTS):  # a class of a known package, not one that the file chooses
        with suppress(ImportError):
            importlib.import_module(_OUTPUTS[:-1])
    if kind is not None and kind not in TREES and kind not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        raise UnsupportedError(
            f"its inputs or outputs stand in a {kind[:80]}, which torch does not know here",
            hint="import the package that registers it first, or export a model that returns tensors",
        )
    if kind in ("collections.defaultdict", "NO_SERIALIZED_TYPE_NAME_FOUND"):
        raise InvalidInputError(f"its inputs or outputs stand in a {kind}")
    if context is not None:
        _check_keys(json.loads(context) if kind in TREES or context.startswith(("[", "{", "n")) else context)
    for child in node["children_spec"]:
        _check_node(child)


def _check_keys(context: Any) -> None:
    if isinstance(context, list):
        for item in context:
            _check_keys(item)
    elif context is not None:
        check_word(context)  # a mapping could name a class to import


# -- expressions -------------------------------------------------------------------------------


def check_symbolic(text: str) -> None:
    """An expression of sizes as torch prints it: named functions of symbols and numbers."""
    _check_ast(text, "expression", _symbolic)


def _symbolic(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            plain = all(isinstance(each.value, ast.Constant) and each.arg in _ASSUMED for each in keywords)
            if name == "Symbol":
                first = args[0].value if len(args) == 1 and isinstance(args[0], ast.Constant) else None
                return plain and isinstance(first, str) and bool(_SYMBOL.fullmatch(first))
            if name == "Float":
                return all(isinstance(each, ast.Constant) for each in args)
            if "Pow" in name and not _small(args):
                return False
            return name in SYMBOLIC and not keywords and all(map(_symbolic, args))
        case ast.Constant(value=value):
            return isinstance(value, bool | int | float)
        case ast.Name(id=name):
            return bool(_SYMBOL.fullmatch(name)) or name in ("true", "false", "int_oo")
        case ast.UnaryOp(operand=operand):
            return _symbolic(operand)
        case ast.BinOp(left=left, op=op, right=right):
            return not isinstance(op, ast.Pow) and _symbolic(left) and _symbolic(right)
        case ast.Compare(left=left, comparators=others):
            return _symbolic(left) and all(map(_symbolic, others))
        case ast.Tuple(elts=items):
            return all(map(_symbolic, items))
    return False


_ASSUMED = frozenset({"positive", "integer", "nonnegative", "negative", "nonzero", "real", "zero", "precision"})


def _small(args: list[ast.expr]) -> bool:
    """Whether an exponent could not grow without limit."""
    match args:
        case [_, ast.Constant(value=int(power))] | [_, ast.Call(args=[ast.Constant(value=int(power))])]:
            return abs(power) <= 16
    return False


def check_guard(text: str) -> None:
    """A condition on the sizes of inputs, which torch compiles as Python."""
    _check_ast(text, "guard", _guard)


def _guard(node: ast.AST) -> bool:
    match node:
        case ast.Constant(value=value):
            return value is None or isinstance(value, bool | int | float)
        case ast.Name(id=name):
            return name == "L"
        case ast.Subscript(value=value, slice=ast.Constant(value=key)):
            return _guard(value) and (isinstance(key, int) or (isinstance(key, str) and bool(_WORD.fullmatch(key))))
        case ast.Call(func=ast.Attribute(value=value, attr="size" | "stride" | "storage_offset" | "dim"), keywords=[]):
            return _guard(value) and all(isinstance(each, ast.Constant) for each in node.args)
        case ast.Call(func=ast.Name(id="max" | "min" | "abs" | "int" | "float"), keywords=[]):
            return all(map(_guard, node.args))
        case ast.Call(func=ast.Attribute(value=ast.Name(id="math"), attr="floor" | "ceil" | "trunc" | "sqrt")):
            return not node.keywords and all(map(_guard, node.args))
        case ast.BoolOp(values=values):
            return all(map(_guard, values))
        case ast.UnaryOp(operand=operand):
            return _guard(operand)
        case ast.BinOp(left=left, op=op, right=right):
            bounded = not isinstance(op, ast.Pow | ast.LShift) or (
                isinstance(right, ast.Constant) and _tiny(right.value)
            )
            return bounded and _guard(left) and _guard(right)
        case ast.Compare(left=left, comparators=others):
            return _guard(left) and all(map(_guard, others))
    return False


def _tiny(value: object) -> bool:
    return isinstance(value, int) and abs(value) <= 16


def _check_ast(text: str, what: str, allowed: Callable[[ast.AST], bool]) -> None:
    try:
        fine = isinstance(text, str) and len(text) <= _LONGEST and allowed(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        fine = False
    if not fine:
        raise InvalidInputError(f"the {what} {str(text)[:80]!r} is not a plain one")


def _refuse_object(text: str) -> None:
    raise InvalidInputError(f"it holds an object of class {text[:80]!r}")


_NAMED = frozenset({
    "tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values", "custom_obj_values",
    "as_string_to_argument",
})  # fmt: skip
_TEXTS: dict[str, Callable[[str], None]] = {
    "name": check_name,
    "as_name": check_name,
    "user_input_name": check_name,
    "forward_arg_names": check_name,
    "fqn": check_path,
    "buffer_name": check_path,
    "parameter_name": check_path,
    "tensor_constant_name": check_path,
    "custom_obj_name": _refuse_object,
    "class_fqn": _refuse_object,
    "expr_str": check_symbolic,
    "as_operator": check_operator,
    "as_string": check_word,
    "as_strings": check_word,
}
