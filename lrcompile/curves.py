"""From the error at a site to the loss at the outputs, by measurement.

A probe replaces one site alone and measures the change of the model's outputs. The first probes
cut every site to one size, and the change over the error scales the site's curve. After
a first allocation every site is probed again at the size that it was given: the two points give
the exponent of a power law, since outputs do not answer in proportion to errors that are large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from lrcompile import cache
from lrcompile.data import Batches
from lrcompile.graphs.base import Graph, Inputs
from lrcompile.progress import Progress, Watched
from lrcompile.rewrite import Proposal

EXPONENTS = (0.5, 2.0)
"""Two noisy points must not make a curve flat or a cliff."""
SPREAD = 8
"""Places in the data that probe samples are taken from."""


@dataclass(frozen=True)
class Curve:
    """Predicted loss of an error energy: ``change · (error / at) ** exponent``, measured at ``at``."""

    at: float
    change: float
    exponent: float = 1.0

    def __call__(self, error: float) -> float:
        """Loss of an error energy of the site."""
        if error <= 0 or self.at <= 0:
            return 0.0
        return self.change * (error / self.at) ** self.exponent

    def refined(self, error: float, change: float) -> Curve:
        """The curve through a second measurement as well; it is exact there."""
        if min(error, change, self.at, self.change) <= 0:
            return self
        distance = math.log(error / self.at)
        if abs(distance) < 0.05:
            return Curve(error, change, self.exponent)
        exponent = math.log(change / self.change) / distance
        return Curve(error, change, min(max(exponent, EXPONENTS[0]), EXPONENTS[1]))


def probe_batches(data: Batches, samples: int) -> list[Inputs]:
    """Small batches spread evenly over the data, about ``samples`` in total: neighbours are often alike."""
    data = data.cut(max(1, samples // SPREAD))
    count = max(1, round(samples / max(data.batch, 1)))
    total = max(1, -(-data.samples // data.batch))
    step = max(1, total // count)
    return list(islice(islice(data, step // 2, None, step), count))


def measured(
    graph: Graph,
    probes: Mapping[str, Proposal],
    data: Batches,
    *,
    samples: int,
    where: Path | None,
    tell: Progress,
) -> dict[str, float]:
    """Squared relative change of the outputs by each probe alone; from the cache where it is there already."""
    labels = ",".join(f"{name}:{probe.source}:{probe.label}:{probe.error:.6g}" for name, probe in probes.items())
    key = cache.key("probes/4", graph.fingerprint(), data.sha256, str(samples), labels)
    stored = cache.load(key, where)
    if stored is not None:
        tensors, texts = stored  # the file keeps no order of its texts, so each says which value is its own
        return {site: float(tensors["change"][int(index)]) for site, index in texts.items()}
    batches = probe_batches(data, samples)
    tell(f"probing {len(probes)} sites", len(batches))
    changes = {name: probe.build()[name] for name, probe in probes.items()}  # not .by, which would keep them
    found = dict(graph.probe(Watched(batches, tell), changes))
    texts = {site: str(index) for index, site in enumerate(found)}
    cache.store(key, {"change": torch.tensor(list(found.values()), dtype=torch.float64)}, texts, where)
    return found
