"""Pruning at the bytes of a low-rank form: what its rows are compared with.

A pruned matrix holds its kept values and one bit for each place. No runtime here computes with that form, so the
files hold zeros in its place; only their bytes are counted as if it were stored.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lrcompile.backends.onnxruntime import OnnxRuntime
from lrcompile.calibrate import Moments
from lrcompile.data import Batches
from lrcompile.files import AtomicSet
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import Dense, densify
from lrcompile.planning import Settings, statistics
from lrcompile.progress import Progress

BLOCK = 128
"""Columns that share a mask decision in SparseGPT."""
DAMP = 0.01
"""Share of the mean diagonal that SparseGPT adds to the second moments."""


def density(keep: float, bits: int) -> float:
    """Share of values to keep so that they and a bit for each place take ``keep`` of the dense bytes."""
    return keep - 1 / bits


def wanda(weight: Tensor, moments: Moments, share: float) -> Tensor:
    """Zeroes the entries with the least ``|W| · ‖x‖``, in each row alike (arXiv 2306.11695)."""
    scores = weight.abs() * moments.second().diagonal().sqrt().to(weight)
    dropped = scores.argsort(1)[:, : weight.shape[1] - round(share * weight.shape[1])]
    return weight.scatter(1, dropped, 0.0)


def sparsegpt(weight: Tensor, moments: Moments, share: float) -> Tensor:
    """Prunes column by column; the columns that follow take up the errors (arXiv 2301.00774)."""
    found, second = weight.double().clone(), moments.second()
    second.diagonal().add_(DAMP * float(second.diagonal().mean()))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(second)), upper=True)
    columns = found.shape[1]
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        scores = (found[:, start:end] / inverse.diagonal()[start:end]).square()
        cut = scores.flatten().kthvalue(max(1, round((1 - share) * scores.numel()))).values
        errors = torch.zeros_like(scores)
        for column in range(start, end):
            old = found[:, column].clone()
            found[scores[:, column - start] <= cut, column] = 0.0
            errors[:, column - start] = (old - found[:, column]) / inverse[column, column]
            found[:, column + 1 : end] -= errors[:, column - start, None] * inverse[column, column + 1 : end]
        found[:, end:] -= errors @ inverse[start:end, end:]
    return found.to(weight)


METHODS = {"Wanda": wanda, "SparseGPT": sparsegpt}


def pruned(dense: Path, method: str, share: float, data: Batches, settings: Settings, out: Path) -> Path:
    """Writes the model with every site pruned to that share of its values."""
    graph = OnnxGraph.load(dense)
    sites = [site for site in graph.linear_sites() if not site.frozen]
    moments = statistics(graph, sites, data, settings, Progress())
    for site in sites:
        weight = densify(site.operator)
        graph.replace(site, Dense(METHODS[method](weight, moments[site.input], share)))
    with AtomicSet(out, force=True) as files:
        OnnxRuntime().build(graph, out=files)
    return out
