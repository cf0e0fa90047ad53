"""Where tensors keep their bytes: checked without reading them, and never outside the model's folder."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

import onnx
import onnx_ir as ir

from lrcompile.errors import InvalidInputError, UnsupportedError

INT64_MAX = 2**63 - 1
MAX_RANK = 64  # of NumPy, and so of everything built on it
IN_MEMORY = "_ORT_MEM_ADDR_"  # ONNX Runtime takes the offset beside this marker for an address

_FIELDS = {
    ir.DataType.FLOAT: ("float_data", 1.0),
    ir.DataType.COMPLEX64: ("float_data", 2.0),
    ir.DataType.DOUBLE: ("double_data", 1.0),
    ir.DataType.COMPLEX128: ("double_data", 2.0),
    ir.DataType.INT64: ("int64_data", 1.0),
    ir.DataType.UINT32: ("uint64_data", 1.0),
    ir.DataType.UINT64: ("uint64_data", 1.0),
    ir.DataType.STRING: ("string_data", 1.0),
    ir.DataType.INT4: ("int32_data", 0.5),
    ir.DataType.UINT4: ("int32_data", 0.5),
    ir.DataType.FLOAT4E2M1: ("int32_data", 0.5),
    ir.DataType.INT2: ("int32_data", 0.25),
    ir.DataType.UINT2: ("int32_data", 0.25),
}


@dataclass(frozen=True)
class Limits:
    """What a model may declare before anything is computed from it.

    Args:
        bytes: of all tensors together.
        nodes: with every call of a function expanded.
        dimension: of one axis.
        elements: of one tensor.
        depth: of subgraphs within subgraphs.
    """

    bytes: int = 2**40
    nodes: int = 1_000_000
    dimension: int = 2**31 - 1
    elements: int = 2**36
    depth: int = 16


def resolve(folder: str | os.PathLike[str], location: str) -> Path:
    """The data file that ``location`` names, links resolved.

    Raises:
        InvalidInputError: it is not a relative path of a regular, singly linked file inside ``folder``.
    """
    other = PureWindowsPath(location)
    hint = "data files must lie in the model's folder, as plain files with relative names"
    absolute = os.path.isabs(location) or other.drive or other.root
    if not location or "\0" in location or absolute or ".." in other.parts or IN_MEMORY in location:
        raise InvalidInputError(f"unsafe external data path {location!r}", where=str(folder), hint=hint)
    root = Path(os.path.realpath(folder))
    path = Path(os.path.realpath(root / location))
    if not path.is_relative_to(root):
        raise InvalidInputError(f"external data {location!r} leads out of the folder", where=str(folder), hint=hint)
    try:
        status = path.stat()
    except OSError as error:
        reason = f"external data {location!r} cannot be read: {os.strerror(error.errno or 0)}"
        raise InvalidInputError(reason, where=str(folder), hint="copy it beside the model") from error
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        kind = "has other hard links" if stat.S_ISREG(status.st_mode) else "is not a file"
        raise InvalidInputError(f"external data {location!r} {kind}", where=str(folder), hint=hint)
    return path


def check_dims(dims: Sequence[int], limits: Limits, where: str) -> int:
    """The number of elements; raises for a negative (3) or an excessive (4) shape."""
    if any(dim < 0 for dim in dims):
        raise InvalidInputError(f"negative dimension in {list(dims)}", where=where)
    if len(dims) > MAX_RANK:
        raise UnsupportedError(f"{len(dims)} dimensions, at most {MAX_RANK} are supported", where=where)
    if any(dim > limits.dimension for dim in dims):
        raise UnsupportedError(f"dimension {max(dims)} is above the limit of {limits.dimension}", where=where)
    count = math.prod(dims)
    if count > limits.elements:
        raise UnsupportedError(f"{count} elements are above the limit of {limits.elements}", where=where)
    return count


@dataclass
class Storage:
    """Checks tensors one after the other; each data file is resolved once.

    Args:
        folder: where the model lies.
        limits: see :class:`Limits`.
    """

    folder: Path
    limits: Limits
    total: int = 0
    _sizes: dict[str, int] = field(default_factory=dict)

    def check(self, tensor: onnx.TensorProto, where: str) -> None:
        """Shape, type and length of the data agree, and the data lies where it may.

        Raises:
            InvalidInputError: corrupt or unsafe.
            UnsupportedError: above the limits.
        """
        count = check_dims(tensor.dims, self.limits, where)
        try:
            dtype = ir.DataType(tensor.data_type)
        except ValueError:
            dtype = ir.DataType.UNDEFINED
        if dtype == ir.DataType.UNDEFINED:
            raise InvalidInputError(f"unknown data type {tensor.data_type}", where=where)
        if tensor.HasField("segment"):
            raise UnsupportedError("tensor segments are not supported", where=where)
        nbytes = 0 if dtype == ir.DataType.STRING else (count * dtype.bitwidth + 7) // 8
        self.total += nbytes
        if self.total > self.limits.bytes:
            raise UnsupportedError(f"the tensors declare more than {self.limits.bytes} bytes", where=where)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            self._check_external(tensor, dtype, nbytes, where)
        else:
            _check_embedded(tensor, dtype, count, nbytes, where)

    def _check_external(self, tensor: onnx.TensorProto, dtype: ir.DataType, nbytes: int, where: str) -> None:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if len(entries) != len(tensor.external_data) or "location" not in entries or dtype == ir.DataType.STRING:
            raise InvalidInputError("malformed external data entry", where=where)
        if tensor.HasField("raw_data"):
            raise InvalidInputError("data both embedded and external", where=where)
        offset = _natural(entries.get("offset", "0"), "offset", where)
        length = _natural(entries["length"], "length", where) if "length" in entries else nbytes
        if length != nbytes:
            raise InvalidInputError(f"external data of {length} bytes, the shape needs {nbytes}", where=where)
        size = self._size(entries["location"], where)
        if offset + length > size:
            location = entries["location"]
            raise InvalidInputError(
                f"external data ends at byte {offset + length} of {location!r}, which has {size}",
                where=where,
                hint="the data file is truncated or belongs to another model",
            )

    def _size(self, location: str, where: str) -> int:
        if location not in self._sizes:
            try:
                self._sizes[location] = resolve(self.folder, location).stat().st_size
            except InvalidInputError as error:
                raise InvalidInputError(error.message, where=where, hint=error.hint) from error
        return self._sizes[location]


def _natural(text: str, key: str, where: str) -> int:
    digits = text.strip()
    if not digits.isascii() or not digits.isdigit() or len(digits) > 19 or int(digits) > INT64_MAX:
        raise InvalidInputError(f"external data {key} {text[:40]!r} is not a 64-bit natural number", where=where)
    return int(digits)


def _check_embedded(tensor: onnx.TensorProto, dtype: ir.DataType, count: int, nbytes: int, where: str) -> None:
    if tensor.external_data:
        raise InvalidInputError("external data entries on an embedded tensor", where=where)
    if tensor.HasField("raw_data"):
        have, need = len(tensor.raw_data), nbytes
        if dtype == ir.DataType.STRING:
            raise InvalidInputError("strings cannot be raw data", where=where)
    else:
        name, per_element = _FIELDS.get(dtype, ("int32_data", 1.0))
        have, need = len(getattr(tensor, name)), math.ceil(count * per_element)
    if have != need:
        unit = "bytes" if tensor.HasField("raw_data") else "values"
        raise InvalidInputError(f"{have} {unit} of data, the shape {list(tensor.dims)} needs {need}", where=where)
