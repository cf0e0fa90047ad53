"""Reading an ONNX file that nobody vouches for."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from lrcompile.errors import InvalidInputError, ResourceError, UnsupportedError, nearest
from lrcompile.graphs.onnx.foreign import foreign
from lrcompile.graphs.onnx.preflight import preflight
from lrcompile.graphs.onnx.storage import Limits, resolve
from lrcompile.graphs.onnx.tensors import exchange

__all__ = ["Limits", "check_finite", "read", "tensors"]

LARGE = 100 * 2**20  # bytes: from here on the file is parsed in pieces
PIECE = 32 * 2**20
PROTOBUF_MAX = 2**31 - 1
GRAPH_FIELD = 7  # of ModelProto


def read(path: str | os.PathLike[str], *, limits: Limits | None = None) -> ir.Model:
    """Reads a model after checking that it is safe and sound; weights stay on disk until they are used.

    External data becomes :class:`onnx_ir.ExternalTensor` (memory-mapped), bound to the absolute folder of
    ``path``, so a bare file name means the same as a full path. The nodes come in topological order.

    Args:
        path: a binary ``.onnx`` file.
        limits: what the model may declare.

    Raises:
        InvalidInputError: missing, truncated or foreign file; corrupt, unsafe, cyclic or non-SSA model.
        UnsupportedError: above the limits, or what no IR holds (sparse initializers, later versions).
    """
    path = Path(path)
    size = _check_file(path)
    return from_proto(_parse(path, size), Path(os.path.realpath(path.parent)), limits=limits, path=path)


def from_proto(
    proto: onnx.ModelProto, folder: Path | None = None, *, limits: Limits | None = None, path: Path | None = None
) -> ir.Model:
    """A checked model from a message; ``folder`` is where its external data lies.

    Raises:
        InvalidInputError, UnsupportedError: as for :func:`read`.
    """
    path = path or Path("(in memory)")
    folder = folder or Path(os.path.realpath("."))
    try:
        in_order = preflight(proto, folder, limits or Limits())
    except UnicodeDecodeError as error:  # protobuf decodes names when they are read
        raise InvalidInputError("a name in the model is not UTF-8", where=str(path)) from error
    try:
        model = ir.serde.deserialize_model(proto)
    except MemoryError as error:
        raise ResourceError("not enough memory to hold the model", where=str(path)) from error
    except Exception as error:
        cause = _root(error)
        kind = UnsupportedError if isinstance(cause, NotImplementedError) else InvalidInputError
        raise kind(
            f"cannot be represented: {(str(cause) or type(cause).__name__).splitlines()[0]}", where=str(path)
        ) from error
    for _, tensor in tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = str(folder)
    exchange(model, ir.TensorProtoTensor, _own)
    if not in_order:
        model.graph.sort()
        for function in model.functions.values():
            function.sort()
    return model


def _own(tensor: ir.TensorProtoTensor) -> ir.TensorProtocol:
    """An array of its own: a tensor of a message copies its bytes at every read and keeps the whole message alive."""
    return ir.Tensor(
        tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name, doc_string=tensor.doc_string
    )


def tensors(model: ir.Model, *, trees: bool = True) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Every constant of a model with its name: initializers and attributes, in subgraphs and functions too.

    Args:
        trees: attributes of classical models as well, in which NaN is a mark like any other.
    """
    graphs: list[ir.Graph] = [model.graph]
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    while bodies:
        body = bodies.pop()
        for node in body:
            for attribute in node.attributes.values():
                if trees or node.domain != "ai.onnx.ml":
                    yield from _attribute_tensors(node, attribute)
                inner = _attribute_graphs(attribute)
                graphs += inner
                bodies += inner
    for graph in graphs:
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, value.const_value


def check_finite(model: ir.Model, *, chunk: int = 2**22) -> None:
    """Refuses NaN and infinite weights, reading ``chunk`` elements at a time.

    Two infinities are legal: a single number (the bound of a clip) and -inf among zeros (an attention mask).

    Raises:
        InvalidInputError: names the tensor.
    """
    for name, tensor in tensors(model, trees=False):
        if tensor.dtype.is_floating_point() and tensor.dtype.bitwidth >= 8:
            _check_tensor(name, tensor, chunk)


def _check_tensor(name: str, tensor: ir.TensorProtocol, chunk: int) -> None:
    masked = weighted = False
    start = 0
    for values in _pieces(tensor, chunk):
        finite = np.isfinite(values)
        if not finite.all():
            bad = values[~finite].astype(np.float32)
            if np.isnan(bad).any() or (tensor.size > 1 and (bad > 0).any()):
                index = start + int(np.flatnonzero(~finite)[0])
                kind = "NaN" if np.isnan(bad).any() else "infinite values"
                raise InvalidInputError(f"contains {kind} (first bad element: {index})", where=name)
            masked = True
        weighted = weighted or bool((values[finite] != 0).any())
        if masked and weighted and tensor.size > 1:
            raise InvalidInputError("contains infinite values among weights", where=name)
        start += values.size


