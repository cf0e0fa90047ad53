"""Second moments of the gradients at the outputs of sites, through a torch evaluation of the ONNX graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir
import torch
from torch import Tensor

from lrcompile.calibrate import Collector, Moments, groups, token_mask, token_rows
from lrcompile.graphs.base import Inputs
from lrcompile.graphs.onnx.observe import Cutter, samples_in, tensors_of
from lrcompile.graphs.onnx.raising import Match
from lrcompile.graphs.onnx.torched.run import TorchRun
from lrcompile.memory import release
from lrcompile.sites import LinearSite
from lrcompile.sketch import Importance, direction

Found = tuple[list[tuple[str, Tensor]], bool]


def gradients(
    model: ir.Model,
    batches: Iterable[Inputs],
    sites: Sequence[LinearSite],
    matches: Mapping[str, tuple[Match, ...]],
    *,
    memory: int,
    seed: int,
) -> Importance:
    """Moments of gradients (see :mod:`lrcompile.sketch`) at what each site gives, by site name.

    Raises:
        UnsupportedError: the graph uses an operator that torch's evaluation does not cover.
    """
    run = TorchRun(model)
    found: dict[str, Moments] = {}
    tokens = False
    for group in groups({site.name: site.shape[0] for site in sites}, memory):
        collector = Collector()
        roots = {name: matches[name] for name in group}
        for index, piece in enumerate(Cutter(model).pieces(batches)):  # one by one: all activations of a piece are held
            rows, tokens = _rows(run, piece, roots, seed + index)
            for name, part in rows:
                collector.add(name, part, samples_in(piece))
            del rows
            release()
        found.update(collector.moments)
    release(now=True)
    return Importance(found, tokens)


def _rows(run: TorchRun, piece: Inputs, roots: Mapping[str, Sequence[Match]], seed: int) -> Found:
    """Gradient vectors (tokens, out) of every site for one piece of data."""
    mask = token_mask(tensors_of(piece))
    pairs = [(name, match) for name, found in roots.items() for match in found]
    with torch.enable_grad():
        outputs, taps = run(piece, [str(match.root.name) for _, match in pairs])
        places = [taps[str(match.root.name)] for _, match in pairs]
        scalar, tokens = direction(outputs, tensors_of(piece), mask, seed)
        del outputs
        gradients = torch.autograd.grad(scalar, [place.edge for place in places], allow_unused=True)
    rows = []
    for (name, match), place, gradient in zip(pairs, places, gradients, strict=True):
        whole = torch.zeros(place.shape) if gradient is None else gradient
        rows.append((name, token_rows(whole.detach(), mask, channel_axis=-1 if match.axis == 0 else match.axis)))
    return rows, tokens
