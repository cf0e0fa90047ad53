"""What products of a shape take, as measured: the cost table behind a latency budget.

One table belongs to one model, one batch and one target. For every shape of a weight it holds what the
dense product takes, and what each storage form takes at a few sizes; between them it interpolates, with
costs that never fall while the arithmetic grows. One scale for all sites, from a whole model that was
measured once, corrects what products in isolation do not show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lrcompile.errors import InvalidInputError

SCHEMA = "lrcompile.costs/1"
LIMIT = 2**26
"""Largest table that is read, in bytes."""
DENSE = "dense"
_HINT = "make it anew with `lrcompile profile MODEL --emit kit/`, and run the kit on the target"


class Shape(NamedTuple):
    """A product: ``tokens`` vectors of ``into`` channels times a weight (out, into).

    ``window`` is a convolution's kernel, strides, pads and dilations; empty for a matrix product. ``into`` then
    counts channels times places of the kernel, and ``tokens`` output positions.
    """

    out: int
    into: int
    tokens: int
    dtype: str = "float32"
    window: tuple[tuple[int, ...], ...] = ()

    def __str__(self) -> str:
        parts = zip(("kernel", "strides", "pads", "dilations"), self.window, strict=False)
        said = " ".join(f"{name} {'x'.join(map(str, sizes))}" for name, sizes in parts)
        convolution = f", convolution of {said}" if said else ""
        return f"{self.out}×{self.into} {self.dtype} at {self.tokens} tokens{convolution}"


def described(shape: Shape) -> dict[str, Any]:
    """A shape as JSON."""
    return {**shape._asdict(), "window": [list(sizes) for sizes in shape.window]}


class Point(NamedTuple):
    """A form at one size: multiply–accumulates per token, milliseconds of one product with all tokens."""

    macs: float
    ms: float
    rank: int | None = None


class Anchor(NamedTuple):
    """A whole model that was measured: its ratio to dense, and what stood at its sites."""

    ratio: float
    sites: tuple[tuple[Shape, str, float, int], ...]  # shape, form, MACs per token, how many


@dataclass(frozen=True)
class CostTable:
    """Measured milliseconds by shape, form and size.

    Attributes:
        total: of the whole dense model.
        dense: of the dense product of each shape.
        forms: points of each shape and form, by growing MACs.
        counts: how many products of each shape the model has.
        threads: 0 is all cores of the target.
        runtime: ``onnxruntime`` or ``torch``.
        inputs: shapes of the batch that was timed, by input.
        scale: savings of whole models over the summed savings of their sites.
    """

    total: float
    dense: Mapping[Shape, float]
    forms: Mapping[tuple[Shape, str], tuple[Point, ...]]
    counts: Mapping[Shape, int]
    threads: int
    runtime: str
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0

    def share(self, shape: Shape, form: str = DENSE, macs: float = 0.0) -> float:
        """What one product takes, as a share of the dense model's total time.

        Raises:
            InvalidInputError: the table lacks the shape or the form.
        """
        if form == DENSE:
            if shape not in self.dense:
                raise self._lacks(str(shape))
            return self.scale * self.dense[shape] / self.total
        points = self.forms.get((shape, form))
        if not points:
            raise self._lacks(f"'{form}' of {shape}")
        return self.scale * interpolated(points, macs) / self.total

    def scaled(self, scale: float) -> CostTable:
        """The same table with another scale."""
        return replace(self, scale=scale)

    def anchored(self, anchor: Anchor) -> CostTable:
        """With the scale at which the sum over the anchor's sites saves what the anchor did."""
        plain = self.scaled(1.0)
        saved = sum(n * (plain.share(s) - plain.share(s, form, macs)) for s, form, macs, n in anchor.sites)
        return plain if saved <= 0.01 or anchor.ratio >= 0.99 else self.scaled((1 - anchor.ratio) / saved)

    def _lacks(self, what: str) -> InvalidInputError:
        held = ", ".join(sorted({f"{s.out}×{s.into} at {s.tokens} tokens" for s in self.dense})[:8])
        return InvalidInputError(f"the cost table lacks {what}; it holds {held}", where="--costs", hint=_HINT)


def interpolated(points: Sequence[Point], macs: float) -> float:
    """Linear between the nearest points, after the noise that makes more work cheaper is averaged away.

    Beyond the last points it goes on in proportion to the work; no extrapolation reaches below the first one's cost.
    """
    x = np.array([point.macs for point in points])
    y = monotone(np.array([point.ms for point in points]))
    if macs > x[-1]:
        return float(y[-1] * macs / x[-1])
    return float(np.interp(macs, x, y))


