"""An artefact that several files test."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lrcompile.artifact import save
from tests.graphs.modules import rewritten, tokens


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact with a program; tracing it takes a while, so tests work on copies."""
    folder = tmp_path_factory.mktemp("saved")
    save(rewritten(), folder, sample=tokens(3, 5))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path
