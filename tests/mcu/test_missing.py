"""What is not installed is named with the extra that brings it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from lrcompile.backends.c.emulator import Emulator
from lrcompile.errors import MissingExtraError
from tests.mcu.firmware import firmware


def test_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ziglang" else real(name, *a))
    with pytest.raises(MissingExtraError, match=r"'ziglang'.*lrcompile\[mcu\]"):
        firmware(tmp_path)


@pytest.mark.parametrize(("module", "package"), [("elftools.elf.elffile", "pyelftools"), ("unicorn", "unicorn")])
def test_the_reader_and_the_emulator(module: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*lrcompile\[mcu\]"):
        Emulator(firmware(tmp_path))
