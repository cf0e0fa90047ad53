"""Verbs and their options; the work is done elsewhere and imported when a verb runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from lrcompile.cli import shell


def _config(context: typer.Context, path: str | None) -> str | None:
    """Reads the config file before the other options, which fall back to it."""
    if path is not None:
        from lrcompile.cli import config

        commands = context.parent.command.commands  # type: ignore[union-attr]
        context.default_map = config.read(path, commands["optimize"].params)
    return path


def _option(*names: str, help: str) -> Any:
    """An option that the environment may set too: ``--max-drift`` is ``LRCOMPILE_MAX_DRIFT``."""
    variable = names[-1].split("/")[0].removeprefix("--").upper().replace("-", "_")
    return typer.Option(*names, help=help, envvar=f"LRCOMPILE_{variable}", show_envvar=False)


Model = Annotated[str, typer.Argument(help="an .onnx or .pt2 file, or a Hugging Face folder")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="no progress on stderr")]
Config = Annotated[
    str | None,
    typer.Option(
        "--config", is_eager=True, callback=_config, help="options from a TOML file, or those of an earlier report.json"
    ),
]
Calib = Annotated[str | None, _option("--calib", "--calibration", help="calibration samples: .npz, .npy or a folder")]
Eval = Annotated[str | None, _option("--eval", "--evaluation", help="held-out samples, same forms as --calib")]
Keep = Annotated[float | None, _option("--keep", help="share of the sites' values that stays, 0 to 1")]
Bytes = Annotated[str | None, _option("--bytes", help="size on disk: 60MB, or a share of the original")]
Macs = Annotated[
    str | None, _option("--macs", help="multiply-accumulates per sample: 500M, or a share of the original")
]
Limit = Annotated[
    float | None, _option("--drift", help="the drift must stay below this; alone: as few bytes as it allows")
]
Pace = Annotated[float | None, _option("--latency", help="time of a run over the original's: 0.8")]
Costs = Annotated[str | None, _option("--costs", help="costs.json of the target, or an earlier report, with --latency")]
Timed = Annotated[str | None, _option("--latency-inputs", help="the batch of timed runs, same forms as --calib")]
TimedBatch = Annotated[int, _option("--latency-batch", help="samples of --calib in a timed run")]
Preset = Annotated[str | None, _option("--preset", help="safe (exact rewrites only), balanced, small or mcu")]
Drift = Annotated[float | None, _option("--max-drift", help="largest relative L2 change of an output")]
Passes = Annotated[list[str] | None, _option("-p", "--pass", help='a pass with options: "low-rank{metric=plain}"')]
Include = Annotated[list[str] | None, _option("--include", help="only sites whose name matches this glob")]
Exclude = Annotated[list[str] | None, _option("--exclude", help="no site whose name matches this glob")]
Seed = Annotated[int, _option("--seed", help="seed of everything random")]
DataFree = Annotated[bool, _option("--data-free", help="allow a lossy budget without calibration data")]
Cache = Annotated[bool, typer.Option("--cache/--no-cache", help="keep statistics on disk, in $LRCOMPILE_CACHE")]
Probes = Annotated[
    bool | None, _option("--probes/--no-probes", help="measure how much each site matters (default: where it helps)")
]
Metric = Annotated[
    str | None, _option("--metric", help="package.module:function(reference, candidate), larger is worse")
]
Growth = Annotated[bool, _option("--force-growth", help="publish a larger or slower result")]
Latency = Annotated[bool, _option("--latency-check/--no-latency-check", help="measure latency and memory")]
Threads = Annotated[int, _option("--threads", help="threads of timed runs; 0: all cores")]
Shape = Annotated[list[str] | None, _option("--shape", help="input_ids=1x128, or batch=16: shapes of made-up inputs")]
Samples = Annotated[int | None, _option("--samples", help="samples of --calib in a timed run; 8 if not given")]
Output = Annotated[str | None, typer.Option("-o", "--output", help="default: MODEL.lrcompile.onnx (or .pt2)")]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make trained models smaller and faster without retraining, and prove that they are still good.",
)
_SOURCES = "Options may also stand in a --config file, or in the environment: LRCOMPILE_KEEP=0.8."


@app.command()
def inspect(model: Model, json: Json = False, debug: Debug = False) -> None:
    """Show what a model is made of: inputs, outputs, sites, parameters, MACs."""
    from lrcompile.cli import verbs

    shell.verb("inspect", lambda _: verbs.inspect(model), json=json, debug=debug)


@app.command(epilog=_SOURCES)
def plan(
    model: Model,
    keep: Keep = None,
    bytes: Bytes = None,
    macs: Macs = None,
    latency: Pace = None,
    drift: Limit = None,
    calib: Calib = None,
    passes: Passes = None,
    include: Include = None,
    exclude: Exclude = None,
    preset: Preset = None,
    data_free: DataFree = False,
    threads: Threads = 0,
    latency_batch: TimedBatch = 8,
    latency_inputs: Timed = None,
    costs: Costs = None,
    cache: Cache = True,
    probes: Probes = None,
    seed: Seed = 0,
    config: Config = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what optimize would do under a budget; writes nothing."""
    from lrcompile.cli import verbs

    given = dict(locals())
    shell.verb("plan", lambda tell: verbs.plan(given, tell), json=json, debug=debug, quiet=quiet)


