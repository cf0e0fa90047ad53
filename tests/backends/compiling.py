"""For the tests of the torch.compile backend: models, plans, and an inner compiler that sees what really runs."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

import lrcompile
from lrcompile import Budget, Options, Plan, Settings
from lrcompile.backends.dynamo.graph import along_last, linear, rebuilt
from lrcompile.graphs.module import ModuleGraph
from lrcompile.linop import Dense, leaves
from lrcompile.plans import content

WIDTH = 32
LOOSE = Options(max_drift=10.0, settings=Settings(align=4, probe_samples=4))


class Block(nn.Module):
    """Two linear layers around a nonlinearity, with a residual."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    """Equal blocks; ``broken`` breaks the graph between them, so that torch sees one block at a time."""

    def __init__(self, depth: int = 3, broken: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if self.broken:
                torch._dynamo.graph_break()
        return x


def stack(depth: int = 3, broken: bool = False, seed: int = 0) -> Any:
    """A stack whose later blocks weigh more, so that ranks differ."""
    torch.manual_seed(seed)
    model = Stack(depth, broken).eval()
    with torch.no_grad():
        for index, block in enumerate(model.blocks):
            for parameter in block.parameters():
                parameter.mul_(1 + 0.3 * index)
                if parameter.ndim == 2:
                    parameter.mul_(torch.rand(parameter.shape[1]) ** (1 + index % 4))
    return model


def samples(count: int = 4, seed: int = 1, width: int = WIDTH) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(8, width, generator=generator)} for _ in range(count)]


def planned(model: nn.Module, keep: float = 0.6, **more: Any) -> Plan:
    return lrcompile.plan(model, Budget(keep=keep), **{"calibration": samples(), "options": LOOSE, **more})


def reference(model: nn.Module, plan: Plan) -> nn.Module:
    """The model with the plan's expressions written into it by other code than the one under test.

    Weights that have changed since are taken from :meth:`Plan.refit`.
    """
    graph = ModuleGraph(copy.deepcopy(model))
    for site in graph.linear_sites():
        entry = plan.entries[site.name]
        if entry.replacement is None:
            continue
        weight = graph.found(site.name).readers[0].weight
        by = entry.replacement
        if content(weight) != entry.sha256:
            by = plan.refit(entry, weight)
            assert not isinstance(by, str), by
        graph.replace(site, by.operator, by.shift)
    return graph.model.eval()


class Watch:
    """An inner compiler that runs the graph as it is and writes down every product with a weight.

    Attributes:
        graphs: how many it was given.
        runs: for each run the shapes of the weights that were multiplied with.
    """

    def __init__(self) -> None:
        self.graphs = 0
        self.runs: list[list[tuple[int, ...]]] = []

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs += 1
        watch = self

        class Run(fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                if target is linear:
                    watch.runs[-1].append(tuple(args[1].shape))
                elif target is along_last:
                    watch.runs[-1].append(rebuilt(*args[2:4], args[4:]).shape)
                return super().call_function(target, args, kwargs)

        def run(*args: Any) -> Any:
            assert all(isinstance(value, torch.Tensor | int) for value in args)
            self.runs.append([])
            return Run(module).run(*args)

        return run

    def clear(self) -> None:
        self.runs.clear()

    @property
    def products(self) -> list[tuple[int, ...]]:
        """Shapes of all weights since :meth:`clear`."""
        return [shape for run in self.runs for shape in run]


def compressed(watch: Watch, plan: Plan, model: nn.Module) -> int:
    """How many planned sites ran as their own thin products in the runs that were watched, none of them dense."""
    dense = {tuple(parameter.shape) for parameter in model.parameters() if parameter.ndim == 2}
    ran = Counter(shape for shape in watch.products if shape not in dense)
    held = [entry.replacement.operator for entry in plan.entries.values() if entry.replacement is not None]
    planned = Counter(leaf.shape for operator in held for leaf in leaves(operator) if isinstance(leaf, Dense))
    times = ran.total() // max(planned.total(), 1)
    assert ran == Counter({shape: count * times for shape, count in planned.items()}), (ran, planned)
    return times * len(plan.compressed)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return float((a.double() - b.double()).norm()) <= tolerance * float(b.double().norm())
