"""Finding the regions (:class:`lrcompile.order.Region`) of a graph: values whose channels may come in any order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

V = TypeVar("V")


@dataclass(eq=False)
class Walk(Generic[V]):
    """What is found around one value.

    Attributes:
        size: channels of every value.
        constants: places that hold one constant number for each channel, as the graph names them.
        fits: nobody who sees the order has been met.
    """

    size: int
    values: dict[int, V] = field(default_factory=dict)
    waiting: list[V] = field(default_factory=list)
    writers: set[str] = field(default_factory=set)
    readers: set[str] = field(default_factory=set)
    constants: list[Any] = field(default_factory=list)
    fits: bool = True

    def join(self, value: V) -> None:
        """A value whose channels come in the same order."""
        if id(value) not in self.values:
            self.values[id(value)] = value
            self.waiting.append(value)

    def require(self, condition: bool) -> None:
        """Gives the region up where something does not hold."""
        self.fits = self.fits and condition

    def sorted(self, places: Mapping[str, int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Writers and readers in an order of sites."""
        return tuple(sorted(self.writers, key=places.__getitem__)), tuple(sorted(self.readers, key=places.__getitem__))


class Finder(ABC, Generic[V]):
    """Walks from what sites compute to everything whose channels keep the order; linear in the size of the graph.

    Args:
        ends: by site whose weights may be changed, in order of execution, what it computes.
    """

    def __init__(self, ends: Mapping[str, V]) -> None:
        self.ends = ends
        self.places = {name: place for place, name in enumerate(ends)}
        self.writers = {id(value): name for name, value in ends.items()}

    def walks(self) -> Iterator[Walk[V]]:
        """One for each region, by its first writer."""
        seen: set[int] = set()
        for name, end in self.ends.items():
            if id(end) in seen:
                continue
            walk = self._around(name, end)
            seen.update(walk.values)
            if walk.fits and walk.writers and walk.readers and walk.size > 1:
                yield walk

    def _around(self, name: str, end: V) -> Walk[V]:
        walk: Walk[V] = Walk(self.channels(name))
        walk.join(end)
        while walk.waiting:  # on and on, even where it fits no more: so that nothing is walked twice
            value = walk.waiting.pop()
            writer = self.writers.get(id(value))
            if writer is None:
                self.behind(value, walk)
            else:
                walk.writers.add(writer)
                walk.require(self.channels(writer) == walk.size)
                self.written(writer, walk)
            self.ahead(value, walk)
        return walk

    @abstractmethod
    def channels(self, name: str) -> int:
        """Number of outputs of a site."""

    def written(self, name: str, walk: Walk[V]) -> None:
        """Takes note of what belongs to a site that writes the region."""

    @abstractmethod
    def behind(self, value: V, walk: Walk[V]) -> None:
        """Walks to what computes a value that no site writes."""

    @abstractmethod
    def ahead(self, value: V, walk: Walk[V]) -> None:
        """Walks to what reads a value."""
