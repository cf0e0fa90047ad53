"""Models that are larger than what may be in memory: sparse files, with a few numbers in each weight."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from onnx import TensorProto, helper

NARROW, WIDE = 256, 65536
SIZE = 4 * NARROW * WIDE  # 64 MB


def write(folder: Path, pairs: int, *, first: int = NARROW) -> Path:
    """``pairs`` of a wide and a narrow layer, 128 MB each, almost all of it holes in the file.

    Args:
        first: rank of the first layer; the others have full rank.
    """
    data = folder / "vast.onnx.data"
    nodes, tensors, value = [], [], "x"
    with open(data, "wb") as stream:
        for index in range(2 * pairs):
            rows, columns = (NARROW, WIDE) if index % 2 == 0 else (WIDE, NARROW)
            _fill(stream, index * SIZE, columns, index, NARROW if index else first)
            tensors.append(_external(f"layers.{index}.weight", (rows, columns), data.name, index * SIZE))
            nodes.append(helper.make_node("MatMul", [value, tensors[-1].name], [f"h{index}"], name=f"mm{index}"))
            value = f"r{index}"
            nodes.append(helper.make_node("Tanh", [f"h{index}"], [value], name=f"act{index}"))
        stream.truncate(2 * pairs * SIZE)
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, ["n", NARROW]) for end in ("x", value)]
    graph = helper.make_graph(nodes, "vast", ends[:1], ends[1:], tensors)
    path = folder / "vast.onnx"
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(proto.SerializeToString())
    return path


def _fill(stream: BinaryIO, start: int, columns: int, seed: int, rank: int) -> None:
    """Numbers on the diagonal, ``rank`` of them."""
    numbers = np.random.default_rng(seed).standard_normal(rank).astype(np.float32)
    for row, number in enumerate(numbers):
        stream.seek(start + 4 * (row * columns + row))
        stream.write(number.tobytes())


def _external(name: str, shape: tuple[int, int], location: str, offset: int) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": str(offset), "length": str(SIZE)}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor
