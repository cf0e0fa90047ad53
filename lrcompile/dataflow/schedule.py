"""A schedule: which stages are written to memory, by which nests, over which other buffers, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lrcompile.dataflow.nest import Nest
from lrcompile.dataflow.planner import ALIGN, Layout, Request, bound, exact
from lrcompile.dataflow.program import Slot
from lrcompile.dataflow.scratch import Pieces, Scratch
from lrcompile.dataflow.stage import Formulas


@dataclass(frozen=True, eq=False)
class Step:
    """A stage that is written to memory.

    Args:
        nests: one for each of its parts, in order.
        over: the stage whose memory it takes over, element by element.
    """

    stage: str
    nests: tuple[Nest, ...]
    over: str | None = None


@dataclass(eq=False)
class Schedule:
    """Steps in order of execution, with the memory that they need.

    Args:
        stack: bytes that the pieces of a nest may take on the stack.
    """

    formulas: Formulas
    steps: Sequence[Step]
    stack: int = 2048
    notes: list[str] = field(default_factory=list)

    @cached_property
    def nests(self) -> list[Nest]:
        """All nests in order of execution; a nest's number is its time."""
        return [nest for step in self.steps for nest in step.nests]

    @cached_property
    def pieces(self) -> list[Pieces]:
        """The inner memory of each nest."""
        return [Scratch(nest).pieces(self.stack) for nest in self.nests]

    @property
    def work(self) -> float:
        """Estimated instructions."""
        return sum(nest.work for nest in self.nests)

    @cached_property
    def owners(self) -> dict[str, str]:
        """Stage → the first stage of the chain whose memory it has."""
        found: dict[str, str] = {}
        for step in self.steps:
            found[step.stage] = found[step.over] if step.over is not None else step.stage
        return found

    @cached_property
    def requests(self) -> dict[str, Request]:
        """Buffer of the arena → size and lifetime. Outputs belong to the caller."""
        spans: dict[str, tuple[int, int]] = {}
        time = 0
        for step in self.steps:
            first, time = time, time + len(step.nests)
            _extend(spans, step.stage, first, time - 1)
            for at, nest in enumerate(step.nests):
                for node in nest.root.nodes():
                    for load in node.part.loads():
                        if load.tensor in self.formulas.stages and load.tensor not in node.sources:
                            _extend(spans, load.tensor, first + at, first + at)
        merged: dict[str, tuple[int, int]] = {}
        for name, (first, last) in spans.items():
            _extend(merged, self.owners[name], first, last)
        outputs = {self.owners[name] for name in self.formulas.outputs}
        found = {
            name: Request(_aligned(self.formulas.stages[name].nbytes), *span)
            for name, span in merged.items()
            if name not in outputs
        }
        for at, piece in enumerate(self.pieces):
            if piece.arena:
                found[f"pieces of {self.nests[at].root.name}#{at}"] = Request(_aligned(piece.arena), at, at)
        return found

    @cached_property
    def layout(self) -> Layout:
        """Offsets of all buffers of the arena, in the order of :attr:`requests`."""
        return exact(list(self.requests.values()))

    @property
    def arena(self) -> int:
        return self.layout.size

    @property
    def bound(self) -> int:
        """Bytes that are alive at once: the least that this order needs."""
        return bound(list(self.requests.values()))

    @property
    def peak(self) -> tuple[str, list[tuple[str, int]]]:
        """The nest during which most bytes are alive, and what they are, the largest first."""
        best: tuple[int, int] = (-1, 0)
        for at in range(len(self.nests)):
            live = sum(each.size for each in self.requests.values() if each.first <= at <= each.last)
            best = max(best, (live, -at))
        at = -best[1]
        found = [(name, each.size) for name, each in self.requests.items() if each.first <= at <= each.last]
        nodes = self.nests[at].root.part.nodes if self.nests else ()
        return ", ".join(nodes[-2:]), sorted(found, key=lambda item: -item[1])

    @property
    def scratch(self) -> int:
        """Bytes that pieces take on the stack, at most."""
        return max((piece.stack for piece in self.pieces), default=0)

    @cached_property
    def slots(self) -> Mapping[str, Slot]:
        """Buffer → where it lies and when."""
        return {
            name: Slot(name, offset, each.size, each.first, each.last)
            for (name, each), offset in zip(self.requests.items(), self.layout.offsets, strict=True)
        }

    def offset(self, stage: str) -> int | None:
        """Where a stage lies in the arena, None where the caller owns its memory."""
        slot = self.slots.get(self.owners[stage])
        return None if slot is None else slot.offset


def _aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


def _extend(spans: dict[str, tuple[int, int]], name: str, first: int, last: int) -> None:
    old = spans.get(name, (first, last))
    spans[name] = min(old[0], first), max(old[1], last)


def plain(formulas: Formulas) -> Schedule:
    """Every stage to memory, one after the other: what can be done without a search."""
    steps = [
        Step(name, tuple(Nest(formulas, stage, part, {}, (), 1) for part in stage.parts))
        for name, stage in formulas.stages.items()
    ]
    return Schedule(formulas, steps)
