"""The kernels of a schedule in C: quick where the time goes, short where it does not.

Shares of all flash and of all instructions are weighed against each other: a longer form is taken where it saves
enough time for its bytes. So a small model gets compact code, beside megabytes of weights everything is quick.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lrcompile.backends.c.codegen import functions
from lrcompile.backends.c.lower import Lowered, Lowering
from lrcompile.backends.c.sharing import Shared, Text, bounds, share
from lrcompile.dataflow.nest import Nest

CHARACTERS = 6  # of a body for one byte of its code
LEAST = 200  # bytes of a function
SHORT_BYTES, SHORT_TIME = 0.6, 0.8
"""What the short form of a kernel saves of its bytes, and adds to its time."""
RATE = 2.0
"""Percents of all instructions that are given for one percent of all flash."""
KNOWN_BOUNDS = 0.12  # of its time, that a kernel saves where the compiler knows its loops


@dataclass
class Kernels:
    """Lowered nests and the functions that they call, both numbered as they are first used.

    Args:
        lowered: by the number of the nest.
        functions: (parameters, body) of each.
        shared: nest → its function, and the numbers that it passes.
        short: functions that are to be compiled for size.
    """

    lowered: list[Lowered]
    functions: list[Text] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)
    short: set[int] = field(default_factory=set)


def kernels(nests: Sequence[Nest], weights: int) -> Kernels:
    """Lowers nests, the short or the quick way, and shares functions among them.

    Args:
        weights: bytes of flash beside the code.

    Raises:
        UnsupportedError: an operation or a type that C99 does not have.
    """
    found = Kernels([Lowering(nest, f"k{at}").lower() for at, nest in enumerate(nests)])
    texts = _texts(dict(enumerate(found.lowered)))
    work = [nest.work for nest in nests]
    written, shared = share(texts)
    flash = weights + sum(map(_bytes, written))
    rare = set()
    for function, members in _members(shared).items():
        time = sum(work[at] for at in members) / max(sum(work), 1)
        if SHORT_TIME * time < RATE * SHORT_BYTES * _bytes(written[function]) / flash:
            rare |= set(members)
    for at in rare:
        found.lowered[at] = Lowering(nests[at], f"k{at}", short=True).lower()
    texts |= _texts({at: found.lowered[at] for at in rare})
    written, shared = share(texts, _apart(texts, work, flash))
    found.functions, found.shared = written, [shared[at] for at in range(len(nests))]
    found.short = {shared[at].function for at in rare}
    return found


def _texts(lowered: Mapping[int, Lowered]) -> dict[int, Text]:
    named = functions({f"k{at}": each for at, each in lowered.items()})
    return {at: named[f"k{at}"] for at in lowered}


def _bytes(text: Text) -> int:
    return max(len(text[1]) // CHARACTERS, LEAST)


def _members(shared: Mapping[int, Shared]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for at, each in shared.items():
        found[each.function].append(at)
    return found


def _apart(texts: Mapping[int, Text], work: Sequence[float], flash: int) -> set[int]:
    """Kernels for which a function with loop bounds of their own pays."""
    written, shared = share(texts)
    found: set[int] = set()
    for function, members in _members(shared).items():
        forms = len({bounds(texts[at][1]) for at in members})
        saved = KNOWN_BOUNDS * sum(work[at] for at in members) / max(sum(work), 1)
        if forms > 1 and saved > RATE * (forms - 1) * _bytes(written[function]) / flash:
            found |= set(members)
    return found
