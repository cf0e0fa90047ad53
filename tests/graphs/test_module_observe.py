"""What runs of a module measure: moments, probes, outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lrcompile.backends.eager import Eager
from lrcompile.calibrate import Moments
from lrcompile.errors import InvalidInputError
from lrcompile.graphs.base import Replacement
from lrcompile.graphs.module import ModuleGraph
from lrcompile.linop import densify, low_rank
from tests.graphs.modules import MEMORY, Wrapped, X, encoder, factors, gpt2, llama, outputs, sites, tokens, tree

# -- observing and probing -------------------------------------------------------------------


def captured(model: nn.Module, path: str, batches: list[dict[str, np.ndarray]]) -> tuple[Tensor, int]:
    """Unpadded rows that a layer reads, by a hook of the test's own, and the number of samples."""
    rows: list[Tensor] = []
    for batch in batches:
        mask = torch.from_numpy(batch["attention_mask"]).bool()
        handle = model.get_submodule(path).register_forward_pre_hook(lambda m, a, k=mask: rows.append(a[0][k]))
        model.eval()
        with torch.no_grad():
            model(**{name: torch.from_numpy(array) for name, array in batch.items()})
        handle.remove()
    return torch.cat(rows), sum(len(batch["input_ids"]) for batch in batches)


@pytest.mark.parametrize("memory", [MEMORY, 1])
def test_moments_are_those_of_the_unpadded_inputs(memory: int):
    model, batches = encoder(), [tokens(4, 7, 0), tokens(3, 5, 1)]
    graph = ModuleGraph(model)
    moments = graph.observe(iter(batches), graph.linear_sites(), memory=memory)
    for name in ("first.query", "second.value", "up", "down", "head"):
        rows, samples = captured(encoder(), name, batches)
        found = moments[sites(graph)[name].input]
        torch.testing.assert_close(found.gram, rows.T @ rows, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.total, rows.sum(0), rtol=1e-4, atol=1e-4)
        assert (found.tokens, found.samples) == (len(rows), samples)


def test_layers_that_read_one_tensor_share_moments():
    graph = ModuleGraph(encoder())
    before = {name: site.input for name, site in sites(graph).items()}
    moments = graph.observe([tokens()], graph.linear_sites(), memory=MEMORY)
    after = {name: site.input for name, site in sites(graph).items()}
    for keys in (before, after):
        assert moments[keys["first.query"]] is moments[keys["first.key"]] is moments[keys["first.value"]]
        assert moments[keys["first.query"]] is not moments[keys["second.query"]]
        assert moments[keys["first.query"]] is not moments[keys["first.out"]]
    assert after["first.key"] == after["first.query"] == "first.query" != after["second.query"]
    assert len({id(value) for value in moments.values()}) == len(set(after.values()))


def test_every_use_of_a_tied_weight_counts():
    model = encoder()
    model.second.query.weight = model.first.query.weight
    graph = ModuleGraph(model)
    moments = graph.observe([tokens()], graph.linear_sites(), memory=MEMORY)
    rows = torch.cat([captured(model, f"{block}.query", [tokens()])[0] for block in ("first", "second")])
    found: Moments = moments[sites(graph)["first.query"].input]
    torch.testing.assert_close(found.gram, rows.T @ rows, rtol=1e-4, atol=1e-4)
    assert found.samples == 4
    alone = moments[sites(graph)["first.key"].input]
    assert alone.tokens * 2 == found.tokens


