"""Rewrites of nodes by rules that somebody else wrote, on a copy of the model."""

from __future__ import annotations

import copy
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lrcompile.errors import UnsupportedError, UsageError
from lrcompile.graphs.onnx.hygiene import signature


def apply_rules(model: ir.Model, rules: Any) -> tuple[ir.Model, list[str]]:
    """A copy of the model with every match rewritten, and the name of the last node of each match.

    Args:
        rules: an onnxscript ``RewriteRule`` or ``RewriteRuleSet``, a rule class, or a sequence of them.

    Raises:
        UsageError: something else was given.
        UnsupportedError: a rule changes inputs, outputs or the version of the standard operators.
    """
    from onnxscript.rewriter import RewriteRuleSet

    places: list[str] = []
    watched = RewriteRuleSet([_watched(rule, places) for rule in _flat(rules)])
    clone = model.clone()
    before, opset = signature(clone), clone.opset_imports.get("")
    count = watched.apply_to_model(clone)
    if count:
        RemoveUnusedNodesPass()(clone)
        clone.graph.sort()
    if signature(clone) != before:
        raise UnsupportedError("the rule changes an input or an output of the model")
    if clone.opset_imports.get("") != opset:
        raise UnsupportedError(
            f"the rule raises the opset from {opset} to {clone.opset_imports.get('')}",
            hint="convert the model to that opset first",
        )
    return clone, places[:count]


def _flat(rules: Any) -> list[Any]:
    """The single rules of whatever was given."""
    from onnxscript.rewriter import RewriteRule, RewriteRuleClassBase, RewriteRuleSet

    if isinstance(rules, RewriteRule):
        return [rules]
    if isinstance(rules, RewriteRuleSet):
        return list(rules)
    if isinstance(rules, type) and issubclass(rules, RewriteRuleClassBase):
        return [rules.rule()]
    if isinstance(rules, list | tuple):
        return [rule for each in rules for rule in _flat(each)]
    raise UsageError(f"a {type(rules).__name__} is no rewrite rule", hint="give an onnxscript RewriteRule")


def _watched(rule: Any, places: list[str]) -> Any:
    """A copy of the rule that writes down where it matches."""
    seen = copy.copy(rule)

    def try_rewrite(model: ir.Model, graph: ir.Graph | ir.Function, node: ir.Node, **more: Any) -> Any:
        found = rule.try_rewrite(model, graph, node, **more)
        if found is not None:
            places.append(node.name or str(node.outputs[0].name))
        return found

    seen.try_rewrite = try_rewrite
    return seen
