"""SmolLM2-135M-Instruct off its four-bit grid: the same function with other weights.

The weights of :mod:`lrcompile.zoo.smollm2` had been rounded to four bits, so that rounding them again says nothing.
Here the gains of the norms are folded into the linears that follow, and the residual stream is turned by a random
orthogonal matrix (arXiv 2404.00456), which the norms without gains let through. The logits stay the same to 1e-3, and
no weight of a linear lies on the grid any more. The last norm's gain goes into the head, which is therefore no longer
the embedding: the file holds 28.3 M values more. Rotated weights have fewer outliers than trained ones usually do, so
low-bit figures on them are rather kind. Texts and figures are those of SmolLM2.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrcompile.zoo import smollm2
from lrcompile.zoo.base import ZooModel, package_folder
from lrcompile.zoo.export import export_onnx

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SEED = 0


def orthogonal(size: int, seed: int = SEED) -> Tensor:
    """A random orthogonal matrix (size, size) float64, uniform over all of them."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def rotated(model: LlamaForCausalLM, seed: int = SEED) -> LlamaForCausalLM:
    """A copy that gives the same logits: gains folded, the residual stream rotated, the head on its own.

    Args:
        model: a Llama without biases; it is not modified.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_dict({**model.config.to_dict(), "tie_word_embeddings": False})
    new = LlamaForCausalLM(config).eval().requires_grad_(False)
    head: Any = model.get_output_embeddings()
    state = {**model.state_dict(), "lm_head.weight": head.weight}
    new.load_state_dict({name: tensor.detach().clone() for name, tensor in state.items()})
    q = orthogonal(config.hidden_size, seed)
    _set(new.model.embed_tokens.weight, new.model.embed_tokens.weight.double() @ q)
    layers: Any = new.model.layers
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        _folded(layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), q)
        _folded(layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), q)
        for writer in (attention.o_proj, mlp.down_proj):
            _set(writer.weight, q.T @ writer.weight.double())
    _folded(new.model.norm, (new.lm_head,), q)
    return new


def _folded(norm: Any, readers: tuple[Any, ...], q: Tensor) -> None:
    """Moves the norm's gain into the linears that read it, which then read the rotated stream."""
    gain = norm.weight.double()
    for reader in readers:
        _set(reader.weight, (reader.weight.double() * gain) @ q)
    norm.weight.fill_(1.0)


def _set(weight: Tensor, value: Tensor) -> None:
    weight.copy_(value.to(weight.dtype))


def module() -> smollm2.LanguageModel:
    """The rotated model in eval mode, float32, on the CPU."""
    return smollm2.LanguageModel(rotated(smollm2.causal_lm())).eval()


def export(path: Path) -> None:
    """Write the model as ONNX with dynamic batch and sequence axes; takes some minutes."""
    ids = torch.randint(0, 49152, (2, 16), generator=torch.Generator().manual_seed(0))
    axes = {"input_ids": {0: "batch", 1: "sequence"}}
    export_onnx(module(), {"input_ids": ids}, Path(path), outputs=(smollm2.OUTPUT,), axes=axes)


def model() -> ZooModel:
    """The registry's entry.

    Raises:
        MissingPackageError: a package that carries the weights or the texts is absent.
    """
    for package in (smollm2.PACKAGE, "gensim"):
        package_folder(package)
    return ZooModel("smollm2_rotated", __doc__ or "", (smollm2.OUTPUT,), module, smollm2.calibration,
                    smollm2.evaluation, smollm2.metric, export)  # fmt: skip
