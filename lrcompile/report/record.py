"""The records of a run, and their JSON."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

DIGITS = 9
"""Significant digits of floats in JSON: more than a float32 holds, fewer than show the noise of float64."""


@dataclass(frozen=True)
class FileInfo:
    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Size:
    """What a model costs. ``macs`` are per sample, ``peak_rss`` in bytes; None where not measured."""

    parameters: int
    bytes: int
    macs: int
    latency_ms: float | None = None
    peak_rss: int | None = None


@dataclass(frozen=True)
class Ratio:
    """After ÷ before; ``latency_low`` and ``latency_high`` bound the measured one."""

    parameters: float | None = None
    bytes: float | None = None
    macs: float | None = None
    latency: float | None = None
    latency_low: float | None = None
    latency_high: float | None = None

    @classmethod
    def of(cls, before: Size, after: Size, latency: tuple[float, float, float] | None = None) -> Ratio:
        """From two sizes and, where it was measured, ``(median, low, high)`` of the latency's ratio."""
        median, low, high = latency or (_over(after.latency_ms, before.latency_ms), None, None)
        return cls(
            _over(after.parameters, before.parameters),
            _over(after.bytes, before.bytes),
            _over(after.macs, before.macs),
            median,
            low,
            high,
        )


@dataclass(frozen=True)
class Drift:
    """How far the outputs moved on held-out samples; None where it does not apply.

    ``limit`` applies to ``metric``, the value of the user's own metric, where there is one, else to ``relative_l2``.
    """

    relative_l2: float | None = None
    cosine: float | None = None
    top1: float | None = None
    kl: float | None = None
    metric: float | None = None
    samples: int | None = None
    limit: float | None = None
    passed: bool | None = None
    worst_output: str = ""

    @property
    def value(self) -> float | None:
        """What the limit applies to."""
        return self.relative_l2 if self.metric is None else self.metric


@dataclass(frozen=True)
class Decision:
    """What became of a site. ``pass_`` is None where it stays as it was; ``keep`` is the share of its values kept."""

    site: str
    shape: tuple[int, ...]
    pass_: str | None = None
    structure: str | None = None
    keep: float | None = None
    predicted: float | None = None
    error: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Calibration:
    kind: str
    samples: int | None = None
    tokens: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class BudgetLine:
    target: float
    reached: float | None = None


@dataclass(frozen=True)
class PassRecord:
    """What a pass did; ``rolled_back`` is the reason why its work was taken back."""

    name: str
    exact: bool
    rewritten: int = 0
    refused: int = 0
    rolled_back: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Spectrum:
    """A normalised tail curve: the share of the output's energy that is lost at growing rank, from 1 to 0.

    ``full`` is the rank at the right end of the curve; one less than its points where None.
    ``rank`` is the chosen rank, None where the site stays dense.
    """

    site: str
    energies: list[float]
    rank: int | None = None
    full: int | None = None

    @classmethod
    def of(cls, site: str, tails: Sequence[float], rank: int | None = None, points: int = 128) -> Spectrum:
        """From all tail sums (full + 1): normalised by the first, thinned evenly to at most ``points``."""
        last, total = len(tails) - 1, float(tails[0])
        count = min(len(tails), points)
        chosen = [round(index * last / (count - 1)) for index in range(count)] if count > 1 else [0]
        return cls(site, [float(tails[index]) / total if total > 0 else 0.0 for index in chosen], rank, last)


