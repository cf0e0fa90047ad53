"""The table of operators, and what its rules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

Rule = Callable[..., Any]
"""``rule(node, *inputs)`` gives the node's output, or a tuple of its outputs; an absent input is None."""

RULES: dict[tuple[str, str], Rule] = {}
"""By domain and operator."""


def rule(name: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Enters a function into the table."""

    def enter(function: Rule) -> Rule:
        RULES[domain, name] = function
        return function

    return enter


def dtype_of(code: int) -> torch.dtype:
    """The torch dtype that an ONNX one is computed in: float32 for smaller floats.

    Raises:
        NotImplementedError: torch has no such type.
    """
    name = ir.DataType(code).name
    found = _DTYPES.get(name)
    if found is None:
        raise NotImplementedError(f"the type {name}")
    return found


_DTYPES = {
    "FLOAT": torch.float32, "DOUBLE": torch.float64, "FLOAT16": torch.float32, "BFLOAT16": torch.float32,
    "INT64": torch.int64, "INT32": torch.int32, "INT16": torch.int16, "INT8": torch.int8, "UINT8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


def filling(node: ir.Node) -> tuple[Any, torch.dtype]:
    """What a ConstantOfShape node fills a tensor with, and its type."""
    value = node.attributes.get("value")
    if value is None:
        return 0.0, torch.float32
    tensor = value.as_tensor()
    return tensor.numpy().reshape(-1)[0].item(), dtype_of(tensor.dtype)


def ints(value: Tensor | np.ndarray | None) -> list[Any]:
    """A tensor of integers as a list; an array of sizes may hold free ones."""
    found = [] if value is None else value.reshape(-1).tolist()
    return [item if isinstance(item, torch.SymInt) else int(item) for item in found]


def wide(tensor: Tensor) -> Tensor:
    """Small floats as float32, which is what the graph is computed in."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() < 4 else tensor
