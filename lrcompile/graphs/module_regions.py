"""Regions of a module tree, from the graph that torch traces of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lrcompile.graphs.module_run import bind, evaluating
from lrcompile.graphs.module_sites import Found
from lrcompile.order import Region


def regions(model: nn.Module, sample: Any, founds: Mapping[str, Found]) -> list[Region]:
    """Regions between sites of the tree; none where torch cannot trace the model.

    Like what is shared between sites, wiring is taken from one sample.

    Args:
        sample: what the model is called with.
    """
    from lrcompile.graphs.fx.graph import FxGraph

    args, kwargs = bind(model, sample)
    try:
        with evaluating(model, inference=False):
            program = torch.export.export(model, args, kwargs, strict=False)
        traced = FxGraph(program)
        shapes = {site.name: site.shape for site in traced.linear_sites()}
        found = traced.regions()
    except Exception:  # whatever the exporter raises: then the model has no regions that could be told
        return []
    known = {name for name, each in founds.items() if each.alone and shapes.get(name) == each.site.shape}
    return [region for region in found if known.issuperset((*region.writers, *region.readers))]