def monotone(values: np.ndarray) -> np.ndarray:
    """The nearest non-decreasing values, by pooling adjacent violators."""
    blocks: list[list[float]] = []  # mean, size
    for value in values.tolist():
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, size = blocks.pop()
            before = blocks[-1]
            before[0] = (before[0] * before[1] + mean * size) / (before[1] + size)
            before[1] += size
    return np.repeat([mean for mean, _ in blocks], [int(size) for _, size in blocks])


# -- files ---------------------------------------------------------------------------------------


def to_json(table: CostTable) -> dict[str, Any]:
    """The object that ``costs.json`` holds; :func:`parse` reads it back."""
    shapes = []
    for shape, ms in table.dense.items():
        forms = [
            {"form": form, "points": [point._asdict() for point in points]}
            for (of, form), points in table.forms.items()
            if of == shape
        ]
        shapes.append({**described(shape), "sites": table.counts.get(shape, 0), "ms": ms, "forms": forms})
    return {
        "schema": SCHEMA,
        "runtime": table.runtime,
        "threads": table.threads,
        "total_ms": table.total,
        "scale": table.scale,
        "inputs": {name: list(shape) for name, shape in table.inputs.items()},
        "machine": dict(table.machine),
        "versions": dict(table.versions),
        "shapes": shapes,
    }


def load(path: Path) -> CostTable:
    """The table of a ``costs.json``, or the one that a report holds.

    Raises:
        InvalidInputError: unreadable, or of another schema.
    """
    try:
        if path.stat().st_size > LIMIT:
            raise InvalidInputError(f"above the limit of {LIMIT} bytes", where=str(path))
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"is no JSON: {error}", where=str(path), hint=_HINT) from error
    return parse(found, str(path))


def parse(found: Any, where: str) -> CostTable:
    """The table of a parsed ``costs.json``, or of a report.

    Raises:
        InvalidInputError: of another schema, incomplete, or with numbers that no measurement gives.
    """
    if isinstance(found, dict) and str(found.get("schema", "")).startswith(("lrcompile.optimize/", "lrcompile.plan/")):
        found = (found.get("costs") or {}).get("latency")
        if found is None:
            raise InvalidInputError("the report is of a run without --latency: it holds no costs", where=where)
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        said = f"is of schema '{schema}'" if schema else "names no schema"
        raise InvalidInputError(f"{said}; this version reads '{SCHEMA}'", where=where, hint=_HINT)
    try:
        table = _table(found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InvalidInputError(f"is damaged: {reason}", where=where, hint=_HINT) from error
    return table.anchored(_anchor(found["anchor"])) if found.get("anchor") else table


def _table(found: Mapping[str, Any]) -> CostTable:
    dense, counts, forms = {}, {}, {}
    for each in found["shapes"]:
        shape = _shape(each)
        dense[shape], counts[shape] = _positive(each["ms"]), int(each["sites"])
        for form in each["forms"]:
            points = (Point(_positive(p["macs"]), _positive(p["ms"]), p.get("rank")) for p in form["points"])
            forms[shape, str(form["form"])] = tuple(sorted(points))
    return CostTable(
        _positive(found["total_ms"]),
        dense,
        forms,
        counts,
        int(found["threads"]),
        str(found["runtime"]),
        {name: tuple(map(int, sizes)) for name, sizes in found.get("inputs", {}).items()},
        dict(found.get("machine", {})),
        dict(found.get("versions", {})),
        _positive(found.get("scale", 1.0)),
    )


def _shape(each: Mapping[str, Any]) -> Shape:
    window = tuple(tuple(map(int, sizes)) for sizes in each["window"])
    return Shape(int(each["out"]), int(each["into"]), int(each["tokens"]), str(each["dtype"]), window)


def _anchor(found: Mapping[str, Any]) -> Anchor:
    try:
        sites = tuple((_shape(e), str(e["form"]), float(e["macs"]), int(e["sites"])) for e in found["sites"])
        return Anchor(_positive(found["ratio"]), sites)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(f"its anchor is damaged: {error}", where="--costs", hint=_HINT) from error


def _positive(value: Any) -> float:
    number = float(value)
    if not 0 < number < float("inf"):
        raise ValueError(f"{value} is no measured amount")
    return number
