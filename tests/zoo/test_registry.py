"""The registry is lazy, names its models and says what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lrcompile import zoo
from lrcompile.errors import UsageError
from lrcompile.zoo import base


def test_listing_and_the_digits_import_no_torch():
    code = (
        "import sys; from lrcompile import zoo; zoo.names(); "
        "[zoo.load(name).calibration() for name in ('digits_vit', 'digits_conv')]; "
        "print(sorted({'torch', 'sklearn', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="digits_vit"):
        zoo.load("digits_vti")


def test_a_missing_package_says_what_to_do():
    with pytest.raises(zoo.MissingPackageError, match="make zoo") as caught:
        base.package_folder("no_such_package_of_weights")
    assert caught.value.code == 2


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LRCOMPILE_CACHE", raising=False)
    assert base.cache_folder() == Path(".cache/zoo")
    monkeypatch.setenv("LRCOMPILE_CACHE", str(tmp_path / "elsewhere"))
    assert base.cache_folder() == tmp_path / "elsewhere" / "zoo"
    assert base.cache_folder().is_dir()
