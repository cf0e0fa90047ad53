"""The compiler behind: Inductor, or another one, for the graph that the factors have been put into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

Compiled = Callable[..., Any]
Compiler = Callable[[fx.GraphModule, list[Any]], Compiled]


def compiler(inner: str | Compiler, mode: str | None, settings: dict[str, Any]) -> Compiler:
    """What compiles a graph: by the name of a torch backend, or a function of (graph module, inputs)."""
    if not isinstance(inner, str):
        return inner
    if inner != "inductor":
        return torch._dynamo.lookup_backend(inner)

    def inductor(module: fx.GraphModule, inputs: list[Any]) -> Any:
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = {**(list_mode_options(mode) if mode else {}), **settings}
        return compile_fx(module, inputs, config_patches=patches or None)

    return inductor


def compile_now(build: Compiler, module: fx.GraphModule, inputs: Sequence[Any], leaves: Sequence[Any]) -> Compiled:
    """Compiles while torch captures: what this demands of sizes becomes part of torch's guards."""
    context = TracingContext.try_get()
    mode = None if context is None else context.fake_mode
    if mode is not None:  # real leaves would get symbolic sizes that nothing gives a value to
        leaves = [mode.from_tensor(leaf, static_shapes=True) for leaf in leaves]
    return build(module, [*inputs, *leaves])


def compile_later(
    build: Compiler, module: fx.GraphModule, inputs: Sequence[Any], leaves: Sequence[Any], given: Sequence[Any]
) -> Compiled:
    """Compiles at run time, when torch has made its guards: with the sizes as they were captured.

    Where that would demand more of the sizes than torch checks, ``torch.compile`` checks it at every call.

    Args:
        inputs: fake ones, as they were captured.
        given: those of this call.
    """
    mode = next((value.fake_mode for value in inputs if isinstance(value, FakeTensor)), None) or FakeTensorMode()
    known = _demands(mode)
    with tracing(TracingContext(mode)):
        fakes = [mode.from_tensor(leaf, static_shapes=True) for leaf in leaves]
        compiled = build(module, [*inputs, *fakes])
    if _demands(mode) == known:
        return compiled
    return torch.compile(module, backend=build, fullgraph=True)


def _demands(mode: FakeTensorMode) -> int:
    sizes = mode.shape_env
    return 0 if sizes is None else len(sizes.guards) + len(sizes.replacements) + len(sizes.axioms)
