"""What every rule of the ``onnxruntime`` backend works with: stored tensors, and values computed once.

Tensors are stored in the type that the expression holds them in and cast where the model computes
in another one, so that a file costs what the algebra says; runtimes fold such casts when they load it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import Tensor

from lrcompile.errors import UnsupportedError
from lrcompile.graphs.onnx.splice import Tape
from lrcompile.graphs.onnx.tensors import from_torch
from lrcompile.linop import LinearOperator
from lrcompile.sites import Window


@dataclass(eq=False)
class Store:
    """Initializers of one model, each stored once, and values computed once.

    Args:
        rules: the lowering of each operator type.
        opset: of the model.
    """

    rules: Mapping[type[LinearOperator], Callable[..., ir.Value]]
    opset: int
    stored: dict[Hashable, tuple[ir.Value, Tensor]] = field(default_factory=dict)
    values: dict[Hashable, ir.Value] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], ir.Value]) -> ir.Value:
        """The value under ``key``, computed where it is first asked for."""
        if key not in self.values:
            self.values[key] = make()
        return self.values[key]

    def tensor(self, tape: Tape, tensor: Tensor, name: str, bits: int = 0) -> ir.Value:
        """A value that holds the tensor; another view of stored elements is turned, not stored again.

        Args:
            bits: 4 packs the elements of an 8-bit integer tensor.
        """
        key = (_place(tensor), bits)
        if key not in self.stored:
            content = from_torch(tensor.contiguous()) if bits != 4 else _packed(tensor)
            self.stored[key] = (tape.constant(content, name), tensor)  # which keeps the memory, and so the key, alive
        value, first = self.stored[key]
        view = (key, tuple(tensor.shape), tuple(step for size, step in _axes(tensor)))
        return self.once(view, lambda: self._turned(tape, value, first, tensor))

    def _turned(self, tape: Tape, value: ir.Value, first: Tensor, wanted: Tensor) -> ir.Value:
        have, want = _axes(first), _axes(wanted)
        if have == want:
            return value if first.shape == wanted.shape else self.reshape(tape, value, wanted.shape)
        if len(have) != first.ndim:
            value = self.reshape(tape, value, [size for size, _ in have])
        order = sorted(range(len(have)), key=have.__getitem__), sorted(range(len(want)), key=want.__getitem__)
        permutation = [source for _, source in sorted(zip(order[1], order[0], strict=True))]
        value = tape.op("Transpose", [value], [ir.AttrInt64s("perm", permutation)])
        return value if len(want) == wanted.ndim else self.reshape(tape, value, wanted.shape)

    def reshape(self, tape: Tape, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """The value in another shape."""
        return tape.op("Reshape", [value, self.shape(tape, shape)])

    def shape(self, tape: Tape, numbers: Sequence[int]) -> ir.Value:
        """A vector of int64, stored once for equal numbers."""
        key = ("shape", *numbers)
        return self.once(key, lambda: tape.constant(ir.tensor(list(numbers), ir.DataType.INT64), "shape"))


def _axes(tensor: Tensor) -> list[tuple[int, int]]:
    """Size and stride of every axis that has more than one element."""
    return [(size, step) for size, step in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]


def _place(tensor: Tensor) -> Hashable:
    """Where a tensor's elements lie: equal for a tensor and its transposes."""
    start = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return (*start, tensor.dtype, tensor.numel(), *sorted(_axes(tensor)))


def _packed(tensor: Tensor) -> ir.Tensor:
    dtype = ir.DataType.INT4 if tensor.dtype == torch.int8 else ir.DataType.UINT4
    return ir.Tensor(tensor.contiguous().numpy().astype(dtype.numpy()), dtype=dtype)


