"""Convolutions as matrices: what an expression does to the patches that a window reads.

The right-most factor meets the window; what stands left of it acts on channels. ``Kron(V, Identity(n))``
meets only the first axes of the window and leaves its last ones, of ``n`` places together, to the factors
before it. With it the four usual decompositions of a kernel are expressions (``W`` is ``(O, I * places)``):

  - im2col    ``Product(U, V)``: a convolution to ``r`` channels, then a 1×1 convolution
  - channel   ``Product(U, Kron(V, Identity(places)))``: a 1×1 convolution, then the window
  - spatial   ``Product(U, Kron(V, Identity(last)))``: a tall window, then a wide one
  - Tucker-2  ``Product(L, Product(C, Kron(V, Identity(places))))``: 1×1, the window, 1×1
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from lrcompile.errors import UnsupportedError
from lrcompile.linop import (
    Cost,
    Identity,
    Kron,
    LinearOperator,
    Product,
    Scaled,
    Stack,
    Sum,
    apply,
    cost,
    densify,
    macs,
    nbytes,
    parameters,
)
from lrcompile.linop.expr import BlockSparse, Choose, Dense, Diagonal, Quantized, Select, SemiSparse, Transposed
from lrcompile.sites import LinearSite, Window

PATCHES = 256
"""Patches of one sample that statistics are taken of; they lie scattered over its positions."""
_GOLDEN = 0.6180339887498949

KERNELS = (Dense, SemiSparse, BlockSparse, Quantized, Transposed)
"""What may meet a window of several places: anything that has a matrix of its own."""


def meets(operator: LinearOperator, window: Window) -> tuple[LinearOperator, Window, Window] | None:
    """What of ``Kron(V, Identity(n))`` meets which part of a window, and the part that it leaves; else None."""
    match operator:
        case Kron(left=inner, right=Identity(size=size)) if not window.pointwise:
            parts = window.split(size)
            return None if parts is None else (inner, *parts)
        case _:
            return None


def pointwise(window: Window) -> Window:
    """The window that is left for what acts on channels only."""
    return Window((1,) * window.rank, (1,) * window.rank)


def unfit(operator: LinearOperator, window: Window | None) -> str:
    """Why an expression cannot be written under a window; empty where it can."""
    if window is None or window.pointwise:
        return ""
    reason, rest = _unfit(operator, window)
    return reason or ("" if rest.pointwise else f"{operator!r} leaves places of the window over")


def _unfit(operator: LinearOperator, window: Window) -> tuple[str, Window]:
    if window.pointwise:
        return "", window
    found = meets(operator, window)
    if found is not None:
        inner, first, rest = found
        return _unfit(inner, first)[0], rest
    match operator:
        case Product(left=left, right=right):
            reason, rest = _unfit(right, window)
            return (reason, rest) if reason else _unfit(left, rest)
        case Sum(terms=parts) | Stack(parts=parts) | Choose(operators=parts):
            return next((reason for part in parts if (reason := unfit(part, window))), ""), pointwise(window)
        case Scaled(operator=inner):
            return unfit(inner, window), pointwise(window)
        case Diagonal() | Select() | Identity() | Kron():
            return f"{operator!r} acts on the places of a window one by one", pointwise(window)
        case _:
            return "", pointwise(window)


def site_cost(site: LinearSite, operator: LinearOperator | None = None) -> Cost:
    """Cost of an expression at a site with all of its uses (multiply–accumulates for each output position)."""
    held = site.operator if operator is None else operator
    uses = len(site.uses)
    if site.window is None or site.window.pointwise:
        return cost([(index, held) for index in range(uses)])
    return Cost(parameters(held), nbytes(held), uses * window_macs(held, site.window))


def window_macs(operator: LinearOperator, window: Window) -> int:
    """Multiply–accumulates for one output position far from the borders."""
    return _flow(operator, window)[0]


def _flow(operator: LinearOperator, window: Window) -> tuple[int, Window]:
    found = meets(operator, window)
    if found is not None:  # computed at every position that the rest of the window steps over
        inner, first, rest = found
        return window_macs(inner, first) * prod(rest.strides), rest
    match operator:
        case Product(left=left, right=right):
            first, middle = _flow(right, window)
            second, rest = _flow(left, middle)
            return first + second, rest
        case Sum(terms=parts) | Stack(parts=parts):
            return sum(window_macs(part, window) for part in parts), pointwise(window)
        case Scaled(operator=inner):
            return window_macs(inner, window) + operator.shape[0], pointwise(window)
        case _:
            return macs(operator), pointwise(window)


# -- running -----------------------------------------------------------------------------------


def convolve(operator: LinearOperator, x: Tensor, window: Window) -> Tensor:
    """The convolution of ``x`` (batch, in, *spatial) whose kernel is ``operator``, in the dtype of ``x``.

    Raises:
        UnsupportedError: the expression does not fit the window, see :func:`unfit`.
    """
    reason = unfit(operator, window)
    if reason:
        raise UnsupportedError(reason)
    return _convolve(operator, x, window)[0]


def _convolve(operator: LinearOperator, x: Tensor, window: Window) -> tuple[Tensor, Window]:
    found = meets(operator, window)
    if found is not None:
        inner, first, rest = found
        return _convolve(inner, x, first)[0], rest
    match operator:
        case Product(left=left, right=right):
            value, rest = _convolve(right, x, window)
            return _convolve(left, value, rest)
        case Sum(terms=parts):
            return sum((_convolve(part, x, window)[0] for part in parts[1:]), _convolve(parts[0], x, window)[0]), (
                pointwise(window)
            )
        case Stack(parts=parts):
            return torch.cat([_convolve(part, x, window)[0] for part in parts], 1), pointwise(window)
        case Scaled(scale=scale, operator=inner):
            value, rest = _convolve(inner, x, window)
            return scale.to(x) * value, rest
        case _ if window.pointwise:
            moved = positions(x, window).movedim(1, -1)
            return apply(operator, moved).movedim(-1, 1), pointwise(window)
        case _:
            return _kernel(densify(operator).to(x), x, window), pointwise(window)


def _kernel(matrix: Tensor, x: Tensor, window: Window) -> Tensor:
    rank = window.rank
    kernel = matrix.reshape(len(matrix), -1, *window.kernel)
    if rank > 3:
        flat = patches(x, window, limit=0)
        out = sizes(x, window)
        return (flat @ matrix.T).reshape(len(x), prod(out), -1).mT.reshape(len(x), -1, *out)
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    before, behind = window.pads[:rank], window.pads[rank:]
    if before == behind:
        return function(x, kernel, None, window.strides, before, window.dilations)
    return function(padded(x, window), kernel, None, window.strides, 0, window.dilations)


def positions(x: Tensor, window: Window) -> Tensor:
    """What a window of a single place reads: every ``strides[i]``-th position."""
    return x[(..., *(slice(None, None, step) for step in window.strides))] if window.strided else x


def padded(x: Tensor, window: Window) -> Tensor:
    """``x`` with the zeros that the window adds around it."""
    if not any(window.pads):
        return x
    pairs = zip(window.pads[: window.rank], window.pads[window.rank :], strict=True)
    return functional.pad(x, [amount for pair in reversed(list(pairs)) for amount in pair])


def sizes(x: Tensor, window: Window) -> tuple[int, ...]:
    """Output positions along each spatial axis."""
    rank = window.rank
    axes = zip(x.shape[2:], window.kernel, window.strides, window.dilations, strict=True)
    total = [window.pads[i] + window.pads[rank + i] for i in range(rank)]
    return tuple((size + pad - (k - 1) * d - 1) // s + 1 for (size, k, s, d), pad in zip(axes, total, strict=True))


def patches(x: Tensor, window: Window, limit: int = PATCHES) -> Tensor:
    """Rows (batch * positions, in * places) that the kernel's matrix multiplies.

    Args:
        x: (batch, in, *spatial).
        limit: positions of a sample; where it has more, scattered ones are taken, the same in every sample.
            0 for all.
    """
    view = padded(x, window)
    for axis, (k, step, spread) in enumerate(zip(window.kernel, window.strides, window.dilations, strict=True)):
        view = view.unfold(2 + axis, (k - 1) * spread + 1, step)[..., ::spread]
    out = view.shape[2 : 2 + window.rank]
    places = torch.unravel_index(_scattered(prod(out), limit), out)
    rows = view[(slice(None), slice(None), *places)]  # (batch, in, positions, *kernel)
    return rows.movedim(1, 2).reshape(len(x) * len(places[0]), -1)


def _scattered(total: int, limit: int) -> Tensor:
    """At most ``limit`` of ``0..total-1``, without a common step: a grid would see some columns only."""
    if not limit or total <= limit:
        return torch.arange(total)
    spots = torch.arange(1, limit + 1, dtype=torch.float64) * _GOLDEN
    return ((spots - spots.floor()) * total).long().unique()
