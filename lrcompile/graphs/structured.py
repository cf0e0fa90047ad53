"""Modules that compute with an expression: what stands in a model where a dense layer stood.

The leaves' tensors are parameters (integers: buffers) under their paths in the expression, like
``factors.left.weight``. A tensor or operator that several expressions share is registered as one
object everywhere, so ``.to()``, ``copy.deepcopy``, optimisers and files see it once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrcompile.linop import Dense, LinearOperator, Product, apply, densify, show
from lrcompile.sites import Window
from lrcompile.windows import convolve


def place(tensor: Tensor) -> Hashable:
    """Where a tensor's elements lie: equal for a tensor and its detached aliases."""
    storage = tensor.untyped_storage()._cdata  # data_ptr() is 0 for every meta tensor
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


class Factors(nn.Module):
    """One node of an expression; children are nodes below it."""

    def __init__(self, operator_type: type[LinearOperator], trainable: bool) -> None:
        super().__init__()
        self.operator_type = operator_type
        self.trainable = trainable
        self.plain: dict[str, Any] = {}
        self.layout: list[tuple[str, str]] = []

    def hold(self, name: str, value: object) -> None:
        """Registers the field ``name``: a tensor, a node, a tuple of nodes, or a plain value."""
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
            self.layout.append((name, "value"))
        elif isinstance(value, Tensor):
            self.register_buffer(name, value)
            self.layout.append((name, "value"))
        elif isinstance(value, Factors):
            self.add_module(name, value)
            self.layout.append((name, "node"))
        elif isinstance(value, tuple) and value and all(isinstance(item, Factors) for item in value):
            self.add_module(name, nn.ModuleList(value))
            self.layout.append((name, "nodes"))
        else:
            self.plain[name] = value

    def expression(self, memo: dict[int, LinearOperator] | None = None) -> LinearOperator:
        """The operator over the tensors as they are now; nodes registered twice become one operator."""
        known: dict[int, LinearOperator] = {} if memo is None else memo
        key = id(self)
        if key not in known:
            values = dict(self.plain)
            for name, how in self.layout:
                found = getattr(self, name)
                if how == "node":
                    found = found.expression(known)
                elif how == "nodes":
                    found = tuple([item.expression(known) for item in found])
                values[name] = found
            known[key] = self.operator_type(**values)
        return known[key]

    def __repr__(self) -> str:
        return show(self.expression())


class Pool:
    """Turns operators into modules, each operator and tensor object into one.

    Args:
        known: parameters of the model; a leaf that aliases one of them uses it itself.
    """

    def __init__(self, known: Iterable[nn.Parameter] = ()) -> None:
        self._nodes: dict[LinearOperator, Factors] = {}
        self._tensors: dict[Hashable, tuple[Tensor, Tensor]] = {place(p): (p, p) for p in known}

    def known(self, tensor: Tensor) -> Tensor:
        """The registered tensor with the same elements, else the tensor itself."""
        found = self._tensors.get(place(tensor))
        return tensor if found is None else found[1]

    def factors(self, operator: LinearOperator, *, device: torch.device, trainable: bool) -> Factors:
        """The module of an operator, on ``device``; float tensors require gradients if ``trainable``."""
        if operator not in self._nodes:
            node = Factors(type(operator), trainable)
            for field in fields(cast(Any, operator)):
                if field.init:
                    node.hold(field.name, self._value(getattr(operator, field.name), device, trainable))
            self._nodes[operator] = node
        return self._nodes[operator]

    def _value(self, value: object, device: torch.device, trainable: bool) -> object:
        if isinstance(value, Tensor):
            return self._tensor(value, device, trainable)
        if isinstance(value, LinearOperator):
            return self.factors(value, device=device, trainable=trainable)
        if isinstance(value, tuple):
            return tuple(self._value(item, device, trainable) for item in value)
        return value

    def _tensor(self, tensor: Tensor, device: torch.device, trainable: bool) -> Tensor:
        key = place(tensor)
        if key not in self._tensors:
            held = tensor.detach().to(device)
            if held.is_inference():  # an inference tensor could never be trained
                with torch.inference_mode(False):
                    held = held.clone()
            if held.is_floating_point():
                held = nn.Parameter(held, requires_grad=trainable)
            self._tensors[key] = (tensor, held)  # the key is valid as long as the tensor lives
        return self._tensors[key][1]


