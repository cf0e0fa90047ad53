"""Rewrites of an exported program's operations: pattern and replacement are functions, traced into ``aten``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.subgraph_rewriter import replace_pattern_with_filters

from lrcompile.errors import UnsupportedError, UsageError
from lrcompile.graphs.fx.lower import Editor

RANKS = (2, 3, 4, 1)
"""Axes of the examples that a pattern is traced with where none are given."""


def rewritten(program: ExportedProgram, rules: Any) -> tuple[ExportedProgram, list[str]]:
    """The program with every match rewritten, and the name of the last node of each match.

    Args:
        rules: (pattern, replacement) or (pattern, replacement, example inputs), or a sequence of those.

    Raises:
        UsageError: something else was given, or functions of different arguments.
        UnsupportedError: a function that torch cannot trace, or a rewrite that changes types or shapes.
    """
    places: list[str] = []
    for rule in _flat(rules):
        editor = Editor(program)
        found = _apply(editor, *_traced(*rule))
        if found:
            places += found
            program = editor.finish()
    return program, places


def _flat(rules: Any) -> list[tuple[Any, ...]]:
    if isinstance(rules, tuple | list) and len(rules) in (2, 3) and callable(rules[0]):
        if not callable(rules[1]):
            raise UsageError("the replacement is no function", hint="give (pattern, replacement)")
        return [tuple(rules)]
    if isinstance(rules, tuple | list):
        return [each for rule in rules for each in _flat(rule)]
    raise UsageError(f"a {type(rules).__name__} is no pattern", hint="give two functions of the same arguments")


def _traced(
    pattern: Callable[..., Any], replacement: Callable[..., Any], examples: Sequence[Tensor] | None = None
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Both functions as ``aten`` operations."""
    counts = [len(inspect.signature(each).parameters) for each in (pattern, replacement)]
    if counts[0] != counts[1]:
        raise UsageError(f"the pattern takes {counts[0]} arguments, its replacement {counts[1]}")
    tried = (
        [list(examples)] if examples is not None else [[torch.ones([3] * n) for _ in range(counts[0])] for n in RANKS]
    )
    reason = ""
    for inputs in tried:
        try:
            with torch.no_grad():
                made = [make_fx(each, pre_dispatch=True)(*inputs) for each in (pattern, replacement)]
        except Exception as error:  # torch and the functions raise anything
            reason = reason or (str(error).splitlines() or [type(error).__name__])[0][:200]
            continue
        for each in made:
            _check(each)
        return made[0], made[1]
    hint = "check them" if examples is not None else "give (pattern, replacement, example inputs)"
    raise UnsupportedError(f"the pattern cannot be traced: {reason}", hint=hint)


def _check(traced: fx.GraphModule) -> None:
    """Only operations: what a function makes of constants of its own could not be matched or stored."""
    traced.graph.eliminate_dead_code()
    for node in traced.graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise UnsupportedError(f"the pattern holds a constant tensor ({node.target})", hint="use plain numbers")


def _apply(editor: Editor, pattern: fx.GraphModule, replacement: fx.GraphModule) -> list[str]:
    if not any(node.op == "call_function" for node in pattern.graph.nodes):
        raise UsageError("the pattern holds no operation")
    ends = [node for node in reversed(pattern.graph.nodes) if node.op == "call_function"]
    module = fx.GraphModule(editor.program.graph_module, editor.graph)
    known = {node: index for index, node in enumerate(module.graph.nodes)}
    matches = replace_pattern_with_filters(module, pattern, replacement, match_filters=[_own_outputs])
    for node in [node for node in module.graph.nodes if node not in known]:
        _infer(editor, node)
    editor.adopt(module.graph)
    ends = [next(match.nodes_map[each] for each in ends if each in match.nodes_map) for match in matches]
    return [node.name for node in sorted(ends, key=known.__getitem__)]


def _own_outputs(match: Any, graph: fx.Graph, pattern: fx.Graph) -> bool:
    """A pattern must not swallow what the program stores, such as a parameter in the place of an operation."""
    return all(node.op == "call_function" for node in match.returning_nodes)


def _infer(editor: Editor, node: fx.Node) -> None:
    """Shape and type of a new node."""

    def value(each: fx.Node) -> Any:
        return each.meta["val"]

    target: Any = node.target
    try:
        with editor.mode, torch.no_grad():
            node.meta["val"] = target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))
    except Exception as error:  # torch raises anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UnsupportedError(f"the replacement does not fit here: {reason}", where=node.name) from error
