"""Running a module: inputs from arrays, named outputs as arrays, nothing of it left behind."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from lrcompile.data import InputSpec
from lrcompile.errors import InvalidInputError, LrcompileError, nearest, out_of_memory
from lrcompile.graphs.base import Inputs, Outputs

CACHES = ("past_key_values", "mems", "cache_params")
"""Outputs that are state for the next call, not results."""


def to_tensor(value: Any, model: nn.Module) -> Any:
    """An array as a tensor on the model's device; floating arrays take the type of the model's weights."""
    if isinstance(value, Tensor):
        return value.to(_anchor(model).device)
    if not isinstance(value, np.ndarray | np.generic | list):
        return value
    array = np.ascontiguousarray(value)
    if array.dtype == ml_dtypes.bfloat16:
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    elif array.dtype.kind in "fiub":
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    else:
        raise InvalidInputError(f"arrays of {array.dtype} cannot be fed to a module")
    anchor = _anchor(model)
    return tensor.to(anchor.device, anchor.dtype if tensor.is_floating_point() else None)


def _anchor(model: nn.Module) -> Tensor:
    """The first floating parameter; it tells device and type."""
    floats = (p for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    return next(floats, torch.empty(0))


def bind(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a call: mappings by name, tuples and lists by position, anything else alone."""
    if isinstance(inputs, Mapping):
        return (), {str(name): to_tensor(value, model) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(to_tensor(value, model) for value in inputs), {}
    return (to_tensor(inputs, model),), {}


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's own result.

    Raises:
        InvalidInputError: the model fails on these inputs.
        ResourceError: out of memory.
    """
    args, kwargs = bind(model, inputs)
    try:
        return model(*args, **kwargs)
    except LrcompileError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise out_of_memory(error) or InvalidInputError(
            f"the model fails on these inputs: {reason}",
            where=type(model).__name__,
            hint="names, types and values of the samples must be what forward() takes",
        ) from error


def named_outputs(result: Any) -> dict[str, Tensor]:
    """Tensors of a result by name: its keys, or ``output``, ``output_1``, …; caches and the rest left out."""
    if dataclasses.is_dataclass(result) and not isinstance(result, Mapping | type):
        result = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    found: dict[str, Tensor] = {}
    if isinstance(result, Mapping):
        for name, value in result.items():
            if name not in CACHES:
                _collect(str(name), value, found)
    elif isinstance(result, tuple | list):
        for index, value in enumerate(result):
            _collect(f"output_{index}" if index else "output", value, found)
    else:
        _collect("output", result, found)
    return found


def _collect(name: str, value: Any, found: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        found[name] = value
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            _collect(f"{name}_{index}", item, found)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _collect(f"{name}_{key}", item, found)


def to_array(tensor: Tensor) -> np.ndarray:
    """A tensor as an array; what numpy has no type for becomes float32."""
    held = tensor.detach().cpu()
    if held.is_floating_point() and held.dtype not in (torch.float16, torch.float32, torch.float64):
        held = held.float()
    return held.resolve_conj().numpy()


@contextmanager
def evaluating(model: nn.Module, *, inference: bool = True) -> Iterator[None]:
    """Without dropout, gradients, torch's fast path for encoder layers (it reads weights raw) or new randomness."""
    training = [module for module in model.modules() if module.training]
    fast = torch.backends.mha.get_fastpath_enabled()
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    try:
        for module in training:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.random.fork_rng(sorted(devices)):
            torch.manual_seed(0)
            with torch.inference_mode() if inference else torch.no_grad():
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module in training:
            module.training = True


def run(model: nn.Module, inputs: Inputs) -> Outputs:
    """Outputs of a module by name, as arrays; dropout off, no gradients."""
    with evaluating(model):
        return {name: to_array(value) for name, value in named_outputs(call(model, inputs)).items()}


def macs(model: nn.Module, sample: Inputs) -> int:
    """Multiply–accumulates of all matrix products, convolutions and attention on ``sample``."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, evaluating(model, inference=False):
        call(model, sample)
    return counter.get_total_flops() // 2


def few(inputs: Any) -> Any:
    """The first two samples of a batch, as copies."""
    if isinstance(inputs, Mapping):
        return {str(name): few(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(few(value) for value in inputs)
    if isinstance(inputs, Tensor):
        return inputs[:2].detach().clone() if inputs.ndim else inputs
    return np.array(inputs[:2]) if isinstance(inputs, np.ndarray) and inputs.ndim else inputs


def argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The first argument of a layer's call."""
    return args[0] if args else next(iter(kwargs.values()))


def forward_parameters(model: nn.Module) -> tuple[list[inspect.Parameter], bool]:
    """Named parameters of ``forward``, and whether it takes any others by keyword."""
    signature = inspect.signature(model.forward)
    named = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return named, any(p.kind == p.VAR_KEYWORD for p in signature.parameters.values())


def input_specs(model: nn.Module, names: Iterable[str]) -> list[InputSpec]:
    """The required inputs and those of ``names``, in the order of ``forward``; names only.

    Raises:
        InvalidInputError: a name that ``forward`` does not take.
    """
    parameters, open_ended = forward_parameters(model)
    known = [parameter.name for parameter in parameters]
    wanted = [str(name) for name in names if not str(name).isdigit()]  # arrays without names are counted
    for name in wanted:
        if name not in known and not open_ended:
            raise InvalidInputError(f"'{name}' is no input of the model", hint=nearest(name, known))
    required = {p.name for p in parameters if p.default is p.empty}
    if not required and not wanted:  # Hugging Face gives every input a default
        required = {getattr(model, "main_input_name", known[0] if known else "")} - {""}
    chosen = [name for name in known if name in required or name in wanted]
    return [InputSpec(name, None, ()) for name in (*chosen, *(name for name in wanted if name not in known))]
