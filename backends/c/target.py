"""Microcontrollers that C is built for, and where firmware stands in their memory."""

from __future__ import annotations

from dataclasses import dataclass

from lrcompile.errors import UnsupportedError, UsageError, nearest

PAGE = 4096
STACK = 2048
"""Bytes of stack that firmware gets unless told otherwise."""
LEAST_STACK = 256
"""Below this no kernel can run: a call, its saved registers and an exception frame."""
CODE, RAM, EXTERNAL = 0x0800_0000, 0x2000_0000, 0x9000_0000
_GUARDED = {"STATIC": 0x2000_0000, "ARENA": 0x2400_0000, "INPUTS": 0x2800_0000, "OUTPUTS": 0x2C00_0000}
_GUARDED_STACK, _GUARDED_WEIGHTS = 0x3000_0000, 0x9000_0000


@dataclass(frozen=True)
class Target:
    """A processor core.

    Args:
        name: as on the command line.
        cpu: what clang calls it, with the floating-point unit, in zig's spelling.
        gcc: the flags that mean the same to ``arm-none-eabi-gcc``.
        model: the core that the emulator takes.
        dsp: it has the 16-bit multiply–accumulate instructions (``SMLAD``).
    """

    name: str
    cpu: str
    gcc: tuple[str, ...]
    model: str
    dsp: bool = True
    triple: str = "thumb-freestanding-eabihf"


TARGETS = {
    target.name: target
    for target in (
        Target("cortex-m4", "cortex_m4+vfp4d16sp", ("-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16"), "UC_CPU_ARM_CORTEX_M4"),
        Target(
            "cortex-m7", "cortex_m7+fp_armv8d16sp", ("-mcpu=cortex-m7", "-mfpu=fpv5-sp-d16"), "UC_CPU_ARM_CORTEX_M7"
        ),
        Target(
            "cortex-m33", "cortex_m33+fp_armv8d16sp", ("-mcpu=cortex-m33", "-mfpu=fpv5-sp-d16"), "UC_CPU_ARM_CORTEX_M33"
        ),
    )
}


def target_named(name: str) -> Target:
    """The target of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in TARGETS:
        raise UsageError(f"no target '{name}'", where="--target", hint=nearest(name, TARGETS))
    return TARGETS[name]


@dataclass(frozen=True)
class Memory:
    """How much memory a board has, in bytes.

    Args:
        stack: reserved at the low end of RAM, so that an overflow faults instead of overwriting data.
        external: flash outside the chip that weights are read from in place; 0: they stand in ``flash``.
    """

    ram: int
    flash: int
    stack: int = STACK
    external: int = 0

    def __post_init__(self) -> None:
        if self.stack < LEAST_STACK:
            raise UsageError(f"a stack of {self.stack} bytes is too small", hint=f"give at least {LEAST_STACK}")
        if self.ram < self.stack:
            raise UnsupportedError(
                f"{self.ram} bytes of RAM leave no room for a stack of {self.stack}",
                where="--ram",
                hint=f"give more than {self.stack} bytes of RAM, or a smaller stack",
            )


def board_regions(memory: Memory, *, code: int = CODE) -> str:
    """The linker's view of a board: everything packed into one RAM and one flash, which begins at ``code``."""
    banks = [("FLASH", "rx", code, memory.flash), ("RAM", "rw", RAM, memory.ram)]
    if memory.external:
        banks.append(("XFLASH", "r", EXTERNAL, memory.external))
    lines = [f"    {name} ({how}) : ORIGIN = {at:#x}, LENGTH = {size}" for name, how, at, size in banks]
    weights = "XFLASH" if memory.external else "FLASH"
    alias = {"CODE": "FLASH", "WEIGHTS": weights} | dict.fromkeys([*_GUARDED, "STACK"], "RAM")
    return "\n".join(["MEMORY {", *lines, "}", *(f'REGION_ALIAS("{k}", {v});' for k, v in alias.items())])


def guarded_regions(memory: Memory, sizes: dict[str, int]) -> str:
    """The same sections in regions far apart; each in RAM ends exactly with a page, the stack begins with one.

    Args:
        sizes: bytes of each region of RAM, as linked for the board.
    """
    regions = [("CODE", "rx", CODE, memory.flash), ("WEIGHTS", "r", _GUARDED_WEIGHTS, 0x1000_0000)]
    regions += [(name, "rw", at + -sizes[name] % PAGE, max(sizes[name], 4)) for name, at in _GUARDED.items()]
    regions.append(("STACK", "rw", _GUARDED_STACK, memory.stack))
    lines = [f"    {name} ({how}) : ORIGIN = {at:#x}, LENGTH = {size}" for name, how, at, size in regions]
    return "\n".join(["MEMORY {", *lines, "}"])
