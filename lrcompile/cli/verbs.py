"""The verbs, without the parsing of their options."""

from __future__ import annotations

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
    _refuse_existing(output, given["force"])
    pipeline = _pipeline(given)
    result = pipeline.run(model, given["calib"], given["eval"], out=output, tell=tell)
    report = result.report
    if report.status == "unchanged":
        report.notes.append(_potential(result.graph))

    def show() -> None:
        print_report(report)
        print(f"wrote {output}" if report.status == "ok" else "nothing to rewrite; nothing was written")

    return Answer(_rest(to_json(report)), show, report.status)


def plan(given: dict[str, Any], tell: Progress) -> Answer:
    """``lrcompile plan``."""
    from lrcompile.report import print_report, to_json

    _, report = _pipeline(given).plan(Path(given["model"]), given["calib"], tell=tell)
    return Answer(_rest(to_json(report)), lambda: print_report(report))


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
    from lrcompile.registry import load
    from lrcompile.registry import passes as known
    from lrcompile.rewrite import parse

    limits = {name: given[name] for name in ("keep", "bytes", "macs", "drift") if given.get(name) is not None}
    budget = Budget(**limits)
    texts = given["passes"] or []
    if texts:
        table = known()
        chosen = [parse(text, table) for text in texts]
    else:
        chosen = [load("passes", "low-rank")()] if budget.limited else []
    return Pipeline(chosen, budget, _options(given))


def _options(given: dict[str, Any]) -> Any:
    from lrcompile import cache
    from lrcompile.planning import Settings
    from lrcompile.stages import Options
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
        latency=given.get("latency", True),
        settings=settings,
    )


def _default_output(model: Path) -> Path:
    return model.with_name(f"{model.name}.lrcompile") if model.is_dir() else model.with_suffix(".lrcompile.onnx")


def _refuse_existing(output: Path, force: bool) -> None:
    """Checked again when it is written; checked here so that nobody waits minutes for this answer."""
    taken = any(output.iterdir()) if output.is_dir() else output.exists()
    if taken and not force:
        raise UsageError("exists already", where=str(output), hint="choose another --output, or --force to replace it")


def _potential(graph: Any) -> str:
    """What a budget could gain, from the shapes alone."""
    sites = [site for site in graph.linear_sites() if not site.frozen]
    values = sum(site.shape[0] * site.shape[1] for site in sites)
    if not values:
        return "the model has no linear weight that could be factorised"
    share = 4 * values / max(graph.nbytes, 1)
    return (
        f"no exact rewrite applies. {len(sites)} linear weights hold about {min(share, 1):.0%} of the bytes: with samples of "
        "real inputs, `--keep 0.8 --calib samples.npz` would take a fifth of them away and measure what that costs"
    )


def _rest(found: dict[str, Any]) -> dict[str, Any]:
    """The fields after the common ones."""
    return {key: value for key, value in found.items() if key not in ("schema", "status", "seconds", "versions")}


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())
