"""``lrcompile search``: which ranks, precision and tiles fit a device and cost the least quality, each proven by a run.

As MCUFormer (arXiv 2310.16898) it looks for what a memory limit allows and narrows the space as it goes; without
training, the ranks of the layers follow from what an error of each does to the outputs, so one number, the share that
is kept, stands for all of them.
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lrcompile import pareto
from lrcompile.budget import quantity
from lrcompile.cli.shell import Answer
from lrcompile.errors import InfeasibleError, UsageError
from lrcompile.progress import Progress

if TYPE_CHECKING:
    from lrcompile.cli.candidates import Candidate, Setting, Workshop

KEEPS = (1.0, 0.7, 0.5, 0.35)
CLOSE = 0.06
"""Two shares that are nearer than this have nothing worth trying between them."""
LESS = 0.75
"""Smaller tiles: the schedule gets this share of the RAM that the best candidate takes."""
STEM = "search"


def search(given: dict[str, Any], tell: Progress) -> Answer:
    """Tries candidates one after the other, then publishes the best one and the report.

    Raises:
        UsageError: missing data, or an output that exists.
        InfeasibleError: nothing fits; the message has the nearest.
    """
    from lrcompile.cli.deploying import check_extras

    check_extras(run=True)
    output = Path(given["output"] or f"{Path(given['model']).stem}.search")
    if output.exists() and not given["force"] and (not output.is_dir() or any(output.iterdir())):
        raise UsageError("the output is there already", where=str(output), hint="choose another --output, or --force")
    with tempfile.TemporaryDirectory(prefix="lrcompile-") as scratch:
        shop, ram = _workshop(given, Path(scratch), tell)
        found = list(_searched(shop, ram, given["candidates"]))
        fitting = [each for each in found if each.fits]
        if not fitting:
            raise InfeasibleError(_nearest(found), where=given["model"], hint="raise --ram, --flash or --max-drift")
        chosen = pareto.front(fitting, lambda each: each.costs)
        shop.scored(chosen)
        best = min(chosen, key=lambda each: (each.costs[0], each.instructions))
        fields = _fields(given, shop, ram, found, chosen, best)
        _publish(output, fields, chosen, best, shop, given["force"])
    return Answer(fields, lambda: _show(fields, output))


# -- what is searched ----------------------------------------------------------------------------


def _workshop(given: dict[str, Any], scratch: Path, tell: Progress) -> tuple[Workshop, int]:
    from lrcompile import zoo
    from lrcompile.backends.c.target import target_named
    from lrcompile.cli.candidates import Workshop, static_shapes
    from lrcompile.cli.deploying import shapes
    from lrcompile.data import Batches
    from lrcompile.graphs.onnx.graph import OnnxGraph
    from lrcompile.options import PRESETS
    from lrcompile.verify import load_metric

    named = given["model"] in zoo.names()
    entry = zoo.load(given["model"]) if named else None
    model = zoo.exported(given["model"]) if named else Path(given["model"])
    graph = OnnxGraph.load(model)
    calibration, evaluation = given["calib"], given["eval"]
    if entry is not None:
        calibration, evaluation = calibration or entry.calibration(), evaluation or entry.evaluation()
    if calibration is None:
        raise UsageError("candidates need calibration samples", where="--calib", hint="give --calib samples.npz")
    data = Batches(calibration).check(graph.input_specs)
    held = Batches(evaluation).check(graph.input_specs) if evaluation is not None else None
    if held is None:
        data, held = data.split()
    flash = quantity(given["flash"], "--flash")
    limit = PRESETS["mcu"] if given["max_drift"] is None else given["max_drift"]
    shop = Workshop(
        model,
        data,
        held,
        scratch,
        target_named(given["target"]),
        None if flash is None else int(flash),
        limit,
        static_shapes(graph, held, shapes(given["shape"] or [])),
        samples=min(given["samples"], held.samples),
        metric=load_metric(given["metric"]) if given["metric"] else None,
        task=entry.metric if entry is not None else None,
        tell=tell,
    )
    return shop, int(quantity(given["ram"], "--ram") or 0)


def _searched(shop: Workshop, ram: int, most: int) -> Iterator[Candidate]:
    """Candidates, the least harmful first, then between those that lie far apart; ``most`` are executed."""
    from lrcompile.cli.candidates import FLOAT, INT8, Setting

    tried: dict[Setting, Candidate] = {}
    coarse = [Setting(keep, precision, ram) for keep in KEEPS for precision in (FLOAT, INT8)]
    for setting in sorted(coarse, key=lambda each: _loss(shop, each)):
        if _executed(tried) < most:
            tried[setting] = shop.tried(setting)
            yield tried[setting]
    while _executed(tried) < most:
        setting = _next(tried, ram)
        if setting is None:
            return
        tried[setting] = shop.tried(setting)
        yield tried[setting]


def _executed(tried: dict[Setting, Candidate]) -> int:
    return sum(each.samples > 0 for each in tried.values())


def _loss(shop: Workshop, setting: Setting) -> float:
    found = shop.made(setting)
    return float("inf") if isinstance(found, str) else found[1].value


def _next(tried: dict[Setting, Candidate], ram: int) -> Setting | None:
    """At the edge of what fits first, then smaller tiles of the best, then the widest gap; None where all is known."""
    edges, gaps = [], []
    for precision in dict.fromkeys(setting.precision for setting in tried):
        line = sorted(
            (each for each in tried.values() if each.setting.precision == precision and each.setting.ram == ram),
            key=lambda each: -each.setting.keep,
        )
        for more, less in itertools.pairwise(line):
            wide = more.setting.keep - less.setting.keep
            if wide > CLOSE and less.fits:
                (gaps if more.fits else edges).append((wide, _between(more.setting, less.setting)))
    if edges:
        return max(edges, key=lambda each: each[0])[1]
    fitting = [each for each in tried.values() if each.fits]
    for each in sorted(fitting, key=lambda each: each.costs)[:2]:
        smaller = _smaller(each)
        if smaller not in tried and not any(_tighter(other, each) for other in tried):
            return smaller
    return max(gaps, key=lambda each: each[0])[1] if gaps else None


def _between(one: Setting, two: Setting) -> Setting:
    from lrcompile.cli.candidates import Setting

    return Setting(round((one.keep + two.keep) / 2, 3), one.precision, one.ram)


def _smaller(each: Candidate) -> Setting:
    from lrcompile.cli.candidates import Setting

    return Setting(each.setting.keep, each.setting.precision, int(each.ram["total"] * LESS))


def _tighter(setting: Setting, each: Candidate) -> bool:
    """Whether a schedule with less RAM of the same file was tried."""
    return setting.file == each.setting.file and setting.ram < each.setting.ram


def _nearest(found: Sequence[Candidate]) -> str:
    told = [f"{each.setting.name}: {each.reason}" for each in found[:6]]
    return f"none of {len(found)} candidates fits; {'; '.join(told)}"


# -- the result ----------------------------------------------------------------------------------


def _fields(
    given: dict[str, Any],
    shop: Workshop,
    ram: int,
    found: Sequence[Candidate],
    chosen: Sequence[Candidate],
    best: Candidate,
) -> dict[str, Any]:
    return {
        "model": given["model"],
        "target": shop.target.name,
        "limit": {"ram": ram, "flash": shop.flash, "drift": shop.limit},
        "shapes": {name: list(shape) for name, shape in shop.shapes.items()},
        "evaluation": {"samples": shop.evaluation.samples, "sha256": shop.evaluation.sha256},
        "best": best.setting.name,
        "candidates": [_described(each, chosen) for each in found],
        "files": ["best.onnx", f"{STEM}.html", f"{STEM}.json"],
    }


def _described(each: Candidate, chosen: Sequence[Candidate]) -> dict[str, Any]:
    drift = each.drift
    return {
        "name": each.setting.name,
        "keep": each.setting.keep,
        "precision": each.setting.precision,
        "schedule_ram": each.setting.ram,
        "ram": dict(each.ram) or None,
        "flash": dict(each.flash) or None,
        "instructions": each.instructions or None,
        "drift": None
        if drift is None
        else {"relative_l2": drift.relative_l2, "top1": drift.top1, "metric": drift.metric},
        "max_error": each.max_error if each.samples else None,
        "samples": each.samples,
        "task": dict(each.task) or None,
        "front": each in chosen,
        "reason": each.reason,
    }


def _publish(
    output: Path, fields: dict[str, Any], chosen: Sequence[Candidate], best: Candidate, shop: Workshop, force: bool
) -> None:
    """The best file, the picture and the report; all of them or none."""
    from lrcompile.files import AtomicSet, made_folder
    from lrcompile.report.front import page

    path = shop.made(best.setting)[0]
    with made_folder(output), AtomicSet(output / f"{STEM}.json", force=force) as files:
        shutil.copyfile(path, files.stage("best.onnx"))
        files.stage(f"{STEM}.html").write_text(page(fields), encoding="utf-8")
        files.path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")


def _show(fields: dict[str, Any], output: Path) -> None:
    print(f"{'candidate':<30} {'drift':>8} {'RAM':>9} {'flash':>9} {'instructions':>13}")
    for each in fields["candidates"]:
        name = f"{'*' if each['front'] else ' '} keep {each['keep']:g} {each['precision']}"
        drift = "—" if each["drift"] is None else f"{each['drift']['relative_l2']:.3g}"
        if each["reason"]:
            print(f"{name:<30} {drift:>8}  {each['reason']}")
            continue
        task = "".join(f"  {key} {value:.4f}" for key, value in (each["task"] or {}).items())
        sizes = f"{each['ram']['total']:>9,} {each['flash']['total']:>9,} {each['instructions']:>13,}"
        print(f"{name:<30} {drift:>8} {sizes}{task}")
    limit = fields["limit"]
    words = [f"--ram {limit['ram']}"] + ([] if limit["flash"] is None else [f"--flash {limit['flash']}"])
    words += [f"--shape {name}={','.join(map(str, shape))}" for name, shape in fields["shapes"].items()]
    print(f"best: {fields['best']}; wrote {output}: {', '.join(fields['files'])}")
    deploy = f"lrcompile deploy {output / 'best.onnx'} --to c --target {fields['target']}"
    print(f"firmware: {deploy} {' '.join(words)} -o firmware")
