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
from lrcompile.linop import LinearOperator, Product
from lrcompile.sites import Window
from lrcompile.windows import meets, pointwise, unfit


@dataclass(eq=False)
class Store:
    """Initializers of one model, each stored once, and values computed once.

    Args:
        rules: the lowering of each operator type.
        opset: of the model.
        blocks: the model uses ONNX Runtime's MatMulNBits already, so codes in blocks may be written so.
    """

    rules: Mapping[type[LinearOperator], Callable[..., ir.Value]]
    opset: int
    blocks: bool = False
    scope: Hashable = None  # the graph that is written to: what is computed there is not seen elsewhere
    stored: dict[Hashable, tuple[ir.Value, Tensor]] = field(default_factory=dict)
    values: dict[Hashable, ir.Value] = field(default_factory=dict)
    pieces: dict[ir.Value, list[tuple[int, ir.Value]]] = field(default_factory=dict)
    """What was put together along the channel axis: the channels and the value of each part."""

    def once(self, key: Hashable, make: Callable[[], ir.Value]) -> ir.Value:
        """The value under ``key``, computed where it is first asked for in each graph."""
        place = (self.scope, key)
        if place not in self.values:
            self.values[place] = make()
        return self.values[place]

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

    def made(self, tape: Tape, key: Tensor, content: Tensor, name: str) -> ir.Value:
        """A value that holds what was made of a tensor; stored once for each such tensor."""
        place = (_place(key), "made")
        if place not in self.stored:
            self.stored[place] = (tape.constant(from_torch(content.contiguous()), name), key)
        return self.stored[place][0]

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
        window: of the convolution that the site is; only the right-most factor meets it.
    """

    store: Store
    tape: Tape
    name: str
    dtype: torch.dtype = torch.float32
    window: Window | None = None

    def apply(self, operator: LinearOperator, source: ir.Value) -> ir.Value:
        """``source @ W.T`` along the channel axis, or the convolution whose kernel ``operator`` is.

        Raises:
            UnsupportedError: the operator has no rule, or does not fit the window.
        """
        reason = unfit(operator, self.window)
        if reason:
            raise UnsupportedError(f"no ONNX form: {reason}", where=self.name)
        return self.flow(operator, source)[0]

    def flow(self, operator: LinearOperator, source: ir.Value) -> tuple[ir.Value, Window | None]:
        """What the operator makes of the source, and what of the window is left for the factors before it."""
        found = None if self.window is None else meets(operator, self.window)
        if found is not None:
            inner, first, rest = found
            return self.under(first).flow(inner, source)[0], rest
        if isinstance(operator, Product):
            return self.through(operator, source)
        rule = self.store.rules.get(type(operator))
        if rule is None:
            raise UnsupportedError(f"no ONNX form for {type(operator).__name__}", where=self.name)
        rest = None if self.window is None else pointwise(self.window)
        return self.store.once((operator, source, self.window), lambda: rule(self, operator, source)), rest

    def through(self, operator: Product, source: ir.Value) -> tuple[ir.Value, Window | None]:
        """A product: the right factor, then the left one under what the right one leaves of the window."""
        inner, middle = self.part("right").flow(operator.right, source)
        return self.part("left").under(middle).flow(operator.left, inner)

    def under(self, window: Window | None) -> Emitter:
        """The same emitter under another window."""
        return Emitter(self.store, self.tape, self.name, self.dtype, window)

    @property
    def axis(self) -> int:
        """The channel axis."""
        return -1 if self.window is None else 1

    def together(self, parts: Sequence[tuple[int, ir.Value]]) -> ir.Value:
        """Values one after the other along the channel axis, each with its number of channels."""
        value = self.op("Concat", [part for _, part in parts], axis=self.axis)
        self.store.pieces[value] = list(parts)
        return value

    def piece(self, source: ir.Value, indices: Tensor) -> ir.Value | None:
        """The part of ``source`` that these channels are exactly, where it was put together from parts."""
        if self.window is not None and self.window.strided:
            return None
        start = 0
        for size, part in self.store.pieces.get(source, ()):
            if torch.equal(indices.long(), torch.arange(start, start + size)):
                return part
            start += size
        return None

    def part(self, name: str) -> Emitter:
        """The emitter of a factor, whose name gets a suffix."""
        return Emitter(self.store, self.tape, f"{self.name}.{name}", self.dtype, self.window)

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
        domain = attributes.pop("domain", "")
        return self.tape.op(op_type, inputs, ir.convenience.convert_attributes(attributes), domain=domain)

    # -- stored tensors --------------------------------------------------------------------

    def tensor(self, tensor: Tensor, part: str = "") -> ir.Value:
        """A stored tensor as it is held."""
        return self.store.tensor(self.tape, tensor, f"{self.name}.{part}" if part else self.name)

    def floats(self, tensor: Tensor, part: str = "") -> ir.Value:
        """A stored tensor in the type of the site's values."""
        return self.cast(self.tensor(tensor, part), tensor.dtype, self.dtype)

    def kept(self, key: Tensor, content: Tensor, part: str = "") -> ir.Value:
        """``content``, which is made of ``key``: stored once for all that hold ``key``."""
        name = f"{self.name}.{part}" if part else self.name
        return self.store.made(self.tape, key, content, name)

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
        if self.window is None or not self.window.strided:
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
        channels = shape[1] // self.window.places
        return self.conv(source, self.op("Reshape", [matrix, self.shape(shape[0], channels, *self.window.kernel)]))

    def conv(self, source: ir.Value, kernel: ir.Value) -> ir.Value:
        """A convolution under the window; what is the default is not written."""
        window = self.window
        if window is None:
            raise UnsupportedError("a convolution needs a window", where=self.name)
        more = {"pads": window.pads} if any(window.pads) else {}
        if any(step != 1 for step in window.dilations):
            more["dilations"] = window.dilations
        return self.op("Conv", [source, kernel], strides=window.strides, **more)
