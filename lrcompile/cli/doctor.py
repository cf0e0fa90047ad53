"""Whether everything that is needed is there and works."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata, util
from typing import Any

from lrcompile.cli.shell import Answer
from lrcompile.errors import LrcompileError, ResourceError

CORE = ("torch", "onnx", "onnx_ir", "onnxruntime", "numpy", "safetensors")
EXTRAS = {
    "mcu": ("unicorn", "ziglang"),
    "report": ("matplotlib",),
    "triton": ("triton",),
    "tvm": ("tvm",),
    "zoo": ("transformers",),
}
"""Packages that an extra brings and that are looked for."""


def examine() -> Answer:
    """Runs all checks; a missing extra is no failure, everything else is.

    The error of a failed examination has the exit code 7: this machine cannot do the work.
    """
    checks = [*_packages(), _check("onnxruntime runs a model", _run_model), _check("cache is writable", _write_cache)]
    failed = [each["name"] for each in checks if not each["ok"] and not each["optional"]]
    error = ResourceError(f"failed: {', '.join(failed)}", hint="see the hints above") if failed else None
    return Answer({"checks": checks}, lambda: _show(checks), "failed" if failed else "ok", error)


def _packages() -> Iterator[dict[str, Any]]:
    yield _result("python", True, platform.python_version())
    for name in CORE:
        yield _package(name, "pip install lrcompile", optional=False)
    for extra, names in EXTRAS.items():
        for name in names:
            yield _package(name, f'pip install "lrcompile[{extra}]"', optional=True)


def _package(name: str, hint: str, *, optional: bool) -> dict[str, Any]:
    found = util.find_spec(name) is not None
    try:
        version = metadata.version(name.replace("_", "-"))
    except metadata.PackageNotFoundError:
        version = None
    return _result(name, found, version, "" if found else hint, optional=optional)


def _check(name: str, work: Callable[[], str | None]) -> dict[str, Any]:
    try:
        return _result(name, True, work())
    except (LrcompileError, OSError, ImportError) as error:
        return _result(name, False, None, str(error))


def _result(name: str, ok: bool, version: str | None, hint: str = "", *, optional: bool = False) -> dict[str, Any]:
    return {"name": name, "ok": ok, "version": version, "hint": hint, "optional": optional}


def _run_model() -> str:
    """One multiplication in ONNX Runtime."""
    import numpy as np
    import onnx_ir as ir
    import onnxruntime

    from lrcompile.graphs.onnx.session import create, options

    shape, dtype = ir.Shape([1, 2]), ir.TensorType(ir.DataType.FLOAT)
    source = ir.Value(name="x", shape=shape, type=dtype)
    node = ir.Node("", "Add", [source, source], outputs=[ir.Value(name="y", shape=shape, type=dtype)])
    graph = ir.Graph([source], node.outputs, nodes=[node], opset_imports={"": 20}, name="doctor")
    session = create(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), options(1))
    (result,) = session.run(None, {"x": np.ones((1, 2), np.float32)})
    if not np.array_equal(np.asarray(result), np.full((1, 2), 2.0)):
        raise ResourceError("ONNX Runtime computes 1 + 1 wrongly", hint="reinstall onnxruntime")
    return onnxruntime.__version__


def _write_cache() -> str | None:
    """A file can be made in the cache folder, or in the nearest folder above it that exists."""
    from lrcompile.cache import folder

    place = next(path for path in (folder(), *folder().absolute().parents) if path.exists())
    if not os.access(place, os.W_OK):
        raise ResourceError(f"{place} is not writable", hint="set LRCOMPILE_CACHE to another folder, or use --no-cache")
    with tempfile.TemporaryFile(dir=place) as stream:
        stream.write(b"x")
    return None


def _show(checks: list[dict[str, Any]]) -> None:
    for each in checks:
        mark = "ok" if each["ok"] else "missing" if each["optional"] else "FAILED"
        print(
            f"{mark:8}{each['name']}  {each['version'] or ''}".rstrip()
            + (f"  ({each['hint']})" if each["hint"] else "")
        )
