"""One function for kernels that differ in numbers only: what differs becomes parameters.

The blocks of a network have the same kernels over other weights, with other zeros, multipliers, shifts, and (where
they were compressed) other ranks. Written out for each, the code of a small model would outgrow its weights.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

MOST = 24
"""Parameters that a function takes for numbers: with more, its kernels have too little in common."""
_MINUS = re.compile(r" - (?=\d+\b(?![.]))")
_PLUS = re.compile(r" \+ -(?=\d)")
# Not a number right behind a bracket: registers are indexed by constants.
_NUMBER = re.compile(r"(?P<cast>\((?P<type>u?int\d+_t)\))?(?<![\w.\[])(?<!\+\+)(?P<value>-?\d+)(?![\w.])")
_BOUND = re.compile(r" < (\d+); ")

STRIDE = 256  # largest factor, and largest distance, between numbers that are taken for related

Text = tuple[str, str]
Column = tuple[tuple[str, str], ...]  # the number at one place, of each kernel


@dataclass(frozen=True)
class Shared:
    """Where a kernel is found.

    Args:
        function: its number among the functions.
        arguments: numbers that follow its pointers.
    """

    function: int
    arguments: tuple[str, ...] = ()


def share(texts: Mapping[int, Text], apart: Container[int] = ()) -> tuple[list[Text], dict[int, Shared]]:
    """The functions to write, as (parameters, body), and for each kernel the one that it calls.

    Args:
        texts: kernel → (parameters, body).
        apart: kernels that share with none of other loop bounds, so that the compiler knows theirs.
    """
    groups: dict[tuple, list[int]] = {}
    numbers: dict[int, list[tuple[str, str]]] = {}
    for name, (parameters, body) in texts.items():
        pieces, numbers[name] = _split(body)
        own = bounds(body) if name in apart else ()
        groups.setdefault((parameters, tuple(pieces), own), []).append(name)
    functions: list[Text] = []
    found: dict[int, Shared] = {}
    for (parameters, pieces, _), names in groups.items():
        columns = list(zip(*(numbers[name] for name in names), strict=True))
        terms, bases = _terms(columns)
        if len(bases) <= MOST:
            found |= {name: Shared(len(functions), _arguments(bases, at)) for at, name in enumerate(names)}
            functions.append(_written(parameters, pieces, columns, terms, bases))
            continue
        known: dict[tuple, int] = {}
        for name in names:
            key = tuple(numbers[name])
            if key not in known:
                known[key] = len(functions)
                functions.append(texts[name])
            found[name] = Shared(known[key])
    return functions, found


def bounds(body: str) -> tuple[str, ...]:
    """The bounds of a kernel's loops."""
    return tuple(_BOUND.findall(body))


def _split(body: str) -> tuple[list[str], list[tuple[str, str]]]:
    """The text between numbers, and the numbers with their types."""
    body = _MINUS.sub(" + -", body)
    pieces, numbers, done = [], [], 0
    for match in _NUMBER.finditer(body):
        pieces.append(body[done : match.start()])
        numbers.append((match["type"] or "int32_t", match["value"]))
        done = match.end()
    return [*pieces, body[done:]], numbers


def _terms(columns: Sequence[Column]) -> tuple[dict[Column, str], list[Column]]:
    """What stands for each column that varies, and the columns that become parameters: others follow from these."""
    terms: dict[Column, str] = {}
    bases: list[Column] = []
    for column in dict.fromkeys(sorted((each for each in columns if len(set(each)) > 1), key=_size)):
        term = next((found for at, base in enumerate(bases) if (found := _linear(column, base, f"c{at}"))), None)
        if term is None:
            term = f"c{len(bases)}"
            bases.append(column)
        terms[column] = term
    return terms, bases


def _size(column: Column) -> int:
    return max(abs(int(value)) for _, value in column)


def _linear(column: Column, base: Column, name: str) -> str:
    """``column`` as a multiple of ``base`` plus a number: strides are multiples of a rank, and of one another."""
    (kind, first), (other, start) = column[0], base[0]
    if (kind, other) != ("int32_t", "int32_t"):
        return ""
    pairs = [(int(a[1]), int(b[1])) for a, b in zip(column, base, strict=True)]
    x, y = next((a - int(first), b - int(start)) for a, b in pairs if b != int(start))
    factor = x // y
    rest = int(first) - factor * int(start)
    if not 1 <= factor <= STRIDE or abs(rest) > STRIDE or any(a != factor * b + rest for a, b in pairs):
        return ""
    term = f"({name} * {factor})" if factor > 1 else name
    return f"({term} + {rest})" if rest else term


def _arguments(bases: Sequence[Column], at: int) -> tuple[str, ...]:
    return tuple(_literal(*column[at]) for column in bases)


def _literal(kind: str, value: str) -> str:
    return value if kind == "int32_t" else f"({kind}){value}"


def _written(
    parameters: str, pieces: Sequence[str], columns: Sequence[Column], terms: Mapping[Column, str], bases: list[Column]
) -> Text:
    made = [pieces[0]]
    for column, piece in zip(columns, pieces[1:], strict=True):
        made += [terms.get(column) or _literal(*column[0]), piece]
    more = [f"{column[0][0]} c{at}" for at, column in enumerate(bases)]
    return ", ".join([parameters, *more]), _PLUS.sub(" - ", "".join(made))
