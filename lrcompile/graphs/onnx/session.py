"""Running parts of a graph in ONNX Runtime without a second copy of its weights.

Large float constants become inputs of the session and are passed by reference on every
run; small ones, which carry shapes and axes, stay where they are. So a session of any part
of a model costs kilobytes, and dozens of them can live side by side.
"""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lrcompile.errors import InvalidInputError, LrcompileError, UnsupportedError, out_of_memory
from lrcompile.graphs.onnx.constants import FLOATS, constant
from lrcompile.graphs.onnx.tensors import embed

if TYPE_CHECKING:
    import onnxruntime

BY_REFERENCE = 4096
"""Float constants with more elements than this are passed to the session by reference."""
MOST_WORKERS = 4

Item = TypeVar("Item")
Found = TypeVar("Found")


def options(threads: int = 0) -> onnxruntime.SessionOptions:
    """Session options of every run of ours: quiet, on the CPU, ``threads`` (0: all cores)."""
    import onnxruntime

    chosen = onnxruntime.SessionOptions()
    chosen.log_severity_level = 4
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1
    return chosen


def create(source: bytes | str, chosen: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session.

    Raises:
        UnsupportedError: ONNX Runtime has no kernel for the model or refuses it.
    """
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(source, chosen, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises half a dozen unrelated types
        raise UnsupportedError(
            f"ONNX Runtime cannot load the model: {first_line(error)}",
            hint="run `python -m onnxruntime.tools.check_onnx_model_mobile_usability` or onnx.checker on it",
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def has_bfloat16(graph: ir.Graph) -> bool:
    """Whether any value of the graph is bfloat16, for which the CPU has no kernels."""
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    return any(value.dtype == ir.DataType.BFLOAT16 for value in values)


def widen(graph: ir.Graph) -> None:
    """Turns bfloat16 into float32 everywhere, in place: what the numbers mean stays the same."""
    for value in [*graph.inputs, *graph.outputs, *graph.initializers.values()]:
        _widen_value(value)
    for node in graph.all_nodes():
        for output in node.outputs:
            _widen_value(output)
        for name, attribute in list(node.attributes.items()):
            if name in ("to", "dtype") and attribute.type == ir.AttributeType.INT:
                if attribute.as_int() == ir.DataType.BFLOAT16:
                    node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == ir.DataType.BFLOAT16:
                node.attributes[name] = ir.AttrTensor(name, _widened(attribute.as_tensor()))


def _widen_value(value: ir.Value) -> None:
    if value.dtype == ir.DataType.BFLOAT16:
        value.type = ir.TensorType(ir.DataType.FLOAT)  # a clone shares the old type object with the model
    if value.const_value is not None and value.const_value.dtype == ir.DataType.BFLOAT16:
        value.const_value = _widened(value.const_value)


def _widened(tensor: ir.TensorProtocol) -> ir.Tensor:
    return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)


@dataclass(frozen=True)
class Workers:
    """How many runs go side by side, and the threads of each.

    Two runs of one thread are up to 1.5 times faster than one run of two: small operators do not share well.
    """

    count: int
    threads: int


@functools.cache
def workers() -> Workers:
    """A few workers that share all cores; only a few, because each holds a run's intermediates."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(cores, MOST_WORKERS)
    return Workers(count, max(1, cores // count))


def ahead(function: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
    """Results in order, computed by :func:`workers` one item ahead of them; items are made in the caller's thread."""
    import torch

    count, before = workers().count, torch.get_num_threads()
    waiting: deque[Future[Found]] = deque()
    torch.set_num_threads(workers().threads)  # new threads take this over
    with ThreadPoolExecutor(count) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            torch.set_num_threads(before)
            for future in waiting:
                future.cancel()


class Session:
    """A graph ready to run, its large weights passed by reference.

    Args:
        graph: owned by the session from now on; its constants are taken out.
        like: the model that gives opsets, functions and the IR version.
        profile: writes a profile of every node under this path.
        plain: runs the graph as it is written, node by node, and not as ONNX Runtime optimises it.
        arena: memory comes from an arena, whose statistics a profile has.
        whole: constants stay in the graph, as a file has them, so that ONNX Runtime fuses what it fuses there.
    """

    def __init__(
        self,
        graph: ir.Graph,
        like: ir.Model,
        *,
        threads: int = 0,
        profile: str = "",
        plain: bool = False,
        arena: bool = False,
        whole: bool = False,
    ) -> None:
        import onnxruntime

        if has_bfloat16(graph):
            widen(graph)
        self.weights: dict[str, Any] = {}
        for name, tensor in ({} if whole else _take_constants(graph)).items():
            self.weights[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor.numpy()))
        self.inputs = [value.name for value in graph.inputs if value.name not in self.weights]
        self.defaults = set(graph.initializers)  # inputs among these need not be fed
        self.outputs = [str(value.name) for value in graph.outputs]
        functions = [function.clone() for function in like.functions.values()]
        model = ir.Model(graph, ir_version=like.ir_version, functions=functions)
        embed(model)
        chosen = options(threads)
        chosen.enable_cpu_mem_arena = arena  # which would keep the largest intermediate of each session
        chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")  # dozens of sessions share the cores
        if profile:
            chosen.enable_profiling, chosen.profile_file_prefix = True, profile
        if plain:
            chosen.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = create(ir.to_proto(model).SerializeToString(), chosen)

    def run(self, feeds: Mapping[str, np.ndarray | Any], names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Outputs by name; ``feeds`` may hold more than the session reads.

        Raises:
            InvalidInputError: ONNX Runtime fails on these inputs.
            ResourceError: out of memory.
        """
        values = dict(self.weights)
        for name in self.inputs:
            if name in self.defaults and name not in feeds:
                continue
            feed = feeds[str(name)]
            if isinstance(feed, np.ndarray):
                feed = _ort_value(runnable(feed))
            values[str(name)] = feed
        wanted = list(self.outputs if names is None else names)
        try:
            results = self.session.run_with_ort_values(wanted, values)
        except LrcompileError:
            raise
        except Exception as error:  # as above
            raise _failed(error) from error
        odd = next((name for name, result in zip(wanted, results, strict=True) if not result.is_tensor()), None)
        if odd is not None:
            raise UnsupportedError("sequences, maps and missing values cannot be compared", where=odd)
        # an output that is an input as well lies in the feed's memory, which may be gone when it is read
        pairs = zip(wanted, results, strict=True)
        return {name: np.array(result.numpy(), copy=True if name in values else None) for name, result in pairs}


class FileSession:
    """A model file in ONNX Runtime, as a user would load it."""

    def __init__(self, path: str, *, threads: int = 0) -> None:
        chosen = options(threads)
        chosen.enable_cpu_mem_arena = False  # as for Session
        self.session = create(path, chosen)
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name.

        Raises:
            InvalidInputError: ONNX Runtime fails on these inputs.
            ResourceError: out of memory.
        """
        try:
            results = self.session.run(None, {name: inputs[name] for name in self.inputs})
        except Exception as error:  # onnxruntime raises half a dozen unrelated types
            raise _failed(error) from error
        return {name: np.asarray(result) for name, result in zip(self.outputs, results, strict=True)}


def _failed(error: Exception) -> LrcompileError:
    """What a failed run means: a session was made, so the operators are there, and the values are at fault."""
    hint = "the values must be what the model takes, such as token numbers within its table"
    return out_of_memory(error) or InvalidInputError(
        f"ONNX Runtime fails on these inputs: {first_line(error)}", hint=hint
    )


def runnable(array: np.ndarray) -> np.ndarray:
    """The array as ONNX Runtime and torch take it: contiguous, bfloat16 as float32."""
    if array.dtype == ml_dtypes.bfloat16:
        return array.astype(np.float32)
    return np.ascontiguousarray(array).reshape(array.shape)  # which turns a single number into a vector


def _ort_value(array: np.ndarray) -> onnxruntime.OrtValue:
    import onnxruntime

    try:
        return onnxruntime.OrtValue.ortvalue_from_numpy(array)
    except Exception as error:  # strings, and floats and integers of less than a byte
        raise UnsupportedError(f"ONNX Runtime takes no arrays of type {array.dtype}") from error


def _take_constants(graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
    """Moves large float constants out of the graph; they become its inputs."""
    taken: dict[str, ir.TensorProtocol] = {}
    for name, value in list(graph.initializers.items()):
        tensor = constant(value)
        if tensor is None or tensor.size <= BY_REFERENCE or tensor.dtype not in FLOATS:
            continue
        if any(node.graph is not graph for node, _ in value.uses()) or value.is_graph_output():
            continue
        taken[name] = tensor
        value.dtype = tensor.dtype
        value.shape = ir.Shape(tensor.shape.numpy())
        value.const_value = None
        del graph.initializers[name]
        graph.inputs.append(value)
    return taken
