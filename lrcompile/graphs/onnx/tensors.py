"""Tensors between ONNX and torch, without copies where memory allows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tensor_adapters import from_torch_dtype, to_torch_dtype

from lrcompile.errors import InvalidInputError, UnsupportedError
from lrcompile.graphs.onnx.storage import resolve

if TYPE_CHECKING:
    import torch

_SMALL_INTEGERS = {
    ir.DataType.INT4: np.int8,
    ir.DataType.INT2: np.int8,
    ir.DataType.UINT4: np.uint8,
    ir.DataType.UINT2: np.uint8,
}
VAST = 2**30
_BITS = {1: np.uint8, 2: np.int16}  # how types that NumPy has not are carried over, by item size


_NATIVE = frozenset(
    [
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    ]
)


def to_torch(tensor: ir.TensorProtocol) -> torch.Tensor:
    """The values of an ONNX tensor, same shape.

    External data is mapped copy-on-write: nothing is read until it is used, and writing to the result
    neither crashes nor reaches the file. (A file of :data:`VAST` bytes or more is mapped for reading only,
    since a private mapping counts as memory of the process where that is limited.) Other arrays are shared,
    read-only ones too: nobody writes to a weight. Integers of 2 and 4 bits come unpacked, as (u)int8.
    bfloat16 and the 8-bit floats keep their bits.

    Raises:
        UnsupportedError: strings, and floats of 4 or 6 bits.
        InvalidInputError: the data file vanished, shrank or moved out of the model's folder.
    """
    import torch

    raw = getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        return raw.detach()
    if tensor.dtype in _SMALL_INTEGERS:
        return torch.from_numpy(tensor.numpy().astype(_SMALL_INTEGERS[tensor.dtype]))
    try:
        dtype = to_torch_dtype(tensor.dtype)
    except (TypeError, ValueError) as error:
        raise UnsupportedError(f"tensors of type {tensor.dtype} are not supported", where=tensor.name or "") from error
    array = _map(tensor) if isinstance(tensor, ir.ExternalTensor) else tensor.numpy()
    flags = array.flags
    if not (flags.c_contiguous and flags.aligned and array.dtype.isnative):
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    if array.dtype.name not in _NATIVE:
        return torch.from_numpy(_writable(array.view(_BITS[array.itemsize]))).view(dtype)
    return torch.from_numpy(_writable(array))


def torch_dtype(dtype: ir.DataType | None) -> torch.dtype:
    """The torch type of an ONNX type; float32 where the type is unknown."""
    import torch

    return torch.float32 if dtype is None else to_torch_dtype(dtype)


class _Shared:
    """A read-only array that says it is writable: torch has no read-only tensors and would warn."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array  # keeps the memory alive
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def _writable(array: np.ndarray) -> np.ndarray:
    return array if array.flags.writeable or array.size == 0 else np.asarray(_Shared(array))


def from_torch(tensor: torch.Tensor, name: str | None = None) -> ir.Tensor:
    """An ONNX tensor over the memory of a contiguous CPU tensor; others are copied once.

    Raises:
        UnsupportedError: a type that ONNX has not (quantised, complex32).
    """
    try:
        dtype = from_torch_dtype(tensor.dtype)
    except TypeError as error:
        raise UnsupportedError(f"tensors of type {tensor.dtype} are not supported", where=name or "") from error
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if dtype.numpy().name in _NATIVE:
        return ir.Tensor(plain.numpy(), dtype=dtype, name=name)
    import torch

    bits = plain.view(torch.int16 if plain.element_size() == 2 else torch.uint8)
    return ir.Tensor(bits.numpy().view(dtype.numpy()), dtype=dtype, name=name)


def exchange(model: ir.Model, kind: type, make: Callable[[Any], ir.TensorProtocol]) -> None:
    """Puts ``make(tensor)`` in the place of every initializer and attribute tensor of a class, bodies included."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, kind):
                value.const_value = make(value.const_value)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, kind):
                    node.attributes[name] = ir.AttrTensor(name, make(attribute.value))


def embed(model: ir.Model) -> None:
    """Reads what is still external into memory, in place: a message that goes elsewhere cannot refer to its data."""
    exchange(model, ir.ExternalTensor, _in_memory)


def _in_memory(tensor: ir.ExternalTensor) -> ir.Tensor:
    content = np.array(_map(tensor)) if tensor.dtype not in _SMALL_INTEGERS else tensor.numpy().copy()
    return ir.Tensor(content, dtype=tensor.dtype, name=tensor.name, doc_string=tensor.doc_string)


def _map(tensor: ir.ExternalTensor) -> np.ndarray:
    """A private, writable mapping of external data (a mapping that is only readable makes torch warn)."""
    shape, dtype = tensor.shape.numpy(), tensor.dtype.numpy()
    if tensor.size == 0:
        return np.empty(shape, dtype)
    path = resolve(tensor.base_dir, str(tensor.location)) if tensor.base_dir else Path(tensor.path)
    carrier = dtype.newbyteorder("<") if dtype.name in _NATIVE else np.dtype(_BITS[dtype.itemsize])
    try:
        mode = "c" if path.stat().st_size < VAST else "r"
        mapped = np.memmap(path, dtype=carrier, mode=mode, offset=tensor.offset or 0, shape=shape)
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"external data cannot be mapped: {error}", where=tensor.name) from error
    return np.asarray(mapped).view(dtype) if dtype.name not in _NATIVE else np.asarray(mapped)
