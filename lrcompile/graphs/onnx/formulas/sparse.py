"""Products with a constant matrix that is mostly zeros: entries of each column with the rows that they stand in.

Rows of a layout with a fixed number of entries (ELL) come as zeros that are scattered into; however the file makes
the matrix, what counts is where it is zero. Indices take a byte up to 256 rows, two up to 65,536.
"""

from __future__ import annotations

import numpy as np

from lrcompile.dataflow.expr import Expr, as_index, call
from lrcompile.graphs.onnx.formulas.builder import Builder, Index, Shape

SHARE = 3
"""A column may fill one place in so many: beyond that a dense product takes hardly more flash, and less time."""


class Sparse:
    """A matrix (rows, columns) as entries (columns, s) and the rows that they stand in, padded with zeros."""

    def __init__(self, b: Builder, matrix: np.ndarray) -> None:
        filled = matrix.T != 0
        most = max(1, int(filled.sum(1).max()))
        where = np.argsort(~filled, axis=1, kind="stable")[:, :most]
        entries = np.take_along_axis(matrix.T, where, 1)
        where = np.where(entries != 0, where, 0)
        dtype = "uint8" if len(matrix) <= 2**8 else "uint16" if len(matrix) <= 2**16 else "int32"
        self._b, self.most = b, most
        self._entries = b.constant(None, np.ascontiguousarray(entries))
        self._where = b.constant(None, where.astype(dtype))

    def term(self, x: str, before: Index, column: Index, inner: Index) -> Expr:
        """One entry times the element of ``x`` (…, rows) that it meets."""
        place = (*column, *inner)
        row = as_index(self._b.at(self._where, place))
        return call("mul", self._b.at(x, [*before, row]), self._b.at(self._entries, place))


def sparse(b: Builder, tensor: str, flip: bool = False) -> Sparse | None:
    """The constant matrix (rows, columns) in this form, if that takes less; ``flip`` takes its transpose."""
    matrix = b.array(tensor)
    if matrix is None or matrix.ndim != 2 or matrix.dtype.name not in ("float32", "float64") or not matrix.size:
        return None
    matrix = matrix.T if flip else matrix
    if np.count_nonzero(matrix, 0).max() * SHARE > len(matrix):
        return None
    return Sparse(b, matrix)


def sparse_product(b: Builder, value: str | None, x: str, y: str) -> bool:
    """Defines ``x @ y`` for such a matrix ``y``; False where a dense product is due."""
    found = sparse(b, y)
    if found is None:
        return False
    shape: Shape = (*b.shape(x)[:-1], b.shape(y)[1])
    b.reduce(value, shape, (found.most,), lambda i, inner: found.term(x, i[:-1], i[-1:], inner))
    return True
