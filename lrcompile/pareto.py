"""Which of several solutions no other one beats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def front(items: Sequence[Item], costs: Callable[[Item], Sequence[float]]) -> list[Item]:
    """The items, in their order, for which no other is as good in every cost and better in one; of equals the first."""
    rated = [tuple(costs(item)) for item in items]
    return [
        item
        for at, item in enumerate(items)
        if not any(
            _beats(other, rated[at]) or (other == rated[at] and index < at)
            for index, other in enumerate(rated)
            if index != at
        )
    ]


def _beats(one: Sequence[float], two: Sequence[float]) -> bool:
    return one != two and all(a <= b for a, b in zip(one, two, strict=True))
