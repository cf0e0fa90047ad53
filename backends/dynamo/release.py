"""Giving back the dense values of weights that run as factors, without anybody reading them by accident later."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrcompile.errors import ReleasedError
from lrcompile.plans import Plan
from lrcompile.plans_state import State

if TYPE_CHECKING:
    from lrcompile.backends.dynamo.dispatch import Dispatcher

_FACTS = ("size", "dim", "stride", "numel", "nelement", "element_size", "is_floating_point", "is_complex")
_FACTS += ("ndimension", "get_device", "is_contiguous", "is_inference", "untyped_storage", "requires_grad_", "__hash__")
_VALUES = ("data", "T", "mT", "H", "mH", "real", "imag")


class Releasable(nn.Parameter):
    """A parameter whose values may be gone; whoever then reads them gets an error that says so.

    Parameters become of this class where they stand, so that every reference stays valid. It stays an ordinary
    parameter as long as it has its values, and in the eyes of ``torch.compile``.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.compiler.is_compiling() and not _is_fact(func):
            for value in _flat((args, kwargs or {})):
                if is_released(value):
                    name = getattr(value, "_lrcompile_site", "")
                    raise ReleasedError(
                        "its dense values were released; only its factors are left, in the compiled model",
                        where=name,
                        hint='load the model again to use it eagerly, or compile without options={"release": True}',
                    )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _is_fact(func: Any) -> bool:
    """Whether a function reads no values: shape, type, device and the like."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in _VALUES
    return name in _FACTS


def _flat(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [item for each in value for item in _flat(each)]
    if isinstance(value, dict):
        return [item for each in value.values() for item in _flat(each)]
    return [value]


def is_released(value: Any) -> bool:
    """Whether a tensor's values were given back."""
    return type(value) is Releasable and getattr(value, "_lrcompile_released", False)


class Releaser:
    """Releases the weights of a plan once code that does not need them has run.

    A weight stays that is tied, or held by a module or an optimiser that the plan does not speak about.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @staticmethod
    def prepare(plan: Plan, weights: Sequence[Tensor], kinds: Sequence[str]) -> None:
        """Turns all weights of the plan into releasable ones before torch makes its guards, which then hold for good.

        Those that stay dense too: torch looks at the class, and equal layers of different plans share one code.

        Args:
            weights, kinds: of the graph at hand; a plan that was loaded may not have met them yet.
        """
        with plan.table.lock:
            for weight, kind in zip(weights, kinds, strict=True):
                plan.table.state(weight, kind)
            for module in list(plan.modules):
                plan.table.meet(module)
        for state in list(plan.table.states.values()):
            weight = state.ref()
            if weight is not None and state.entry is not None and type(weight) is nn.Parameter:
                weight.__class__ = Releasable
                weight._lrcompile_site = state.entry.name  # type: ignore[attr-defined]

    def after(self, dispatcher: Dispatcher, weights: Sequence[Tensor], states: Sequence[State]) -> None:
        """Releases what the code that has just run does not read."""
        wanted = [
            (weight, state)
            for weight, state, each in zip(weights, states, dispatcher.marked, strict=True)
            if each.whole and state.replacement is not None and not state.released and type(weight) is Releasable
        ]
        if not wanted:
            return
        others = _other_holders([weight for weight, _ in wanted], self.plan)
        if not self.plan.modules:  # found by content: nothing says where else the model reads them
            others = {id(weight): "plan.bind(model) tells whose they are" for weight, _ in wanted}
        for weight, state in wanted:
            if id(weight) in others:
                self._say(state, f"compressed, dense values kept: {others[id(weight)]}")
            else:
                _drop(weight)
                state.released = True
                self._say(state, "compressed, dense values released")
        self.plan.table.generation += 1

    def _say(self, state: State, text: str) -> None:
        if state.entry is not None:
            self.plan.table.running[state.entry.name] = text


def _drop(weight: Tensor) -> None:
    with torch.no_grad():
        empty = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
        empty.untyped_storage().resize_(0)
        weight.data = empty
    weight._lrcompile_released = True  # type: ignore[attr-defined]


def _other_holders(weights: Sequence[Tensor], plan: Plan) -> dict[int, str]:
    """By ``id`` of a weight: who holds it beside the planned places."""
    gc.collect()
    names = {name for entry in plan.entries.values() for name in entry.parameters}
    planned: dict[int, set[tuple[int, str]]] = {}
    for module in plan.modules:
        for path, holder in module.named_modules(remove_duplicate=False):
            for last, parameter in holder._parameters.items():
                if f"{path}.{last}".lstrip(".") in names:
                    planned.setdefault(id(parameter), set()).add((id(holder), last))
    wanted = {id(weight) for weight in weights}
    found: dict[int, str] = {}
    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, nn.Module):
            for name, value in getattr(thing, "_parameters", {}).items():
                if id(value) in wanted and (id(thing), name) not in planned.get(id(value), ()):
                    found[id(value)] = f"also held by a {kind.__name__}"
        elif issubclass(kind, torch.optim.Optimizer):
            for group in thing.param_groups:
                found.update({id(p): f"held by a {kind.__name__}" for p in group["params"] if id(p) in wanted})
    return found
