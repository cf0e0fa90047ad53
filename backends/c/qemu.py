"""A second opinion with nothing in common but the sources: ``arm-none-eabi-gcc``, newlib and ``qemu-system-arm``."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lrcompile.backends.c.elf import Image
from lrcompile.backends.c.host import checked
from lrcompile.backends.c.target import Memory, Target, board_regions
from lrcompile.backends.c.toolchain import C_TYPES, DEVICE
from lrcompile.dataflow.program import ENTRY, Port, Program
from lrcompile.errors import ResourceError, UsageError

COMPILER, MACHINE = "arm-none-eabi-gcc", "qemu-system-arm"
PACKAGES = "gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm"
FLAGS = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-O2", "-fno-math-errno", "-ffunction-sections", "-fdata-sections")
BOARD = Memory(ram=4 << 20, flash=4 << 20, stack=16384)
"""The machine ``mps2-an500``: a Cortex-M7 with code at 0."""
TICK = 40
"""Instructions of one SysTick count: the clock runs at 25 MHz, and each instruction takes a nanosecond."""


@dataclass(frozen=True)
class Opinion:
    """What QEMU computed.

    Args:
        instructions: to 40, and modulo 671 million.
        stack: bytes painted over, the model's call only.
    """

    outputs: dict[str, np.ndarray]
    instructions: int
    stack: int
    image: Image


def missing() -> list[str]:
    """Programs that are not installed."""
    return [name for name in (COMPILER, MACHINE) if shutil.which(name) is None]


def versions() -> str:
    """Compiler and emulator, for reports."""
    lines = [_run([name, "--version"], Path.cwd()).splitlines()[0] for name in (COMPILER, MACHINE)]
    return ", ".join(lines)


def build(program: Program, target: Target, folder: Path, memory: Memory = BOARD, flags: Sequence[str] = ()) -> Image:
    """Compiles with GCC and links against newlib for QEMU's board.

    Raises:
        UsageError: the compiler or the emulator is not installed.
        ResourceError: the compiler failed, with what it said.
    """
    if missing():
        raise UsageError(f"not installed: {', '.join(missing())}", hint=f"apt install {PACKAGES}")
    folder.mkdir(parents=True, exist_ok=True)
    program.write(folder)
    (folder / "semihost.c").write_text(_main(program), encoding="utf-8")
    script = (DEVICE / "link.ld").read_text(encoding="utf-8").replace("@STACK@", str(memory.stack))
    (folder / "qemu.ld").write_text(script.replace("@REGIONS@", board_regions(memory, code=0)), encoding="utf-8")
    machine = [*target.gcc, "-mthumb", "-mfloat-abi=hard"]
    own = ["semihost.c", str(DEVICE / "start.c")]
    link = ["-nostartfiles", "--specs=nosys.specs", "-Wl,--gc-sections", "-T", "qemu.ld", "-lm", "-o", "qemu.elf"]
    _run([COMPILER, *machine, *FLAGS, *flags, "-I.", *own, *program.sources, *link], folder)
    return Image(folder / "qemu.elf")


def run(program: Program, image: Image, inputs: Mapping[str, np.ndarray], *, limit: float = 600) -> Opinion:
    """Executes the image once.

    Raises:
        ResourceError: QEMU failed, or did not end within ``limit`` seconds.
    """
    folder = image.path.parent
    for index, port in enumerate(program.inputs):
        (folder / f"in_{index}.bin").write_bytes(checked(port, inputs).tobytes())
    machine = ["-M", "mps2-an500", "-cpu", "cortex-m7", "-nographic", "-monitor", "none", "-serial", "none"]
    options = ["-semihosting-config", "enable=on,target=native", "-icount", "shift=0"]
    _run([MACHINE, *machine, *options, "-kernel", image.path.name], folder, limit)
    outputs = {}
    for index, port in enumerate(program.outputs):
        values = np.fromfile(folder / f"out_{index}.bin", port.dtype)
        outputs[port.name] = values.reshape(port.shape)
    ticks, stack = map(int, np.fromfile(folder / "cost.bin", np.uint32))
    return Opinion(outputs, ticks * TICK, stack, image)


def _main(program: Program) -> str:
    names = [(f"in_{index}", port) for index, port in enumerate(program.inputs)]
    names += [(f"out_{index}", port) for index, port in enumerate(program.outputs)]
    files = [f'    {{"{name}.bin", lrc_{name}, sizeof lrc_{name}}},' for name, _ in names]
    head = [
        '#include <stdint.h>\n#include "model.h"',
        "struct lrc_file {\n    const char *name;\n    void *buffer;\n    uintptr_t bytes;\n};",
        *(f"static {_declared(name, port)};" for name, port in names),
        *("static const struct lrc_file lrc_files[] = {", *files, "};"),
        f"#define LRC_INPUTS {len(program.inputs)}u",
        f"static void lrc_call(void)\n{{\n    {ENTRY}({', '.join(f'lrc_{name}' for name, _ in names)});\n}}\n",
    ]
    return "\n".join(head) + (DEVICE / "semihost.c").read_text(encoding="utf-8")


def _declared(name: str, port: Port) -> str:
    return f"{C_TYPES[port.dtype]} lrc_{name}[{max(int(np.prod(port.shape)), 1)}]"


def _run(command: Sequence[str], folder: Path, limit: float = 600) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        raise ResourceError(f"{command[0]} did not end within {limit:g} s") from None
    if done.returncode:
        raise ResourceError(f"{command[0]} failed", hint=(done.stderr or done.stdout).strip()[-4000:])
    return done.stdout
