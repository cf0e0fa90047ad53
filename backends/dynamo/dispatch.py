"""What a captured graph runs as: code for the factors of exactly those weights that come in.

Torch shares captured code between modules of equal shapes, so nothing of a weight may be built in. At every call
the weights say which factors belong to them; these go in as inputs of code that only knows their structure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

from torch import Tensor, fx

from lrcompile.backends.dynamo.graph import Form, Leaves, Marked, copied, rewrite
from lrcompile.backends.dynamo.inner import Compiled, Compiler, compile_later, compile_now
from lrcompile.errors import ReleasedError, warn_once
from lrcompile.plans_state import State, Table

_REFERENCES = ("get_attr", "call_module")
_versions = attrgetter("_version")
_Pick = Callable[[Sequence[Any]], tuple[Any, ...]]


def picker(indices: Sequence[int]) -> _Pick:
    """A function that takes these items out of a sequence, as a tuple."""
    if not indices:
        return lambda values: ()
    if len(indices) == 1:
        only = indices[0]
        return lambda values: (values[only],)
    return itemgetter(*indices)


class Binding:
    """Weights that came in together, and the code and factors that stand for them."""

    __slots__ = ("_checked", "_ids", "_keep", "_leaves", "_pointers", "_run", "_seen", "generation")

    def __init__(
        self,
        table: Table,
        weights: Sequence[Tensor],
        states: Sequence[State],
        run: Compiled,
        keep: _Pick,
        leaves: Sequence[Tensor],
    ) -> None:
        checked = [i for i, s in enumerate(states) if s.replacement is not None and not s.released]
        self._ids = tuple(map(id, weights))
        self._checked = picker(checked)
        self._seen: tuple[int, ...] | None = tuple(states[i].version for i in checked)
        self._pointers = tuple(states[i].pointer for i in checked)
        if any(weights[i].is_inference() for i in checked):  # these count no writes
            self._seen = None
        self._run, self._keep, self._leaves = run, keep, tuple(leaves)
        self.generation = table.generation

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are the very same weights, unchanged. About 0.15 µs for each of them."""
        if tuple(map(id, weights)) != self._ids:
            return False
        checked = self._checked(weights)
        return tuple(map(Tensor.data_ptr, checked)) == self._pointers and (
            self._seen is None or tuple(map(_versions, checked)) == self._seen
        )

    def __call__(self, args: Sequence[Any]) -> Any:
        return self._run(*self._keep(args), *self._leaves)


class Dispatcher:
    """A captured graph with linear weights; called as torch calls compiled code.

    Args:
        graph: what torch captured; it is copied.
        inputs: of this first call; for the weights the real parameters.
        build: compiles a graph once its factors are inputs.
        after: told of every new binding, with its weights and states, once it has run.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Sequence[Any],
        marked: Sequence[Marked],
        table: Table,
        build: Compiler,
        after: Callable[[Dispatcher, Sequence[Tensor], Sequence[State]], None] | None = None,
    ) -> None:
        self.marked = list(marked)
        self.table = table
        self._build, self._after = build, after
        self._graph = copied(module.graph)
        self._parts = {str(n.target): _part(module, str(n.target)) for n in self._graph.nodes if n.op in _REFERENCES}
        self._weights = picker([each.index for each in marked])
        self._bindings: dict[int, Binding] = {}
        self._generation = table.generation
        self._variants: dict[tuple[Form | None, ...], tuple[Compiled, _Pick]] = {}
        self._fakes: list[Any] = [node.meta.get("example_value") for node in module.graph.find_nodes(op="placeholder")]
        with table.lock:
            self._bind(inputs, self._weights(inputs), first=True)
        self._bindings.clear()  # the first call binds again, to be told when it has run

    @property
    def variants(self) -> int:
        """How often the graph was compiled."""
        return len(self._variants)

    def __call__(self, *args: Any) -> Any:
        weights = self._weights(args)
        binding = self._bindings.get(id(weights[0]))
        if binding is not None and binding.generation == self.table.generation and binding.holds(weights):
            return binding(args)
        return self._slowly(args, weights)

    def _slowly(self, args: Sequence[Any], weights: Sequence[Tensor]) -> Any:
        with self.table.lock:
            binding = self._bind(args, weights)
        result = binding(args)
        if self._after is not None:
            with self.table.lock:
                self._after(self, weights, self._states(weights))
        return result

    # -- what stands for the weights -----------------------------------------------------------

    def _bind(self, args: Sequence[Any], weights: Sequence[Tensor], *, first: bool = False) -> Binding:
        if self._generation != self.table.generation:
            self._bindings.clear()
        states = self._states(weights)
        self._generation = self.table.generation
        leaves = Leaves()
        forms = tuple(self._form(each, state, leaves) for each, state in zip(self.marked, states, strict=True))
        if forms not in self._variants:
            self._variants[forms] = self._variant(forms, leaves.tensors, args, first)
        run, keep = self._variants[forms]
        binding = self._bindings[id(weights[0])] = Binding(self.table, weights, states, run, keep, leaves.tensors)
        self._tell(states)
        return binding

    def _states(self, weights: Sequence[Tensor]) -> list[State]:
        return [self.table.state(weight, each.kind) for weight, each in zip(weights, self.marked, strict=True)]

    def _form(self, each: Marked, state: State, leaves: Leaves) -> Form | None:
        fits = state.entry is not None and state.entry.kind == each.kind
        if state.released and not (fits and each.whole):
            raise ReleasedError("its dense values were released, and this code reads them", where=_name(state, each))
        if state.replacement is None or not fits:
            return None
        return leaves.form(state.replacement.operator, state.replacement.shift)

    def _variant(
        self, forms: Sequence[Form | None], leaves: Sequence[Tensor], args: Sequence[Any], first: bool
    ) -> tuple[Compiled, _Pick]:
        graph = copied(self._graph)
        before = [node.name for node in graph.find_nodes(op="placeholder")]
        rewrite(graph, self.marked, forms, leaves)
        left = {node.name for node in graph.find_nodes(op="placeholder")}
        keep = picker([index for index, name in enumerate(before) if name in left])
        module = fx.GraphModule(self._parts, graph)
        if first:
            return compile_now(self._build, module, keep(args), leaves), keep
        return compile_later(self._build, module, keep(self._fakes), leaves, keep(args)), keep

    def _tell(self, states: Sequence[State]) -> None:
        """Writes into the plan what runs now, and warns of weights that it does not know."""
        running = self.table.running
        for each, state in zip(self.marked, states, strict=True):
            if state.entry is None:
                warn_once(
                    self.table,
                    f"{each.source} stays dense: {state.reason}; make a new plan if it should be compressed",
                    key="unplanned",
                )
            elif state.replacement is not None and state.entry.kind == each.kind:
                running[_name(state, each)] = "compressed, dense values released" if state.released else "compressed"
            else:
                running[_name(state, each)] = f"dense: {state.reason or 'stays as it is'}"


def _name(state: State, each: Marked) -> str:
    return each.source if state.entry is None else state.entry.name or each.source


def _part(module: fx.GraphModule, target: str) -> Any:
    found: Any = module
    for name in target.split("."):
        found = getattr(found, name)
    return found
