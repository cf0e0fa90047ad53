"""``lrcompile deploy``: a model as firmware for a microcontroller."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lrcompile.cli.shell import Answer
from lrcompile.errors import InvalidInputError, MissingExtraError, UsageError, nearest
from lrcompile.progress import Progress

KINDS = ("c",)
_UNITS = {"": 1, "B": 1, "KB": 1024, "KIB": 1024, "K": 1024, "MB": 1024**2, "MIB": 1024**2, "M": 1024**2}


def deploy(given: dict[str, Any], tell: Progress) -> Answer:
    """Runs the verb.

    Raises:
        UsageError: unknown target or kind, an output that exists, an extra that is missing.
    """
    if given["to"] not in KINDS:
        raise UsageError(f"cannot deploy to '{given['to']}'", where="--to", hint=nearest(given["to"], KINDS))
    _check_packages()
    from lrcompile.backends.c.target import STACK, Memory, target_named

    target = target_named(given["target"])
    memory = Memory(
        ram=size(given["ram"], "--ram"),
        flash=size(given["flash"], "--flash"),
        stack=STACK if given["stack"] is None else size(given["stack"], "--stack"),
        external=0 if given["external_flash"] is None else size(given["external_flash"], "--external-flash"),
    )
    path = Path(given["model"])
    out = Path(given["output"] or f"{path.stem}-firmware")
    _check_output(out, path, given["force"])
    return _deploy(given, path, out, target, memory, tell)


def _deploy(given: dict[str, Any], path: Path, out: Path, target: Any, memory: Any, tell: Progress) -> Answer:
    from lrcompile.backends.c import deploy as work
    from lrcompile.graphs.onnx.graph import OnnxGraph
    from lrcompile.graphs.onnx.load import read

    model = read(path)
    specs = OnnxGraph(model).input_specs
    if given["keep"] is not None:
        model = _compressed(path, given, tell)
    if given["int8"]:
        from lrcompile.graphs.onnx.quantise import quantise

        if given["calib"] is None:
            raise UsageError("int8 needs calibration samples", where="--int8", hint="give --calib samples.npz")
        tell("calibrating")
        model = quantise(model, _samples(given["calib"], specs))
    samples = None if given["run"] is None else _samples(given["run"], specs)
    made = work.deploy(
        model,
        target,
        memory,
        out,
        shapes=dict(map(shape, given["shape"] or ())),
        samples=samples,
        limit=given["max_error"],
        tell=tell,
    )
    fields = _fields(made, target, memory, out)
    return Answer(fields, lambda: _show(fields, made, out))


def _compressed(path: Path, given: dict[str, Any], tell: Progress) -> Any:
    """The model with low-rank weights, under the gate that ``optimize`` has."""
    from lrcompile.api import optimize
    from lrcompile.budget import Budget
    from lrcompile.options import Options

    if given["calib"] is None:
        raise UsageError("compression needs calibration samples", where="--keep", hint="give --calib samples.npz")
    options = Options(max_drift=given["max_drift"], latency=False)
    return optimize(path, Budget(keep=given["keep"]), calibration=given["calib"], options=options, tell=tell).model


def _samples(source: str, specs: Any) -> Iterable[Any]:
    """One sample after the other, checked against the model's inputs."""
    from lrcompile.data import Batches

    return _each(Batches(source, batch=1).check(specs))


def _each(batches: Iterable[Any]) -> Iterator[Any]:
    yield from batches


def _fields(made: Any, target: Any, memory: Any, out: Path) -> dict[str, Any]:
    from lrcompile.backends.c.artifacts import flash, ram

    found: dict[str, Any] = {
        "target": target.name,
        "precision": made.precision,
        "ram": ram(made, memory),
        "flash": flash(made),
        "limit": {"ram": memory.ram, "flash": memory.flash},
        "bound": made.program.bound,
        "notes": list(made.program.notes),
        "files": [str(out / name) for name in made.files],
    }
    if made.proof is not None:
        from importlib import metadata

        found |= {
            "instructions": made.proof.instructions,
            "max_error": made.proof.max_error,
            "samples": made.proof.samples,
            "stack_used": made.proof.stack,
            "violations": list(made.proof.violations),
            "emulator": f"unicorn {metadata.version('unicorn')}",
        }
    if made.ram is not None:
        from lrcompile.backends.c.toolchain import FLAGS, compiler_version

        found["toolchain"] = f"{compiler_version()} {' '.join(FLAGS)}"
    return found


def _show(found: dict[str, Any], made: Any, out: Path) -> None:
    from lrcompile.report import human_bytes

    ram, flash = found["ram"], found["flash"]
    parts = ", ".join(f"{human_bytes(ram[name])} {name}" for name in ("arena", "stack", "io", "static"))
    print(f"RAM    {human_bytes(ram['total'])} of {human_bytes(found['limit']['ram'])}: {parts}")
    if flash["total"] is not None:
        print(f"flash  {human_bytes(flash['total'])} of {human_bytes(found['limit']['flash'])}")
    print(f"arena  {ram['arena']} bytes; this order of kernels needs at least {found['bound']}")
    for note in made.program.notes:
        print(f"       {note}")
    if made.proof is not None:
        run = f"{found['instructions'] / 1e6:.2f} M instructions, {found['stack_used']} bytes of stack"
        print(f"run    {found['samples']} samples: {run}, largest error {found['max_error']:.3g}, memory respected")
    print(f"wrote  {out}")


def size(text: str, where: str) -> int:
    """Bytes: ``64KB``, ``1MB`` or a plain number; powers of 1024.

    Raises:
        UsageError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match.group(2).upper() if match else "?"
    if match is None or unit not in _UNITS:
        raise UsageError(f"'{text}' is no size", where=where, hint="64KB, 1MB or a number of bytes")
    return int(float(match.group(1)) * _UNITS[unit])


def shape(text: str) -> tuple[str, tuple[int, ...]]:
    """``input=1,3,32,32`` as a name and its shape.

    Raises:
        UsageError: of another form.
    """
    name, mark, dims = text.rpartition("=")
    numbers = [each for each in re.split(r"[,x]", dims) if each]
    if not mark or not name or not all(each.isdigit() and int(each) > 0 for each in numbers):
        raise UsageError(f"'{text}' is no shape", where="--shape", hint="--shape input=1,3,32,32")
    return name, tuple(map(int, numbers))


def _check_packages() -> None:
    from importlib.util import find_spec

    for package, extra in (("tvm", "tvm"),):
        if find_spec(package) is None:
            raise MissingExtraError(package, extra)


def _check_output(out: Path, model: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError("the output is a file", where=str(out), hint="give a folder")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise UsageError("exists already", where=str(out), hint="choose another --output, or --force")
    if not out.parent.is_dir():
        raise UsageError("there is no such folder", where=str(out.parent), hint="create it first")
    if model.is_dir():
        raise InvalidInputError("is a folder", where=str(model), hint="give an .onnx file")
