"""Writing a model: one tensor in memory at a time, the same bytes for the same model.

A protobuf message may be written in pieces, since repeated fields concatenate: first the graph
without its initializers, then one initializer after the other. So a model is never held
a second time, neither as a message nor as its serialised bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import onnx
import onnx_ir as ir

from lrcompile.files import AtomicSet
from lrcompile.graphs.onnx.tensors import embed

MESSAGE_LIMIT = 2**31 - 2**20
"""Protobuf cannot hold more than 2 GiB; larger models keep their weights in a data file."""
EXTERNAL = 1024
"""Tensors of at least this many bytes go to the data file, where there is one."""
_ALIGN = 4096
_PIECE = 2**20
_NOTHING = bytes(_PIECE)


def write(model: ir.Model, files: AtomicSet, *, external: bool | None = None) -> None:
    """Writes the model to the set's target, with a data file where it needs one or had one.

    Args:
        external: weights in a data file; by default where the model came so, or is above 2 GiB.
    """
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    if external is None:
        external = any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors)
        external = external or sum(tensor.nbytes for tensor in tensors) > MESSAGE_LIMIT
    outside = _write_data(model, files) if external else {}
    with open(files.path, "wb") as stream:
        _write_model(model, stream, outside)


def _write_data(model: ir.Model, files: AtomicSet) -> dict[str, tuple[str, int, int]]:
    """Puts large tensors into one data file: name → (location, offset, length)."""
    path = files.stage_data()
    places: dict[str, tuple[int, int]] = {}
    with open(path, "wb") as stream:
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < EXTERNAL:
                continue
            stream.write(b"\0" * (-stream.tell() % _ALIGN))
            start = stream.tell()
            _write_sparse(stream, tensor.tobytes())
            places[name] = (start, stream.tell() - start)
        stream.truncate()  # what ends in a hole is as long as it should be
    location = files.seal(path)
    return {name: (location, start, length) for name, (start, length) in places.items()}


def _write_sparse(stream: BinaryIO, data: bytes) -> None:
    """Writes the bytes; pieces of zeros become holes in the file, which cost no room and no time."""
    view = memoryview(data)
    for start in range(0, len(data), _PIECE):
        piece = view[start : start + _PIECE]
        if piece[0] or len(piece) < _PIECE or bytes(piece) != _NOTHING:
            stream.write(piece)
        else:
            stream.seek(_PIECE, 1)


def _write_model(model: ir.Model, stream: BinaryIO, outside: dict[str, tuple[str, int, int]]) -> None:
    initializers = dict(model.graph.initializers)
    bare = model.clone()
    for value in bare.graph.initializers.values():
        value.const_value = None
    bare.graph.initializers.clear()
    embed(bare)
    message = ir.to_proto(bare)
    graph = message.graph.SerializeToString(deterministic=True)
    message.ClearField("graph")
    heads = {name: _head(name, value, outside) for name, value in initializers.items()}
    length = len(graph) + sum(_size(5, _tensor_size(head, raw)) for head, raw in heads.values())
    stream.write(message.SerializeToString(deterministic=True))
    stream.write(_tag(7) + _varint(length))
    stream.write(graph)
    for name, (head, raw) in heads.items():
        stream.write(_tag(5) + _varint(_tensor_size(head, raw)) + head)
        if raw:
            stream.write(_tag(9) + _varint(raw))
            for piece in _raw(initializers[name]):
                stream.write(piece)


def _head(name: str, value: ir.Value, outside: dict[str, tuple[str, int, int]]) -> tuple[bytes, int]:
    """A tensor's message without its raw bytes, and how many of those follow."""
    tensor = value.const_value
    if tensor is None:
        raise ValueError(f"initializer {name} has no value")
    if tensor.dtype == ir.DataType.STRING:
        return ir.serde.serialize_tensor(tensor).SerializeToString(deterministic=True), 0
    proto = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
    if tensor.doc_string:
        proto.doc_string = tensor.doc_string
    for key, text in sorted(tensor.metadata_props.items()):
        proto.metadata_props.add(key=key, value=text)
    if name not in outside:
        return proto.SerializeToString(deterministic=True), tensor.nbytes
    proto.data_location = onnx.TensorProto.EXTERNAL
    for key, text in zip(("location", "offset", "length"), map(str, outside[name]), strict=True):
        proto.external_data.add(key=key, value=text)
    return proto.SerializeToString(deterministic=True), 0


def _raw(value: ir.Value) -> Iterator[bytes]:
    if value.const_value is not None:
        yield value.const_value.tobytes()


def _tensor_size(head: bytes, raw: int) -> int:
    return len(head) + (_size(9, raw) if raw else 0)


def _size(field: int, length: int) -> int:
    return len(_tag(field)) + len(_varint(length)) + length


def _tag(field: int) -> bytes:
    return _varint(field << 3 | 2)  # 2: a length-delimited field


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)
