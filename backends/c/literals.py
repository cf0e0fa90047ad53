"""Numbers as C has them, exactly."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from tvm import tirx

from lrcompile.dataflow.expr import Const


def number(value: Const) -> Any:
    """A number, exactly: what six decimals do not hold is written by its bits."""
    if value.dtype == "bool":
        return tirx.const(bool(value.value), "bool")
    if not value.dtype.startswith("float"):
        return tirx.const(int(value.value), value.dtype)
    number = np.dtype(value.dtype).type(value.value)
    if np.isfinite(number) and np.dtype(value.dtype).type(f"{float(number):.6e}") == number:
        return tirx.const(float(number), value.dtype)
    if value.dtype == "float32":
        bits = struct.unpack("<I", struct.pack("<f", number))[0]
        return tirx.call_pure_extern("float32", "lrc_f32", tirx.const(bits, "uint32"))
    bits = struct.unpack("<Q", struct.pack("<d", number))[0]
    high, low = tirx.const(bits >> 32, "uint32"), tirx.const(bits & 0xFFFFFFFF, "uint32")
    return tirx.call_pure_extern("float64", "lrc_f64", high, low)
