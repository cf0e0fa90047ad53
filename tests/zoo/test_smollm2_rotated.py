"""Folding gains and rotating the residual stream leave the logits, and no weight where it was."""

from __future__ import annotations

import torch

from lrcompile.zoo.smollm2_rotated import orthogonal, rotated
from tests.zoo import tiny_llama


def test_the_logits_stay_and_the_weights_do_not():
    model = tiny_llama.causal_lm()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new = rotated(model)
    ids = torch.randint(0, tiny_llama.VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, found = model(input_ids=ids).logits, new(input_ids=ids).logits
    assert expected.std() > 0.1  # the case says something
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    for name, tensor in new.state_dict().items():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor))
        else:
            assert (tensor - before[name]).abs().mean() > 0.1 * before[name].abs().mean()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_rotation_is_orthogonal():
    q = orthogonal(32, seed=3)
    torch.testing.assert_close(q.T @ q, torch.eye(32, dtype=torch.float64))
    assert not torch.equal(q, orthogonal(32, seed=4))
