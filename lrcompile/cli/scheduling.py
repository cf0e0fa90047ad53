"""``lrcompile schedule``: how little memory activations need on a target, the plan, and why it is not less."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile.budget import quantity
from lrcompile.cli.shell import Answer
from lrcompile.errors import UnsupportedError, UsageError, nearest
from lrcompile.progress import Progress

if TYPE_CHECKING:
    from lrcompile.backends.c.deploy import Board
    from lrcompile.dataflow.schedule import Schedule
    from lrcompile.dataflow.stage import Formulas

RUNTIMES = ("onnxruntime", "ort")
WIDE = 40


def schedule(given: dict[str, Any], tell: Progress) -> Answer:
    """Plans without writing anything.

    Raises:
        UsageError: an unknown target, or a shape that does not fit.
        UnsupportedError: it does not fit ``--ram``, or an operator has no formula.
    """
    from lrcompile.backends.c.target import TARGETS

    known = (*TARGETS, *RUNTIMES)
    if given["target"] not in known:
        hint = nearest(given["target"], known)
        raise UsageError(f"no target '{given['target']}'", where="--target", hint=hint)
    return _runtime(given, tell) if given["target"] in RUNTIMES else _device(given, tell)


# -- ONNX Runtime --------------------------------------------------------------------------------


def _runtime(given: dict[str, Any], tell: Progress) -> Answer:
    from lrcompile.feeds import feeds, shapes
    from lrcompile.frontend import open_graph

    graph = open_graph(Path(given["model"]))
    tile = getattr(graph, "tile_rows", None)
    if tile is None:
        raise UnsupportedError(f"a model of kind '{graph.kind}' has no nodes", hint="give an .onnx file")
    sizes = shapes([each.replace(",", "x") for each in given["shape"] or ()])
    free = [str(size) for spec in graph.input_specs for size in spec.shape if not isinstance(size, int)]
    if free and not sizes and given["calib"] is None:
        hint = f"give --calib samples.npz, or --shape {free[0]}=1 and so on"
        raise UnsupportedError(
            f"the sizes of {', '.join(dict.fromkeys(free))} are not known", where="--shape", hint=hint
        )
    tell("measuring sizes and choosing tiles")
    sample = feeds(graph, given["calib"], sizes, 1 if given["calib"] else None)
    ram = quantity(given["ram"], "--ram")
    found = tile(sample, limit=ram or 0.0, most=given["tiles"])
    if ram is not None and found.after > ram:
        message = f"needs {found.after:,} bytes of activations at once, {found.after - int(ram):,} more than there are"
        raise UnsupportedError(message, where="--ram", hint=found.reason or "smaller inputs need less")
    fields = {
        "target": given["target"],
        "activations": {"before": found.before, "after": found.after, "ratio": found.after / max(found.before, 1)},
        "limit": {"ram": None if ram is None else int(ram)},
        "inputs": {name: list(array.shape) for name, array in sample.items()},
        "parts": [{"name": name, "plan": plan} for name, plan in found.parts],
        "reason": found.reason,
    }
    return Answer(fields, lambda: _show_runtime(fields))


def _show_runtime(fields: dict[str, Any]) -> None:
    sizes = fields["activations"]
    shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in fields["inputs"].items())
    print(f"activations alive at once, for {shapes}")
    print(f"as it is   {sizes['before']:>14,} B")
    print(f"in tiles   {sizes['after']:>14,} B  (×{sizes['ratio']:.2f})")
    for part in fields["parts"]:
        print(f"  {part['name']}: {part['plan']}")
    print(f"not lower: {fields['reason'] or 'the limit is met'}")
    if fields["parts"]:
        print("`lrcompile optimize -p schedule-memory` writes it")


# -- microcontrollers ----------------------------------------------------------------------------


def _device(given: dict[str, Any], tell: Progress) -> Answer:
    from lrcompile.backends.c import deploy
    from lrcompile.backends.c.target import target_named
    from lrcompile.cli.deploying import shapes
    from lrcompile.dataflow.search import schedule as smallest

    ram = quantity(given["ram"], "--ram")
    board = deploy.Board(target_named(given["target"]), ram=None if ram is None else int(ram))
    tell("reading the model")
    formulas = deploy.formulas(Path(given["model"]), shapes(given["shape"] or []))
    tell("searching a schedule")
    found = smallest(formulas, 0) if ram is None else deploy.plan(formulas, board)
    fields = _fields(found, formulas, board)
    return Answer(fields, lambda: _show_device(fields))


def _fields(found: Schedule, formulas: Formulas, board: Board) -> dict[str, Any]:
    alive = _alive(found)
    return {
        "target": board.target.name,
        "arena": found.arena,
        "bound": found.bound,
        "optimal": found.layout.optimal,
        "scratch": found.scratch,
        "work": found.work,
        "limit": {"ram": board.ram},
        "kernels": [
            {
                "name": nest.root.name,
                "nodes": list(nest.root.part.nodes),
                "alive": sum(sizes.values()),
                "work": nest.work,
            }
            for nest, sizes in zip(found.nests, alive, strict=True)
        ],
        "buffers": [
            {"name": slot.name, "offset": slot.offset, "bytes": slot.nbytes, "first": slot.first, "last": slot.last}
            for slot in found.slots.values()
        ],
        "in_place": {step.stage: step.over for step in found.steps if step.over is not None},
        "reason": _reason(found, formulas, alive, board),
    }


def _alive(found: Schedule) -> list[dict[str, int]]:
    """Buffers with their bytes, for each kernel."""
    return [
        {name: each.size for name, each in found.requests.items() if each.first <= at <= each.last}
        for at in range(len(found.nests))
    ]


def _reason(found: Schedule, formulas: Formulas, alive: Sequence[dict[str, int]], board: Board) -> str:
    """Why the arena is not smaller."""
    if not alive or not found.arena:
        return "nothing is kept in the arena"
    at = max(range(len(alive)), key=lambda at: sum(alive[at].values()))
    nodes = found.nests[at].root.part.nodes
    busy = ", ".join(f"{name} {size:,}" for name, size in sorted(alive[at].items(), key=lambda each: -each[1])[:6])
    parts = [
        f"at {nodes[-1] if nodes else found.nests[at].root.name} {sum(alive[at].values()):,} bytes are alive: {busy}"
    ]
    if found.layout.optimal:
        parts.append("no placement of these buffers is smaller")
    else:
        parts.append(f"the placement leaves {found.arena - found.bound:,} bytes of gaps")
    parts.append(
        "no schedule with less was found"
        if board.ram is None
        else "the limit is met, and this is the least work under it"
    )
    return "; ".join(parts)


def _show_device(fields: dict[str, Any]) -> None:
    print(
        f"arena {fields['arena']:,} B, bound of this order {fields['bound']:,} B, small pieces {fields['scratch']:,} B"
    )
    print(f"estimated work {fields['work']:,.0f} instructions")
    top = max((each["alive"] for each in fields["kernels"]), default=1) or 1
    for at, each in enumerate(fields["kernels"]):
        bar = "█" * round(WIDE * each["alive"] / top)
        nodes = each["nodes"][-1] if each["nodes"] else each["name"]
        over = f"  over {fields['in_place'][each['name']]}" if each["name"] in fields["in_place"] else ""
        print(f"{at:>3} {bar:<{WIDE}} {each['alive']:>9,}  {nodes}{over}")
    print(f"not lower: {fields['reason']}")
