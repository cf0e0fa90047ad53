"""The gate: how far the outputs moved on inputs that calibration did not see.

Relative L2 per float output, the worst output counts. Cosine, top-1 agreement and KL divergence
stand beside it where an output looks like logits, and a metric of the user's can replace it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor

from lrcompile.calibrate import token_mask
from lrcompile.errors import GateError, UsageError
from lrcompile.graphs.base import Inputs, Outputs
from lrcompile.memory import release

Run = Callable[[Inputs], Outputs]
Metric = Callable[[list[Outputs], list[Outputs]], float]
"""``metric(reference, candidate)`` over all batches; larger is worse, and the drift limit applies to it."""

EXACT = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-3, "bfloat16": 1e-3}
"""Largest relative change that counts as rounding, by the narrowest dtype that a model stores."""


@dataclass(frozen=True)
class Drift:
    """Change of the outputs; None where a measure does not apply."""

    relative_l2: float
    cosine: float | None
    top1: float | None
    kl: float | None
    samples: int
    worst_output: str
    metric: float | None = None
    limit: float | None = None

    @property
    def value(self) -> float:
        """What the limit applies to."""
        return self.relative_l2 if self.metric is None else self.metric

    @property
    def passed(self) -> bool:
        """Whether the drift is a number and within its limit."""
        return math.isfinite(self.value) and (self.limit is None or self.value <= self.limit)


@dataclass(eq=False)
class _Sums:
    """Running sums of one output."""

    difference: float = 0.0
    norm: float = 0.0
    cosine: float = 0.0
    agreed: float = 0.0
    divergence: float = 0.0
    rows: int = 0
    logits: bool = True

    def add(self, reference: Tensor, candidate: Tensor) -> None:
        same = reference == candidate  # masked logits may be -inf in both
        self.difference += float((candidate - reference).masked_fill(same, 0.0).square().sum())
        self.norm += float(reference.masked_fill(same & reference.isinf(), 0.0).square().sum())
        self.logits = self.logits and reference.ndim >= 2 and reference.shape[-1] > 1
        if reference.numel():
            self._add_rows(*(value.reshape(-1, (1, *value.shape)[-1]) for value in (reference, candidate, same)))

    def _add_rows(self, a: Tensor, b: Tensor, same: Tensor) -> None:
        equal = same.all(dim=-1)  # two rows of zeros point the same way
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
        self.cosine += float(torch.where(equal, 1.0, cosine).sum())
        self.agreed += float((a.argmax(-1) == b.argmax(-1)).sum())
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        terms = (log_a.exp() * (log_a - log_b)).masked_fill(log_a == -math.inf, 0.0)
        self.divergence += float(torch.where(equal, 0.0, terms.sum(-1)).sum())
        self.rows += len(a)

    @property
    def relative(self) -> float:
        if self.norm > 0:
            return math.sqrt(self.difference / self.norm)
        return 0.0 if self.difference == 0 else math.inf


@dataclass(eq=False)
class DriftMeter:
    """Compares batches of outputs, padding left out."""

    sums: dict[str, _Sums] = field(default_factory=dict)
    samples: int = 0

    def add(self, inputs: Inputs, reference: Outputs, candidate: Outputs) -> None:
        """Adds one batch.

        Raises:
            GateError: an output is missing or has another shape.
        """
        mask = token_mask({k: torch.from_numpy(a) for k, a in inputs.items() if a.dtype.kind in "fiub"})
        for name, before in reference.items():
            after = candidate.get(name)
            if after is None or after.shape != before.shape:
                shape = "nothing" if after is None else f"shape {after.shape}"
                raise GateError(f"the rewritten model gives {shape} instead of shape {before.shape}", where=name)
            if before.dtype.kind != "f" and before.dtype.name != "bfloat16":
                continue
            sums = self.sums.setdefault(name, _Sums())
            sums.add(*(_real(array, mask) for array in (before, after)))
        self.samples += max((len(array) for array in inputs.values() if array.ndim), default=1)

    def result(self, limit: float | None = None) -> Drift:
        """The drift so far; the worst output decides.

        Raises:
            GateError: there is no float output to compare.
        """
        if not self.sums:
            raise GateError("the model has no floating-point output to compare", hint="give a --metric of your own")
        worst, sums = max(self.sums.items(), key=lambda item: (not math.isnan(item[1].relative), item[1].relative))
        if any(math.isnan(s.relative) for s in self.sums.values()):
            worst, sums = next(item for item in self.sums.items() if math.isnan(item[1].relative))
        rows = max(sums.rows, 1)
        top1, kl = (sums.agreed / rows, sums.divergence / rows) if sums.logits else (None, None)
        return Drift(sums.relative, sums.cosine / rows, top1, kl, self.samples, worst, limit=limit)


def _real(array: np.ndarray, mask: Tensor | None) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array.astype(np.float64)))
    if mask is not None and tensor.shape[: mask.ndim] == mask.shape:
        return tensor[mask]
    return tensor


def measure(
    reference: Run,
    candidate: Run,
    batches: Iterable[Inputs],
    *,
    limit: float | None = None,
    metric: Metric | None = None,
) -> Drift:
    """Drift of ``candidate`` against ``reference``, one batch in memory at a time.

    With ``metric`` all outputs are kept and its value replaces the relative L2 in the gate.
    """
    meter = DriftMeter()
    kept: tuple[list[Outputs], list[Outputs]] = ([], [])
    for inputs in batches:
        before, after = reference(inputs), candidate(inputs)
        meter.add(inputs, before, after)
        if metric is not None:
            kept[0].append(before)
            kept[1].append(after)
        release()
    drift = meter.result(limit)
    if metric is None:
        return drift
    value = float(metric(*kept))
    return Drift(
        drift.relative_l2, drift.cosine, drift.top1, drift.kl, drift.samples, drift.worst_output, value, drift.limit
    )


def load_metric(text: str) -> Metric:
    """``package.module:function`` as a function.

    Raises:
        UsageError: no such module or function.
    """
    module, colon, name = text.partition(":")
    try:
        found = getattr(importlib.import_module(module), name) if colon else None
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"cannot load the metric '{text}': {error}", where="--metric") from error
    if not callable(found):
        raise UsageError(f"'{text}' is not a function", where="--metric", hint="write package.module:function")
    return cast("Metric", found)


def require(drift: Drift) -> None:
    """Stops a model that moved too far.

    Raises:
        GateError: above the limit, or not a number.
    """
    if not drift.passed:
        name = "relative L2 drift" if drift.metric is None else "metric"
        what = f"is above the limit {drift.limit:.3g}" if drift.limit is not None else "is not a number"
        raise GateError(
            f"{name} {drift.value:.3g} {what} on {drift.samples} held-out samples",
            where=drift.worst_output,
            hint="keep more, calibrate on more data, or raise --max-drift",
        )
