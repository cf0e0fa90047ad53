"""Plans as files: ``plan.json`` says what, ``plan.safetensors`` holds factors and statistics. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrcompile.artifact_load import check_indices
from lrcompile.artifact_read import read_json, resolve
from lrcompile.calibrate import Moments
from lrcompile.errors import InvalidInputError, LrcompileError, UnsupportedError, UsageError
from lrcompile.files import AtomicSet, made_folder, system_error
from lrcompile.graphs.base import Replacement
from lrcompile.linop import rebuild, structure, tensors
from lrcompile.plans import Entry, Plan, Recipe
from lrcompile.sites import Window

SCHEMA = "lrcompile.compile-plan/1"
TARGET, WEIGHTS = "plan.json", "plan.safetensors"
_MOMENTS = ("total", "absolute", "absmax", "counts")


def save(plan: Plan, folder: Path, *, statistics: bool, force: bool) -> None:
    """Writes a plan; all or nothing.

    Raises:
        UsageError: a plan of a model file, an existing plan, or a folder that cannot be written.
    """
    if plan.graph != "module":
        raise UsageError(f"a plan of an {plan.graph} model is not saved", hint="lrcompile.optimize writes the model")
    writer = _Writer()
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "entries": [writer.entry(entry) for entry in plan.entries.values()],
        "statistics": writer.moments(plan.moments if statistics else {}, "moments"),
        "gradients": writer.moments(plan.gradients if statistics else {}, "gradients"),
        "calibrated": plan.calibrated,
        "align": plan.align,
        "seed": plan.seed,
        "verified": plan.verified,
        "drift": plan.drift,
        "budget": plan.budget,
    }
    with made_folder(folder), AtomicSet(folder / TARGET, force=force) as files:
        _write(writer.held, files.stage(WEIGHTS))
        files.path.write_text(json.dumps(content, indent=1), encoding="utf-8")


class _Writer:
    """Collects tensors, each object once."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}
        self.names: dict[int, str] = {}

    def tensor(self, value: Tensor) -> str:
        name = self.names.setdefault(id(value), f"factor.{len(self.names)}")
        self.held[name] = value
        return name

    def entry(self, entry: Entry) -> dict[str, Any]:
        by, recipe = entry.replacement, entry.recipe
        return {
            "site": entry.name,
            "parameters": list(entry.parameters),
            "kind": entry.kind,
            "shape": list(entry.shape),
            "dtype": entry.dtype,
            "sha256": entry.sha256,
            "reason": entry.reason,
            "structure": None if by is None else structure(by.operator),
            "tensors": {} if by is None else {path: self.tensor(value) for path, value in tensors(by.operator)},
            "shift": None if by is None or by.shift is None else self.tensor(by.shift),
            "recipe": None if recipe is None else {**vars(recipe), "window": recipe.window and vars(recipe.window)},
        }

    def moments(self, found: Mapping[str, Moments], kind: str) -> list[list[Any]]:
        """One list of keys for each object: sites that read one tensor share their moments."""
        keys: dict[int, list[str]] = {}
        for key, moments in found.items():
            keys.setdefault(id(moments), []).append(key)
        for index, names in enumerate(keys.values()):
            stored, gram = found[names[0]].tensors(), found[names[0]].gram
            del stored["half"]
            rows, columns = torch.tril_indices(*gram.shape).unbind()
            self.held[f"{kind}.{index}.gram"] = gram[rows, columns]
            self.held.update({f"{kind}.{index}.{name}": value for name, value in stored.items()})
        return list(keys.values())


def _write(held: Mapping[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in held.items()}, path)
    except SafetensorError as error:
        raise system_error(error, path) from error


def load(folder: Path) -> Plan:
    """The plan in a folder.

    Raises:
        InvalidInputError: unreadable, malformed, or with factors that do not fit their weight.
        UnsupportedError: written by a later version.
    """
    content = read_json(folder, TARGET)
    schema = content.get("schema") if isinstance(content, dict) else None
    if not isinstance(schema, str) or not schema.startswith("lrcompile.compile-plan/"):
        raise InvalidInputError("not a plan of lrcompile", where=str(folder / TARGET))
    if schema != SCHEMA:
        raise UnsupportedError(f"schema {schema}; this version reads {SCHEMA}", where=str(folder / TARGET))
    try:
        return _read(content, _held(folder))
    except LrcompileError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        reason = f"malformed plan: {type(error).__name__} {str(error)[:200]}"
        raise InvalidInputError(reason, where=str(folder / TARGET)) from error