@app.command(epilog=_SOURCES)
def optimize(
    model: Model,
    output: Output = None,
    keep: Keep = None,
    bytes: Bytes = None,
    macs: Macs = None,
    latency: Pace = None,
    drift: Limit = None,
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
    force_growth: Growth = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="do everything but write the result")] = False,
    latency_check: Latency = True,
    threads: Threads = 0,
    latency_batch: TimedBatch = 8,
    latency_inputs: Timed = None,
    costs: Costs = None,
    cache: Cache = True,
    probes: Probes = None,
    seed: Seed = 0,
    config: Config = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rewrite a model: exactly without a budget, else the best plan under it that passes the gate."""
    from lrcompile.cli import verbs

    given = dict(locals())
    shell.verb("optimize", lambda tell: verbs.optimize(given, tell), json=json, debug=debug, quiet=quiet)


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

    shell.verb("verify", lambda _: verbs.verify(a, b, eval, max_drift, metric), json=json, debug=debug)


@app.command()
def deploy(
    model: Model,
    to: Annotated[str, typer.Option("--to", help="c: plain C and firmware for a microcontroller")],
    output: Annotated[str, typer.Option("-o", "--output", help="folder of the files")],
    target: Annotated[str, typer.Option("--target", help="cortex-m4, cortex-m7 or cortex-m33")] = "cortex-m7",
    ram: Annotated[str | None, typer.Option("--ram", help="RAM for arena, stack, inputs, outputs: 64KB")] = None,
    flash: Annotated[str | None, typer.Option("--flash", help="flash for code and weights: 1MB")] = None,
    external: Annotated[str | None, typer.Option("--external", help="external flash that weights go to: 8MB")] = None,
    stack: Annotated[str | None, typer.Option("--stack", help="stack to reserve; default: what is needed")] = None,
    keep: Annotated[
        float | None, typer.Option("--keep", help="compress first: share of the weights that stays")
    ] = None,
    max_drift: Annotated[
        float | None, typer.Option("--max-drift", help="gate of --keep and of --int8, as in optimize")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="quantise to 8 bits, calibrated")] = False,
    calib: Annotated[str | None, typer.Option("--calib", help="samples for --keep and --int8: .npz")] = None,
    run: Annotated[str | None, typer.Option("--run", help="samples to run in the emulator: .npz")] = None,
    shape: Annotated[list[str] | None, typer.Option("--shape", help="a static input shape: x=1,3,32,32")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace files in the folder")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn a model into firmware that fits a device; --run proves it in an emulator."""
    given = dict(locals())

    def work(tell: Any) -> shell.Answer:
        from lrcompile.cli import deploying

        return deploying.deploy(given, tell)

    shell.verb("deploy", work, json=json, debug=debug, quiet=quiet)


