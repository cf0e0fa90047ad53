"""One captured graph: which plan speaks about it, and what it is compiled to."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import tracing

from lrcompile.backends.dynamo.dispatch import Dispatcher
from lrcompile.backends.dynamo.exact import ExactTable
from lrcompile.backends.dynamo.graph import Marked, copied, mark
from lrcompile.backends.dynamo.inner import compiler
from lrcompile.backends.dynamo.options import Chosen, Held, read
from lrcompile.backends.dynamo.release import Releaser, is_released
from lrcompile.errors import LrcompileError, LrcompileWarning, PlanRequired, ReleasedError, UsageError, warn_once
from lrcompile.options import Options
from lrcompile.plans import Plan
from lrcompile.plans_make import make
from lrcompile.plans_state import Table
from lrcompile.registry import load

_exact = ExactTable()
_codes: set[str] = set()
"""Functions that were compiled with this backend, as torch writes them in its warnings."""


def compiled(module: fx.GraphModule, inputs: Sequence[Any], options: Any, mode: str | None) -> Any:
    """What runs in the place of a captured graph."""
    chosen = read(options, mode)
    _watch_limits()
    build = compiler(chosen.inner, chosen.mode, chosen.inductor)
    marked = mark(module.graph, inputs)
    plan = _plan(chosen, marked, inputs) if marked else chosen.plan
    table: Table = _exact if plan is None else plan.table
    if wants_gradients(module.graph):
        return _dense(module, inputs, build, marked, table)
    if not marked:
        return build(_plain(module), list(inputs))
    after = Releaser(plan).after if chosen.release and plan is not None else None
    if chosen.release and plan is not None:
        Releaser.prepare(plan, [inputs[each.index] for each in marked], [each.kind for each in marked])
    return Dispatcher(module, inputs, marked, table, build, after)


def _plain(module: fx.GraphModule) -> fx.GraphModule:
    return fx.GraphModule(module, copied(module.graph))


# -- gradients ---------------------------------------------------------------------------------


def wants_gradients(graph: fx.Graph) -> bool:
    """Whether something that the graph returns is differentiable."""
    results = next(iter(graph.find_nodes(op="output"))).all_input_nodes
    return any(getattr(node.meta.get("example_value"), "requires_grad", False) for node in results)


def _dense(module: fx.GraphModule, inputs: Sequence[Any], build: Any, marked: Sequence[Marked], table: Table) -> Any:
    """The graph as it is, because gradients are wanted."""
    gone = next((each for each in marked if is_released(inputs[each.index])), None)
    if gone is not None:
        raise ReleasedError("gradients need its dense values, which were released", where=gone.source)
    with table.lock:
        states = [table.state(inputs[each.index], each.kind) for each in marked]
    concerned = [state.entry for state in states if state.replacement is not None and state.entry is not None]
    for entry in concerned:
        table.running[entry.name] = "dense: gradients are wanted"
    if concerned:
        warn_once(
            table,
            f"gradients are wanted, so {len(concerned)} planned weights stay dense; call the compiled model under "
            "torch.no_grad() or torch.inference_mode(), or set requires_grad_(False), to compute with their factors",
            key="gradients",
        )
    return build(_plain(module), list(inputs))


# -- plans -------------------------------------------------------------------------------------


def _plan(chosen: Chosen, marked: Sequence[Marked], inputs: Sequence[Any]) -> Plan | None:
    """The plan that speaks about these weights; None without one.

    Raises:
        UsageError: it is a plan for another model.
        PlanRequired: there is none yet, and this is not the whole model.
    """
    weights = [inputs[each.index] for each in marked]
    if chosen.plan is not None:
        _tie(chosen.plan, marked, weights)
        return chosen.plan
    return None if chosen.calibration is None else _made(chosen, chosen.calibration, weights)


def _tie(plan: Plan, marked: Sequence[Marked], weights: Sequence[Any]) -> None:
    """Ties a plan to the module whose code is compiled, if none of the weights belongs to it yet."""
    if plan.graph != "module":
        raise UsageError(f"the plan was made from an {plan.graph} model", hint="make it from the nn.Module")
    if _knows(plan, weights):
        return
    for module in roots():
        if plan.names(module):
            plan.bind(module)
            return
    with plan.table.lock:
        if any(plan.table.entry_of(weight, each.kind) for each, weight in zip(marked, weights, strict=True)):
            return
    raise UsageError(
        "the plan is for another model: it knows none of the weights that are compiled here",
        where=marked[0].source,
        hint="plan.bind(model) ties it to the whole model before parts of it are compiled",
    )


def _knows(plan: Plan, weights: Sequence[Any]) -> bool:
    """Whether one of the weights was planned, or belongs to a module of the plan."""
    states = plan.table.states
    if any((state := states.get(id(w))) is not None and state.ref() is w and state.entry is not None for w in weights):
        return True
    wanted = {id(weight) for weight in weights}
    return any(id(parameter) in wanted for module in plan.modules for parameter in module.parameters())


def _made(chosen: Chosen, samples: Held, weights: Sequence[Any]) -> Plan:
    """The plan that these samples were used for, or a new one of the whole model."""
    for plan in samples.plans.values():
        if _knows(plan, weights):
            return plan
    found = roots()
    hint = 'call lrcompile.plan(model, …) first and give options={"plan": plan}'
    if not found:
        raise PlanRequired("a function is compiled, not a model, so its weights cannot be planned", hint=hint)
    root = found[0]
    evaluation = None if chosen.evaluation is None else chosen.evaluation.samples
    if not {id(weight) for weight in weights} <= {id(parameter) for parameter in root.parameters()}:
        raise PlanRequired(f"{type(root).__name__} does not hold all weights of the captured graph", hint=hint)
    passes = [load("passes", "low-rank")()]
    try:
        with tracing(None), torch.autocast("cpu", enabled=False), torch.enable_grad(), torch.inference_mode(False):
            plan = make(root, passes, chosen.budget, Options(), samples.samples, evaluation)
    except LrcompileError as error:
        if error.code not in (3, 4):
            raise
        message = f"the calibration samples do not fit {type(root).__name__}, the part that is compiled ({error})"
        raise PlanRequired(message, hint=hint) from error
    samples.plans[root] = plan
    return plan


def roots() -> list[nn.Module]:
    """The module that was given to ``torch.compile``, then those at hand in the function that torch captures."""
    try:
        scope = InstructionTranslator.current_tx().output.local_scope
    except AttributeError:
        scope = {}
    given = [*_called(), *(value for value in scope.values() if isinstance(value, nn.Module))]
    return list(dict.fromkeys(getattr(module, "_orig_mod", module) for module in given))


def _called() -> Iterator[Any]:
    """The innermost call of a compiled module: after a graph break torch captures only a part of it."""
    frame = sys._getframe()
    while frame is not None:
        module = frame.f_locals.get("self") if frame.f_code.co_name in ("__call__", "_wrapped_call_impl") else None
        if isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None:
            yield module
            return
        frame = frame.f_back


# -- recompilation limits ----------------------------------------------------------------------


class _Limits(logging.Filter):
    """Turns torch's log line about a recompilation limit into a warning that says what is lost and what to do."""

    def filter(self, record: logging.LogRecord) -> bool:
        args = record.args if isinstance(record.args, tuple) else ()
        if str(record.msg).startswith("torch._dynamo hit config.") and len(args) > 3 and args[2] in _codes:
            warnings.warn(
                f"torch stopped compiling {args[2]} after {args[1]} versions (last reason: {args[3]}): calls that none "
                "of them fits run eagerly, with dense weights. Mark what varies with torch._dynamo.mark_dynamic or "
                f"compile with dynamic=True, compile one layer at a time, or raise torch._dynamo.config.{args[0]}",
                LrcompileWarning,
                stacklevel=2,
            )
        return True


_limits = _Limits()


def _watch_limits() -> None:
    try:
        code = InstructionTranslator.current_tx().output.root_tx.f_code  # type: ignore[union-attr]
        _codes.add(f"'{code.co_name}' ({code.co_filename}:{code.co_firstlineno})")
    except AttributeError:
        return
    logger = logging.getLogger("torch._dynamo.convert_frame")
    if _limits not in logger.filters:
        logger.addFilter(_limits)
