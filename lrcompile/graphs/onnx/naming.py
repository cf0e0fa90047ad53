"""Names of sites: the module path of the original model, where the exporter left a trace of it."""

from __future__ import annotations

import ast
import re

import onnx_ir as ir

_GENERATED = re.compile(
    r"^(onnx::|val_|_?t?_?\d+$|[A-Za-z]+_\d+$|const(ant)?s?(_\w*)?$)"  # exporters' counters
    r"|(^|/)[A-Z][A-Za-z]*(_\d+)?_output_\d+$"  # what a node computes
)
_PART = re.compile(r"(\.factors)?(\.(left|right|term\d+|part\d+))+(_\d+)?$")  # what lowering adds to the name of a site
_OPERATORS = ("MatMul", "Gemm", "Conv", "linear", "matmul", "addmm", "conv2d", "conv1d", "mm")


def site_name(weight: ir.Value | None, node: ir.Node, *, compound: bool = False) -> str:
    """The best name for the linear map that ``node`` computes with ``weight``.

    Args:
        compound: several weights make the map up, so that the name of one is cut to what they share.

    In this order: the initializer's own name unless a tool made it up, the module scope in the
    metadata of torch's exporter, the scoped node name of the older exporter, the node's name.
    """
    own = _from_weight(weight)
    candidates = (_PART.sub("", own) if compound else own, _from_scopes(node), _from_node_name(node.name or ""))
    return next((name for name in candidates if name), node.name or (weight.name if weight else "") or "linear")


def _from_weight(weight: ir.Value | None) -> str:
    producer = None if weight is None else weight.producer()
    if weight is None or (producer is not None and producer.op_type != "Constant"):
        return ""
    name = weight.name or ""
    if is_generated(name):
        return ""
    return name.removesuffix(".weight")


def _from_scopes(node: ir.Node) -> str:
    text = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return ""
    if not isinstance(scopes, list) or len(scopes) < 2:
        return ""
    return str(scopes[-2])  # the last scope is the operator itself


def _from_node_name(name: str) -> str:
    if "/" not in name:
        return ""
    parts = [part for part in name.split("/") if part]
    if parts and parts[-1].split("_")[0] in _OPERATORS:
        parts = parts[:-1]
    return ".".join(parts)


def is_generated(name: str) -> bool:
    """Whether an exporter made the name up."""
    return not name or _GENERATED.search(name) is not None


def unique(name: str, taken: set[str], mark: str = "#") -> str:
    """``name``, or ``name#2`` and so on where it is taken; adds the result to ``taken``."""
    result, count = name, 1
    while result in taken:
        count += 1
        result = f"{name}{mark}{count}"
    taken.add(result)
    return result
