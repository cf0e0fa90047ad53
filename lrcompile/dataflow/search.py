"""Which stages to write to memory, and which to compute inside the loops of others.

Stages are decided in their order: written to memory, or computed inside the nests of those that read them. A state is
what is in memory and what waits to be computed inside; of states that look alike only those survive that no other one
beats in memory and work.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lrcompile.dataflow.blocking import work
from lrcompile.dataflow.options import Option, Options
from lrcompile.dataflow.planner import ALIGN
from lrcompile.dataflow.schedule import Schedule, Step
from lrcompile.dataflow.stage import Formulas, Stage

BEAM = 6
MOST = 18  # stages that one nest computes
ALIKE = 3  # states with the same future that are kept
REFINED = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
"""Sizes of pieces that the chosen nests are tried with."""


@dataclass(frozen=True, eq=False)
class _State:
    """A decision for each stage so far.

    Args:
        live: stages in memory that are still needed.
        waiting: stages to be computed inside, and whether a nest has done so already.
        peak: most bytes so far.
        work: instructions so far, what waits counted once.
    """

    live: frozenset[str]
    waiting: tuple[tuple[str, bool], ...]
    peak: int
    work: float
    before: _State | None = None
    step: tuple[str, Option, str | None] | None = None


class Search:
    """Schedules formulas under a limit of memory.

    Args:
        limit: bytes of arena and pieces together; None asks for the least work.
    """

    def __init__(self, formulas: Formulas, limit: int | None = None, options: Options | None = None) -> None:
        self.formulas, self.limit = formulas, limit
        self.options = options or Options(formulas)
        self.strict = False  # whether to drop at once what is above the limit
        self.order = list(formulas.stages)
        self.place = {name: at for at, name in enumerate(self.order)}
        self.readers = formulas.readers()
        self.base = {name: sum(work(part) for part in stage.parts) for name, stage in formulas.stages.items()}

    def run(self) -> Schedule:
        """The schedule of least work under the limit; without one that fits, the smallest found."""
        for self.strict in (self.limit is not None, False):
            states = [_State(frozenset(), (), 0, 0.0)]
            for at, name in enumerate(self.order):
                states = self._kept([new for state in states for new in self._next(state, name, at)])
            if states:
                break
        return self._schedule(min(states, key=self._rank))

    def _rank(self, state: _State) -> tuple[float, float, float]:
        over = 0 if self.limit is None else max(state.peak - self.limit, 0)
        return over, state.work, state.peak

    # -- one stage ------------------------------------------------------------------------------

    def _next(self, state: _State, name: str, at: int) -> Iterable[_State]:
        stage = self.formulas.stages[name]
        if len(state.waiting) < MOST and len(stage.parts) == 1 and name not in self.formulas.outputs:
            waiting = (*state.waiting, (name, False))
            yield _State(state.live, waiting, state.peak, state.work + self.base[name], state)
        inside = self._inside(state, name)
        if inside is None:
            return
        after = self._after(state, inside, at)
        if after is None:
            return
        live = frozenset(each for each in (*state.live, name) if self._needed(each, at, after))
        dying = [each for each in state.live if each not in live]
        held = sum(_size(self.formulas.stages[each]) for each in state.live - set(self.formulas.outputs))
        room = None if not self.strict or self.limit is None else self.limit - held
        if room is not None and (0 if dying or name in self.formulas.outputs else _size(stage)) > room:
            return
        spent = sum(self.base[each] for each, used in state.waiting if each in inside and not used)
        for option in self.options.of(name, inside):
            for over in self._overwritten(option, name, dying):
                own = 0 if over is not None or name in self.formulas.outputs else _size(stage)
                peak = max(state.peak, held + own + -(-option.scratch // ALIGN) * ALIGN)
                if self.strict and self.limit is not None and peak > self.limit:
                    continue
                total = state.work + option.work - spent
                yield _State(live, after, peak, total, state, (name, option, over))

    def _inside(self, state: _State, name: str) -> frozenset[str] | None:
        """Waiting stages that the nest of a stage computes; None where that is too many, or too much again."""
        waiting = dict(state.waiting)
        found: set[str] = set()
        stack = [name]
        while stack:
            for source in self.formulas.stages[stack.pop()].reads():
                if source in waiting and source not in found:
                    if len(found) == MOST or (waiting[source] and source not in self.options.cheap):
                        return None
                    found.add(source)
                    stack.append(source)
        return frozenset(found)

    def _after(self, state: _State, inside: frozenset[str], at: int) -> tuple[tuple[str, bool], ...] | None:
        """What still waits; None where something that is computed already has other readers and is not cheap."""
        kept: list[tuple[str, bool]] = []
        alive: set[str] = set()
        for each, before in reversed(state.waiting):
            used = before or each in inside
            if any(self.place[reader] > at or reader in alive for reader in self.readers[each]):
                if used and each not in self.options.cheap:
                    return None
                alive.add(each)
                kept.append((each, used))
        return tuple(reversed(kept))

    def _needed(self, name: str, at: int, waiting: tuple[tuple[str, bool], ...]) -> bool:
        names = {each for each, _ in waiting}
        return any(self.place[reader] > at or reader in names for reader in self.readers[name])

    def _overwritten(self, option: Option, name: str, dying: list[str]) -> list[str | None]:
        outputs = self.formulas.outputs
        if name in outputs:
            return [None]
        fits = [each for each in dying if each not in outputs and option.overwrites(each)]
        return list(fits[:1]) or [None]

    # -- the beam -------------------------------------------------------------------------------

    def _kept(self, states: list[_State]) -> list[_State]:
        groups: dict[tuple, list[_State]] = {}
        for state in states:
            groups.setdefault((state.live, state.waiting), []).append(state)
        buckets: dict[int, list[_State]] = {}
        for group in groups.values():
            for state in self._undominated(group):
                buckets.setdefault(len(state.waiting), []).append(state)
        return [state for bucket in buckets.values() for state in self._best(bucket)]

    def _best(self, states: list[_State]) -> list[_State]:
        """Half of them by rank, half by memory."""
        if len(states) <= BEAM:
            return states
        ranked = sorted(states, key=self._rank)[: BEAM // 2]
        chosen = {id(state) for state in ranked}
        small = sorted(states, key=lambda state: (state.peak, state.work))
        return ranked + [state for state in small if id(state) not in chosen][: BEAM - len(ranked)]

    def _undominated(self, states: list[_State]) -> list[_State]:
        kept: list[_State] = []
        for state in sorted(states, key=self._rank):
            if all(state.peak < other.peak for other in kept):
                kept.append(state)
        return [*kept[: ALIKE - 1], *kept[-1:]] if len(kept) > ALIKE else kept

    # -- result ---------------------------------------------------------------------------------

    def _schedule(self, state: _State) -> Schedule:
        chosen: list[tuple[str, Option, str | None]] = []
        at: _State | None = state
        while at is not None:
            if at.step is not None:
                chosen.append(at.step)
            at = at.before
        room = max(state.peak, self.limit or 0)
        steps = [self._refined(step, room, state.peak) for step in reversed(chosen)]
        return Schedule(self.formulas, steps)

    def _refined(self, step: tuple[str, Option, str | None], room: int, peak: int) -> Step:
        name, option, over = step
        best = option
        if option.shape.inside:
            spare = room - peak
            for other in self.options.refined(name, option, REFINED):
                if other.scratch > option.scratch + spare or (over is not None and not other.overwrites(over)):
                    continue
                if (other.work, other.scratch) < (best.work, best.scratch):
                    best = other
        return Step(name, best.nests, over)


def _size(stage: Stage) -> int:
    return -(-stage.nbytes // ALIGN) * ALIGN


def schedule(formulas: Formulas, limit: int | None = None) -> Schedule:
    """The best schedule under a limit of bytes of RAM for arena and pieces."""
    return Search(formulas, limit).run()
