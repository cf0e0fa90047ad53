"""Offsets for buffers with known lifetimes in one arena. It knows no graph: sizes and times only.

``greedy`` places buffers by descending size into the first gap, as TensorFlow Lite Micro does. ``exact`` tries a few
orders of placement, lets what reaches the top choose first, then searches all orders and proves its result where that
ends. Both return one offset for each request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGN = 16
ROUNDS = 48  # times that buffers are placed anew before all orders are searched


@dataclass(frozen=True)
class Request:
    """A buffer: its bytes, and the first and last step during which it must keep its contents."""

    size: int
    first: int
    last: int

    def meets(self, other: Request) -> bool:
        """Whether both are alive at some step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Layout:
    """Offsets in the order of the requests.

    Args:
        size: bytes of the arena.
        optimal: whether no arrangement of these requests is smaller.
    """

    offsets: tuple[int, ...]
    size: int
    optimal: bool


class Planner:
    """Collects requests one by one: ``add(size, first, last)`` returns the request's number."""

    def __init__(self, align: int = ALIGN) -> None:
        self.align = align
        self.requests: list[Request] = []

    def add(self, size: int, first: int, last: int) -> int:
        """Adds a buffer.

        Raises:
            ValueError: a negative size, or it ends before it begins.
        """
        if size < 0 or last < first:
            raise ValueError(f"size {size}, first {first}, last {last}")
        self.requests.append(Request(-(-size // self.align) * self.align, first, last))
        return len(self.requests) - 1

    def layout(self, *, effort: int = 20_000) -> Layout:
        """The smallest layout found; never larger than the greedy one."""
        return exact(self.requests, effort=effort)


def bound(requests: Sequence[Request]) -> int:
    """The most bytes that are alive at one step: no layout is smaller."""
    changes: dict[int, int] = {}
    for each in requests:
        changes[each.first] = changes.get(each.first, 0) + each.size
        changes[each.last + 1] = changes.get(each.last + 1, 0) - each.size
    live = most = 0
    for time in sorted(changes):
        live += changes[time]
        most = max(most, live)
    return most


def greedy(requests: Sequence[Request]) -> Layout:
    """First fit by descending size (ties: earlier first)."""
    order = sorted(range(len(requests)), key=lambda at: (-requests[at].size, requests[at].first, at))
    offsets = _place(requests, order)
    return _layout(requests, offsets)


def exact(requests: Sequence[Request], *, effort: int = 20_000) -> Layout:
    """Branch and bound over the order of placement, ``effort`` placements at most."""
    best = greedy(requests)
    for key in (_by_length, _by_area, _by_time):  # cheap orders that sometimes reach the bound at once
        if best.optimal:
            return best
        other = _layout(requests, _place(requests, sorted(range(len(requests)), key=lambda at: key(requests[at]))))
        best = other if other.size < best.size else best
    best = _raised(requests, best, min(effort // max(len(requests), 1), ROUNDS))
    return best if best.optimal else _Search(requests, best, effort).run()


def _raised(requests: Sequence[Request], best: Layout, rounds: int) -> Layout:
    """Places anew, what reached the top the time before first: the buffer that found no gap gets to choose one."""
    order = sorted(range(len(requests)), key=lambda at: -requests[at].size)
    for _ in range(rounds):
        if best.optimal:
            break
        offsets = _place(requests, order)
        found = _layout(requests, offsets)
        best = found if found.size < best.size else best
        top = max(order, key=lambda at: offsets[at] + requests[at].size)
        order.remove(top)
        order.insert(0, top)
    return best


def _by_length(each: Request) -> tuple[int, ...]:
    return each.first - each.last, -each.size


def _by_area(each: Request) -> tuple[int, ...]:
    return (-each.size * (each.last - each.first + 1),)


def _by_time(each: Request) -> tuple[int, ...]:
    return each.first, -each.last, -each.size


def _layout(requests: Sequence[Request], offsets: Sequence[int], optimal: bool | None = None) -> Layout:
    size = max((offset + each.size for offset, each in zip(offsets, requests, strict=True)), default=0)
    return Layout(tuple(offsets), size, size == bound(requests) if optimal is None else optimal)


def _place(requests: Sequence[Request], order: Sequence[int]) -> list[int]:
    offsets = [0] * len(requests)
    placed: list[int] = []
    for at in order:
        offsets[at] = _first_gap(requests[at], [(offsets[other], requests[other]) for other in placed])
        placed.append(at)
    return offsets


def _first_gap(wanted: Request, placed: Sequence[tuple[int, Request]]) -> int:
    """The lowest offset at which nothing that is alive at the same time lies."""
    if not wanted.size:
        return 0
    offset = 0
    for start, other in sorted((start, other) for start, other in _busy(wanted, placed)):
        if start - offset >= wanted.size:
            break
        offset = max(offset, start + other)
    return offset


def _busy(wanted: Request, placed: Sequence[tuple[int, Request]]) -> list[tuple[int, int]]:
    return [(start, other.size) for start, other in placed if other.size and other.meets(wanted)]


class _Search:
    """Depth first over the orders; what cannot beat the best layout so far is cut."""

    def __init__(self, requests: Sequence[Request], best: Layout, effort: int) -> None:
        self.requests, self.best, self.effort = requests, best, effort
        self.least = bound(requests)

    def run(self) -> Layout:
        order = sorted(range(len(self.requests)), key=lambda at: -self.requests[at].size)
        finished = self._extend([], order, 0)
        return _layout(self.requests, self.best.offsets, finished or self.best.size == self.least)

    def _extend(self, placed: list[tuple[int, int]], rest: list[int], size: int) -> bool:
        """Whether everything below was looked at."""
        if not rest:
            offsets = [offset for _, offset in sorted(placed)]
            self.best = Layout(tuple(offsets), size, size == self.least)
            return True
        known = [(offset, self.requests[at]) for at, offset in placed]
        seen: set[tuple[Request, int]] = set()
        floor = max((offset for _, offset in placed), default=0) if placed else 0
        for at in rest:
            if self.best.size == self.least:
                return True
            self.effort -= 1
            if self.effort < 0:
                return False
            offset = _first_gap(self.requests[at], known)
            top = max(size, offset + self.requests[at].size)
            # Offsets may be given in ascending order: every layout is pushed down in that order without growing.
            if offset < floor or top >= self.best.size or (self.requests[at], offset) in seen:
                continue
            seen.add((self.requests[at], offset))
            if not self._extend([*placed, (at, offset)], [other for other in rest if other != at], top):
                return False
        return True
