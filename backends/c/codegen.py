"""From TVM's loop IR to plain C functions: unpacked arguments, no runtime."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import tvm
from tvm.ir import IRModule
from tvm.s_tir import transform as s_transform
from tvm.target import Target
from tvm.tirx import transform

from lrcompile.backends.c.lower import Lowered

FUNCTION = re.compile(r"^(?:TVM_DLL )?void (\w+)\(([^)]*)\) \{\n(.*?)^\}", re.M | re.S)
UNUSED = re.compile(r"^ *int32_t (\w+) = [^;\n]*;\n", re.M)
HELPERS = """static inline float lrc_f32(uint32_t bits)
{
    union { uint32_t bits; float value; } both;
    both.bits = bits;
    return both.value;
}
"""
HELPERS_WIDE = """static inline double lrc_f64(uint32_t high, uint32_t low)
{
    union { uint64_t bits; double value; } both;
    both.bits = (uint64_t)high << 32 | low;
    return both.value;
}
"""


def passes(target: Target) -> list[Any]:
    """Simplification, and the lowering of intrinsics; everything structural has been decided before."""
    return [
        transform.BindTarget(target),
        transform.StmtSimplify(),
        s_transform.RenormalizeSplitPattern(),
        transform.StmtSimplify(),
        transform.RemoveNoOp(),
        transform.CommonSubexprElim(),
        transform.LowerIntrin(),
    ]


def functions(kernels: Mapping[str, Lowered]) -> dict[str, tuple[str, str]]:
    """Symbol → (parameters, body) of each kernel, with ``const`` where it only reads."""
    if not kernels:
        return {}
    target = Target({"kind": "c"})
    module = IRModule({symbol: each.function for symbol, each in kernels.items()})
    for each in passes(target):
        module = each(module)
    build = tvm.get_global_func("target.build.c")
    assert build is not None
    source: str = build(module, target).inspect_source()
    found = {}
    for symbol, params, body in FUNCTION.findall(source):
        if symbol in kernels:
            body = _clean(body)
            names = re.findall(r"(\w+)(?:,|$)", params)
            unread = [name for name in names if not re.search(rf"\b{name}\b", body)]
            body = "".join(f"    (void){name};\n" for name in unread) + body
            found[symbol] = _parameters(params.split(", "), kernels[symbol]), body
    return found


def _parameters(params: Sequence[str], kernel: Lowered) -> str:
    made = []
    for text, name in zip(params, kernel.params, strict=True):
        kind, symbol = re.fullmatch(r"(.*?)\*? ?\*?(\w+)", text).groups()  # type: ignore[union-attr]
        made.append(f"{'' if name in kernel.written else 'const '}{kind.strip()} *{symbol}")
    return ", ".join(made)


def _clean(body: str) -> str:
    """Four spaces; ``acc_ptr`` is ``acc``; no variable that nothing reads."""
    body = re.sub(r"^( +)", lambda match: match.group(1) * 2, body, flags=re.M)
    body = re.sub(r"\b(\w+)_ptr\b", r"\1", body)
    while True:
        shorter = _without_unused(body, Counter(re.findall(r"\b[a-z]\w*", body)))
        if shorter == body:
            return body
        body = shorter


def _without_unused(body: str, counts: Counter[str]) -> str:
    return UNUSED.sub(lambda match: "" if counts[match.group(1)] == 1 else match.group(0), body)
