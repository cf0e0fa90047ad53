"""Calibration statistics: streaming, mergeable moments of the values that linear sites read.

Accumulation is in float32 (the inputs' own precision), decompositions are done in float64 by
whoever needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompile.errors import InvalidInputError

MASK_NAMES = ("attention_mask", "input_mask", "padding_mask", "mask")
"""Input names that are taken for a token mask (1 = a real token) of shape (batch, tokens)."""

TOGETHER = 512
"""Vectors that a Gram matrix takes at once."""
ENOUGH = 128
"""As many it takes as they come: a buffer for each of some hundred values would be large."""


@dataclass(eq=False)
class Moments:
    """Second and first moments of a value with ``n`` channels.

    Attributes:
        total: ``Σ x``, (n,).
        absolute: ``Σ |x|``, (n,).
        absmax: ``max |x|``, (n,).
        tokens: number of vectors that went in.
        samples: number of calibration samples that they came from.
        seen: number of vectors that the site multiplied, where not all went in.
    """

    _gram: Tensor | None  # (n, n), where it was given as a whole
    total: Tensor
    absolute: Tensor
    absmax: Tensor
    tokens: int = 0
    samples: int = 0
    seen: int = 0
    _half: Tensor | None = None  # one triangle in rectangular full packed form, in the place of the matrix

    @property
    def gram(self) -> Tensor:
        """``Σ x xᵀ``, (n, n) float32; made anew on every access where half of it is held."""
        if self._gram is not None:
            return self._gram
        from scipy.linalg.lapack import stfttr  # pyright: ignore[reportAttributeAccessIssue] - made at import

        assert self._half is not None
        full, _ = stfttr(self.channels, self._half.numpy(), uplo="L")
        upper = torch.from_numpy(full.T).triu_()  # columns come first in what LAPACK returns
        return upper.add_(upper.triu(1).T)

    @property
    def half(self) -> Tensor:
        """(n (n + 1) / 2,) float32: the lower triangle in LAPACK's rectangular full packed form."""
        if self._half is not None:
            return self._half
        from scipy.linalg.lapack import strttf  # pyright: ignore[reportAttributeAccessIssue] - made at import

        assert self._gram is not None
        return torch.from_numpy(strttf(self._gram.float().numpy(), uplo="L")[0])

    @classmethod
    def zeros(cls, channels: int) -> Moments:
        """Empty moments of a value with ``channels`` channels."""
        total, absolute, absmax = (torch.zeros(channels) for _ in range(3))
        return cls(None, total, absolute, absmax, _half=torch.zeros(channels * (channels + 1) // 2))

    @property
    def channels(self) -> int:
        return len(self.total)

    def update(self, rows: Tensor, samples: int = 0, *, spend: bool = False) -> None:
        """Adds vectors ``rows`` (tokens, n); ``spend`` allows their memory to be written over.

        Raises:
            InvalidInputError: a vector, or its square, is NaN or infinite.
        """
        rows = rows.detach().to("cpu", torch.float32).contiguous()
        self._accumulate(rows)
        ones = torch.ones(len(rows))
        self.total = self.total + ones @ rows  # not in place: these may be tensors of inference mode
        magnitude = rows.abs_() if spend else rows.abs()
        self.absolute = self.absolute + ones @ magnitude
        if len(rows):
            self.absmax = torch.maximum(self.absmax, magnitude.amax(0))
        self.tokens += len(rows)
        self.samples += samples
        largest = float(self.absmax.max()) if self.channels else 0.0
        if not torch.isfinite(self.absolute).all() or largest * largest * self.tokens > torch.finfo(torch.float32).max:
            raise InvalidInputError("the calibration data makes this value NaN or infinite")

    def _accumulate(self, rows: Tensor) -> None:
        """Adds ``rowsᵀ rows`` in place: half the work and half the memory of a full product.

        LAPACK counts columns first, so the rows are handed over as their transpose.
        """
        from scipy.linalg.lapack import ssfrk  # pyright: ignore[reportAttributeAccessIssue] - made at import

        if rows.numel():
            tokens, channels = rows.shape
            sums = ssfrk(channels, tokens, 1.0, rows.numpy().T, 1.0, self.half.numpy(), uplo="L", overwrite_c=1)
            self._gram, self._half = None, torch.from_numpy(sums)  # the same memory

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of vectors."""
        return Moments(
            None,
            self.total + other.total,
            self.absolute + other.absolute,
            torch.maximum(self.absmax, other.absmax),
            self.tokens + other.tokens,
            self.samples + other.samples,
            self.multiplied + other.multiplied,
            self.half + other.half,
        )

    @property
    def multiplied(self) -> int:
        """Number of vectors that the site multiplied."""
        return self.seen or self.tokens

    def second(self) -> Tensor:
        """``E[x xᵀ]``, (n, n) float64."""
        return self.gram.double() / max(self.tokens, 1)

    def mean(self) -> Tensor:
        """``E[x]``, (n,) float64."""
        return self.total.double() / max(self.tokens, 1)

    def covariance(self) -> Tensor:
        """``E[x xᵀ] − E[x] E[x]ᵀ``, (n, n) float64."""
        mean = self.mean()
        return self.second() - torch.outer(mean, mean)

    def tensors(self) -> dict[str, Tensor]:
        """Everything as tensors, for storage."""
        counts = torch.tensor([self.tokens, self.samples, self.seen])
        return {
            "half": self.half,
            "total": self.total,
            "absolute": self.absolute,
            "absmax": self.absmax,
            "counts": counts,
        }

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor]) -> Moments:
        """The inverse of :meth:`tensors`; ``gram`` (n, n) may stand in the place of ``half``."""
        tokens, samples, seen = (int(count) for count in stored["counts"])
        total, absolute, absmax = (stored[name].contiguous() for name in ("total", "absolute", "absmax"))
        return cls(stored.get("gram"), total, absolute, absmax, tokens, samples, seen, stored.get("half"))


def token_mask(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """The (batch, tokens) padding mask among a model's inputs, if there is one.

    A decoder's mask covers its cache as well, (batch, past + tokens): the part of the tokens is taken.
    """
    for name in MASK_NAMES:
        mask = inputs.get(name)
        if mask is not None and mask.ndim == 2:
            return mask.bool()[:, _past(mask, inputs) :]
    return None


def _past(mask: Tensor, inputs: Mapping[str, Tensor]) -> int:
    """Columns of the mask that stand for a cache: some ids are so much shorter, and a float input has that size."""
    ids = [each for each in inputs.values() if each.ndim == 2 and len(each) == len(mask) and each is not mask]
    lengths = {each.shape[1] for each in ids if not each.is_floating_point()}
    if mask.shape[1] in lengths:
        return 0
    sizes = {n for each in inputs.values() if each.ndim > 2 and each.is_floating_point() for n in each.shape[1:]}
    return next((mask.shape[1] - length for length in sorted(lengths) if mask.shape[1] - length in sizes), 0)


def token_rows(value: Tensor, mask: Tensor | None, *, channel_axis: int = -1) -> Tensor:
    """The vectors (tokens, n) of a value, padding left out where the mask fits its shape."""
    value = value.movedim(channel_axis, -1)
    if mask is not None and not mask.all():
        if value.shape[:-1] == mask.shape:
            return value[mask]
        if value.ndim == 2 and len(value) == mask.numel():
            return value[mask.reshape(-1)]
    return value.reshape(-1, value.shape[-1])


class Collector:
    """Moments of many values at once.

    Few vectors wait in a buffer until there are enough of them: a Gram matrix takes one large product in a fraction
    of the time of many small ones. They are copied there, so that what a run returned is free at once.

    Args:
        counting: count the vectors, and nothing else.
    """

    def __init__(self, *, counting: bool = False) -> None:
        self._counting = counting
        self._moments: dict[str, Moments] = {}
        self._buffers: dict[str, Tensor] = {}
        self._waiting: dict[str, int] = {}

    def add(self, name: str, rows: Tensor, samples: int, seen: int | None = None) -> None:
        """Adds vectors (tokens, n) of the value ``name``.

        Args:
            seen: how many there were to choose from; all are given by default.

        Raises:
            InvalidInputError: NaN or infinity; the error names the value.
        """
        if self._counting:
            count = self._moments.setdefault(name, Moments.zeros(1))
            count.tokens, count.seen = count.tokens + len(rows), count.seen + (len(rows) if seen is None else seen)
            return
        if name not in self._moments:
            self._moments[name] = Moments.zeros(rows.shape[-1])
        self._moments[name].samples += samples
        self._moments[name].seen += len(rows) if seen is None else seen
        for part in rows.detach().split(TOGETHER):
            if len(part) >= ENOUGH:
                self._update(name, part)
            else:
                self._wait(name, part)

    def _wait(self, name: str, rows: Tensor) -> None:
        if self._waiting.get(name, 0) + len(rows) > TOGETHER:
            self._flush(name)
        if name not in self._buffers:
            self._buffers[name], self._waiting[name] = torch.empty(TOGETHER, rows.shape[-1]), 0
        begin = self._waiting[name]
        self._buffers[name][begin : begin + len(rows)] = rows
        self._waiting[name] = begin + len(rows)

    @property
    def moments(self) -> dict[str, Moments]:
        """Everything so far, by name.

        Raises:
            InvalidInputError: as for :meth:`add`.
        """
        for name in self._waiting:
            self._flush(name)
        return self._moments

    def _flush(self, name: str) -> None:
        rows = self._buffers[name][: self._waiting[name]]
        self._waiting[name] = 0
        self._update(name, rows, spend=True)

    def _update(self, name: str, rows: Tensor, *, spend: bool = False) -> None:
        try:
            self._moments[name].update(rows, spend=spend)
        except InvalidInputError as error:
            raise InvalidInputError(error.message, where=name, hint="look for extreme values in its inputs") from None


def groups(sizes: Mapping[str, int], limit: int) -> Iterable[list[str]]:
    """Splits values into groups whose Gram matrices fit ``limit`` bytes together.

    Args:
        sizes: channels of each value.
        limit: bytes; a single value above it forms a group of its own. 0 where there are no Gram matrices.
    """
    group: list[str] = []
    used = 0
    for name, channels in sizes.items():
        need = 2 * channels * (channels + 1) if limit else 0
        if group and used + need > limit:
            yield group
            group, used = [], 0
        group.append(name)
        used += need
    if group:
        yield group
