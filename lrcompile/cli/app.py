"""Verbs and their options; the work is done elsewhere and imported when a verb runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from lrcompile.cli import shell

Model = Annotated[str, typer.Argument(help="an .onnx file, or a Hugging Face folder")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="no progress on stderr")]
Calib = Annotated[str | None, typer.Option("--calib", "--calibration", help="calibration samples: .npz, .npy or a folder")]
Eval = Annotated[str | None, typer.Option("--eval", "--evaluation", help="held-out samples, same forms as --calib")]
Keep = Annotated[float | None, typer.Option(help="share of the sites' values that stays, 0 to 1")]
Bytes = Annotated[str | None, typer.Option(help="size on disk: 60MB, or a share of the original")]
Macs = Annotated[str | None, typer.Option(help="multiply-accumulates per sample: 500M, or a share of the original")]
Preset = Annotated[str | None, typer.Option(help="safe (exact rewrites only), balanced, small or mcu")]
Drift = Annotated[float | None, typer.Option("--max-drift", help="largest relative L2 change of an output")]
Passes = Annotated[list[str] | None, typer.Option("-p", "--pass", help='a pass with options: "low-rank{metric=plain}"')]
Include = Annotated[list[str] | None, typer.Option(help="only sites whose name matches this glob")]
Exclude = Annotated[list[str] | None, typer.Option(help="no site whose name matches this glob")]
Seed = Annotated[int, typer.Option(help="seed of everything random")]
DataFree = Annotated[bool, typer.Option("--data-free", help="allow a lossy budget without calibration data")]
Cache = Annotated[bool, typer.Option("--cache/--no-cache", help="keep calibration statistics on disk")]
Probes = Annotated[bool, typer.Option("--probes/--no-probes", help="measure how much each site matters")]
Metric = Annotated[str | None, typer.Option(help="package.module:function(reference, candidate), larger is worse")]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make trained models smaller and faster without retraining, and prove that they are still good.",
)


@app.command()
def inspect(model: Model, json: Json = False, debug: Debug = False) -> None:
    """Show what a model is made of: inputs, outputs, sites, parameters, MACs."""
    from lrcompile.cli import verbs

    shell.verb("inspect", lambda: verbs.inspect(model), json=json, debug=debug)


@app.command()
def plan(
    model: Model,
    keep: Keep = None,
    bytes: Bytes = None,
    macs: Macs = None,
    calib: Calib = None,
    passes: Passes = None,
    include: Include = None,
    exclude: Exclude = None,
    preset: Preset = None,
    data_free: DataFree = False,
    cache: Cache = True,
    probes: Probes = True,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what optimize would do under a budget; writes nothing."""
    from lrcompile.cli import verbs

    given = dict(locals())
    shell.verb("plan", lambda: verbs.plan(given, shell.progress(quiet)), json=json, debug=debug)


@app.command()
def optimize(
    model: Model,
    output: Annotated[str | None, typer.Option("-o", "--output", help="default: MODEL.lrcompile.onnx")] = None,
    keep: Keep = None,
    bytes: Bytes = None,
    macs: Macs = None,
    drift: Annotated[float | None, typer.Option(help="the drift must stay below this")] = None,
    calib: Calib = None,
    eval: Eval = None,
    preset: Preset = None,
    max_drift: Drift = None,
    metric: Metric = None,
    passes: Passes = None,
    include: Include = None,
    exclude: Exclude = None,
    data_free: DataFree = False,
    force: Annotated[bool, typer.Option("--force", help="replace an existing output")] = False,
    force_growth: Annotated[bool, typer.Option("--force-growth", help="publish a larger or slower result")] = False,
    latency: Annotated[bool, typer.Option("--latency-check/--no-latency-check", help="measure latency and memory")] = True,
    cache: Cache = True,
    probes: Probes = True,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rewrite a model: exactly without a budget, else the best plan under it that passes the gate."""
    from lrcompile.cli import verbs

    given = dict(locals())
    shell.verb("optimize", lambda: verbs.optimize(given, shell.progress(quiet)), json=json, debug=debug)


@app.command()
def verify(
    a: Model,
    b: Annotated[str, typer.Argument(help="the model to compare with the first")],
    eval: Eval = None,
    max_drift: Drift = None,
    metric: Metric = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure how far the outputs of B are from those of A."""
    from lrcompile.cli import verbs

    shell.verb("verify", lambda: verbs.verify(a, b, eval, max_drift, metric), json=json, debug=debug)


@app.command("passes")
def show_passes(
    name: Annotated[str | None, typer.Argument(help="one pass, with its whole description")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the passes with their options."""
    from lrcompile.cli import verbs

    shell.verb("passes", lambda: verbs.passes(name), json=json, debug=debug)


@app.command()
def demo(
    output: Annotated[str, typer.Option("-o", "--output", help="folder of the results")] = "lrcompile-demo",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress a small vision transformer for handwritten digits and show what it costs."""
    from lrcompile.cli import demo as show

    shell.verb("demo", lambda: show.demo(output, shell.progress(quiet)), json=json, debug=debug)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        from lrcompile import __version__

        typer.echo(f"lrcompile {__version__}")
        raise typer.Exit


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    given: list[str] = list(sys.argv[1:] if arguments is None else arguments)
    command: Callable[..., Any] = typer.main.get_command(app)
    return shell.guard(command, given)