def _held(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    path = resolve(folder, WEIGHTS)
    try:
        with safe_open(path, framework="pt") as stream:
            held = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidInputError(f"corrupt plan: {str(error)[:200]}", where=str(path)) from error
    for name, value in held.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise InvalidInputError("holds NaN or infinity", where=f"{path}: {name}")
    return held


def _read(content: dict[str, Any], held: dict[str, Tensor]) -> Plan:
    memo: dict[Any, Any] = {}
    entries = [_entry(item, held, memo) for item in content["entries"]]
    drift = content["drift"]
    return Plan(
        {entry.name: entry for entry in entries},
        _keyed(content["statistics"], held, "moments"),
        _keyed(content["gradients"], held, "gradients"),
        calibrated=bool(content["calibrated"]),
        align=int(content["align"]),
        seed=int(content["seed"]),
        verified=content["verified"] is True,
        drift=None if drift is None else float(drift),
        budget={_text(name): value for name, value in content["budget"].items()},
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, not {type(value).__name__}")
    return value


def _entry(item: dict[str, Any], held: dict[str, Tensor], memo: dict[Any, Any]) -> Entry:
    name, kind = _text(item["site"]), _text(item["kind"])
    shape = tuple(int(size) for size in item["shape"])
    recipe = item["recipe"]
    return Entry(
        name,
        tuple(_text(each) for each in item["parameters"]),
        kind,
        shape,
        _text(item["dtype"]),
        _text(item["sha256"]),
        None if item["structure"] is None else _replacement(item, name, kind, shape, held, memo),
        None if recipe is None else _recipe(recipe),
        _text(item["reason"]),
    )


def _recipe(item: dict[str, Any]) -> Recipe:
    inputs = tuple(_text(each) for each in item["inputs"])
    window = item["window"]
    geometry = None if window is None else Window(**{name: tuple(map(int, values)) for name, values in window.items()})
    return Recipe(_text(item["source"]), _text(item["label"]), inputs, item["biased"] is True, geometry)


def _replacement(
    item: dict[str, Any], name: str, kind: str, shape: tuple[int, ...], held: dict[str, Tensor], memo: dict[Any, Any]
) -> Replacement:
    operator = rebuild(item["structure"], {path: held[_text(key)] for path, key in item["tensors"].items()}, "", memo)
    check_indices(operator, name)
    wanted = (shape[1], shape[0]) if kind == "Conv1D" else (shape[0], prod(shape[1:]))
    shift = None if item["shift"] is None else held[_text(item["shift"])]
    if operator.shape != wanted or (shift is not None and tuple(shift.shape) != wanted[:1]):
        raise InvalidInputError(f"factors of {operator.shape} do not fit a weight of {wanted}", where=name)
    return Replacement(operator, shift)


def _keyed(items: list[list[Any]], held: dict[str, Tensor], kind: str) -> dict[str, Moments]:
    """Moments by each of their keys."""
    found = [_moments(held, f"{kind}.{index}.") for index in range(len(items))]
    return {_text(key): each for keys, each in zip(items, found, strict=True) for key in keys}


def _moments(held: dict[str, Tensor], prefix: str) -> Moments:
    values = {name: held[prefix + name] for name in _MOMENTS}
    channels = len(values["total"])
    gram = torch.zeros(channels, channels)
    rows, columns = torch.tril_indices(channels, channels).unbind()
    gram[rows, columns] = held[f"{prefix}gram"]
    gram = gram + gram.tril(-1).T
    if any(tuple(values[name].shape) != (channels,) for name in ("absolute", "absmax")):
        raise InvalidInputError("statistics of different sizes", where=prefix.rstrip("."))
    return Moments.from_tensors({"gram": gram, **values})