@dataclass(frozen=True, eq=False)
class Emitter:
    """Emits one site into a tape.

    Args:
        dtype: of the values that flow through the site.
        window: of the convolution that the site is; only the right-most factor meets its strides.
    """

    store: Store
    tape: Tape
    name: str
    dtype: torch.dtype = torch.float32
    window: Window | None = None

    def apply(self, operator: LinearOperator, source: ir.Value) -> ir.Value:
        """``source @ W.T`` along the channel axis.

        Raises:
            UnsupportedError: the operator has no rule.
        """
        rule = self.store.rules.get(type(operator))
        if rule is None:
            raise UnsupportedError(f"no ONNX form for {type(operator).__name__}", where=self.name)
        strides = None if self.window is None else tuple(self.window.strides)
        return self.store.once((operator, source, strides), lambda: rule(self, operator, source))

    @property
    def axis(self) -> int:
        """The channel axis."""
        return -1 if self.window is None else 1

    def part(self, name: str, *, meets_input: bool = True) -> Emitter:
        """The emitter of a factor whose name gets a suffix; one that does not meet the input has strides of 1."""
        window = self.window
        if window is not None and not meets_input:
            window = Window(window.kernel, (1,) * window.rank)
        return Emitter(self.store, self.tape, f"{self.name}.{name}", self.dtype, window)

    def needs(self, opset: int, what: str) -> None:
        """Raises:
        UnsupportedError: the model is of an older operator set.
        """
        if self.store.opset < opset:
            raise UnsupportedError(
                f"{what} need opset {opset}, the model has {self.store.opset}",
                where=self.name,
                hint="convert the model to a later opset",
            )

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        """Appends an operator and returns its output."""
        return self.tape.op(op_type, inputs, ir.convenience.convert_attributes(attributes))

    # -- stored tensors --------------------------------------------------------------------

    def tensor(self, tensor: Tensor, part: str = "") -> ir.Value:
        """A stored tensor as it is held."""
        return self.store.tensor(self.tape, tensor, f"{self.name}.{part}" if part else self.name)

    def floats(self, tensor: Tensor, part: str = "") -> ir.Value:
        """A stored tensor in the type of the site's values."""
        return self.cast(self.tensor(tensor, part), tensor.dtype, self.dtype)

    def indices(self, tensor: Tensor, part: str = "indices") -> ir.Value:
        """Stored indices, in a type that ONNX takes for one."""
        wide = tensor.dtype if tensor.dtype in (torch.int32, torch.int64) else torch.int64
        return self.cast(self.tensor(tensor, part), tensor.dtype, wide)

    def cast(self, value: ir.Value, held: torch.dtype, wanted: torch.dtype) -> ir.Value:
        """The value in another type, computed once."""
        if held == wanted:
            return value
        return self.store.once((value, wanted), lambda: self.op("Cast", [value], to=from_torch_dtype(wanted).value))

    def shape(self, *numbers: int) -> ir.Value:
        """A vector of int64."""
        return self.store.shape(self.tape, numbers)

    def filled(self, number: float, *shape: int, dtype: torch.dtype | None = None) -> ir.Value:
        """A tensor with one number everywhere; stores its shape only."""
        fill = from_torch(torch.full((1,), number, dtype=dtype or self.dtype))
        return self.op("ConstantOfShape", [self.shape(*shape)], value=fill)

    # -- computations ----------------------------------------------------------------------

    def strided(self, source: ir.Value) -> ir.Value:
        """The source at the positions that the window keeps."""
        if self.window is None or all(step == 1 for step in self.window.strides):
            return source
        self.needs(10, "strides without a product")
        rank = self.window.rank
        bounds = [[0] * rank, [2**62] * rank, range(2, 2 + rank), self.window.strides]
        return self.op("Slice", [source, *(self.shape(*numbers) for numbers in bounds)])

    def channelwise(self, vector: Tensor) -> Tensor:
        """A vector shaped to scale the channel axis."""
        return vector if self.window is None else vector.reshape(-1, *[1] * self.window.rank)

    def multiply(self, matrix: ir.Value, shape: tuple[int, int], source: ir.Value, *, turned: bool) -> ir.Value:
        """Applies a computed matrix ``(out, in)``, or one that is ``turned``: (in, out)."""
        convolution = self.window is not None
        if turned == convolution:
            matrix = self.op("Transpose", [matrix], perm=[1, 0])
        if self.window is None:
            return self.op("MatMul", [source, matrix])
        kernel = self.op("Reshape", [matrix, self.shape(*shape, *self.window.kernel)])
        return self.op("Conv", [source, kernel], strides=self.window.strides)
