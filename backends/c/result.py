"""What a deployment is and what its proof showed, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lrcompile.dataflow.program import Program
from lrcompile.dataflow.schedule import Schedule


@dataclass(frozen=True)
class Proof:
    """What running the firmware in the emulator showed.

    Args:
        instructions: of one sample, the most.
        max_error: largest absolute difference to ONNX Runtime's outputs.
        scale: largest absolute value of those outputs.
        samples: how many were run.
        stack: most bytes of stack in use.
        functions: instructions by function, of the last sample.
        violations: accesses outside of the memory that the firmware has.
    """

    instructions: int
    max_error: float
    scale: float
    samples: int
    stack: int
    functions: Mapping[str, int]
    violations: tuple[str, ...]


@dataclass(frozen=True)
class Deployment:
    """A program that fits, with what is known about it.

    Args:
        ram, flash: bytes by kind, from the ELF file; None where no toolchain is installed.
        precision: ``float32`` or ``int8``.
    """

    schedule: Schedule
    program: Program
    ram: Mapping[str, int] | None
    flash: Mapping[str, int] | None
    proof: Proof | None
    precision: str
    files: tuple[str, ...]
