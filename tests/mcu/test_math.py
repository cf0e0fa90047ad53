"""The device's mathematical functions against the host's double precision, in units of the last place."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from lrcompile.backends.c import host
from lrcompile.backends.c.toolchain import DEVICE

ONE = {
    "acosf": 0.51,
    "acoshf": 0.51,
    "asinf": 0.51,
    "asinhf": 0.51,
    "atanf": 0.51,
    "atanhf": 0.51,
    "coshf": 0.51,
    "erff": 1.5,
    "expm1f": 0.51,
    "log1pf": 0.51,
    "nearbyintf": 0.0,
    "rintf": 0.0,
    "sinhf": 0.51,
    "tanhf": 1.4,
}
"""Function → bound that is promised in mathf.c."""
STRIDE = 4099  # every 4099th float of all 2**32: about a million
SCAN = """
#include <math.h>
#include <stdint.h>
#include <string.h>

static double ulps(float got, double want)
{
    float rounded = (float)want, next;
    double unit;
    if (isnan(want) || isnan(got)) { return isnan(want) && isnan(got) ? 0.0 : INFINITY; }
    if (isinf(rounded) || isinf(got)) { return rounded == got ? 0.0 : INFINITY; }
    if (rounded == 0.0f) { return fabs((double)got - want) / 1.4e-45; }
    if (signbit(got) != signbit(rounded)) { return INFINITY; }
    next = nextafterf(fabsf(rounded), INFINITY);
    unit = isinf(next) ? 2.028240960365167e31 : (double)next - fabs((double)rounded);
    return fabs((double)got - want) / unit;
}

double scan(float (*f)(float), double (*g)(double), uint32_t stride, float *worst)
{
    double most = -1.0;
    uint64_t at;
    for (at = 0; at < (1ull << 32); at += stride) {
        uint32_t word = (uint32_t)at;
        float x;
        double error;
        memcpy(&x, &word, 4);
        error = ulps(f(x), g((double)x));
        if (error > most) { most = error; *worst = x; }
    }
    return most;
}

double pair(float got, double want) { return ulps(got, want); }
"""
NAMES = (*ONE, "atan2f", "powf", "copysignf")


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The device's functions under other names, and the scan over all floats."""
    folder = tmp_path_factory.mktemp("math")
    text = (DEVICE / "mathf.c").read_text(encoding="utf-8")
    for name in NAMES:
        text = text.replace(f"float {name}(", f"float device_{name}(")
    (folder / "mathf.c").write_text(_prototypes() + text)
    (folder / "scan.c").write_text(SCAN)
    return host.shared_library([folder / "mathf.c", folder / "scan.c"], folder)


def _prototypes() -> str:
    one = "".join(f"float device_{name}(float);" for name in ONE)
    return one + "".join(f"float device_{name}(float, float);" for name in NAMES[len(ONE) :]) + "\n"


def reference(name: str) -> Any:
    """The host's function for double."""
    return getattr(ctypes.CDLL("libm.so.6"), name[:-1])


@pytest.mark.parametrize("name", ONE)
def test_functions_of_one_argument_meet_their_bound(name: str, device: ctypes.CDLL):
    scan, worst = device.scan, ctypes.c_float()
    scan.restype = ctypes.c_double
    pointers = (ctypes.cast(f, ctypes.c_void_p) for f in (getattr(device, f"device_{name}"), reference(name)))
    error = scan(*pointers, ctypes.c_uint32(STRIDE), ctypes.byref(worst))
    assert error <= ONE[name], f"{name}({worst.value!r}) is wrong by {error:.3f} units"


EDGES = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 3.0, -3.0, 1e-40, -1e-40, 3e38, -3e38, 16777216.0, 0.99999994]
EDGES += [float("inf"), float("-inf"), float("nan"), 2.5, -2.5, 7.0, -7.0, 1.0000001]


@pytest.mark.parametrize("name", ["atan2f", "powf"])
def test_functions_of_two_arguments_meet_their_bound(name: str, device: ctypes.CDLL):
    generator = np.random.default_rng(0)
    random = np.concatenate([generator.normal(size=300), np.exp(generator.normal(size=300) * 9)])
    values = np.concatenate([EDGES, random]).astype(np.float32)
    function, truth, pair = getattr(device, f"device_{name}"), reference(name), device.pair
    function.restype, function.argtypes = ctypes.c_float, (ctypes.c_float, ctypes.c_float)
    truth.restype, truth.argtypes = ctypes.c_double, (ctypes.c_double, ctypes.c_double)
    pair.restype, pair.argtypes = ctypes.c_double, (ctypes.c_float, ctypes.c_double)
    partners = [*values[: len(EDGES)], *values[len(EDGES) :: 7]]
    errors = {(x, y): pair(function(x, y), truth(x, y)) for x in map(float, values) for y in map(float, partners)}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 0.51, (name, worst, errors[worst])
