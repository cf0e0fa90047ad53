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
EXTREME = re.compile(r"\blrc_(min|max)_(\w+?)\(")
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


def helpers(source: str) -> str:
    """Definitions of the small functions that a source calls."""
    made = [text for name, text in (("lrc_f32(", HELPERS), ("lrc_f64(", HELPERS_WIDE)) if name in source]
    for kind, dtype in sorted(set(EXTREME.findall(source))):
        sign = "<" if kind == "min" else ">"
        head = f"static inline {dtype}_t lrc_{kind}_{dtype}({dtype}_t a, {dtype}_t b)"
        made.append(f"{head}\n{{\n    return a {sign} b ? a : b;\n}}\n")
    return "\n".join(made)


def passes(target: Target) -> list[Any]:
    """Simplification, and the lowering of intrinsics; everything structural has been decided before.

    Common subexpressions are left to the C compiler: which ones there are depends on numbers that happen to be equal,
    and kernels of one structure must be one text.
    """
    return [
        transform.BindTarget(target),
        transform.StmtSimplify(),
        s_transform.RenormalizeSplitPattern(),
        transform.StmtSimplify(),
        transform.RemoveNoOp(),
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
            unread = [name for name in re.findall(r"(\w+)(?:,|$)", params) if not re.search(rf"\b{name}\b", body)]
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
    before = ""
    while before != body:
        before, counts = body, Counter(re.findall(r"\b[a-z]\w*", body))
        single = {name for name, count in counts.items() if count == 1}
        body = "".join(line for line in body.splitlines(keepends=True) if not _unused(line, single))
    return body


def _unused(line: str, single: set[str]) -> bool:
    match = UNUSED.match(line)
    return match is not None and match.group(1) in single
