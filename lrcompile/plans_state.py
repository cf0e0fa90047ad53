"""What stands for each weight right now: looked up by identity, checked, and made again when the weight changed."""

from __future__ import annotations

import dataclasses
import logging
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lrcompile.errors import warn_once
from lrcompile.graphs.base import Replacement
from lrcompile.linop import LinearOperator, map_leaves, tensors
from lrcompile.linop.tree import own_tensors

if TYPE_CHECKING:
    from lrcompile.plans import Entry, Plan

log = logging.getLogger("lrcompile")
_tables: weakref.WeakSet[Table] = weakref.WeakSet()


def refresh(model: nn.Module) -> int:
    """Says that weights of a module were changed in a way that torch cannot see (``p.data.add_(…)``, numpy, DLPack).

    Every plan factorises them anew at the next call of compiled code. Returns the number of weights that it concerns.
    """
    wanted = {id(parameter) for parameter in model.parameters()}
    return sum(table.outdate(wanted) for table in list(_tables))


@dataclass(eq=False)
class State:
    """What stands for one weight.

    Attributes:
        replacement: on the weight's device; None while it stays dense.
        version, pointer: of the weight that it was made from.
        reason: why the weight stays dense.
        released: the dense values were given back.
    """

    ref: weakref.ref[Tensor]
    entry: Entry | None
    replacement: Replacement | None = None
    version: int = -1
    pointer: int = 0
    reason: str = ""
    released: bool = False

    def fresh(self, weight: Tensor) -> bool:
        """Whether the weight is still the one that the expression was made from."""
        if self.ref() is not weight:
            return False
        return self.released or (self.version == version(weight) and self.pointer == weight.data_ptr())


def version(weight: Tensor) -> int:
    """Counts writes to a tensor; tensors of inference mode have no counter."""
    return -1 if weight.is_inference() else weight._version