def affine(operator: LinearOperator, x: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias``, the bias inside the last product where there is one."""
    match operator:
        case Product(left=left, right=right):
            return affine(left, apply(right, x), bias)
        case Dense(weight=weight) if bias is not None:
            return functional.linear(x, weight.to(x.dtype), bias.to(x.dtype))
        case _:
            out = apply(operator, x)
            return out if bias is None else out + bias.to(out.dtype)


class Structured(nn.Module):
    """What :class:`StructuredLinear` and :class:`StructuredConv` have in common."""

    bias: nn.Parameter | None

    def __init__(self, factors: Factors, bias: Tensor | None) -> None:
        super().__init__()
        self.factors = factors
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=factors.trainable)
        self.register_parameter("bias", bias)

    @property
    def operator(self) -> LinearOperator:
        """The expression (out, in) over the module's parameters."""
        return self.factors.expression()

    def _sizes(self) -> str:
        out, into = self.operator.shape
        return f"in_features={into}, out_features={out}, bias={self.bias is not None}"

    def extra_repr(self) -> str:
        return self._sizes()


class StructuredLinear(Structured):
    """``y = apply(operator, x) + bias`` in place of ``nn.Linear``, or of GPT-2's ``Conv1D``.

    Args:
        factors: from :meth:`Pool.factors`.
        bias: (out,) or None.
        transposed: ``weight`` is (in, out), as ``Conv1D`` stores it.
    """

    def __init__(self, factors: Factors, bias: Tensor | None = None, *, transposed: bool = False) -> None:
        super().__init__(factors, bias)
        self.out_features, self.in_features = factors.expression().shape
        self.transposed = transposed
        if transposed:
            self.nx, self.nf = self.in_features, self.out_features

    @property
    def weight(self) -> Tensor:
        """The dense matrix, computed on every access; (out, in), or (in, out) where ``transposed``."""
        matrix = densify(self.operator)
        return matrix.mT if self.transposed else matrix

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return affine(self.operator, input, self.bias)


class StructuredConv(Structured):
    """A convolution whose kernel is an expression on the patches that its window reads.

    Args:
        window: geometry; the operator is (out, in * places).
    """

    def __init__(self, factors: Factors, bias: Tensor | None = None, *, window: Window) -> None:
        super().__init__(factors, bias)
        self.window = window
        self.out_channels = factors.expression().shape[0]
        self.in_channels = factors.expression().shape[1] // window.places
        self.stride, self.kernel_size = window.strides, window.kernel

    @property
    def weight(self) -> Tensor:
        """The dense kernel (out, in, *kernel), computed on every access."""
        return densify(self.operator).reshape(self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in, *spatial) or (in, *spatial); contiguous as a convolution's output."""
        if not self.window.pointwise:
            return self._convolved(input)
        axis = -len(self.stride) - 1
        moved = strided(input, self.stride).movedim(axis, -1)
        out = affine(self.operator, moved, self.bias).movedim(-1, axis)
        last = len(self.stride) == 2 and input.ndim == 4 and not input.is_contiguous()
        return out if last and input.is_contiguous(memory_format=torch.channels_last) else out.contiguous()

    def _convolved(self, input: Tensor) -> Tensor:
        batched = input if input.ndim == self.window.rank + 2 else input.unsqueeze(0)
        out = convolve(self.operator, batched, self.window)
        if self.bias is not None:
            out = out + self.bias.to(out.dtype).reshape(-1, *[1] * self.window.rank)
        return out if batched is input else out.squeeze(0)

    def extra_repr(self) -> str:
        geometry = str(self.window)
        return f"{self._sizes()}, stride={self.stride}" + (f", {geometry}" if not self.window.pointwise else "")


def strided(value: Tensor, strides: Sequence[int]) -> Tensor:
    """Every ``strides[i]``-th position of the last axes."""
    if all(step == 1 for step in strides):
        return value
    return value[(..., *(slice(None, None, step) for step in strides))]


def arranged(bias: Tensor | None, order: Tensor | None) -> Tensor | None:
    """A bias in another order of channels: the very same object without one."""
    if bias is None or order is None:
        return bias
    return nn.Parameter(bias.detach()[order.to(bias.device)], requires_grad=bias.requires_grad)


def shifted(bias: Tensor | None, shift: Tensor | None, like: Tensor) -> Tensor | None:
    """A bias that gains a constant: the very same object without one, else new, in the bias' own type.

    Args:
        like: the weight, for type and device where there is no bias yet.
    """
    if shift is None:
        return bias
    kind = like if bias is None else bias
    moved = shift.detach().to(kind.device, torch.float32)
    total = moved if bias is None else bias.detach().float() + moved
    return nn.Parameter(total.to(kind.dtype), requires_grad=kind.requires_grad)


def structured_modules(model: nn.Module) -> Iterator[tuple[str, Structured]]:
    """Every structured module once, with its first path."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, Structured))


def slots(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """For every module (by ``id``) all (parent, attribute) pairs that hold it."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                found.setdefault(id(child), []).append((parent, name))
    return found


@dataclass(frozen=True, eq=False)
class Change:
    """One attribute or submodule that was set, and what stood there before."""

    holder: nn.Module
    name: str
    before: object
    after: object

    def redo(self) -> None:
        """Sets it (again)."""
        self._set(self.after)

    def undo(self) -> None:
        """Puts back what stood there: the very same object."""
        self._set(self.before)

    def _set(self, value: object) -> None:
        if isinstance(value, nn.Module):
            self.holder._modules[self.name] = value
        else:
            setattr(self.holder, self.name, value)


def install(root: nn.Module, old: nn.Module, new: nn.Module) -> list[Change]:
    """Puts ``new`` wherever ``old`` stands below ``root``; undone in reverse order.

    ``nn.TransformerEncoderLayer`` has a fast path that reads dense weights: it is turned off
    for a layer in which something was replaced, and for the encoder around it.
    """
    new.train(old.training)
    changes: list[Change] = []
    for parent, name in slots(root).get(id(old), []):
        changes.append(Change(parent, name, old, new))
        if isinstance(parent, nn.TransformerEncoderLayer):
            changes.append(Change(parent, "activation_relu_or_gelu", parent.activation_relu_or_gelu, 0))
            changes += [Change(m, "use_nested_tensor", True, False) for m in root.modules() if _nests(m, parent)]
    for change in changes:
        change.redo()
    return changes


def _nests(module: nn.Module, layer: nn.TransformerEncoderLayer) -> bool:
    is_encoder = isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False)
    return bool(is_encoder) and any(child is layer for child in module.modules())
