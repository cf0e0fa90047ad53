"""Firmware executed in an emulated Cortex-M: what it computes, what it costs, and that it stays inside its memory.

The proof is by mapping. Only code, weights, stack, arena, inputs and outputs exist, in regions far apart; code,
weights and inputs are read-only; each buffer ends where its page ends, so the first byte behind it faults, and what
a page holds in front of a buffer is filled with a pattern that must be whole after the run. The arena and the
outputs start as garbage: two runs with different garbage that differ in one bit have read what they never wrote.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile.backends.c.elf import Image
from lrcompile.backends.c.host import checked, shared_library
from lrcompile.backends.c.target import CODE, PAGE
from lrcompile.backends.c.toolchain import DEVICE, Firmware
from lrcompile.errors import MissingExtraError

GARBAGE = (0xFF, 0x2B)
"""What memory holds before a run: as floats NaN, and 6e-13."""
CANARY = 0xC5
SYSTEM = 0xE000_E000
_FAULTS = {
    "UC_MEM_READ_UNMAPPED": "reads outside its memory",
    "UC_MEM_WRITE_UNMAPPED": "writes outside its memory",
    "UC_MEM_FETCH_UNMAPPED": "jumps outside its code",
    "UC_MEM_WRITE_PROT": "writes to read-only memory",
    "UC_MEM_READ_PROT": "reads what it may not read",
    "UC_MEM_FETCH_PROT": "executes data",
}


@dataclass(frozen=True)
class Run:
    """One execution.

    Args:
        outputs: by port name.
        instructions: executed from the entry of ``main`` to its return.
        functions: the same by function, largest first.
        stack: most bytes of stack that were in use.
        touched: bytes of the arena that were written.
        violations: accesses outside the memory that the firmware has; empty in a sound run.
    """

    outputs: dict[str, np.ndarray]
    instructions: int
    functions: dict[str, int]
    stack: int
    touched: int
    violations: tuple[str, ...]


class Emulator:
    """A machine with one firmware in it, for any number of runs.

    Args:
        board: run the image for the board, in one RAM of the board's size, in place of the guarded one.

    Raises:
        MissingExtraError: the emulator is not installed.
    """

    def __init__(self, firmware: Firmware, *, board: bool = False) -> None:
        self.firmware = firmware
        self.image: Image = firmware.board if board else firmware.guarded
        self.unicorn = _unicorn()
        u = self.unicorn
        self._engine = u.Uc(u.UC_ARCH_ARM, u.UC_MODE_THUMB | u.UC_MODE_MCLASS)
        self._engine.ctl_set_cpu_model(getattr(u.arm_const, firmware.target.model))
        self._map(board)
        self._counter = BlockCounter(self._engine, u, self.image)
        self._faults: list[str] = []
        self._engine.hook_add(u.UC_HOOK_MEM_INVALID, self._fault)

    def run(self, inputs: Mapping[str, np.ndarray], *, garbage: int = GARBAGE[0], limit: float = 3600) -> Run:
        """Executes once from reset.

        Args:
            inputs: by port name, of the port's shape and type.
            garbage: the byte that arena and outputs hold before.
            limit: seconds after which it counts as hung, which is a violation.
        """
        self._prepare(inputs, garbage)
        vectors = self.image.sections[".vectors"].address
        stack, reset = np.frombuffer(self._engine.mem_read(vectors, 8), np.uint32)
        self._engine.reg_write(self.unicorn.arm_const.UC_ARM_REG_SP, int(stack))
        done = self.image.symbols["lrc_done"][0] & ~1
        try:
            self._engine.emu_start(int(reset) | 1, done, timeout=int(limit * 1e6))
        except self.unicorn.UcError as error:
            self._faults.append(f"stopped: {error}") if not self._faults else None
        return self._result(done, garbage)

    def _map(self, board: bool) -> None:
        u, sections = self.unicorn, self.image.sections
        read, write, run = u.UC_PROT_READ, u.UC_PROT_WRITE, u.UC_PROT_EXEC
        code = max(address + len(data) for address, data in self.image.segments if address < CODE + 0x0800_0000)
        self._engine.mem_map(CODE, _pages(code - CODE), read | run)
        self._engine.mem_map(SYSTEM, PAGE, read | write)
        if ".weights" in sections and sections[".weights"].address >= 0x9000_0000:
            self._engine.mem_map(sections[".weights"].address, _pages(sections[".weights"].nbytes), read)
        for address, data in self.image.segments:
            self._engine.mem_write(address, data)
        self._ranges = self._board_ranges() if board else self._guarded_ranges()
        for start, end, writable in self._ranges:
            self._engine.mem_map(start, end - start, read | write if writable else read)

    def _guarded_ranges(self) -> list[tuple[int, int, bool]]:
        """(first page, end page, writable) of everything in RAM."""
        groups = [(".data", ".bss"), (".arena",), (".inputs",), (".outputs",), (".stack",)]
        ranges = []
        for names in groups:
            parts = [self.image.sections[n] for n in names if n in self.image.sections]
            parts = [part for part in parts if part.nbytes]
            if parts:
                start, end = min(p.address for p in parts), max(p.end for p in parts)
                ranges.append((start // PAGE * PAGE, end + -end % PAGE, ".inputs" not in names))
        return ranges

    def _board_ranges(self) -> list[tuple[int, int, bool]]:
        start = self.image.sections[".stack"].address
        return [(start, start + _pages(self.firmware.memory.ram), True)]

    def _prepare(self, inputs: Mapping[str, np.ndarray], garbage: int) -> None:
        self._faults.clear()
        self._counter.clear()
        for start, end, _ in self._ranges:
            self._engine.mem_write(start, bytes([CANARY]) * (end - start))
        for name in (".arena", ".outputs"):
            if name in self.image.sections:
                section = self.image.sections[name]
                self._engine.mem_write(section.address, bytes([garbage]) * section.nbytes)
        for index, port in enumerate(self.firmware.program.inputs):
            value = checked(port, inputs)
            self._engine.mem_write(self.image.symbols[f"lrc_in_{index}"][0], value.tobytes())

    def _fault(self, engine: Any, access: int, address: int, size: int, value: int, data: Any) -> bool:
        kinds = {getattr(self.unicorn, name): text for name, text in _FAULTS.items()}
        at = engine.reg_read(self.unicorn.arm_const.UC_ARM_REG_PC)
        what = f"{self.image.function(at) or hex(at)} {kinds.get(access, 'faults')}"
        self._faults.append(f"{what}: {size} bytes at {address:#x} ({self._near(address)})")
        return False

    def _near(self, address: int) -> str:
        """The section that an address is next to."""
        parts = [part for part in self.image.sections.values() if part.nbytes]
        return min(parts, key=lambda p: max(p.address - address, address - p.end + 1, 0)).name.lstrip(".")

    def _result(self, done: int, garbage: int) -> Run:
        at = self._engine.reg_read(self.unicorn.arm_const.UC_ARM_REG_PC) & ~1
        if at != done and not self._faults:
            self._faults.append(f"did not finish: stopped in {self.image.function(at) or hex(at)}")
        functions = self._counter.by_function()
        program, outputs = self.firmware.program, {}
        for index, port in enumerate(program.outputs):
            raw = bytes(self._engine.mem_read(self.image.symbols[f"lrc_out_{index}"][0], port.nbytes))
            outputs[port.name] = np.frombuffer(raw, port.dtype).reshape(port.shape).copy()
        violations = (*self._faults, *self._canaries(), *self._counter.strays())
        touched = self._changed(".arena", garbage)
        return Run(outputs, sum(functions.values()), functions, self._stack(), touched, violations)

    def _canaries(self) -> list[str]:
        """Ranges of pages outside all sections that no longer hold the pattern."""
        broken = []
        for start, end, _ in self._ranges:
            memory = np.frombuffer(self._engine.mem_read(start, end - start), np.uint8)
            free = np.ones(end - start, bool)
            for part in self.image.sections.values():
                if start <= part.address < end:
                    free[part.address - start : part.end - start] = False
            bad = np.flatnonzero(free & (memory != CANARY))
            if len(bad):
                broken.append(f"{len(bad)} bytes outside every buffer were overwritten, first at {start + bad[0]:#x}")
        return broken

    def _stack(self) -> int:
        section = self.image.sections[".stack"]
        memory = np.frombuffer(self._engine.mem_read(section.address, section.nbytes), np.uint8)
        used = np.flatnonzero(memory != CANARY)
        return section.nbytes - int(used[0]) if len(used) else 0

    def _changed(self, name: str, pattern: int) -> int:
        if name not in self.image.sections:
            return 0
        section = self.image.sections[name]
        memory = np.frombuffer(self._engine.mem_read(section.address, section.nbytes), np.uint8)
        return int(np.count_nonzero(memory != pattern))


class _Counts(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_uint32),
        ("bytes", ctypes.c_uint32),
        ("code", ctypes.c_void_p),
        ("size", ctypes.c_void_p),
        ("length", ctypes.c_void_p),
        ("executed", ctypes.c_void_p),
        ("elsewhere", ctypes.c_uint64),
    )


class BlockCounter:
    """Counts executed instructions by basic block, in a hook compiled for the host."""

    def __init__(self, engine: Any, unicorn: Any, image: Image) -> None:
        self._image = image
        text = image.sections[".text"]
        self._code = np.frombuffer((text.data or b"") + b"\0\0", np.uint16).copy()
        self._size, self._length = (np.zeros(len(self._code), np.uint32) for _ in range(2))
        self._executed = np.zeros(len(self._code), np.uint64)
        arrays = (self._code, self._size, self._length, self._executed)
        self._counts = _Counts(text.address, text.nbytes, *(each.ctypes.data for each in arrays), 0)
        register = _engine_library(unicorn).uc_hook_add
        self._handle = ctypes.c_size_t()
        hook = ctypes.cast(_hook().lrc_on_block, ctypes.c_void_p)
        everything = ctypes.c_uint64(1), ctypes.c_uint64(0)
        kind = ctypes.c_int(unicorn.UC_HOOK_BLOCK)
        handle = engine._uch if hasattr(engine, "_uch") else engine._Uc__handle
        status = register(handle, ctypes.byref(self._handle), kind, hook, ctypes.byref(self._counts), *everything)
        if status:
            raise RuntimeError(f"the emulator refuses the block hook ({status})")

    def clear(self) -> None:
        """Forgets what was counted; what was decoded stays."""
        self._executed[:] = 0
        self._counts.elsewhere = 0

    def by_function(self) -> dict[str, int]:
        """Instructions of each function but the reset code, largest first."""
        total: Counter[str] = Counter()
        for index in np.flatnonzero(self._executed):
            total[self._image.function(self._counts.base + 2 * int(index))] += int(self._executed[index])
        for name in ("Reset_Handler", "lrc_done"):
            total.pop(name, None)
        return dict(total.most_common())

    def strays(self) -> list[str]:
        """A complaint where something outside the code was executed."""
        count = int(self._counts.elsewhere)
        return [f"{count} blocks were executed outside the code"] if count else []


def _pages(size: int) -> int:
    return size + -size % PAGE


def _unicorn() -> Any:
    try:
        import unicorn
        import unicorn.arm_const
    except ImportError:
        raise MissingExtraError("unicorn", "mcu") from None
    return unicorn


@functools.cache
def _hook() -> ctypes.CDLL:
    """The block hook, compiled once per process."""
    return shared_library([DEVICE / "hook.c"], Path(tempfile.mkdtemp(prefix="lrcompile-")), remove=True)


def _engine_library(unicorn: Any) -> ctypes.CDLL:
    from unicorn.unicorn_py3 import unicorn as implementation

    return implementation.uclib
