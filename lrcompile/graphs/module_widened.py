"""Products of float16 on a CPU, computed in float32.

Few CPUs multiply float16, and what torch does instead takes up to hundreds of times as long as a float32 product where
an operand is not transposed, which is every backward pass.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.mv.default,
    _aten.addmv.default, _aten.linear.default, _aten.matmul.default, _aten.convolution.default,
    _aten.convolution_backward.default,
}  # fmt: skip


def widened(model: nn.Module) -> AbstractContextManager[Any]:
    """Within it, products of a model with float16 weights on a CPU are sums in float32, rounded once.

    Operands are widened one product at a time, so no second copy of the weights is held.
    """
    narrow = any(p.dtype == torch.float16 and p.device.type == "cpu" for p in model.parameters())
    return _Widened() if narrow else nullcontext()


class _Widened(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS or not any(map(_narrow, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        wide = tree_map(lambda value: value.float() if _narrow(value) else value, (args, kwargs))
        found = func(*wide[0], **wide[1])
        return tree_map(lambda value: value.half() if isinstance(value, Tensor) else value, found)


def _narrow(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float16 and value.device.type == "cpu"
