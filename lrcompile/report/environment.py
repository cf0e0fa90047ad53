"""Where a result was made: versions and machine, found without importing anything heavy."""

from __future__ import annotations

import os
import platform
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "onnx", "onnxruntime", "numpy")


def versions() -> dict[str, str | None]:
    """Versions of lrcompile, Python and the packages that decide the result; None where not installed."""
    own = _version("lrcompile") or getattr(sys.modules.get("lrcompile"), "__version__", None)
    return {"lrcompile": own, "python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def machine() -> dict[str, str | int]:
    """Processor, usable cores and operating system; no host or user name."""
    return {"cpu": _processor(), "cores": _cores(), "os": f"{platform.system()} {platform.machine()}".strip()}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
