"""Convolutions of any kernel: found, measured, replaced by every form, written and found again, in both graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from lrcompile.errors import UsageError
from lrcompile.graphs.module import ModuleGraph
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import (
    Dense,
    Diagonal,
    Identity,
    Kron,
    LinearOperator,
    Product,
    Scaled,
    Select,
    Sum,
    apply,
    densify,
    low_rank,
    macs,
    same,
)
from lrcompile.sites import LinearSite, Window
from lrcompile.windows import PATCHES, convolve, patches, site_cost, unfit, window_macs
from tests.graphs.nets import built, model, node, normal, run

IN, OUT = 6, 10


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(normal(*shape, seed=seed))


def image_size(rank: int) -> tuple[int, ...]:
    return (9, 10, 6)[:rank]


GEOMETRIES: dict[str, dict[str, Any]] = {
    "3x3": {"kernel": (3, 3)},
    "padded": {"kernel": (3, 3), "pads": [1, 1, 1, 1]},
    "uneven": {"kernel": (2, 3), "pads": [0, 2, 1, 0], "strides": [2, 1]},
    "dilated": {"kernel": (3, 2), "dilations": [2, 3], "pads": [2, 0, 2, 1]},
    "patches": {"kernel": (3, 5), "strides": [3, 5]},
    "same upper": {"kernel": (2, 4), "auto_pad": "SAME_UPPER"},
    "same lower": {"kernel": (2, 4), "auto_pad": "SAME_LOWER"},
    "line": {"kernel": (4,), "strides": [2], "pads": [1, 2]},
    "volume": {"kernel": (2, 1, 3), "strides": [1, 2, 1]},
    "padded 1x1": {"kernel": (1, 1), "pads": [1, 0, 1, 0], "strides": [2, 1]},
}


def net(kernel: tuple[int, ...], bias: bool = True, **geometry: Any) -> onnx.ModelProto:
    rank = len(kernel)
    spatial: tuple[Any, ...] = tuple("abc"[:rank])
    nodes = [node("Conv", "x w b" if bias else "x w", "y", **geometry)]
    weights = {"w": normal(OUT, IN, *kernel, seed=1)} | ({"b": normal(OUT, seed=2)} if bias else {})
    return model(nodes, {"x": ("n", IN, *spatial)}, {"y": ("n", OUT, *[None] * rank)}, weights)


def forms(window: Window) -> dict[str, LinearOperator]:
    """The four decompositions of a kernel, and what else may stand under a window."""
    p = window.places
    result: dict[str, LinearOperator] = {
        "dense": Dense(random(OUT, IN * p)),
        "im2col": low_rank(random(OUT, 3), random(3, IN * p, seed=1)),
        "channel": Product(Dense(random(OUT, 4 * p)), Kron(Dense(random(4, IN, seed=1)), Identity(p))),
        "tucker": Product(
            Dense(random(OUT, 3)),
            Product(Dense(random(3, 4 * p, seed=1)), Kron(Dense(random(4, IN, seed=2)), Identity(p))),
        ),
        "sum": Sum(
            (Dense(random(OUT, IN * p)), Scaled(torch.tensor(0.5), low_rank(random(OUT, 2), random(2, IN * p))))
        ),
    }
    last = window.kernel[-1]
    if len(window.kernel) > 1 and 1 < last < p:
        tall = Kron(Dense(random(4, IN * p // last, seed=1)), Identity(last))
        result["spatial"] = Product(Dense(random(OUT, 4 * last)), tall)
    return result


CASES = [(name, form) for name in GEOMETRIES for form in ("dense", "im2col", "channel", "tucker", "sum", "spatial")]


def the_site(graph: Any) -> LinearSite:
    (site,) = graph.linear_sites()
    return site


@pytest.mark.parametrize(("name", "form"), CASES)
def test_replaced_and_found_again(name: str, form: str) -> None:
    proto = net(**GEOMETRIES[name])
    graph = OnnxGraph.from_proto(proto)
    site = the_site(graph)
    assert site.window is not None and not site.frozen and site.kind == "Conv"
    given = {"x": normal(2, IN, *image_size(site.window.rank), seed=3)}
    x, bias = torch.from_numpy(given["x"]), normal(OUT, seed=2).reshape(-1, *[1] * site.window.rank)
    kept = convolve(site.operator, x, site.window).numpy() + bias
    np.testing.assert_allclose(kept, run(proto, given)["y"], atol=2e-4)
    if form not in forms(site.window):
        return
    op = forms(site.window)[form]
    shift = random(OUT, seed=5)
    graph.replace(site, op, shift)
    lowered = built(graph)
    wanted = convolve(op, x, site.window).numpy() + bias + shift.numpy().reshape(bias.shape)
    np.testing.assert_allclose(run(lowered, given)["y"], wanted, atol=1e-4 * max(1, np.abs(wanted).max()))
    again = the_site(OnnxGraph.from_proto(lowered))
    if site.window.places > 1:
        assert again.window == site.window
        assert same(again.operator, op)
    torch.testing.assert_close(densify(again.operator), densify(op))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_multiplications_are_what_the_algebra_says(name: str) -> None:
    """Far from the borders: without padding, and on an image that the steps divide."""
    geometry = {key: value for key, value in GEOMETRIES[name].items() if key not in ("pads", "auto_pad")}
    graph = OnnxGraph.from_proto(net(bias=False, **geometry))
    site = the_site(graph)
    window = site.window
    assert window is not None
    reach = [(k - 1) * d for k, d in zip(window.kernel, window.dilations, strict=True)]
    size = [12 * s + r for s, r in zip(window.strides, reach, strict=True)]
    sample = {"x": np.zeros((1, IN, *size), np.float32)}
    for form, op in forms(window).items():
        if form in ("dense", "im2col"):
            graph.replace(site, op)
            assert OnnxGraph.from_proto(built(graph)).macs(sample) == window_macs(op, window) * 12**window.rank
        if form in ("channel", "tucker", "spatial"):
            graph.replace(site, op)
            counted = OnnxGraph.from_proto(built(graph)).macs(sample) / 12**window.rank
            assert window_macs(op, window) <= counted <= 2.5 * window_macs(op, window)  # borders of a small image


def test_cost_of_a_form_at_its_site() -> None:
    graph = OnnxGraph.from_proto(net((3, 3)))
    site = the_site(graph)
    assert site_cost(site).macs == macs(site.operator) == OUT * IN * 9
    tucker = forms(Window((3, 3), (1, 1)))["tucker"]
    assert site_cost(site, tucker).macs == 4 * IN + 3 * 4 * 9 + OUT * 3
    assert site_cost(site, tucker).nbytes == 4 * (4 * IN + 3 * 4 * 9 + OUT * 3)


def test_patches_are_what_a_convolution_multiplies() -> None:
    window = Window((3, 2), (2, 1), (1, 0, 0, 2), (1, 2))
    x, op = random(3, IN, 9, 10), Dense(random(OUT, IN * 6))
    rows = patches(x, window, limit=0)
    torch.testing.assert_close(
        apply(op, rows), convolve(op, x, window).movedim(1, -1).reshape(-1, OUT), rtol=1e-4, atol=1e-4
    )
    few = patches(random(2, 1, 64, 64), Window((3, 3), (1, 1)))
    assert PATCHES // 2 < len(few) // 2 <= PATCHES


def test_moments_are_those_of_patches_in_both_graphs() -> None:
    conv = nn.Conv2d(IN, OUT, 3, stride=2, padding=1, dilation=2)
    weights = {"w": conv.weight.detach().numpy(), "b": conv.bias.detach().numpy()}  # type: ignore[union-attr]
    nodes = [node("Conv", "x w b", "y", strides=[2, 2], pads=[1, 1, 1, 1], dilations=[2, 2])]
    proto = model(nodes, {"x": ("n", IN, "a", "b")}, {"y": ("n", OUT, None, None)}, weights)
    data = [{"x": normal(4, IN, 9, 10, seed=seed)} for seed in range(2)]
    graphs: list[Any] = [OnnxGraph.from_proto(proto), ModuleGraph(conv.eval(), sample={"input": data[0]["x"]})]
    found = []
    for graph, name in zip(graphs, ("x", "input"), strict=True):
        site = the_site(graph)
        batches = [{name: batch["x"]} for batch in data]
        found.append(graph.observe(batches, [site], memory=2**30)[site.input])
        rows = torch.cat([patches(torch.from_numpy(batch["x"]), site.window) for batch in data]).double()
        torch.testing.assert_close(found[-1].second(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-4)
        change = low_rank(random(OUT, 2), random(2, IN * 9))
        moved = graph.probe(batches, {site.name: changed_to(change)})[site.name]
        found.append(moved)
    torch.testing.assert_close(found[0].second(), found[2].second())
    assert found[1] == pytest.approx(found[3], rel=1e-3)
    assert found[0].multiplied == found[2].multiplied == found[0].tokens


def changed_to(operator: LinearOperator) -> Any:
    from lrcompile.graphs.base import Replacement

    return Replacement(operator, random(OUT, seed=8))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "square": lambda: nn.Conv2d(IN, OUT, 3, padding=1),
    "wide": lambda: nn.Conv2d(IN, OUT, (3, 2), stride=(1, 2), padding="valid", dilation=(2, 1)),
    "same": lambda: nn.Conv2d(IN, OUT, (2, 4), padding="same"),
    "line": lambda: nn.Conv1d(IN, OUT, 5, stride=2, padding=2, bias=False),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("form", ["im2col", "channel", "tucker", "spatial"])
def test_replaced_in_a_module(name: str, form: str) -> None:
    torch.manual_seed(0)
    layer: Any = LAYERS[name]().eval()
    graph = ModuleGraph(nn.Sequential(layer))
    site = the_site(graph)
    assert site.window is not None
    x = random(2, IN, *image_size(site.window.rank))
    zero = torch.zeros(OUT) if layer.bias is None else layer.bias.detach()
    bias = zero.reshape(-1, *[1] * site.window.rank)
    torch.testing.assert_close(convolve(site.operator, x, site.window) + bias, layer(x), rtol=1e-4, atol=1e-5)
    if form not in forms(site.window):
        return
    op = forms(site.window)[form]
    graph.replace(site, op)
    module: Any = graph.model
    wanted = convolve(op, x, site.window) + bias
    torch.testing.assert_close(module(x), wanted)
    torch.testing.assert_close(module(x[0]), wanted[0])  # without a batch
    assert module[0].weight.shape == layer.weight.shape
    module(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_what_a_window_cannot_hold_is_refused_with_a_reason() -> None:
    window = Window((3, 3), (1, 1))
    bad: list[LinearOperator] = [
        Product(Dense(random(OUT, 5)), Select(torch.arange(5), IN * 9)),
        Product(Dense(random(OUT, IN * 9)), Diagonal(torch.ones(IN * 9))),
        Product(Dense(random(OUT, 4 * 2)), Kron(Dense(random(4, IN * 9 // 2)), Identity(2))),
    ]
    graphs: list[Any] = [OnnxGraph.from_proto(net((3, 3))), ModuleGraph(nn.Sequential(nn.Conv2d(IN, OUT, 3)))]
    for graph in graphs:
        for op in bad:
            assert unfit(op, window)
            with pytest.raises(UsageError, match="cannot be written"):
                graph.replace(the_site(graph), op)


@pytest.mark.parametrize(
    ("attributes", "shape", "reason"),
    [
        ({"group": 2}, (OUT, IN // 2, 3, 3), "2 groups"),
        ({"group": IN}, (2 * IN, 1, 3, 3), f"{IN} groups"),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (OUT, IN, 3, 3), "size of the image"),
    ],
)
def test_frozen_convolutions(attributes: dict[str, Any], shape: tuple[int, ...], reason: str) -> None:
    nodes = [node("Conv", "x w", "y", **attributes)]
    proto = model(nodes, {"x": ("n", IN, "a", "b")}, {"y": ("n", shape[0], None, None)}, {"w": normal(*shape)})
    site = the_site(OnnxGraph.from_proto(proto))
    assert reason in site.frozen
    assert site.shape == (shape[0], IN * 9)
    x = random(2, IN, 7, 7)
    if "group" in attributes and site.window is not None:
        wanted = run(proto, {"x": x.numpy()})["y"]
        np.testing.assert_allclose(convolve(site.operator, x, site.window).numpy(), wanted, atol=1e-4)
        assert macs(site.operator) == normal(*shape).size


def test_a_kernel_under_two_windows_is_one_site() -> None:
    nodes = [node("Conv", "x w", "y"), node("Conv", "x w", "z", strides=[2, 2], pads=[1, 1, 1, 1])]
    outputs = {"y": ("n", OUT, None, None), "z": ("n", OUT, None, None)}
    graph = OnnxGraph.from_proto(model(nodes, {"x": ("n", IN, "a", "b")}, outputs, {"w": normal(OUT, IN, 3, 3)}))
    site = the_site(graph)
    assert [use.input for use in site.uses] == [
        "x (channels, 3x3 patches)",
        "x (channels, 3x3 patches, steps 2x2, pads 1.1.1.1)",
    ]
    op = forms(Window((3, 3), (1, 1)))["channel"]
    graph.replace(site, op)
    given = {"x": normal(2, IN, 8, 8)}
    found, x = run(built(graph), given), torch.from_numpy(given["x"])
    for name, window in (("y", Window((3, 3), (1, 1))), ("z", Window((3, 3), (2, 2), (1, 1, 1, 1)))):
        np.testing.assert_allclose(found[name], convolve(op, x, window).numpy(), rtol=1e-3, atol=1e-3)
