"""Second moments of the gradients at the outputs of a module's layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrcompile.calibrate import Collector, Moments, groups, token_mask, token_rows
from lrcompile.errors import UnsupportedError
from lrcompile.graphs.base import Inputs
from lrcompile.graphs.module_run import bind, call, evaluating, named_outputs
from lrcompile.graphs.module_sites import Found, Reader
from lrcompile.graphs.module_widened import widened
from lrcompile.memory import release
from lrcompile.sketch import Importance, direction

Rows = tuple[list[tuple[str, Tensor]], bool]
"""Vectors by site name, and whether the outputs are distributions over tokens."""


def gradients(
    model: nn.Module, batches: Iterable[Inputs], founds: Mapping[str, Found], *, memory: int, seed: int, whole: bool
) -> Importance:
    """Moments of gradients (see :mod:`lrcompile.sketch`) at what each site gives, by the keys of ``founds``.

    Args:
        whole: the model takes batches of one size only.

    Raises:
        UnsupportedError: the model cannot be differentiated.
    """
    result: dict[str, Moments] = {}
    tokens = False
    for group in groups({name: found.site.shape[0] for name, found in founds.items()}, memory):
        collector = Collector()
        chosen = {name: founds[name] for name in group}
        for index, piece in enumerate(batches if whole else _singles(batches)):
            found, tokens = _rows(model, piece, chosen, seed + index)
            for name, rows in found:
                collector.add(name, rows, 1)
            del found
            release()
        result.update(collector.moments)
    release(now=True)
    return Importance(result, tokens)


def _singles(batches: Iterable[Inputs]) -> Iterator[Any]:
    """Samples one by one, where they have a common leading axis: their activations are all held at once."""
    for batch in batches:
        arrays = list(batch.values()) if isinstance(batch, Mapping) else []
        sizes = {len(a) for a in arrays if isinstance(a, np.ndarray | Tensor) and a.ndim}
        if len(sizes) != 1 or any(not isinstance(a, np.ndarray | Tensor) or not a.ndim for a in arrays):
            yield batch
            continue
        for index in range(sizes.pop()):
            yield {name: array[index : index + 1] for name, array in batch.items()}


def _rows(model: nn.Module, piece: Any, founds: Mapping[str, Found], seed: int) -> Rows:
    """Gradient vectors (tokens, out) of every site for one piece of data."""
    tensors = {name: value for name, value in bind(model, piece)[1].items() if isinstance(value, Tensor)}
    mask = token_mask(tensors)
    taps: list[tuple[str, Reader, Tensor]] = []
    with ExitStack() as stack, evaluating(model, inference=False), torch.enable_grad(), widened(model):
        for name, found in founds.items():
            for reader in found.readers:
                _tap(stack, name, reader, taps)
        outputs = named_outputs(call(model, piece))
        if not taps:
            return [], False
        scalar, tokens = direction(outputs, tensors, mask, seed)
        try:
            found = torch.autograd.grad(scalar, [tap[2] for tap in taps], allow_unused=True)
        except RuntimeError as error:  # an operation without a derivative
            reason = str(error).splitlines()[0][:200]
            raise UnsupportedError(f"the model cannot be differentiated: {reason}") from error
    rows = []
    for (name, reader, value), gradient in zip(taps, found, strict=True):
        whole = torch.zeros_like(value) if gradient is None else gradient
        axis = -len(reader.strides) - 1 if reader.strides else -1
        rows.append((name, token_rows(whole.detach().cpu(), mask, channel_axis=axis)))
    return rows, tokens


def _tap(stack: ExitStack, name: str, reader: Reader, taps: list[tuple[str, Reader, Tensor]]) -> None:
    """Notes what a layer gives; the rest of the model gets a copy, which it may write over."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        value = output if output.requires_grad else output.detach().requires_grad_()
        taps.append((name, reader, value))
        return value.clone()

    stack.callback(reader.module.register_forward_hook(hook).remove)