class Table:
    """The states of all weights that compiled graphs of one plan have met.

    Attributes:
        generation: changes whenever something that was looked up may no longer hold.
        lock: held while anything is looked up or made.
        refits: how often a changed weight was factorised anew.
        running: by site, how the code that ran last computes it.
    """

    def __init__(self, plan: Plan | None) -> None:
        self._plan = None if plan is None else weakref.ref(plan)
        self.states: dict[int, State] = {}
        self.generation = 0
        self.lock = threading.RLock()
        self.refits = 0
        self.running: dict[str, str] = {}
        _tables.add(self)

    @property
    def plan(self) -> Plan:
        found = None if self._plan is None else self._plan()
        assert found is not None, "a table lives as long as its plan"
        return found

    def know(self, model: nn.Module) -> None:
        """Takes the weights of a module as those that the plan was made from."""
        for name, parameter in model.named_parameters(remove_duplicate=False):
            entry = self._by_name().get(name)
            if entry is not None and id(parameter) not in self.states:
                self._add(parameter, entry, entry.replacement)

    def meet(self, model: nn.Module) -> None:
        """Looks up all planned weights of a module; call it under :attr:`lock`."""
        wanted = self._by_name()
        for name, parameter in model.named_parameters(remove_duplicate=False):
            entry = wanted.get(name)
            if entry is not None:
                self.state(parameter, entry.kind)

    def forget(self) -> None:
        """Looks up everything anew that was not found so far."""
        with self.lock:
            self.states = {key: state for key, state in self.states.items() if state.entry is not None}
            self.generation += 1

    def outdate(self, wanted: set[int]) -> int:
        """Marks weights (by ``id``) as changed; returns how many of them the plan compresses."""
        with self.lock:
            stale = [s for key, s in self.states.items() if key in wanted and s.replacement is not None]
            for state in stale:
                state.pointer = -1
            self.generation += 1
            return sum(not state.released for state in stale)

    def state(self, weight: Tensor, kind: str) -> State:
        """What stands for a weight; call it under :attr:`lock`.

        Args:
            kind: how the graph reads the weight: ``Linear``, ``Conv1D`` or ``Conv``.

        Raises:
            UsageError: the weight has changed its shape or type since it was planned.
        """
        found = self.states.get(id(weight))
        if found is None or found.ref() is not weight:
            found = self._meet(weight, kind)
        elif not found.fresh(weight):
            self._update(found, weight)
        return found

    # -- looking up ------------------------------------------------------------------------

    def _by_name(self) -> dict[str, Entry]:
        return {name: entry for entry in self.plan.entries.values() for name in entry.parameters}

    def _meet(self, weight: Tensor, kind: str) -> State:
        entry = self.entry_of(weight, kind)
        if entry is None:
            return self._add(weight, None, None, "it is not in the plan")
        return self._adopt(weight, entry)

    def entry_of(self, weight: Tensor, kind: str) -> Entry | None:
        """The entry of a weight that was not met before: by its name in a module, else by its content."""
        wanted = self._by_name()
        for module in list(self.plan.modules):
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if parameter is weight:
                    return wanted.get(name)
        return None if self.plan.modules else self._by_content(weight, kind)

    def _by_content(self, weight: Tensor, kind: str) -> Entry | None:
        from lrcompile.plans import content

        dtype = str(weight.dtype).removeprefix("torch.")
        alike = [e for e in self.plan.entries.values() if (e.shape, e.dtype, e.kind) == (weight.shape, dtype, kind)]
        if not alike:
            return None
        digest = content(weight)
        return next((entry for entry in alike if entry.sha256 == digest), None)

    def _adopt(self, weight: Tensor, entry: Entry) -> State:
        """A weight under a planned name that may hold other values than the planned one did."""
        from lrcompile.plans import check_fits

        check_fits(entry, weight, entry.name)
        if entry.replacement is None:
            return self._add(weight, entry, None)
        state = self._add(weight, entry, None)
        self._refit(state, weight, entry)
        return state

    def _add(self, weight: Tensor, entry: Entry | None, by: Replacement | None, reason: str = "") -> State:
        key = id(weight)
        ref = weakref.ref(weight, lambda _: self._gone(key))
        moved = None if by is None else on_device(by, weight.device)
        reason = reason or (entry.reason if entry is not None else "")
        state = self.states[key] = State(ref, entry, moved, version(weight), weight.data_ptr(), reason)
        return state

    def _gone(self, key: int) -> None:
        self.states.pop(key, None)
        self.generation += 1

    # -- changes ---------------------------------------------------------------------------

    def _update(self, state: State, weight: Tensor) -> None:
        """The weight was written to, moved, or said to be changed."""
        from lrcompile.plans import check_fits

        entry = state.entry
        state.version, state.pointer = version(weight), weight.data_ptr()
        if entry is not None and entry.replacement is not None:
            check_fits(entry, weight, entry.name)
            self._refit(state, weight, entry)

    def _refit(self, state: State, weight: Tensor, entry: Entry) -> None:
        from lrcompile.plans import content

        if entry.replacement is not None and content(weight) == entry.sha256:  # an adapter was taken out again
            state.replacement, state.reason = on_device(entry.replacement, weight.device), ""
            return
        made = self.plan.refit(entry, weight)
        if isinstance(made, str):
            state.replacement, state.reason = None, made
            warn_once(
                self,
                f"{entry.name} has changed and stays dense: {made}; make a new plan with lrcompile.plan",
                key=entry.name,
            )
            return
        self.refits += 1
        log.info("%s has changed: factorised anew (%s)", entry.name, entry.recipe and entry.recipe.label)
        state.replacement, state.reason = on_device(made, weight.device), ""


def on_device(by: Replacement, device: torch.device) -> Replacement:
    """A replacement whose tensors lie on a device."""

    def move(leaf: LinearOperator) -> LinearOperator:
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in own_tensors(leaf)}
        if all(tensor is getattr(leaf, name) for name, tensor in moved.items()):
            return leaf
        return dataclasses.replace(leaf, **moved)  # type: ignore[type-var]

    if all(tensor.device == device for _, tensor in tensors(by.operator)):
        return by
    return Replacement(map_leaves(by.operator, move), None if by.shift is None else by.shift.to(device))