@app.command()
def schedule(
    model: Model,
    target: Annotated[
        str, typer.Option("--target", help="cortex-m4, cortex-m7, cortex-m33 or onnxruntime")
    ] = "cortex-m7",
    ram: Annotated[
        str | None, typer.Option("--ram", help="what the plan must fit: 64KB; default: as little as found")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option("--shape", help="a size to plan for: x=1,3,32,32, or batch=1")
    ] = None,
    calib: Annotated[str | None, typer.Option("--calib", help="samples of the sizes to plan for (onnxruntime)")] = None,
    tiles: Annotated[int, typer.Option("--tiles", help="most tiles of one part (onnxruntime)")] = 8,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show how little memory activations need on a target, the plan, and why it is not less; writes nothing."""
    given = dict(locals())

    def work(tell: Any) -> shell.Answer:
        from lrcompile.cli import scheduling

        return scheduling.schedule(given, tell)

    shell.verb("schedule", work, json=json, debug=debug, quiet=quiet)


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="an .onnx file, or a model of the zoo: digits_vit")],
    ram: Annotated[str, typer.Option("--ram", help="RAM for arena, stack, inputs, outputs: 16KB")],
    flash: Annotated[str | None, typer.Option("--flash", help="flash for code and weights: 128KB")] = None,
    target: Annotated[str, typer.Option("--target", help="cortex-m4, cortex-m7 or cortex-m33")] = "cortex-m7",
    output: Annotated[str | None, typer.Option("-o", "--output", help="folder; default: MODEL.search")] = None,
    calib: Calib = None,
    eval: Eval = None,
    max_drift: Drift = None,
    metric: Metric = None,
    shape: Annotated[list[str] | None, typer.Option("--shape", help="a static input shape: x=1,3,32,32")] = None,
    candidates: Annotated[int, typer.Option("--candidates", help="how many are executed at most", min=1)] = 8,
    samples: Annotated[int, typer.Option("--samples", help="evaluation samples that each executes", min=1)] = 4,
    force: Annotated[bool, typer.Option("--force", help="replace files in the folder")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find ranks, precision and tiles that fit a device at the least loss; every candidate is executed."""
    given = dict(locals())

    def work(tell: Any) -> shell.Answer:
        from lrcompile.cli import searching

        return searching.search(given, tell)

    shell.verb("search", work, json=json, debug=debug, quiet=quiet)


@app.command()
def bench(
    a: Model,
    b: Annotated[str, typer.Argument(help="the model to compare with the first")],
    calib: Calib = None,
    shape: Shape = None,
    samples: Samples = None,
    threads: Threads = 0,
    seconds: Annotated[float, _option("--seconds", help="how long to measure, at least")] = 4.0,
    precision: Annotated[
        float, _option("--precision", help="go on, up to 6 times as long, until the ratio is known to this share")
    ] = 0.02,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time two models in turns on the same inputs; the ratio is B over A."""
    given = dict(locals())

    def work(_: Any) -> shell.Answer:
        from lrcompile.cli import benching

        return benching.bench(given)

    shell.verb("bench", work, json=json, debug=debug)


@app.command()
def profile(
    model: Model,
    emit: Annotated[str, typer.Option("--emit", help="folder of the kit")],
    calib: Calib = None,
    shape: Shape = None,
    samples: Samples = None,
    threads: Threads = 0,
    passes: Passes = None,
    include: Include = None,
    exclude: Exclude = None,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier kit")] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a script that measures on the target what --latency needs, with numpy and onnxruntime only."""
    given = dict(locals())

    def work(tell: Any) -> shell.Answer:
        from lrcompile.cli import profiling

        return profiling.profile(given, tell)

    shell.verb("profile", work, json=json, debug=debug, quiet=quiet)


@app.command("passes")
def show_passes(
    name: Annotated[str | None, typer.Argument(help="one pass, with its whole description")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """List the passes with their options."""
    from lrcompile.cli import verbs

    shell.verb("passes", lambda _: verbs.passes(name), json=json, debug=debug)


@app.command()
def demo(
    output: Annotated[str, typer.Option("-o", "--output", help="folder of the results")] = "lrcompile-demo",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compress a small vision transformer for handwritten digits and show what it costs."""

    def work(tell: Any) -> shell.Answer:
        from lrcompile.cli import demo as show

        return show.demo(output, tell)

    shell.verb("demo", work, json=json, debug=debug, quiet=quiet)


@app.command()
def doctor(json: Json = False, debug: Debug = False) -> None:
    """Check that everything needed is installed and works."""
    from lrcompile.cli import doctor as checks

    shell.verb("doctor", lambda _: checks.examine(), json=json, debug=debug)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="print the version")] = False
) -> None:
    if version:
        from lrcompile import __version__

        typer.echo(f"lrcompile {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    given: list[str] = list(sys.argv[1:] if arguments is None else arguments)
    command: Callable[..., Any] = typer.main.get_command(app)
    return shell.guard(command, given)
