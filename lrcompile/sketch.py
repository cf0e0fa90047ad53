"""Random directions of the outputs, whose gradients tell how much an error at a site matters.

For ``v ~ N(0, I)`` the gradient g of ⟨v, outputs⟩ at a site's output has ``E[g gᵀ] = E[Jᵀ J]``, the Gauss–Newton
matrix of the outputs' squared change. A model of tokens is judged by its distribution instead: with labels drawn from
the model itself, the gradients of their log-likelihood give the Fisher information (arXiv 1503.05671), the
curvature of the KL divergence. Neither needs labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lrcompile.calibrate import Moments
from lrcompile.errors import UnsupportedError

WIDE = 4096
"""An output of so many channels, all token ids below it, is taken for logits whatever its name."""
DRAWN = 32
"""Tokens whose labels are drawn at once: sums over a vocabulary are in float64."""


@dataclass(frozen=True, eq=False)
class Importance:
    """Moments of the outputs' gradients at what sites give.

    Attributes:
        moments: by site name.
        tokens: the outputs are distributions over tokens, so errors are KL divergences in nats; else they are
            squared relative changes.
    """

    moments: Mapping[str, Moments]
    tokens: bool = False


def token_logits(outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor | None:
    """The output (batch, tokens, vocabulary) over the vocabulary of an input of token ids (batch, tokens), if any."""
    for ids in inputs.values():
        if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
            continue
        largest = int(ids.max())
        for name, value in outputs.items():
            fits = value.ndim == 3 and value.shape[:2] == ids.shape and value.is_floating_point()
            if fits and value.shape[-1] > largest and ("logit" in name.lower() or value.shape[-1] >= WIDE):
                return value
    return None


def direction(
    outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor], mask: Tensor | None, seed: int
) -> tuple[Tensor, bool]:
    """A random scalar of the outputs, and whether it is a log-likelihood of tokens.

    The scalar is ⟨v, y / ‖y‖⟩, summed over the float outputs y: its squared gradient is a squared *relative* change.
    Of token logits it is the log-likelihood of sampled tokens over the root of their number (to first order): its
    squared gradient is twice a mean KL divergence.

    Args:
        mask: (batch, tokens); outputs of padding count nothing.
        seed: of v; another one for every piece of data.

    Raises:
        UnsupportedError: no output is a finite float that depends on the sites.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = token_logits(outputs, inputs)
    if logits is not None and logits.requires_grad:
        fits = mask is not None and mask.shape == logits.shape[:2]
        return _likelihood(logits[mask.to(logits.device)] if mask is not None and fits else logits, generator), True
    return _change(outputs, mask, generator), False


def _likelihood(logits: Tensor, generator: torch.Generator) -> Tensor:
    rows = logits.reshape(-1, logits.shape[-1])  # (tokens, vocabulary)
    noise = torch.rand(len(rows), 1, generator=generator, dtype=torch.float64)
    with torch.no_grad():  # the derivative is known: nothing of the vocabulary's size is kept for it twice
        slopes = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        for start in range(0, len(rows), DRAWN):
            part = slice(start, start + DRAWN)
            slopes[part] = _slopes(rows[part].detach().float(), noise[part])
        slopes /= max(len(rows), 1) ** 0.5
    return torch.dot(rows.flatten(), slopes.to(rows).flatten())


def _slopes(logits: Tensor, noise: Tensor) -> Tensor:
    """Derivatives of the log-likelihoods of ids drawn from the distributions, one for each number in 0..1."""
    odds = logits.softmax(-1)
    sums = odds.double().cumsum_(-1).cpu()
    drawn = torch.searchsorted(sums, noise * sums[:, -1:]).clamp_(max=logits.shape[-1] - 1).to(logits.device)
    return odds.neg_().scatter_add_(1, drawn, torch.ones_like(odds[:, :1]))


def _change(outputs: Mapping[str, Tensor], mask: Tensor | None, generator: torch.Generator) -> Tensor:
    parts = []
    for value in outputs.values():
        if not value.is_floating_point() or not value.requires_grad:
            continue
        if mask is not None and value.shape[: mask.ndim] == mask.shape:
            value = value[mask.to(value.device)]
        still = value.detach()
        norm = torch.where(still.isfinite(), still, 0.0).norm()
        v = torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value)
        parts.append((torch.where(still.isfinite(), value, 0.0) * v).sum() / norm.clamp_min(1e-30))
    if not parts:
        raise UnsupportedError("no output has a gradient")
    return torch.stack([part.float() for part in parts]).sum()