def _pieces(tensor: ir.TensorProtocol, chunk: int) -> Iterator[np.ndarray]:
    """The elements in order; an external tensor is read, not mapped, so that the resident size stays small."""
    if not isinstance(tensor, ir.ExternalTensor):
        flat = tensor.numpy().reshape(-1)
        yield from (flat[start : start + chunk] for start in range(0, flat.size, chunk))
        return
    dtype = tensor.dtype.numpy()
    path = resolve(tensor.base_dir, str(tensor.location)) if tensor.base_dir else Path(tensor.path)
    with open(path, "rb") as stream:
        stream.seek(tensor.offset or 0)
        for start in range(0, tensor.size, chunk):
            need = min(chunk, tensor.size - start)
            data = stream.read(need * dtype.itemsize)
            if len(data) < need * dtype.itemsize:
                raise InvalidInputError("the data file is truncated", where=str(path))
            yield np.frombuffer(data, dtype)


def _attribute_tensors(node: ir.Node, attribute: ir.Attr) -> Iterator[tuple[str, ir.TensorProtocol]]:
    if attribute.is_ref() or attribute.value is None:
        return
    label = next((out.name for out in node.outputs if out.name), None) or node.name or node.op_type
    if attribute.type == ir.AttributeType.TENSOR:
        yield attribute.value.name or label, attribute.value
    elif attribute.type == ir.AttributeType.TENSORS:
        yield from ((tensor.name or label, tensor) for tensor in attribute.value)


def _attribute_graphs(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.is_ref() or attribute.value is None:
        return []
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.value]
    return list(attribute.value) if attribute.type == ir.AttributeType.GRAPHS else []


def _check_file(path: Path) -> int:
    """The size of a plausible file; raises for what is missing, special, empty or plainly foreign."""
    where = str(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise InvalidInputError("is a folder, not a file", where=where)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidInputError("is not a regular file", where=where)
        with open(path, "rb") as stream:
            kind = foreign(path, stream.read(512), status.st_size)
    except FileNotFoundError as error:
        beside = [entry.name for entry in path.parent.glob("*.onnx")] if path.parent.is_dir() else []
        raise InvalidInputError(
            "no such file", where=where, hint=nearest(path.name, beside) if beside else ""
        ) from error
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"cannot be read: {error}", where=where) from error
    if kind:
        raise InvalidInputError(f"not an ONNX model: it seems to be {kind}", where=where)
    return status.st_size


def _parse(path: Path, size: int) -> onnx.ModelProto:
    if size > PROTOBUF_MAX:
        hint = "store the weights as external data"
        raise InvalidInputError(f"{size} bytes, but an ONNX file has at most 2 GiB", where=str(path), hint=hint)
    proto = onnx.ModelProto()
    try:
        with open(path, "rb") as stream:
            if size < LARGE:
                proto.ParseFromString(stream.read())
            else:
                _parse_pieces(proto, stream, size)
    except DecodeError as error:
        raise InvalidInputError("not an ONNX model, or truncated", where=str(path)) from error
    except OSError as error:
        raise InvalidInputError(f"cannot be read: {error}", where=str(path)) from error
    if not proto.HasField("graph") or not proto.ir_version:
        reason = "not an ONNX model, or truncated: there is no graph or no version"
        raise InvalidInputError(reason, where=str(path))
    return proto


def _parse_pieces(proto: onnx.ModelProto, stream: BinaryIO, size: int) -> None:
    """Merges field by field, so that the file is never in memory twice (protobuf merges repeated fields)."""
    for number, start, payload, stop in _fields(stream, 0, size):
        if number == GRAPH_FIELD:
            proto.graph.SetInParent()
            begin = payload
            for _, _, _, end in _fields(stream, payload, stop):
                if end - begin >= PIECE or end == stop:
                    proto.graph.MergeFromString(_slice(stream, begin, end))
                    begin = end
        else:
            proto.MergeFromString(_slice(stream, start, stop))


def _slice(stream: BinaryIO, start: int, stop: int) -> bytes:
    stream.seek(start)
    return stream.read(stop - start)


def _fields(stream: BinaryIO, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, start, start of the payload, stop) of each field of a message."""
    while position < end:
        stream.seek(position)
        head = stream.read(min(20, end - position))
        tag, used = _varint(head, 0)
        if tag & 7 == 0:
            payload, length = used, _varint(head, used)[1] - used
        elif tag & 7 == 2:
            length, payload = _varint(head, used)
        elif tag & 7 in (1, 5):
            payload, length = used, 8 if tag & 7 == 1 else 4
        else:
            raise DecodeError("unknown wire type")
        stop = position + payload + length
        if stop > end or tag >> 3 == 0:
            raise DecodeError("truncated")
        yield tag >> 3, position, position + payload, stop
        position = stop


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise DecodeError("truncated")
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise DecodeError("malformed number")


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
