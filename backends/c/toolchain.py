"""From C sources to an ELF file, with the compiler that ``pip install "lrcompile[mcu]"`` brings."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

from lrcompile.backends.c.elf import Image
from lrcompile.backends.c.target import LEAST_STACK, Memory, Target, board_regions, guarded_regions
from lrcompile.dataflow.program import ENTRY, Port, Program
from lrcompile.errors import MissingExtraError, ResourceError, UnsupportedError

DEVICE = Path(__file__).parent / "device"
FLAGS = (
    *("-std=c99", "-Wall", "-Wextra", "-Werror", "-O3", "-fno-math-errno", "-fomit-frame-pointer"),
    *("-ffunction-sections", "-fdata-sections", "-mno-global-merge", "-fno-unwind-tables", "-fhosted"),
)
"""What every source is compiled with. ``-mno-global-merge`` keeps the arena a section of its own, ``-fhosted`` lets
``sqrtf`` and its like become instructions."""
C_TYPES = {
    **{"float32": "float", "float64": "double", "bool": "uint8_t"},
    **{f"{sign}int{bits}": f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class Firmware:
    """A linked program: for the board, and once more with its memory apart for the emulator's proof."""

    program: Program
    target: Target
    memory: Memory
    board: Image
    guarded: Image


def include_binary(symbol: str, binary: str) -> str:
    """Assembly that puts the file ``binary``, found on the include path, under a C symbol in read-only data.

    In C it is ``extern const unsigned char symbol[];``, aligned to 16 bytes.
    """
    return (
        f'    .section .rodata.{symbol}, "a"\n    .balign 16\n    .global {symbol}\n    .type {symbol}, %object\n'
        f'{symbol}:\n    .incbin "{binary}"\n    .size {symbol}, . - {symbol}\n'
        f'    .section .note.GNU-stack, "", %progbits\n'
    )


def bench(program: Program) -> str:
    """C of a ``main`` that calls the model once on buffers which the emulator fills and reads."""
    inputs = [(f"lrc_in_{index}", port) for index, port in enumerate(program.inputs)]
    outputs = [(f"lrc_out_{index}", port) for index, port in enumerate(program.outputs)]
    types = [f"const {_c_type(port)} *" for _, port in inputs] + [f"{_c_type(port)} *" for _, port in outputs]
    buffers = [_buffer(name, port) for name, port in [*inputs, *outputs]]
    names = ", ".join(name for name, _ in [*inputs, *outputs])
    call = f"int main(void)\n{{\n    {ENTRY}({names});\n    return 0;\n}}\n"
    head = ["#include <stdint.h>", f"void {ENTRY}({', '.join(types)});", "int main(void);"]
    return "\n".join([*head, *buffers, call])


def _c_type(port: Port) -> str:
    return C_TYPES[port.dtype]


def _buffer(name: str, port: Port) -> str:
    kind = _c_type(port)
    return f"extern {kind} {name}[];\n{kind} {name}[{max(prod(port.shape), 1)}];"


def build(program: Program, target: Target, memory: Memory, folder: Path, *, flags: Sequence[str] = ()) -> Firmware:
    """Writes, compiles and links a program: ``firmware.elf`` (and ``guarded.elf``, for the emulator) in ``folder``.

    Args:
        flags: further flags for the model's own sources.

    Raises:
        MissingExtraError: the compiler is not installed.
        UnsupportedError: it does not fit RAM or flash; the message says by how many bytes.
        ResourceError: the compiler failed, with what it said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    program.write(folder)
    main = folder / "bench.c"
    main.write_text(bench(program), encoding="utf-8")
    own = (DEVICE / "start.c", DEVICE / "mathf.c", main)
    objects = [_compile(folder / name, target, folder, flags) for name in program.sources]
    objects += [_compile(path, target, folder, ()) for path in own]
    board = _link(objects, target, board_regions(memory), memory, folder, "firmware")
    regions = guarded_regions(memory, board.region_sizes())
    return Firmware(program, target, memory, board, _link(objects, target, regions, memory, folder, "guarded"))


def _compile(source: Path, target: Target, folder: Path, flags: Sequence[str]) -> Path:
    out = folder / f"{source.stem}.o"
    machine = ["-target", target.triple, f"-mcpu={target.cpu}"]
    paths = ["-isystem", str(DEVICE / "include"), f"-I{folder}"]
    options = () if source.suffix == ".S" else (*FLAGS, *flags)
    zig(["cc", *machine, *options, *paths, "-c", str(source), "-o", str(out)], folder)
    return out


def _link(objects: Sequence[Path], target: Target, regions: str, memory: Memory, folder: Path, name: str) -> Image:
    script, out = folder / f"{name}.ld", folder / f"{name}.elf"
    template = (DEVICE / "link.ld").read_text(encoding="utf-8")
    script.write_text(template.replace("@REGIONS@", regions).replace("@STACK@", str(memory.stack)), encoding="utf-8")
    machine = ["-target", target.triple, "-mcpu", target.cpu, "-O", "ReleaseFast", "-fcompiler-rt", "-fsingle-threaded"]
    layout = ["--script", str(script), "--gc-sections", "-fentry=Reset_Handler", f"-femit-bin={out}"]
    try:
        zig(["build-exe", *map(str, objects), *machine, *layout, "--name", name], folder)
    except ResourceError as error:
        raise _does_not_fit(error, memory) from error
    return Image(out)


def _does_not_fit(error: ResourceError, memory: Memory) -> UnsupportedError | ResourceError:
    """What the linker says about a region that overflows, in terms of the board."""
    over: dict[str, int] = {}
    for region, by in re.findall(r"will not fit in region '(\w+)': overflowed by (\d+) bytes", error.hint):
        over[region] = max(over.get(region, 0), int(by))
    if not over:
        return error
    sizes = {"RAM": memory.ram, "FLASH": memory.flash, "XFLASH": memory.external}
    words = [f"{name} of {sizes.get(name, 0)} bytes is {by} bytes too small" for name, by in over.items()]
    hint = f"of the RAM, {memory.stack} bytes are stack (least {LEAST_STACK})" if "RAM" in over else ""
    return UnsupportedError(f"the firmware does not fit: {', '.join(words)}", hint=hint)


@cache
def compiler_version() -> str:
    """The version of the installed compiler, for reports.

    Raises:
        MissingExtraError: it is not installed.
    """
    return f"zig {zig(['version'], Path.cwd()).strip()}"


def zig(arguments: Sequence[str], folder: Path) -> str:
    """Runs the compiler; its local cache goes to ``folder``.

    Raises:
        MissingExtraError: it is not installed.
        ResourceError: it failed; the hint holds what it said.
    """
    if importlib.util.find_spec("ziglang") is None:
        raise MissingExtraError("ziglang", "mcu")
    command = [sys.executable, "-m", "ziglang", *arguments]
    environment = os.environ | {"ZIG_LOCAL_CACHE_DIR": str(folder / ".zig-cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise ResourceError(f"the C compiler failed ({arguments[0]})", hint=done.stderr.strip()[-4000:])
    return done.stdout
