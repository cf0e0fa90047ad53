"""``torch.compile(model, backend="lrcompile")``: planned weights as factors, with Inductor behind.

See :func:`backend`.
"""

from __future__ import annotations

from typing import Any

from torch import fx


def backend(module: fx.GraphModule, inputs: list[Any], *, options: Any = None, mode: str | None = None) -> Any:
    """Compiles a graph that torch has captured; called by ``torch.compile``, not by users.

    Without options only exact passes are applied. With ``options={"plan": plan}`` the weights that the plan
    names are computed with their factors; the model is not changed. Where gradients are wanted the weights stay
    dense. See :data:`lrcompile.backends.dynamo.options.KNOWN` for all options.

    Raises:
        UsageError: an option that is unknown or of the wrong type, or a plan for another model.
        PlanRequired: ``keep`` was given, but only a part of the model is compiled.
    """
    from lrcompile.backends.dynamo.compile import compiled

    return compiled(module, inputs, options, mode)