@dataclass
class Report:
    """One run, filled while it happens.

    Attributes:
        report: where the JSON went.
        task: task metrics: name → ``{"before": value, "after": value}``.
        costs: the measured cost table; passing it back makes a lossy run repeatable.
        memory: (seconds, resident bytes), for the picture only.
    """

    verb: Literal["optimize", "plan"]
    status: str = "ok"
    seconds: float = 0.0
    versions: dict[str, str | None] = field(default_factory=dict)
    input: FileInfo | None = None
    output: FileInfo | None = None
    report: str | None = None
    before: Size | None = None
    after: Size | None = None
    ratio: Ratio | None = None
    budget: dict[str, BudgetLine] = field(default_factory=dict)
    feasible: bool | None = None
    drift: Drift | None = None
    calibration: Calibration | None = None
    seed: int | None = None
    preset: str | None = None
    sites: dict[str, int] = field(default_factory=dict)
    decisions: list[Decision] = field(default_factory=list)
    passes: list[PassRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    spectra: list[Spectrum] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    task: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    machine: dict[str, str | int] = field(default_factory=dict)
    costs: dict[str, Any] = field(default_factory=dict)
    memory: list[tuple[float, int]] = field(default_factory=list)


BUDGET = ("keep", "bytes", "macs", "latency", "drift")
SITES = ("total", "rewritten", "dense", "refused")


def to_json(report: Report) -> dict[str, Any]:
    """The object that ``--json`` prints and ``report.json`` holds; only values that JSON knows, in a fixed order.

    Raises:
        ValueError: the verb has no such report.
    """
    if report.verb not in ("optimize", "plan"):
        raise ValueError(f"no report is defined for '{report.verb}'")
    found = {"schema": f"lrcompile.{report.verb}/1", "status": report.status, "seconds": jsonable(report.seconds)}
    found["versions"] = {name: jsonable(value) for name, value in report.versions.items()}
    if report.error is not None:
        found["error"] = {key: jsonable(report.error.get(key)) for key in ("code", "message", "hint", "where")}
    for name in ("input", "output", "report", "before", "after", "ratio"):
        found[name] = jsonable(getattr(report, name))
    order = sorted(report.budget, key=lambda name: (BUDGET.index(name) if name in BUDGET else len(BUDGET), name))
    found["budget"] = {name: jsonable(report.budget[name]) for name in order} | {"feasible": report.feasible}
    for name in ("drift", "calibration", "seed", "preset"):
        found[name] = jsonable(getattr(report, name))
    found["sites"] = {name: jsonable(report.sites.get(name, 0)) for name in SITES}
    found["decisions"] = [_decision(each) for each in report.decisions]
    for name in ("passes", "notes", "config", "task", "machine", "costs"):
        found[name] = jsonable(getattr(report, name))
    return _planned(found) if report.verb == "plan" else found


def _planned(found: dict[str, Any]) -> dict[str, Any]:
    """Without what only a finished result has."""
    ratio = found["ratio"]
    if ratio is not None:
        found["ratio"] = {name: value for name, value in ratio.items() if not name.startswith("latency")}
    return {name: value for name, value in found.items() if name not in ("output", "after", "drift")}


def _decision(decision: Decision) -> dict[str, Any]:
    return {name.rstrip("_"): value for name, value in jsonable(decision).items()}


def jsonable(value: Any) -> Any:
    """``value`` as JSON knows it: floats of 9 digits, None for NaN and infinity, keys of free mappings sorted."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return (float(f"{value:.{DIGITS}g}") + 0.0) if math.isfinite(value) else None
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case os.PathLike():
            return jsonable(os.fspath(value))
        case Mapping():
            return {str(jsonable(key)): jsonable(value[key]) for key in sorted(value, key=str)}
        case AbstractSet():
            return sorted((jsonable(each) for each in value), key=str)
        case list() | tuple():
            return [jsonable(each) for each in value]
    return _foreign(value)


def _foreign(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: jsonable(getattr(value, each.name)) for each in fields(value)}
    for method in ("tolist", "item"):  # numbers and arrays of numpy and torch, without importing them
        if callable(getattr(value, method, None)):
            return jsonable(getattr(value, method)())
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))  # an address would differ from run to run


def _over(after: float | None, before: float | None) -> float | None:
    if after is None or before is None:
        return None
    return after / before if before else (1.0 if not after else None)
