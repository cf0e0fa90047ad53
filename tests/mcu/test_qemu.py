"""The independent check: another compiler, another C library, another emulator."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from lrcompile.backends.c import qemu
from lrcompile.backends.c.emulator import Emulator
from lrcompile.backends.c.target import target_named
from lrcompile.errors import ResourceError, UsageError
from tests.mcu.firmware import expected, firmware, program, sample

needs_qemu = pytest.mark.skipif(
    bool(qemu.missing()) and not (os.environ.get("CI") and shutil.which("apt-get")),
    reason=f"not installed: apt install {qemu.PACKAGES}",
)


@needs_qemu
def test_both_emulators_compute_the_same(tmp_path: Path):
    image = qemu.build(program(), target_named("cortex-m7"), tmp_path / "qemu")
    other = qemu.run(program(), image, sample())
    ours = Emulator(firmware(tmp_path / "ours")).run(sample())
    np.testing.assert_allclose(other.outputs["y"], ours.outputs["y"], atol=2e-7)
    np.testing.assert_allclose(other.outputs["y"], expected(sample()), atol=1e-6)
    assert 0.5 < other.instructions / ours.instructions < 5  # the C libraries differ in erf
    assert 0 < other.stack < 2048


@needs_qemu
def test_both_count_the_same_loop(tmp_path: Path):
    """An assembly loop of known length, so that the two counters can be compared exactly."""
    loop = 'i = 100000; __asm__ volatile("1: subs %0, %0, #1\\n bne 1b" : "+r"(i) :: "cc");'
    plain = [qemu.run(program(d), qemu.build(program(d), target_named("cortex-m7"), tmp_path / n), sample())
             for n, d in (("a", ""), ("b", loop))]  # fmt: skip
    ours = [Emulator(firmware(tmp_path / n, d)).run(sample()) for n, d in (("c", ""), ("d", loop))]
    assert plain[1].instructions - plain[0].instructions == pytest.approx(200_000, abs=2 * qemu.TICK)
    assert ours[1].instructions - ours[0].instructions == pytest.approx(200_000, abs=20)


@needs_qemu
def test_warnings_are_errors(tmp_path: Path):
    with pytest.raises(ResourceError, match="unused"):
        qemu.build(program("int unused;"), target_named("cortex-m7"), tmp_path)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(qemu.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="apt install gcc-arm-none-eabi"):
        qemu.build(program(), target_named("cortex-m7"), tmp_path)
