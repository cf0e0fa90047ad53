"""Without a plan: exact passes only, on every weight when it is first met."""

from __future__ import annotations

from torch import Tensor

from lrcompile.graphs.base import Replacement
from lrcompile.linop import Dense
from lrcompile.plans import Entry, apply_exact, matrix
from lrcompile.plans_state import State, Table, on_device, version
from lrcompile.registry import EXACT, load
from lrcompile.rewrite import Context, GraphPass
from lrcompile.sites import LinearSite, Use


class ExactTable(Table):
    """Weights and what exact passes make of each alone; without reference to any module."""

    def __init__(self) -> None:
        super().__init__(None)

    def _meet(self, weight: Tensor, kind: str) -> State:
        dtype = str(weight.dtype).removeprefix("torch.")
        entry = Entry("", (), kind, tuple(weight.shape), dtype, "")
        state = self._add(weight, entry, None)
        self._make(state, weight, entry)
        return state

    def _update(self, state: State, weight: Tensor) -> None:
        state.version, state.pointer = version(weight), weight.data_ptr()
        assert state.entry is not None
        self._make(state, weight, state.entry)

    def _make(self, state: State, weight: Tensor, entry: Entry) -> None:
        made = exact(weight, entry.kind)
        if isinstance(made, str):
            state.replacement, state.reason = None, made
        else:
            state.replacement, state.reason = on_device(made, weight.device), ""


def exact(weight: Tensor, kind: str) -> Replacement | str:
    """What the first exact pass that applies makes of a weight; else why none does."""
    site = LinearSite("weight", Dense(matrix(weight, kind)), (Use("use", "input"),))
    made: Replacement | str = "no exact pass applies"
    for name in EXACT:
        each = load("passes", name)()
        if isinstance(each, GraphPass):
            made = apply_exact(each, site, Context(None))  # type: ignore[arg-type] - one weight has no graph
            if not isinstance(made, str):
                break
    return made
