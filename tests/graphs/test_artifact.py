"""Saving and loading: what comes back computes the same, on its own in a fresh process, and bad files are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lrcompile.artifact import load, open_folder, save
from lrcompile.artifact_read import CONFIG, PROGRAM, TARGET, WEIGHTS
from lrcompile.backends.eager import Eager
from lrcompile.errors import InvalidInputError, MissingExtraError, UnsupportedError, UsageError
from lrcompile.files import AtomicSet
from lrcompile.graphs.module import ModuleGraph
from lrcompile.linop import Dense, Identity, Kron, Product, low_rank, same
from lrcompile.program import Program
from tests.graphs.modules import edit, encoder, factors, gpt2, llama, rewritten, same_outputs, tokens, tree
from tests.models import two_layer_mlp

ROOT = Path(__file__).resolve().parents[2]


# -- round trips -----------------------------------------------------------------------------


def test_into_a_freshly_built_module(tmp_path: Path):
    graph = rewritten()
    tree(graph).norm_is_trained = True
    with torch.no_grad():
        tree(graph).first.norm.weight.mul_(2)
    assert save(graph, tmp_path) == [TARGET, WEIGHTS]
    fresh = encoder(9)
    fresh.second.out.weight = fresh.first.out.weight
    loaded: Any = load(tmp_path, into=fresh)
    assert loaded is fresh
    assert loaded.state_dict().keys() == tree(graph).state_dict().keys()
    for name, value in tree(graph).state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    for name in ("first.query", "up", "down", "first.out", "head"):
        assert same(loaded.get_submodule(name).operator, tree(graph).get_submodule(name).operator)
    assert loaded.first.query.factors.right.weight is loaded.second.key.factors.right.weight
    assert loaded.first.out.factors.blocks is loaded.second.out.factors.blocks
    same_outputs(graph.model, loaded, **tokens())


def test_shared_tensors_are_written_once(tmp_path: Path):
    graph = rewritten()
    save(graph, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    total = sum(value.numel() * value.element_size() for value in stored.values())
    assert total == Eager().build(graph).nbytes
    assert (tmp_path / WEIGHTS).stat().st_size < total + 8000


def test_a_module_without_replacements_round_trips(tmp_path: Path):
    model = encoder()
    save(model, tmp_path)
    loaded: Any = load(tmp_path, into=encoder(3))
    same_outputs(model, loaded, **tokens())


def test_equal_modules_give_equal_bytes(tmp_path: Path, saved: Path):
    save(rewritten(), tmp_path, sample=tokens(3, 5))
    for file in (TARGET, WEIGHTS, PROGRAM):
        assert (tmp_path / file).read_bytes() == (saved / file).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_come_back_narrow(tmp_path: Path, dtype: torch.dtype):
    graph = ModuleGraph(encoder().to(dtype))
    site = next(site for site in graph.linear_sites() if site.name == "up")
    graph.replace(site, low_rank(torch.randn(32, 4).to(dtype), torch.randn(4, 16).to(dtype)))
    save(graph, tmp_path)
    loaded: Any = load(tmp_path, into=encoder())
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(loaded.up.factors.left.weight, tree(graph).up.factors.left.weight)


def test_the_backend_writes_the_artefact_with_a_program(tmp_path: Path):
    graph = rewritten()
    reference = Eager().build(graph).run(tokens())
    graph.check(tokens())
    with AtomicSet(tmp_path / TARGET) as files:
        built = Eager().build(graph, out=files)
    assert built.notes == [] and built.path == tmp_path / TARGET
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([TARGET, WEIGHTS, PROGRAM])
    loaded: Any = open_folder(tmp_path)
    for name, value in ModuleGraph(loaded).run(tokens()).items():
        np.testing.assert_allclose(value, reference[name], rtol=1e-4, atol=1e-5)


def test_the_backend_does_without_a_program_where_there_can_be_none(tmp_path: Path):
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if x.sum() > 0 else x

    x = {"x": np.ones((3, 8), np.float32)}
    graph = ModuleGraph(Branching(), sample=x)
    with pytest.raises(UnsupportedError, match="no program can be stored"):
        save(graph, tmp_path / "a", sample=x)
    assert not list((tmp_path / "a").iterdir())
    with AtomicSet(tmp_path / TARGET) as files:
        built = Eager().build(graph, out=files)
    assert "no program can be stored" in built.notes[0]
    with pytest.raises(UsageError, match=r"into=.*Branching"):
        load(tmp_path)


# -- programs --------------------------------------------------------------------------------


def test_a_program_holds_for_other_sizes_and_refuses_what_it_was_not_traced_for(saved: Path):
    graph = rewritten()
    program: Any = load(saved)
    assert isinstance(program, Program)
    for samples, length in ((3, 5), (1, 9), (6, 4)):
        same_outputs(graph.model, program, **tokens(samples, length))
    assert set(program.state_dict()) <= set(tree(graph).state_dict())
    fed = {name: torch.from_numpy(array) for name, array in tokens().items()}
    assert program(**fed)["cache"] is None
    torch.testing.assert_close(program(*fed.values())["logits"], program(**fed)["logits"])
    with pytest.raises(UsageError, match="takes the inputs input_ids, attention_mask"):
        program(fed["input_ids"])
    with pytest.raises(InvalidInputError, match="does not fit"):
        program(input_ids=fed["input_ids"][0], attention_mask=fed["attention_mask"])
    with pytest.raises(InvalidInputError, match="does not fit"):
        program(input_ids=fed["input_ids"], attention_mask=fed["attention_mask"][:2])


def test_a_size_that_had_to_be_fixed_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = torch.export.export

    def choosy(*args: Any, dynamic_shapes: Any, **kwargs: Any) -> Any:
        if any(len(axes) > 1 for axes in dynamic_shapes[0].values()):
            raise RuntimeError("not the sequence")
        return real(*args, dynamic_shapes=dynamic_shapes, **kwargs)

    monkeypatch.setattr(torch.export, "export", choosy)
    save(rewritten(), tmp_path, sample=tokens(3, 5))
    program: Any = load(tmp_path)
    same_outputs(rewritten().model, program, **tokens(2, 5))
    with pytest.raises(InvalidInputError, match="does not fit") as caught:
        program(**{name: torch.from_numpy(array) for name, array in tokens(3, 6).items()})
    assert "not the sequence" in caught.value.hint


def test_a_program_trains(saved: Path):
    program: Any = load(saved)
    program(**{name: torch.from_numpy(array) for name, array in tokens().items()})["logits"].square().sum().backward()
    grads = {name for name, p in program.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"up.factors.terms.0.left.weight", "words.weight", "first.query.factors.right.weight"} <= grads


def test_a_convolutional_model_with_buffers_and_constants(tmp_path: Path):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.norm, self.point = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
            self.register_buffer("scale", torch.linspace(1, 2, 4)[:, None, None], persistent=False)
            self.offset = torch.tensor(0.5)

        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            h = self.point(torch.relu(self.norm(self.wide(x)))) * self.scale + self.offset
            return h, [h.mean((2, 3))]

    torch.manual_seed(0)
    graph = ModuleGraph(Net().eval())
    wide, point = graph.linear_sites()
    graph.replace(wide, Product(Dense(torch.randn(8, 18)), Kron(Dense(torch.randn(2, 3)), Identity(9))))
    graph.replace(point, factors(4, 8, 2))
    x = torch.randn(1, 3, 6, 6)
    save(graph, tmp_path, sample=x)
    program: Any = load(tmp_path)
    for size in ((1, 3, 6, 6), (5, 3, 4, 8)):
        x = torch.randn(size)
        (a, [b]), (c, [d]) = program(x), tree(graph)(x)
        torch.testing.assert_close((a, b), (c, d))
    into: Any = load(tmp_path, into=Net())
    torch.testing.assert_close(into.eval()(x)[0], tree(graph)(x)[0])


SCRIPT = """
import sys, json, numpy as np, torch
from lrcompile.artifact import load
def logits(folder, **inputs):
    with torch.no_grad():
        result = load(folder)(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return result["logits"].flatten().tolist()
inputs = dict(np.load(sys.argv[3]))
program = logits(sys.argv[1], **inputs)
assert "transformers" not in sys.modules and "tests" not in sys.modules
print(json.dumps([program, logits(sys.argv[2], input_ids=inputs["input_ids"])]))
"""


def test_artefacts_load_in_a_fresh_process(tmp_path: Path, saved: Path):
    ids = tokens()
    graph = ModuleGraph(llama())
    graph.replace(next(s for s in graph.linear_sites() if s.name.endswith("up_proj")), factors(48, 32, 5))
    save(graph, tmp_path / "llama")
    np.savez(tmp_path / "ids.npz", allow_pickle=False, **ids)
    folders = [str(saved), str(tmp_path / "llama"), str(tmp_path / "ids.npz")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, *folders]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    expected = [Eager().build(rewritten()).run(ids), Eager().build(graph).run({"input_ids": ids["input_ids"]})]
    for have, want in zip(json.loads(done.stdout), expected, strict=True):
        np.testing.assert_allclose(have, want["logits"].ravel(), rtol=1e-3, atol=1e-4)


# -- Hugging Face ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (llama, "model.layers.1.mlp.up_proj"),
        (lambda: llama(tied=True), "model.layers.0.self_attn.q_proj"),
        (gpt2, "transformer.h.1.mlp.c_fc"),
    ],
)
def test_hugging_face_models_rebuild_themselves(tmp_path: Path, build: Callable[[], Any], name: str):
    model = build().to(torch.float32)
    model.generation_config.max_new_tokens = 6
    source = tmp_path / "source"
    model.save_pretrained(source)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}', encoding="utf-8")
    opened = open_folder(source)
    assert type(opened) is type(model) and not opened.training
    graph = ModuleGraph(opened, source)
    site = next(site for site in graph.linear_sites() if site.name == name)
    graph.replace(site, factors(*site.shape, 5))
    files = save(graph, tmp_path / "out", sample={"input_ids": np.ones((2, 4), np.int64)})
    assert sorted(files) == sorted([TARGET, WEIGHTS, CONFIG, "generation_config.json", "tokenizer_config.json"])
    loaded: Any = load(tmp_path / "out")
    assert type(loaded) is type(model) and not any(p.is_meta for p in loaded.parameters())
    prompt = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded.generate(prompt, do_sample=False), tree(graph).generate(prompt, do_sample=False))
    assert loaded.generation_config.max_new_tokens == 6
    tied = [module.get_output_embeddings().weight is module.get_input_embeddings().weight for module in (loaded, model)]
    assert tied[0] == tied[1]
    with pytest.raises(OSError, match=r"model\.safetensors"):  # else it would invent the rewritten layers
        type(model).from_pretrained(tmp_path / "out")


def test_code_from_a_folder_is_never_run(tmp_path: Path):
    save(llama(), tmp_path)
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n", encoding="utf-8")
    edit(tmp_path / CONFIG, auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"})
    load(tmp_path)
    edit(tmp_path / CONFIG, architectures=["Evil"])
    with pytest.raises(UnsupportedError, match=r"no model class 'Evil'.*never run"):
        load(tmp_path)
    edit(tmp_path / CONFIG, architectures=["AutoConfig"])
    with pytest.raises(UnsupportedError, match="no model class"):
        load(tmp_path)
    assert not marker.exists()


def test_missing_transformers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(llama(), tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"lrcompile\[zoo\]"):
        load(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path):
    model = llama()
    model.config.save_pretrained(tmp_path)
    edit(tmp_path / CONFIG, architectures=["LlamaForCausalLM"])
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidInputError, match=r"cannot load the model.*model\.safetensors"):
        open_folder(tmp_path)


def test_an_onnx_folder_loads_to_something_that_runs(tmp_path: Path):
    built = two_layer_mlp(tmp_path / "model.onnx")
    graph: Any = load(tmp_path)
    assert graph.run(built.example())["y"].shape == (5, 10)
