"""Firmware in the emulator: right results, exact counts, and every way out of its memory is seen."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lrcompile.backends.c import host
from lrcompile.backends.c.emulator import CANARY, GARBAGE, Emulator
from lrcompile.backends.c.target import Memory, target_named
from lrcompile.backends.c.toolchain import Firmware, build
from lrcompile.errors import InvalidInputError, UnsupportedError, UsageError
from tests.mcu.firmware import COLUMNS, MEMORY, ROWS, expected, firmware, program, sample, weights


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Firmware:
    return firmware(tmp_path_factory.mktemp("sound"))


def count_one_by_one(emulator: Emulator, inputs: dict[str, np.ndarray]) -> int:
    """Instructions between entry of main and its return, by a hook per instruction."""
    counts: list[str] = []

    def seen(engine: object, address: int, size: int, data: object) -> None:
        counts.append(emulator.image.function(address))

    u = emulator.unicorn
    handle = emulator._engine.hook_add(u.UC_HOOK_CODE, seen)
    emulator.run(inputs)
    emulator._engine.hook_del(handle)
    return sum(name not in ("Reset_Handler", "lrc_done") for name in counts)


def test_results_are_right_on_the_guarded_and_on_the_board_image(sound: Firmware):
    guarded, board = Emulator(sound).run(sample()), Emulator(sound, board=True).run(sample())
    np.testing.assert_allclose(guarded.outputs["y"], expected(sample()), atol=1e-6)
    np.testing.assert_array_equal(guarded.outputs["y"], board.outputs["y"])
    assert guarded.instructions == board.instructions
    assert guarded.violations == board.violations == ()


def test_blocks_count_what_single_steps_count(sound: Firmware):
    emulator = Emulator(sound)
    run = emulator.run(sample())
    assert run.instructions == count_one_by_one(Emulator(sound), sample())
    assert run.instructions == sum(run.functions.values()) > ROWS * COLUMNS
    assert {"model_run", "main"} <= set(run.functions)


def test_a_run_leaves_nothing_behind_for_the_next(sound: Firmware):
    emulator = Emulator(sound)
    first = emulator.run(sample())
    emulator.run(sample(2), garbage=GARBAGE[1])
    again = emulator.run(sample())
    np.testing.assert_array_equal(first.outputs["y"], again.outputs["y"])
    assert (first.instructions, first.stack, first.touched) == (again.instructions, again.stack, again.touched)


def test_memory_is_read_from_the_file(sound: Firmware):
    ram, flash = sound.board.ram(), sound.board.flash()
    assert ram["arena"] == 4 * ROWS
    assert ram["io"] == 48 + 4 * ROWS  # each buffer begins at a multiple of 16
    assert ram["stack"] == MEMORY.stack
    assert ram["total"] == sum(value for name, value in ram.items() if name != "total")
    assert flash["weights"] == weights().nbytes
    assert 300 < flash["code"] < 5000


def test_the_arena_counts_as_touched(sound: Firmware):
    assert 4 * ROWS * 0.9 < Emulator(sound).run(sample(), garbage=GARBAGE[1]).touched <= 4 * ROWS


@pytest.mark.parametrize("target", ["cortex-m4", "cortex-m33"])
def test_other_cores_compute_the_same(target: str, tmp_path: Path):
    run = Emulator(firmware(tmp_path, target=target)).run(sample())
    np.testing.assert_allclose(run.outputs["y"], expected(sample()), atol=1e-6)
    assert run.violations == ()


@pytest.mark.parametrize(
    ("defect", "complaint"),
    [
        (f"((volatile float *)arena)[{ROWS}] = 1.0f;", r"model_run writes outside its memory.*\(arena\)"),
        ("((volatile float *)arena)[-1] = 1.0f;", "bytes outside every buffer were overwritten"),
        (f"y[0] = ((volatile float *)arena)[{ROWS}];", r"model_run reads outside its memory.*\(arena\)"),
        ("((volatile float *)(void *)(unsigned)x)[1] = 1.0f;", r"model_run writes to read-only memory.*\(inputs\)"),
        ("((volatile float *)(void *)(unsigned)w)[1] = 1.0f;", r"model_run writes to read-only memory.*\(weights\)"),
        (f"((volatile float *)y)[{ROWS}] = 1.0f;", r"model_run writes outside its memory.*\(outputs\)"),
        (f"y[0] = ((const volatile float *)w)[{ROWS * COLUMNS} + 1024];", r"model_run reads outside its memory"),
        ("volatile float big[700]; for (i = 699; i >= 0; --i) { big[i] = 1.0f; }", r"writes outside.*\(stack\)"),
        ("((void (*)(void))(unsigned)0x60000001u)();", "jumps outside its code"),
        ("((void (*)(void))(unsigned)((char *)arena + 1))();", "executes data|stopped"),
        ("__builtin_trap();", "stopped|did not finish"),
    ],
)
def test_every_way_out_of_memory_is_a_violation(defect: str, complaint: str, tmp_path: Path):
    run = Emulator(firmware(tmp_path, defect)).run(sample())
    assert re.search(complaint, " ".join(run.violations)), run.violations


def test_a_loop_without_end_is_a_violation(tmp_path: Path):
    run = Emulator(firmware(tmp_path, "for (;;) { y[0] += ((volatile float *)arena)[0]; }")).run(sample(), limit=0.2)
    assert "did not finish" in run.violations[0]


def test_garbage_shows_what_is_read_before_it_is_written(tmp_path: Path):
    sound = program()
    text = str(sound.files["model.c"]).replace("arena[i] = 0.0f;", "arena[i] *= i != 7;")
    faulty = replace(sound, files={**sound.files, "model.c": text})
    emulator = Emulator(build(faulty, target_named("cortex-m7"), MEMORY, tmp_path))
    runs = [emulator.run(sample(), garbage=each).outputs["y"] for each in GARBAGE]
    assert not np.array_equal(runs[0], runs[1])


def test_stack_is_the_highest_use(tmp_path: Path):
    shallow = Emulator(firmware(tmp_path / "a")).run(sample()).stack
    deep = Emulator(
        firmware(tmp_path / "b", "volatile float big[100]; for (i = 0; i < 100; ++i) { big[i] = 1.0f; }")
    ).run(sample())
    assert 400 <= deep.stack - shallow <= 450
    assert deep.violations == ()


def test_weights_may_stand_in_external_flash(tmp_path: Path):
    built = firmware(tmp_path, memory=Memory(ram=16384, flash=4096, external=1 << 20))
    assert built.board.sections[".weights"].address == 0x9000_0000
    for board in (False, True):
        run = Emulator(built, board=board).run(sample())
        np.testing.assert_allclose(run.outputs["y"], expected(sample()), atol=1e-6)


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (Memory(ram=2100, flash=65536), r"RAM of 2100 bytes is \d+ bytes too small"),
        (Memory(ram=16384, flash=1200), r"FLASH of 1200 bytes is \d+ bytes too small"),
    ],
)
def test_what_does_not_fit_says_by_how_much(memory: Memory, message: str, tmp_path: Path):
    with pytest.raises(UnsupportedError, match=message):
        firmware(tmp_path, memory=memory)


def test_ram_that_leaves_no_stack_is_refused():
    with pytest.raises(UnsupportedError, match="no room for a stack of 2048"):
        Memory(ram=1024, flash=65536)
    with pytest.raises(UsageError, match="too small"):
        Memory(ram=65536, flash=65536, stack=16)


def test_an_unknown_target_names_the_nearest():
    with pytest.raises(UsageError, match="cortex-m7"):
        target_named("cortexm7")


def test_an_input_of_another_shape_is_refused(sound: Firmware):
    with pytest.raises(InvalidInputError, match="x: no value"):
        Emulator(sound).run({"y": np.zeros(11, np.float32)})
    with pytest.raises(InvalidInputError, match=r"x: wants float32 \[10\], not float32 \[11\]"):
        Emulator(sound).run({"x": np.zeros(11, np.float32)})


def test_the_canary_is_none_of_the_garbage():
    assert CANARY not in GARBAGE


def test_the_host_computes_the_same(tmp_path: Path):
    result = host.call(host.build(program(), tmp_path), program(), sample())
    np.testing.assert_allclose(result["y"], expected(sample()), atol=1e-6)
