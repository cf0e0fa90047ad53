"""``lrcompile deploy``: from a model to files for a device."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile.budget import quantity
from lrcompile.cli.preparing import prepared
from lrcompile.cli.shell import Answer
from lrcompile.errors import MissingExtraError, UsageError, nearest
from lrcompile.progress import Progress

if TYPE_CHECKING:
    from lrcompile.backends.c.deploy import Board, Check
    from lrcompile.backends.c.toolchain import Firmware
    from lrcompile.dataflow.schedule import Schedule

BACKENDS = ("c",)
EXTRAS = {"tvm": "tvm", "ziglang": "mcu", "elftools": "mcu", "unicorn": "mcu"}
PACKAGES = {"tvm": "apache-tvm", "elftools": "pyelftools"}


def deploy(given: dict[str, Any], tell: Progress) -> Answer:
    """Builds the firmware beside the output, checks it, and publishes the folder in one step."""
    if given["to"] not in BACKENDS:
        raise UsageError(f"no backend '{given['to']}'", where="--to", hint=nearest(given["to"], BACKENDS))
    model, output = Path(given["model"]), Path(given["output"])
    check_extras(run=given["run"] is not None)
    from lrcompile.backends.c import deploy as backend

    board = _board(given)
    _check_output(output, given["force"])
    with tempfile.TemporaryDirectory(prefix="lrcompile-") as scratch:
        source, drift = prepared(model, Path(scratch), given, tell)
        tell("reading the model")
        formulas = backend.formulas(source, shapes(given["shape"] or []))
        samples = None if given["run"] is None else _samples(given["run"], formulas)
        tell("searching a schedule")
        schedule = backend.plan(formulas, board)
        tell("compiling")
        firmware = backend.compile_to(Path(scratch), schedule, board)
        check = None
        if samples is not None:
            tell("running in the emulator", total=samples.samples)
            check = backend.check(firmware, source, _counted(samples, tell))
        fields = _fields(firmware, board, check)
        fields["quantisation_drift"] = drift
        fields["precision"] = "int8" if backend.quantised(source) else "float32"
        fields["files"] = _publish(firmware, board, check, fields, model, output, given["force"])
    return Answer(fields, lambda: _show(fields, schedule, output))


# -- options -----------------------------------------------------------------------------------------


def check_extras(*, run: bool) -> None:
    """Names what is missing before minutes are spent.

    Raises:
        MissingExtraError: a package that the backend needs is not installed.
    """
    for module, extra in EXTRAS.items():
        if (run or module != "unicorn") and importlib.util.find_spec(module) is None:
            raise MissingExtraError(PACKAGES.get(module, module), extra)


def _board(given: dict[str, Any]) -> Board:
    from lrcompile.backends.c.deploy import Board
    from lrcompile.backends.c.target import target_named

    sizes = {}
    for name in ("ram", "flash", "external", "stack"):
        amount = quantity(given[name], f"--{name}")
        sizes[name] = None if amount is None else int(amount)
    return Board(target_named(given["target"]), **sizes)


def _check_output(output: Path, force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UsageError("the output is a file", where=str(output), hint="give the name of a folder")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise UsageError("the folder is not empty", where=str(output), hint="choose another --output, or --force")


def shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``x=1,3,32,32`` as a shape.

    Raises:
        UsageError: not of that form.
    """
    shapes = {}
    for text in texts:
        name, _, dims = text.rpartition("=")
        sizes = dims.replace("x", ",").split(",")
        if not name or not all(size.strip().isdigit() and int(size) > 0 for size in sizes):
            raise UsageError(f"'{text}' is not a shape", where="--shape", hint="write --shape x=1,3,32,32")
        shapes[name] = tuple(int(size) for size in sizes)
    return shapes


def _samples(source: str, formulas: Any) -> Any:
    import numpy as np

    from lrcompile.data import Batches, InputSpec

    specs = [InputSpec(name, np.dtype(dtype), shape) for name, (shape, dtype) in formulas.inputs.items()]
    return Batches(source, batch=1).check(specs)


def _counted(samples: Any, tell: Progress) -> Iterator[Any]:
    for batch in samples:
        yield batch
        tell.advance()


# -- result ------------------------------------------------------------------------------------------


def _fields(firmware: Firmware, board: Board, check: Check | None) -> dict[str, Any]:
    from lrcompile.backends.c.deploy import versions

    fields: dict[str, Any] = {
        "target": board.target.name,
        "ram": firmware.board.ram(),
        "flash": firmware.board.flash(),
        "limit": {"ram": board.ram, "flash": board.flash},
    }
    if check is not None:
        fields |= {
            "instructions": check.instructions,
            "max_error": check.max_error,
            "relative_l2": check.distance,
            "samples": check.samples,
            "violations": len(check.violations),
            "stack_used": check.stack,
            **versions(),
        }
    return fields


def _publish(
    firmware: Firmware,
    board: Board,
    check: Check | None,
    fields: dict[str, Any],
    model: Path,
    output: Path,
    force: bool,
) -> list[str]:
    """Puts sources, weights, image and reports into the folder; all of them or none."""
    from lrcompile.backends.c.artifacts import costs, sources
    from lrcompile.files import AtomicSet, made_folder
    from lrcompile.report.firmware import page

    made: dict[str, str | bytes] = {**firmware.program.files, **sources(firmware.program, board.target)}
    names = [*made, "firmware.elf", "report.json", "report.html"]
    report = fields | {"model": model.name, "files": names, "bound": firmware.program.bound, **costs(firmware, check)}
    made["report.html"] = page(report)
    with made_folder(output), AtomicSet(output / "report.json", inputs=[model], force=force) as files:
        for name, content in made.items():
            files.stage(name).write_bytes(content.encode() if isinstance(content, str) else content)
        shutil.copyfile(firmware.board.path, files.stage("firmware.elf"))
        files.path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return names


def _show(fields: dict[str, Any], schedule: Schedule, output: Path) -> None:
    ram, flash = fields["ram"], fields["flash"]
    print(f"RAM    {ram['total']:>10,} B: arena {ram['arena']:,}, stack {ram['stack']:,}, in/out {ram['io']:,}")
    print(f"flash  {flash['total']:>10,} B: weights {flash['weights']:,}, code {flash['code']:,}")
    print(f"arena bound of this order of kernels: {schedule.bound:,} B")
    if "instructions" in fields:
        run = f"{fields['instructions']:,} instructions, largest error {fields['max_error']:.2g}"
        print(f"{fields['samples']} samples in the emulator: {run}, no access outside its memory")
    if fields["quantisation_drift"] is not None:
        print(f"int8 changes the outputs by {fields['quantisation_drift']:.2g} (relative L2, calibration samples)")
    print(f"wrote {output}: {', '.join(fields['files'])}")
