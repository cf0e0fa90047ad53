"""Where things stand: the project's files, packages and declared metadata, read without importing them."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MAPPED = {"passes": "passes", "backends": "backends", "zoo": "models_zoo"}  # link inside lrcompile/ -> folder
SKIPPED = {".git", ".venv", "__pycache__", "build", "dist", "lrcompile.egg-info"}


@cache
def pyproject() -> dict[str, Any]:
    """The parsed ``pyproject.toml``."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@cache
def constraints() -> dict[str, str]:
    """Normalised distribution name -> pinned version."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if line.strip() and not line.startswith("#"))
    return {normalised(name): version for name, version in pins}


def normalised(name: str) -> str:
    """A distribution name in its one comparable spelling."""
    return re.sub(r"[-_.]+", "-", name).lower()


def project_files() -> list[Path]:
    """All files that are or would be committed; links are left out. Without git: all files that are there."""
    listed = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    paths = _walk() if listed is None else (ROOT / name for name in listed.split("\0") if name)
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


def link_modes() -> dict[str, str] | None:
    """Name of each link's path in the index -> git mode, or None where git does not know them."""
    listed = _git("ls-files", "-s", *(f"lrcompile/{name}" for name in MAPPED))
    if not listed:
        return None
    return {line.split("\t")[1]: line.split()[0] for line in listed.splitlines()}


def package_folders() -> Iterator[tuple[str, Path]]:
    """(dotted name, folder) of every folder with Python files in the importable package."""
    roots = {"lrcompile": ROOT / "lrcompile"} | {f"lrcompile.{k}": ROOT / v for k, v in MAPPED.items()}
    for name, root in roots.items():
        for folder, subfolders, files in os.walk(root):  # does not follow links
            subfolders[:] = [each for each in subfolders if not each.startswith((".", "__"))]
            if any(file.endswith(".py") for file in files):
                yield ".".join([name, *Path(folder).relative_to(root).parts]), Path(folder)


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def _walk() -> Iterator[Path]:
    for folder, subfolders, files in os.walk(ROOT):
        subfolders[:] = [each for each in subfolders if each not in SKIPPED and not each.endswith("cache")]
        yield from (Path(folder) / file for file in files)
