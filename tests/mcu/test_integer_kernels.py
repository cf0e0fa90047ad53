"""Quantised networks as C: equal, bit for bit, to the definition; on the host, in the emulator and in QEMU."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from lrcompile.backends.c import host, qemu
from lrcompile.backends.c.emit import emit
from lrcompile.backends.c.emulator import GARBAGE, Emulator
from lrcompile.backends.c.target import Memory, target_named
from lrcompile.backends.c.toolchain import build
from lrcompile.dataflow import interpret
from lrcompile.dataflow.fuse import fuse
from lrcompile.dataflow.program import Program
from lrcompile.dataflow.search import schedule
from lrcompile.dataflow.stage import Formulas
from lrcompile.graphs.onnx.formulas.build import build as formulas_of
from lrcompile.graphs.onnx.quantise import integer_model
from tests.mcu.test_qemu import needs_qemu
from tests.mcu.test_quantise import quantised, samples

MEMORY = Memory(ram=64 << 10, flash=256 << 10, stack=4096)


@cache
def formulas(name: str) -> Formulas:
    shapes = {key: value.shape for key, value in samples(name, 1)[0].items()}
    return fuse(formulas_of(integer_model(quantised(name), shapes)))


@cache
def program(name: str, limit: int | None = None) -> Program:
    return emit(schedule(formulas(name), limit))


@pytest.mark.parametrize("name", ["convolutions"])
def test_the_host_computes_the_definition(name: str, tmp_path: Path):
    library = host.build(program(name), tmp_path)
    for sample in samples(name, 3, seed=5):
        wanted = interpret.run(formulas(name), sample)["y"]
        np.testing.assert_array_equal(host.call(library, program(name), sample)["y"], wanted)


@pytest.mark.parametrize(("name", "tight"), [("encoder", True), ("convolutions", False)])
def test_the_device_computes_the_definition_within_its_memory(name: str, tight: bool, tmp_path: Path):
    chosen = program(name, 1 if tight else None)
    firmware = build(chosen, target_named("cortex-m7"), MEMORY, tmp_path)
    assert firmware.board.ram()["arena"] == chosen.arena
    emulator = Emulator(firmware)
    for garbage in GARBAGE:
        run = emulator.run(samples(name, 1, seed=5)[0], garbage=garbage)
        assert run.violations == ()
        wanted = interpret.run(formulas(name), samples(name, 1, seed=5)[0])["y"]
        np.testing.assert_array_equal(run.outputs["y"], wanted)


def test_the_dsp_instructions_are_used_where_they_are(tmp_path: Path):
    """A core without them computes the same in plain C, with more instructions."""
    sample = samples("encoder", 1)[0]
    firmware = build(program("encoder"), target_named("cortex-m7"), MEMORY, tmp_path / "a")
    plain = build(program("encoder"), target_named("cortex-m7"), MEMORY, tmp_path / "b", flags=["-U__ARM_FEATURE_DSP"])
    fast, slow = (Emulator(each).run(sample) for each in (firmware, plain))
    np.testing.assert_array_equal(fast.outputs["y"], slow.outputs["y"])
    assert fast.instructions < 0.85 * slow.instructions


@needs_qemu
def test_another_compiler_and_emulator_agree(tmp_path: Path):
    sample = samples("encoder", 1, seed=5)[0]
    image = qemu.build(program("encoder"), target_named("cortex-m7"), tmp_path)
    found = qemu.run(program("encoder"), image, sample)
    np.testing.assert_array_equal(found.outputs["y"], interpret.run(formulas("encoder"), sample)["y"])
