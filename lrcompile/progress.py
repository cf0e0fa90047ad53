"""Progress of a run, for whoever watches it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class Progress:
    """Nobody watches: every call does nothing. A front end overrides both methods."""

    def __call__(self, text: str, total: int | None = None) -> None:
        """A step begins; ``total`` is the number of :meth:`advance` calls that it makes, where it is known."""

    def advance(self) -> None:
        """A part of the step is done."""


class Watched:
    """A re-iterable that advances the progress with every item."""

    def __init__(self, items: Iterable[Any], progress: Progress) -> None:
        self.items = items
        self.progress = progress

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            yield item
            self.progress.advance()
