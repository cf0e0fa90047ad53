"""A linked image: what stands where, read from the ELF file itself."""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lrcompile.errors import MissingExtraError

_REGIONS = {"STATIC": (".data", ".bss"), "ARENA": (".arena",), "INPUTS": (".inputs",), "OUTPUTS": (".outputs",)}
_CODE = (".vectors", ".text", ".rodata", ".data")


@dataclass(frozen=True)
class Section:
    """A section that takes memory on the device."""

    name: str
    address: int
    nbytes: int
    data: bytes | None  # None: not loaded, as .bss

    @property
    def end(self) -> int:
        return self.address + self.nbytes


@dataclass(frozen=True)
class Image:
    """The sections and symbols of an ELF file.

    Raises:
        MissingExtraError: the reader of ELF files is not installed.
    """

    path: Path
    sections: dict[str, Section] = field(init=False)
    symbols: dict[str, tuple[int, int]] = field(init=False)  # address, bytes
    segments: tuple[tuple[int, bytes], ...] = field(init=False)  # load address, contents
    _starts: list[tuple[int, str]] = field(init=False)

    def __post_init__(self) -> None:
        try:
            from elftools.elf.elffile import ELFFile
        except ImportError:
            raise MissingExtraError("pyelftools", "mcu") from None
        with self.path.open("rb") as stream:
            elf: Any = ELFFile(stream)
            found = {section.name: _section(section) for section in elf.iter_sections() if section["sh_flags"] & 2}
            symbols = [each for each in elf.get_section_by_name(".symtab").iter_symbols() if each.name]
            loads = [(part["p_paddr"], part.data()) for part in elf.iter_segments("PT_LOAD") if part["p_filesz"]]
        functions = {each["st_value"] & ~1: each.name for each in symbols if each["st_info"]["type"] == "STT_FUNC"}
        named = {each.name: (each["st_value"], each["st_size"]) for each in symbols}
        values = {"sections": found, "symbols": named, "segments": tuple(loads), "_starts": sorted(functions.items())}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def function(self, address: int) -> str:
        """Name of the function that ``address`` is in, or the empty string."""
        index = bisect.bisect_right(self._starts, (address, "\U0010ffff")) - 1
        return self._starts[index][1] if index >= 0 else ""

    def region_sizes(self) -> dict[str, int]:
        """Bytes that each region of RAM holds, but the stack."""
        return {name: sum(self._size(part) for part in parts) for name, parts in _REGIONS.items()}

    def ram(self) -> dict[str, int]:
        """Bytes of RAM: arena, stack (as reserved), io, static, and their total."""
        sizes = self.region_sizes()
        parts = {
            "arena": sizes["ARENA"],
            "stack": self._size(".stack"),
            "io": sizes["INPUTS"] + sizes["OUTPUTS"],
            "static": sizes["STATIC"],
        }
        return parts | {"total": sum(parts.values())}

    def flash(self) -> dict[str, int]:
        """Bytes of flash: weights, code (with its constants), and their total."""
        parts = {"weights": self._size(".weights"), "code": sum(self._size(name) for name in _CODE)}
        return parts | {"total": sum(parts.values())}

    def _size(self, name: str) -> int:
        return self.sections[name].nbytes if name in self.sections else 0


def _section(section: Any) -> Section:
    data = None if section["sh_type"] == "SHT_NOBITS" else section.data()
    return Section(section.name, section["sh_addr"], section["sh_size"], data)
