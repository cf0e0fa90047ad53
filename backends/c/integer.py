"""Integer kernels in C: the DSP instructions where the core has them, the same in plain C where it has not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from tvm import tirx

from lrcompile.dataflow.dot import WIDTH, Dot, Factor
from lrcompile.dataflow.expr import Load

if TYPE_CHECKING:
    from lrcompile.dataflow.index import Var
    from lrcompile.dataflow.nest import Node

_ONCE = """#if defined(__GNUC__)
__attribute__((noinline)) /* for rows, not for elements: one copy will do */
#endif
"""
ISQRT = f"""{_ONCE}static int64_t lrc_isqrt(int64_t value)
{{
    uint64_t rest = (uint64_t)value, root = 0, bit = (uint64_t)1 << 62;
    while (bit > rest) {{
        bit >>= 2;
    }}
    for (; bit; bit >>= 2) {{
        if (rest >= root + bit) {{
            rest -= root + bit;
            root = (root >> 1) + bit;
        }} else {{
            root >>= 1;
        }}
    }}
    return (int64_t)root;
}}
"""
QUOTIENT = f"""{_ONCE}static int64_t lrc_quotient(int64_t value, int64_t divisor)
{{
    uint64_t quotient = 0, bit = 1, rest = (uint64_t)value, step = (uint64_t)divisor;
    for (; step <= rest >> 1; bit <<= 1) {{
        step <<= 1;
    }}
    for (; bit; bit >>= 1, step >>= 1) {{
        if (rest >= step) {{
            rest -= step;
            quotient += bit;
        }}
    }}
    return (int64_t)quotient;
}}
"""
SCALE = """static inline int32_t lrc_scale(int32_t value, int32_t multiplier, int64_t offset, int32_t shift)
{
    return (int32_t)(((int64_t)value * multiplier + offset) >> shift);
}
"""
DSP = """#if defined(__ARM_FEATURE_DSP) && __ARM_FEATURE_DSP
#include <arm_acle.h>
#define LRC_DSP 1
#else
#define LRC_DSP 0
#endif
"""
LOAD4 = """static inline uint32_t lrc_load4(const int8_t *bytes)
{
    uint32_t word;
    __builtin_memcpy(&word, bytes, 4);
    return word;
}
"""
SMLAD = """static inline int32_t lrc_smlad(uint32_t a, uint32_t b, int32_t total)
{
#if LRC_DSP
    return __smlad((int16x2_t)a, (int16x2_t)b, total);
#else
    int32_t low = (int16_t)(a & 0xFFFFu) * (int16_t)(b & 0xFFFFu);
    return total + low + (int16_t)(a >> 16) * (int16_t)(b >> 16);
#endif
}
"""
EVEN = """static inline uint32_t lrc_even(uint32_t bytes)
{
#if LRC_DSP
    return (uint32_t)__sxtb16((int8x4_t)bytes);
#else
    uint32_t low = (uint32_t)(int32_t)(int8_t)(bytes & 0xFFu), high = (uint32_t)(int32_t)(int8_t)(bytes >> 16 & 0xFFu);
    return (low & 0xFFFFu) | high << 16;
#endif
}
static inline uint32_t lrc_odd(uint32_t bytes)
{
    return lrc_even(bytes >> 8 | bytes << 24);
}
"""
EVEN_PLUS = """static inline uint32_t lrc_even_plus(uint32_t bytes, uint32_t zeros)
{
#if LRC_DSP
    return (uint32_t)__sxtab16((int16x2_t)zeros, (int8x4_t)bytes);
#else
    uint32_t low = (uint32_t)(int32_t)(int8_t)(bytes & 0xFFu) + (zeros & 0xFFFFu);
    uint32_t high = (uint32_t)(int32_t)(int8_t)(bytes >> 16 & 0xFFu) + (zeros >> 16);
    return (low & 0xFFFFu) | high << 16;
#endif
}
static inline uint32_t lrc_odd_plus(uint32_t bytes, uint32_t zeros)
{
    return lrc_even_plus(bytes >> 8 | bytes << 24, zeros);
}
"""
HELPERS = {
    **{"lrc_isqrt(": ISQRT, "lrc_quotient(": QUOTIENT, "lrc_scale(": SCALE, "lrc_smlad(": DSP + LOAD4 + SMLAD},
    **{"lrc_even(": EVEN, "lrc_even_plus(": EVEN_PLUS},
}
"""What a text calls → the C that it needs."""


class Elements(Protocol):
    """What the kernel that is being written offers."""

    def element(self, load: Load, env: dict[Var, Any], node: Node) -> Any:
        """What a load reads, as it is stored."""
        ...


def isqrt(value: Any) -> Any:
    """The floor of a square root."""
    return tirx.call_pure_extern("int64", "lrc_isqrt", value)


def quotient(args: list[Any]) -> Any:
    """The floor of the quotient of two positive numbers of 64 bits: rare enough for a loop in place of a library."""
    return tirx.call_pure_extern("int64", "lrc_quotient", *args)


def scale(args: list[Any]) -> Any:
    """``(value * multiplier + offset) >> shift``, as :func:`lrcompile.fixedpoint.requantise` has it."""
    return tirx.call_pure_extern("int32", "lrc_scale", *args)


def helpers(text: str) -> list[str]:
    """The C that a text needs in front of it."""
    return [helper for name, helper in HELPERS.items() if name in text]


def loop(
    lowering: Elements,
    node: Node,
    found: Dot,
    total: Any,
    points: list[dict[Var, Any]],
    update: Callable[[dict[Var, Any]], list[Any]],
    turn: Any,
    *,
    short: bool = False,
) -> list[Any]:
    """The innermost loop over bytes, four at a time; what is left over one by one, by ``update``."""
    extent = found.var.extent
    width = WIDTH if short else steps(extent, len(points))
    firsts = [turn * width + at for at in range(0, width, WIDTH)]
    body = [stmt for first in firsts for stmt in updates(lowering, node, found, total, points, first)]
    made: list[Any] = [tirx.For(turn, _int(0), _int(extent // width), tirx.ForKind.SERIAL, tirx.SeqStmt(body))]
    done = extent // width * width
    for at in range(done, extent - WIDTH + 1, WIDTH):
        made += updates(lowering, node, found, total, points, _int(at))
    done += (extent - done) // WIDTH * WIDTH
    return made + [stmt for at in range(done, extent) for stmt in update({found.var: _int(at)})]


def updates(
    lowering: Elements, node: Node, found: Dot, total: Any, points: list[dict[Var, Any]], first: Any
) -> list[Any]:
    """Adds the products of four bytes to each of the totals."""
    made = []
    for at, point in enumerate(points):
        env = dict(point) | {found.var: first}
        left, right = (_pairs(lowering, node, factor, env) for factor in (found.left, found.right))
        for one, other in zip(left, right, strict=True):
            value = tirx.call_pure_extern("int32", "lrc_smlad", one, other, tirx.BufferLoad(total, [_int(at)]))
            made.append(tirx.BufferStore(total, value, [_int(at)]))
    return made


def _pairs(lowering: Elements, node: Node, factor: Factor, env: dict[Var, Any]) -> tuple[Any, Any]:
    """Bytes 0 and 2, and bytes 1 and 3, as pairs of 16 bits, less the zero."""
    pointer = tirx.address_of(lowering.element(factor.load, env, node))
    word = tirx.call_pure_extern("uint32", "lrc_load4", pointer)
    if not factor.zero:
        return tuple(tirx.call_pure_extern("uint32", name, word) for name in ("lrc_even", "lrc_odd"))  # type: ignore[return-value]
    half = -factor.zero & 0xFFFF
    zeros = tirx.const(half << 16 | half, "uint32")
    names = ("lrc_even_plus", "lrc_odd_plus")
    return tuple(tirx.call_pure_extern("uint32", name, word, zeros) for name in names)  # type: ignore[return-value]


def steps(extent: int, count: int) -> int:
    """Bytes of one turn of the innermost loop: as many words as do not swell the code."""
    return WIDTH * (2 if extent >= 2 * WIDTH and count <= 4 else 1)


def _int(value: int) -> Any:
    return tirx.const(int(value), "int32")
