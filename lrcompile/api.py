"""The two calls that most people need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lrcompile.budget import Budget
from lrcompile.options import Options
from lrcompile.pipeline import Pipeline, Result
from lrcompile.plans import Plan
from lrcompile.plans_make import make
from lrcompile.progress import Progress
from lrcompile.registry import LOSSY, load
from lrcompile.rewrite import Pass


def optimize(
    model: Any,
    budget: Budget | None = None,
    *,
    calibration: Any = None,
    evaluation: Any = None,
    passes: Sequence[Pass] | None = None,
    options: Options | None = None,
    out: str | Path | None = None,
    tell: Progress | None = None,
) -> Result:
    """Makes a model smaller or faster, and measures what that did to its outputs.

    Args:
        model: an ``nn.Module``, an exported program (``torch.export``), an ONNX model, or a path; it is not
            modified. The result's ``model`` is of the same kind.
        budget: limits on the result; without one only exact rewrites are applied.
        calibration: representative inputs (``.npz`` keyed by input name, dicts, tensors, …).
        evaluation: other inputs, on which the drift is measured; by default the last fifth
            of the calibration samples is held out.
        passes: instead of ``low-rank`` and ``conv-low-rank``.
        out: publish the artefact and its reports here, all or nothing.
        tell: watches the progress.

    Raises:
        GateError: the result drifted too far, or is larger or slower; nothing was published.
        InfeasibleError: the budget cannot be met.
        InvalidInputError, UnsupportedError, UsageError: the model, the data or the call.
    """
    budget = budget or Budget()
    pipeline = Pipeline(_passes(passes, budget), budget, options or Options())
    return pipeline.run(model, calibration, evaluation, out=out, tell=tell)


def plan(
    model: Any,
    budget: Budget,
    *,
    calibration: Any = None,
    evaluation: Any = None,
    passes: Sequence[Pass] | None = None,
    options: Options | None = None,
    tell: Progress | None = None,
) -> Plan:
    """What :func:`optimize` would choose, as an object that is saved, loaded, and given to ``torch.compile``.

    ``torch.compile(model, backend="lrcompile", options={"plan": plan})`` computes with the plan's factors;
    the model itself is never changed.

    Args:
        evaluation: inputs that calibration does not see; the drift of the planned model is measured on
            them and has to pass the gate. Without them the plan is stamped unverified.

    Raises:
        GateError: the outputs drift too far on the evaluation data.
        InfeasibleError: the budget cannot be met.
        InvalidInputError, UnsupportedError, UsageError: the model, the data or the call.
    """
    return make(model, _passes(passes, budget), budget, options or Options(), calibration, evaluation, tell)


def _passes(passes: Sequence[Pass] | None, budget: Budget) -> Sequence[Pass]:
    if passes is not None:
        return passes
    return [load("passes", name)() for name in LOSSY] if budget.limited else []