def test_moments_of_a_strided_convolution_see_the_positions_that_it_reads():
    model = Wrapped(nn.Conv2d(6, 4, 1, stride=2))
    graph = ModuleGraph(model)
    x = np.random.default_rng(0).standard_normal((3, 6, 5, 5)).astype(np.float32)
    moments = graph.observe([{"x": x}], graph.linear_sites(), memory=MEMORY)
    rows = torch.from_numpy(x[:, :, ::2, ::2]).movedim(1, -1).reshape(-1, 6)
    torch.testing.assert_close(moments["layer"].gram, rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_a_tensor_written_to_between_two_reads_is_not_shared():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x + 1
            first = self.a(x) + self.c(x.reshape(-1, 8))
            return first + self.b(x.mul_(2))

    graph = ModuleGraph(InPlace(), sample=X)
    found = sites(graph)
    assert found["a"].input == found["c"].input != found["b"].input


def test_calibration_that_overflows_names_the_layer():
    graph = ModuleGraph(encoder())
    tree(graph).first.norm.weight.data.fill_(1e30)
    with pytest.raises(InvalidInputError, match="NaN or infinite"):
        graph.observe([tokens()], [sites(graph)["down"]], memory=MEMORY)


@pytest.mark.parametrize("name", ["first.query", "up", "head"])
def test_a_probe_is_the_measured_change(name: str):
    batches = [tokens(4, 7, 0), tokens(3, 5, 1)]
    graph = ModuleGraph(encoder())
    site = sites(graph)[name]
    operator = low_rank(*_truncated(densify(site.operator), 3))
    shift = torch.full((site.shape[0],), 0.1)
    found = graph.probe(batches, {name: Replacement(operator, shift)})
    changed = encoder()
    layer = changed.get_submodule(name)
    with torch.no_grad():
        layer.weight.copy_(densify(operator))
        layer.bias.add_(shift)
    change, norm = dict.fromkeys(("logits", "hidden"), 0.0), dict.fromkeys(("logits", "hidden"), 0.0)
    for batch in batches:
        mask = torch.from_numpy(batch["attention_mask"]).bool()
        dense, other = outputs(encoder(), batch), outputs(changed, batch)
        for output in change:
            change[output] += float((other[output] - dense[output])[mask].double().square().sum())
            norm[output] += float(dense[output][mask].double().square().sum())
    expected = sum(change[output] / norm[output] for output in change)
    assert found[name] == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-6 and not graph.replacements


def _truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_run_and_are_observed(dtype: torch.dtype):
    graph = ModuleGraph(encoder().to(dtype))
    moments = graph.observe([tokens()], graph.linear_sites(), memory=MEMORY)
    rows, _ = captured(encoder(), "up", [tokens()])
    torch.testing.assert_close(moments["up"].gram, rows.T @ rows, rtol=5e-2, atol=0.5)
    graph.replace(sites(graph)["up"], low_rank(torch.randn(32, 4).to(dtype), torch.randn(4, 16).to(dtype)))
    reference, have = graph.run(tokens()), Eager().build(graph).run(tokens())
    expected = np.float32 if dtype == torch.bfloat16 else np.dtype(str(dtype).removeprefix("torch."))
    assert reference["logits"].dtype == have["logits"].dtype == expected
    assert {p.dtype for p in tree(graph).up.parameters()} == {dtype}
    assert graph.probe([tokens()], {"head": Replacement(low_rank(torch.zeros(5, 1), torch.zeros(1, 16)))})["head"] > 0.5
    floats = ModuleGraph(Wrapped(nn.Linear(8, 8).to(dtype)))
    assert floats.run(X)["output"].shape == (5, 8)  # float32 samples are cast to what the model takes


# -- inputs and outputs ----------------------------------------------------------------------


def test_outputs_have_names():
    class Many(nn.Module):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
            return x, (x + 1, [x + 2]), None, 3

    graph = ModuleGraph(Many())
    assert list(graph.run(X)) == ["output", "output_1_0", "output_1_1_0"]
    assert list(graph.run((X["x"],))) == list(graph.run(torch.ones(2, 2))) == list(graph.run(X))  # type: ignore[arg-type]
    assert [spec.name for spec in graph.input_specs] == ["x"]
    assert [spec.name for spec in graph.specs_for(["y"])] == ["x", "y"]
    with pytest.raises(InvalidInputError, match="'z' is no input"):
        graph.specs_for(["x", "z"])
    with pytest.raises(InvalidInputError, match="fails on these inputs"):
        graph.run({"z": X["x"]})


def test_runs_are_deterministic_and_leave_no_trace():
    model = encoder().train()
    graph = ModuleGraph(model)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    fast = torch.backends.mha.get_fastpath_enabled()
    first = graph.run(tokens())
    np.testing.assert_array_equal(first["logits"], graph.run(tokens())["logits"])
    assert torch.equal(torch.rand(1), expected) and tree(graph).training and tree(graph).first.drop.training
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tree(graph).modules())


# -- Hugging Face ----------------------------------------------------------------------------


@pytest.mark.parametrize(("build", "name"), [(llama, "model.layers.1.mlp.up_proj"), (gpt2, "transformer.h.1.mlp.c_fc")])
def test_generation_works_after_a_replacement(build: Any, name: str):
    model = build()
    prompt = torch.tensor([[3, 4, 5]])
    ids = {"input_ids": np.random.default_rng(0).integers(0, 50, (2, 6)), "attention_mask": np.ones((2, 6), np.int64)}
    graph = ModuleGraph(model)
    moments = graph.observe([ids], graph.linear_sites(), memory=MEMORY)
    found = sites(graph)
    if build is llama:
        block = "model.layers.0.self_attn."
        assert moments[found[f"{block}q_proj"].input] is moments[found[f"{block}v_proj"].input]
    operator = factors(*found[name].shape, 5)
    graph.replace(found[name], operator)
    dense = build()
    with torch.no_grad():
        weight = dense.get_submodule(name).weight
        matrix = densify(operator)
        weight.copy_(matrix if weight.shape == matrix.shape else matrix.T)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(tree(graph).generate(prompt, **options), dense.generate(prompt, **options))
    assert "past_key_values" not in graph.run(ids) and graph.run(ids)["logits"].shape == (2, 6, 50)
    assert [spec.name for spec in graph.input_specs] == ["input_ids"]


def test_a_tied_head_stays():
    graph = ModuleGraph(llama(tied=True))
    assert tree(graph).lm_head.weight is tree(graph).model.embed_tokens.weight
    assert sites(graph)["lm_head"].frozen == "tied to embedding model.embed_tokens"
