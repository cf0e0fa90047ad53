"""Which regions are worth it, in how many tiles: the highest peak first, until it cannot be lowered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from lrcompile.graphs.onnx.tiling.grow import Grower, Region
from lrcompile.graphs.onnx.tiling.memory import Lives, Readers, execution
from lrcompile.graphs.onnx.tiling.sizes import Size, Sizes, static

COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SEEDS = 4
"""Values, the largest ones alive at a peak, that regions are grown from."""
SHARE = 0.125
"""Values below this share of the peak may share memory as the runtime likes."""
WORTH = 0.97
"""A region is taken where what it leaves is below this share of the peak."""
SLACK = 1.05
"""Fewer tiles are better than the last few percent."""


@dataclass(frozen=True, eq=False)
class Tiled:
    """A region in so many tiles.

    Args:
        peak: bytes alive at once while it is computed.
        work: nodes that it becomes.
    """

    region: Region
    count: int
    peak: int
    work: int


@dataclass(eq=False)
class Choice:
    """What was chosen.

    Attributes:
        plans: ways to cut, the one with the fewest nodes first; which is best depends on the runtime.
        before, after: bytes alive at once, if every value lived no longer than it is needed.
        reason: why it is not lower.
    """

    plans: list[list[Tiled]] = field(default_factory=list)
    before: int = 0
    after: int = 0
    reason: str = ""


def _even(count: int, rows: Size) -> int:
    """As many tiles as are not empty."""
    return -(-rows[0] // -(-rows[0] // count)) if static(rows) else count


class Chooser:
    """Chooses regions and tile counts for a graph.

    Args:
        limit: bytes that are low enough; 0 for as low as it goes.
        most: tiles of a region.
    """

    def __init__(self, graph: ir.Graph, sizes: Sizes, *, limit: int = 0, most: int = 16) -> None:
        self.sizes, self.limit, self.most = sizes, limit, most
        readers = Readers(graph)
        self.lives = Lives(execution(graph, readers), sizes, readers)
        self.grower = Grower(self.lives, sizes)
        self.plain = self.lives.bytes()
        self._needs: dict[Region, tuple[int, int, int, int]] = {}

    def run(self) -> Choice:
        """Plans that are about as low as the lowest found."""
        choice = Choice(before=max(self.plain, default=0))
        fronts: list[list[Tiled]] = []
        chosen: list[Tiled] = []
        levels = list(self.plain)
        while max(levels, default=0) > self.limit:
            step = levels.index(max(levels))
            node = self.lives.order[step]
            if node in self.grower.taken:
                choice.reason = self._bound(next(each for each in chosen if node in each.region.members))
                break
            front = self._front(step, max(levels))
            if not front:
                choice.reason = self._stuck(step)
                break
            fronts.append(front)
            chosen.append(front[-1])
            self.grower.taken |= front[-1].region.members
            levels = self._levels(chosen)
        if not chosen:
            choice.reason = choice.reason or "its values are constants, or their shapes depend on the data"
            return choice
        few = self._relaxed(list(chosen), fronts, max(max(levels, default=0) * SLACK, self.limit))
        choice.after = max(self._levels(few), default=0)
        limit = max(choice.after, self.limit)
        few = [*few, *self._shared(few, limit)]
        choice.plans = [few, [self._finest(each) for each in few]]
        if not self.limit:
            choice.plans.append([*chosen, *self._shared(chosen, limit)])
        return choice

    def _finest(self, each: Tiled) -> Tiled:
        """The same region in as many tiles as are allowed."""
        count = _even(min(self.most, each.region.rows[0]), each.region.rows)
        return Tiled(each.region, count, self._peak(each.region, count), self._work(each.region, count))

    def _shared(self, chosen: Sequence[Tiled], limit: int) -> Iterator[Tiled]:
        """Regions around large values of equal shapes that are still whole.

        ONNX Runtime gives the memory of one to the next and keeps it in between, so they are alive longer than they are
        needed.
        """
        self.grower.taken = {node for each in chosen for node in each.region.nodes}
        groups: dict[object, list[ir.Value]] = {}
        for node in self.lives.order:
            for value in node.outputs:
                if self.sizes.nbytes(value) > limit * SHARE and not value.is_graph_output():
                    groups.setdefault(self.sizes.of(value), []).append(value)
        for values in groups.values():
            for value in values if len(values) > 1 else ():
                tiled = None if value.producer() in self.grower.taken else self._around(value, limit)
                if tiled is not None:
                    self.grower.taken |= tiled.region.members
                    yield tiled

    def _around(self, value: ir.Value, limit: int) -> Tiled | None:
        """The smallest region that has a value inside, in tiles that are small."""
        size = self.sizes.nbytes(value)
        for seed in self.grower.seeds(value):
            for region in self.grower.steps(seed):
                ends = max(self.sizes.nbytes(each) for each in (*region.cut, *region.outputs))
                count = next((each for each in COUNTS if size <= each * limit * SHARE), COUNTS[-1])
                count = _even(min(count, self.most, region.rows[0]), region.rows)
                if value not in region.outputs and 2 * ends <= size and self._peak(region, count) <= limit:
                    return Tiled(region, count, self._peak(region, count), self._work(region, count))
        return None

    def _levels(self, chosen: Sequence[Tiled]) -> list[int]:
        """Live bytes at every step, with these regions in tiles."""
        levels = list(self.plain)
        for each in chosen:
            steps = [self.lives.at[node] for node in each.region.nodes]
            inner = [value for node in each.region.nodes for value in node.outputs if value not in each.region.outputs]
            for value in inner:
                first, last = self.lives.span(value)
                if self.lives.roots.get(value) is value:
                    for step in range(first, min(last, len(levels) - 1) + 1):
                        levels[step] -= self.sizes.nbytes(value) * (each.count - 1) // each.count
            for step in steps:
                levels[step] = each.peak
        return levels

    def _front(self, step: int, now: int) -> list[Tiled]:
        """Tiled regions around a step that lower its peak, fewer nodes and a higher peak first; none is beaten."""
        found = [tiled for region in self._regions(step) for tiled in self._tilings(region) if tiled.peak < WORTH * now]
        front: list[Tiled] = []
        for each in sorted(found, key=lambda each: (each.peak, each.work)):
            if not front or each.work < front[-1].work:
                front.append(each)
        return front[::-1]

    def _regions(self, step: int) -> Iterator[Region]:
        node = self.lives.order[step]
        values = [value for value in self.lives.alive(step) if value.producer() is not None][:SEEDS]
        for value in dict.fromkeys([*node.outputs, *values]):
            for seed in self.grower.seeds(value):
                for region in self.grower.steps(seed):
                    if node in region.members:
                        yield region

    def _tilings(self, region: Region) -> Iterator[Tiled]:
        for count in COUNTS:
            if count <= min(region.rows[0], self.most) and count == _even(count, region.rows):
                yield Tiled(region, count, self._peak(region, count), self._work(region, count))

    def _work(self, region: Region, count: int) -> int:
        return count * (len(region.nodes) + len(region.cut)) + len(region.outputs)

    # -- memory of one region -----------------------------------------------------------------

    def _peak(self, region: Region, count: int) -> int:
        """Bytes alive at once while the region is computed in tiles, everything around it included."""
        if region not in self._needs:
            self._needs[region] = self._need(region)
        around, parts, inner, joined = self._needs[region]
        return max(around + parts * (count - 1) // count + inner // count, joined)

    def _need(self, region: Region) -> tuple[int, int, int, int]:
        """Bytes beside the tiles, of all outputs, inside a tile that has all rows, and when the outputs are joined."""
        lives, nbytes = self.lives, self.sizes.nbytes
        steps = [lives.at[node] for node in region.nodes]
        first, last = min(steps), max(steps)
        ends = (value for value in (*region.cut, *region.whole) if not self.sizes.constant(value))
        inputs = {root for root in (lives.roots.get(value, value) for value in ends) if root in lives.spans}
        own = inputs | {lives.roots.get(value, value) for node in region.nodes for value in node.outputs}
        through = sum(
            nbytes(value)
            for value in lives.table[first]
            if lives.spans[value][0] < first and lives.spans[value][1] > last and value not in own
        )
        kept = sum(nbytes(value) for value in inputs if lives.spans[value][1] > last)
        parts = [nbytes(value) for value in region.outputs]
        joined = through + kept + sum(parts) + max(parts)
        return through + sum(map(nbytes, inputs)), sum(parts), self._inner(region), joined

    def _inner(self, region: Region) -> int:
        """Bytes alive at once inside a single tile that has all rows."""
        last: dict[ir.Value, int] = {}
        for at, node in enumerate(region.nodes):
            for value in node.inputs:
                if value is not None and value in region.axes:
                    last[value] = at
        live, most, begun = 0, 0, set()
        for at, node in enumerate(region.nodes):
            new = [value for value in (*node.inputs, *node.outputs) if value in region.axes and value not in begun]
            begun.update(value for value in new if value is not None)
            live += sum(self.sizes.nbytes(value) for value in dict.fromkeys(new) if value is not None)
            most = max(most, live)
            ends = {value for value in (*node.inputs, *node.outputs) if value is not None and value in region.axes}
            live -= sum(
                self.sizes.nbytes(value) for value in ends if last.get(value, at) <= at and value not in region.outputs
            )
        return most

    # -- the end --------------------------------------------------------------------------------

    def _relaxed(self, chosen: list[Tiled], fronts: Sequence[Sequence[Tiled]], limit: float) -> list[Tiled]:
        """Every region as cheap as the limit allows, or left out."""
        for at in range(len(chosen)):
            for each in (None, *fronts[at]):
                trial = [*chosen[:at], *([each] if each is not None else []), *chosen[at + 1 :]]
                if max(self._levels([one for one in trial if one.count > 1]), default=0) <= limit:
                    chosen[at] = each or Tiled(chosen[at].region, 1, 0, 0)
                    break
        return [each for each in chosen if each.count > 1]

    def _bound(self, tiled: Tiled) -> str:
        region = tiled.region
        names = [
            str(value.name) for value in (*region.cut, *region.whole, *region.outputs) if not self.sizes.constant(value)
        ]
        return f"every tile of {region.outputs[-1].name} needs {', '.join(names[:6])} beside its own rows"

    def _stuck(self, step: int) -> str:
        alive = self.lives.alive(step)[:3]
        told = []
        for value in alive:
            why = "an output" if value.is_graph_output() else self.grower.refusals.get(str(value.name))
            told.append(f"{value.name} ({self.sizes.nbytes(value):,} B{': ' + why if why else ''})")
        return f"at {self.lives.order[step].op_type} {self.lives.order[step].outputs[0].name}: {'; '.join(told)}"
