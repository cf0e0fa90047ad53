"""SmolLM2 with factors that know what earlier layers have lost: does it help beside the metric of both sides?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from benchmarks.ablation import losses
from benchmarks.common import WORK, kept_share, table, write
from benchmarks.saes import GROUPS, Factorise, Factors, calibration, sequential
from lrcompile import Budget, LowRank
from lrcompile.backends.onnxruntime import OnnxRuntime
from lrcompile.data import Batches
from lrcompile.files import AtomicSet, sha256
from lrcompile.gauge import identity_gauge
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import densify, low_rank
from lrcompile.planning import Settings, plan
from lrcompile.rewrite import Context, Proposal
from lrcompile.sites import LinearSite
from lrcompile.spectrum import sampling_shrink, shrunk, spectrum
from lrcompile.zoo import exported, smollm2

KEEP = 0.8
BETAS = (0.0, 0.5)
RIDGE = 0.1
DAMP = 1e-5
_HEAD = f"""Keep {KEEP} of the values of 210 decoder linears, at the ranks and forms of one plan; one draw of the
calibration data. Static: factors for what each layer reads in the uncompressed model, as lrcompile makes them. The
other rows fit each layer to what it reads in the compressed model (moments H of x), in the same metric of the outputs,
for the target `W + β W Δ (H + {RIDGE} diag H)⁻¹` with Δ = E[(x_f − x) xᵀ]; x_f is what it reads in the uncompressed
model, and β 0 is the weight itself. At once: H and Δ of all layers from one run of the model with static factors.
Walk: layer by layer, once all before it are compressed (the order of SAES-SVD, arXiv 2602.03051, whose own factors
are in the SmolLM2 table)."""


def main() -> None:
    """Row by row; the table is written after each."""
    WORK.mkdir(parents=True, exist_ok=True)
    dense, lines = exported("smollm2"), []
    base = losses(dense)
    for name, path, seconds in _made(dense):
        ratio = math.exp(losses(path) - base)
        lines.append([name, kept_share(path, dense), f"{ratio:.3f}", f"{seconds:.0f}", sha256(path)[:12]])
        columns = ("factors", "keep", "perplexity ÷ dense", "made in, s", "SHA-256")
        write("anchored", "Error-aware targets", [_HEAD, table(columns, lines)])


def _made(dense: Path) -> Iterator[tuple[str, Path, float]]:
    graph = OnnxGraph.load(dense)
    data = Batches(smollm2.calibration()).check(graph.input_specs)
    planned = plan(graph, [LowRank()], Budget(keep=KEEP), data, Settings(cache=WORK / "cache"))
    chosen = {c.site.name: (c.site, c.proposal) for c in planned.choices if c.proposal is not None}
    ways: dict[str, Callable[[], Mapping[str, Factors] | None]] = {"static": lambda: None}
    for beta in BETAS:
        make = _factorise(planned.context, chosen, beta)
        ways[f"at once, β {beta}"] = lambda make=make: at_once(chosen, calibration(), make)
    for beta in BETAS:
        make = _factorise(planned.context, chosen, beta)
        ways[f"walk, β {beta}"] = lambda make=make: sequential(smollm2.causal_lm(), calibration(), make)
    for name, way in ways.items():
        start, found = time.monotonic(), way()
        yield name, _written(graph, chosen, found), time.monotonic() - start


Chosen = Mapping[str, tuple[LinearSite, Proposal]]


@torch.no_grad()
def at_once(chosen: Chosen, batches: Sequence[Tensor], make: Factorise) -> dict[str, Factors]:
    """Factors of every linear from one run of the model with the factors of the plan, beside the uncompressed one."""
    whole, small = smollm2.causal_lm(), smollm2.causal_lm()
    for name, (_, proposal) in chosen.items():
        _weight(small, name.removeprefix("model.")).copy_(densify(proposal.build()[name].operator))
    firsts = {f"model.layers.{place}.{group[0]}" for place in range(len(whole.model.layers)) for group in GROUPS}
    moments: dict[str, Tensor] = {}  # of x with itself, and of what is missing with x
    for ids in batches:
        before, now = _read(whole, firsts, ids), _read(small, firsts, ids)
        for name, x in now.items():
            size = x.shape[1]
            second, moved = moments.setdefault(name, torch.zeros(2, size, size, dtype=torch.float64))
            second += (x.T @ x).double()
            moved += ((before[name] - x).T @ x).double()
    found, tokens = {}, sum(ids.numel() for ids in batches)
    for name, (second, moved) in moments.items():
        layer = name[: name.index(".", len("model.layers."))]
        for each in next(group for group in GROUPS if name.endswith(group[0])):
            path = f"{layer}.{each}"
            pair = make(path, _weight(whole, path), second / tokens, moved / tokens)
            if pair is not None:
                found[path] = pair
    return found


def _weight(model: nn.Module, path: str) -> Tensor:
    return model.get_parameter(f"{path}.weight")


def _read(model: nn.Module, names: Iterable[str], ids: Tensor) -> dict[str, Tensor]:
    """What the named linears read, (tokens, in) each."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> RemovableHandle:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = args[0].flatten(0, -2)

        return model.get_submodule(name).register_forward_pre_hook(hook)

    handles = [watch(name) for name in names]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def _factorise(context: Context, chosen: Chosen, beta: float) -> Factorise:
    def make(path: str, weight: Tensor, second: Tensor, moved: Tensor) -> Factors | None:
        site, proposal = chosen.get(f"model.{path}", (None, None))
        if site is None or proposal is None or proposal.rank is None:
            return None
        moments = context.statistics(site)
        shrink = 0.0 if moments is None else sampling_shrink(moments)
        wanted = anchored(weight.double(), second, moved, beta)
        pair = spectrum(wanted, shrunk(second.clone(), shrink, DAMP), context.importance(site)).factors(proposal.rank)
        return pair[0].to(weight), pair[1].to(weight)

    return make


def anchored(weight: Tensor, second: Tensor, moved: Tensor, beta: float) -> Tensor:
    """The target (out, in) between a weight and what makes up for the inputs' change; ridged for each channel."""
    ridged = second.clone()
    ridged.diagonal().mul_(1 + RIDGE)
    ridged.diagonal().add_(1e-12 * float(second.diagonal().mean()))
    return weight + beta * torch.linalg.solve(ridged, (weight @ moved).T).T


def _written(graph: OnnxGraph, chosen: Chosen, found: Mapping[str, Factors] | None) -> Path:
    """The file with the factors that were found, or with those of the plan."""
    mark = graph.journal.mark()
    for name, (site, proposal) in chosen.items():
        if found is None:
            graph.replace(site, proposal.build()[name].operator)
        else:
            pair = found[name.removeprefix("model.")]
            gauged = identity_gauge(*pair, torch.float32) if proposal.form else None
            graph.replace(site, gauged or low_rank(*(each.contiguous() for each in pair)))
    with AtomicSet(WORK / "anchored.onnx", force=True) as files:
        OnnxRuntime().build(graph, out=files)
    graph.rollback(mark)
    return files.target
