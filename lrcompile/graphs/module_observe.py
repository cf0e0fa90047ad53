"""Statistics of a module by running it: moments of what layers read, and probes of single sites."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.calibrate import Collector, Moments, groups, token_mask, token_rows
from lrcompile.graphs.base import Inputs, Replacement
from lrcompile.graphs.module_run import argument, bind, call, evaluating, named_outputs
from lrcompile.graphs.module_sites import Found, Reader
from lrcompile.graphs.module_widened import widened
from lrcompile.graphs.structured import strided
from lrcompile.linop import LinearOperator, apply
from lrcompile.memory import release
from lrcompile.sites import Window
from lrcompile.windows import convolve, patches, sizes


def reusable(batches: Iterable[Inputs]) -> Iterable[Inputs]:
    """Batches that can be gone through more than once; only an iterator is read into memory."""
    return list(batches) if iter(batches) is batches else batches


def observe(
    model: nn.Module, batches: Iterable[Inputs], founds: Mapping[str, Found], *, memory: int
) -> dict[str, Moments]:
    """Moments of what sites read, in groups whose Gram matrices fit ``memory`` bytes.

    Args:
        founds: by key; one site for each value, all of its modules count.
    """
    sizes = {key: found.site.shape[1] for key, found in founds.items()}
    result: dict[str, Moments] = {}
    for group in groups(sizes, memory):
        collector = Collector(counting=not memory)
        for batch in batches:
            with ExitStack() as stack, evaluating(model), widened(model):
                for key in group:
                    _listen(stack, collector, key, founds[key].readers, _Batch(model, batch))
                call(model, batch)
            release()
        result.update(collector.moments)
    release(now=True)
    return result


class _Batch:
    """A batch's mask and number of samples; the samples count once for each value."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        args, kwargs = bind(model, batch)
        tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        self.mask = token_mask(tensors)
        first = next((value for value in (*args, *tensors.values()) if isinstance(value, Tensor)), None)
        self.samples = 0 if first is None or not first.ndim else len(first)
        self.counted: set[str] = set()

    def once(self, key: str) -> int:
        """The number of samples at the first call for ``key``, 0 afterwards."""
        if key in self.counted:
            return 0
        self.counted.add(key)
        return self.samples


def _listen(stack: ExitStack, collector: Collector, key: str, readers: Sequence[Reader], batch: _Batch) -> None:
    for reader in readers:

        def hook(module: nn.Module, args: Any, kwargs: Any, reader: Reader = reader) -> None:
            with torch.inference_mode(False), torch.no_grad():  # moments outlive this run and are written to
                rows, seen = _rows(reader, argument(args, kwargs), batch.mask)
                collector.add(key, rows, batch.once(key), seen)

        stack.callback(reader.module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _rows(reader: Reader, value: Tensor, mask: Tensor | None) -> tuple[Tensor, int]:
    """The vectors (tokens, in) that a layer multiplies, padding left out, and how many there are in all."""
    window = reader.window
    if window is not None and not window.pointwise:
        value = _batched(value, window)
        return patches(value, window), len(value) * prod(sizes(value, window))
    value, axis = read(reader, value)
    rows = token_rows(value, mask, channel_axis=axis)
    return rows, len(rows)


def _batched(value: Tensor, window: Window) -> Tensor:
    return value if value.ndim == window.rank + 2 else value.unsqueeze(0)


def read(reader: Reader, value: Tensor) -> tuple[Tensor, int]:
    """The positions that a layer multiplies, and the axis of the channels."""
    return (strided(value, reader.strides), -len(reader.strides) - 1) if reader.strides else (value, -1)


# -- probes --------------------------------------------------------------------------------


def probe(
    model: nn.Module, batches: Iterable[Inputs], founds: Mapping[str, Found], changes: Mapping[str, Replacement]
) -> dict[str, float]:
    """Squared relative L2 change of the float outputs (summed) when a site alone is replaced.

    Padding is left out of outputs whose leading axes are those of the token mask.
    """
    change: dict[str, dict[str, float]] = {name: {} for name in changes}
    norm: dict[str, float] = {}
    for batch in batches:
        mask = _Batch(model, batch).mask
        dense = _float_outputs(model, batch)
        for output, value in dense.items():
            norm[output] = norm.get(output, 0.0) + _energy(value, mask)
        for name, found in founds.items():
            with ExitStack() as stack:
                for reader in found.readers:
                    _divert(stack, reader, found.site.operator, changes[name])
                changed = _float_outputs(model, batch)
            for output in dense.keys() & changed.keys():
                gained = _energy(changed[output].double() - dense[output].double(), mask)
                change[name][output] = change[name].get(output, 0.0) + gained
            release()
    return {
        name: sum(value / norm[output] for output, value in sorted(per_output.items()) if norm[output] > 0)
        for name, per_output in change.items()
    }


def _float_outputs(model: nn.Module, batch: Inputs) -> dict[str, Tensor]:
    with evaluating(model), widened(model):
        found = named_outputs(call(model, batch))
        return {name: value.clone() for name, value in found.items() if value.is_floating_point()}


def _energy(value: Tensor, mask: Tensor | None) -> float:
    if mask is not None and value.shape[: mask.ndim] == mask.shape:
        value = value[mask.to(value.device)]
    return float(value.double().square().sum())


def _divert(stack: ExitStack, reader: Reader, before: LinearOperator, change: Replacement) -> None:
    """Adds to the layer's output what the replacement would change in it."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        delta = _delta(reader, argument(args, kwargs), before, change)
        return (output + delta.reshape(output.shape)).to(output.dtype)

    stack.callback(reader.module.register_forward_hook(hook, with_kwargs=True).remove)


def _delta(reader: Reader, value: Tensor, before: LinearOperator, change: Replacement) -> Tensor:
    """What the replacement adds to the layer's output, given what the layer reads."""
    value = value if value.dtype == torch.float64 else value.float()
    window = reader.window
    if window is not None and not window.pointwise:
        value, axis = _batched(value, window), 1
        delta = (convolve(change.operator, value, window) - convolve(before, value, window)).movedim(1, -1)
    else:
        value, axis = read(reader, value)
        moved = value.movedim(axis, -1)
        delta = apply(change.operator, moved) - apply(before, moved)
    if change.shift is not None:
        delta = delta + change.shift.to(delta)
    return delta.movedim(-1, axis)
