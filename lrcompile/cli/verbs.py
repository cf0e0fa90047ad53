"""The verbs, without the parsing of their options."""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lrcompile.budget import Budget
from lrcompile.cli.shell import Answer
from lrcompile.errors import UsageError
from lrcompile.progress import Progress


def optimize(given: dict[str, Any], tell: Progress) -> Answer:
    """``lrcompile optimize``."""
    from lrcompile.report import print_report, to_json

    model = Path(given["model"])
    output = Path(given["output"]) if given["output"] else _default_output(model)
    dry = given["dry_run"]
    if not dry:
        _check_output(model, output, given["force"])
    pipeline = _pipeline(given)
    with tempfile.TemporaryDirectory() if dry else nullcontext() as scratch:
        target = Path(scratch) / output.name if scratch else output
        result = pipeline.run(model, given["calib"], given["eval"], out=target, tell=tell)
    report = result.report
    if dry:
        report.output = report.report = None
        report.notes.append("dry run: nothing was written")
    if report.status == "unchanged" and not pipeline.budget.limited:
        report.notes.append(_potential(result.graph))

    def show() -> None:
        print_report(report)
        if report.status != "ok":
            print("nothing to rewrite; nothing was written")
        elif not dry:
            print(f"wrote {output}")

    return Answer(_located(_rest(to_json(report)), model, output), show, report.status)


def plan(given: dict[str, Any], tell: Progress) -> Answer:
    """``lrcompile plan``."""
    from lrcompile.report import print_report, to_json

    model = Path(given["model"])
    _, report = _pipeline(given).plan(model, given["calib"], tell=tell)
    return Answer(_located(_rest(to_json(report)), model, None), lambda: print_report(report))


def inspect(model: str) -> Answer:
    """``lrcompile inspect``."""
    from lrcompile.cli.inspecting import facts, show

    found = facts(Path(model))
    return Answer(found, lambda: show(found))


def verify(a: str, b: str, eval: str | None, max_drift: float | None, metric: str | None) -> Answer:
    """``lrcompile verify``: exit 5 where the drift is above the limit."""
    from lrcompile.cli.comparing import compare

    return compare(Path(a), Path(b), eval, max_drift, metric)


def passes(name: str | None) -> Answer:
    """``lrcompile passes``."""
    import inspect as introspection

    from lrcompile.registry import load, names

    chosen = [name] if name else sorted(names("passes"))
    found = []
    for each in chosen:
        cls = load("passes", each)
        options = {key: {"type": kind, "default": default} for key, (kind, default) in cls.options().items()}
        doc = introspection.cleandoc(cls.__doc__ or "")
        found.append({"name": each, "exact": cls.exact, "options": options, "doc": doc})

    def show() -> None:
        for item in found:
            kind = "exact" if item["exact"] else "lossy"
            print(f"{item['name']} ({kind})")
            print(_indent(item["doc"] if name else item["doc"].splitlines()[0]))
            for key, option in item["options"].items() if name else ():
                print(f"    {key}={option['default']}  ({option['type']})")

    return Answer({"passes": found}, show)


# -- options -------------------------------------------------------------------------------------


def _pipeline(given: dict[str, Any]) -> Any:
    from lrcompile.pipeline import Pipeline
    from lrcompile.registry import LOSSY, load
    from lrcompile.registry import passes as known
    from lrcompile.rewrite import parse

    limits = {
        name: given[name] for name in ("keep", "bytes", "macs", "latency", "drift") if given.get(name) is not None
    }
    budget = Budget(**limits)
    texts = given["passes"] or []
    if texts:
        table = known()
        chosen = [parse(text, table) for text in texts]
    else:
        chosen = [load("passes", name)() for name in LOSSY] if budget.limited else []
    return Pipeline(chosen, budget, _options(given))


def _options(given: dict[str, Any]) -> Any:
    from lrcompile import cache
    from lrcompile.options import Options
    from lrcompile.planning import Settings
    from lrcompile.verify import load_metric

    settings = Settings(
        include=tuple(given["include"] or ("*",)),
        exclude=tuple(given["exclude"] or ()),
        probes=given["probes"],
        seed=given["seed"],
        cache=cache.folder() if given["cache"] else None,
    )
    return Options(
        preset=given["preset"],
        max_drift=given.get("max_drift"),
        metric=load_metric(given["metric"]) if given.get("metric") else None,
        data_free=given["data_free"],
        force=given.get("force", False),
        force_growth=given.get("force_growth", False),
        latency=given.get("latency_check", True),
        latency_batch=given["latency_batch"],
        latency_inputs=given["latency_inputs"],
        threads=given["threads"],
        costs=given["costs"],
        settings=settings,
    )


def _default_output(model: Path) -> Path:
    if not model.is_dir():
        return model.with_suffix(f".lrcompile{'.pt2' if model.suffix == '.pt2' else '.onnx'}")
    whole = Path(os.path.abspath(model))  # "." has no name to extend
    return (model if model.name not in ("", "..") else whole).with_name(f"{whole.name}.lrcompile")


def _check_output(model: Path, output: Path, force: bool) -> None:
    """All of this is checked again when it is written; here so that nobody waits minutes for the answer.

    Raises:
        UsageError: something stands there already, or cannot stand there.
    """
    if output.is_dir() and not model.is_dir():
        raise UsageError("the output is a folder", where=str(output), hint="give the name of a file")
    if not output.parent.is_dir() and not model.is_dir():
        raise UsageError("there is no such folder", where=str(output.parent), hint="create it first")
    if force:
        return
    if os.path.lexists(output) and model.exists() and output.exists() and output.samefile(model):
        raise UsageError("the output is the input", where=str(output), hint="choose another --output, or --force")
    stem = output.stem if output.suffix in (".onnx", ".pt2") else output.name
    beside = [] if model.is_dir() else [output.with_name(f"{stem}.report.{kind}") for kind in ("json", "html")]
    for path in (output, *beside):
        if any(path.iterdir()) if path.is_dir() else os.path.lexists(path):
            raise UsageError("exists already", where=str(path), hint="choose another --output, or --force")


def _located(found: dict[str, Any], model: Path, output: Path | None) -> dict[str, Any]:
    """Paths as the caller wrote them; in the stored report they are relative to the report."""
    if found.get("input"):
        found["input"]["path"] = str(model)
    if output is not None and found.get("output"):
        found["output"]["path"] = str(output)
        found["report"] = str((output if model.is_dir() else output.parent) / found["report"])
    return found


def _potential(graph: Any) -> str:
    """What a budget could gain, from the shapes alone."""
    sites = [site for site in graph.linear_sites() if not site.frozen]
    values = sum(site.shape[0] * site.shape[1] for site in sites)
    if not values:
        return "the model has no linear weight that could be factorised"
    share = min(4 * values / max(graph.nbytes, 1), 1)
    return (
        f"no exact rewrite applies. {len(sites)} linear weights hold about {share:.0%} of the bytes: with samples of "
        "real inputs, `--keep 0.8 --calib samples.npz` would take a fifth of them away and measure what that costs"
    )


def _rest(found: dict[str, Any]) -> dict[str, Any]:
    """The fields after the common ones."""
    return {key: value for key, value in found.items() if key not in ("schema", "status", "seconds", "versions")}


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())
