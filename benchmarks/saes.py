"""SAES-SVD (arXiv 2602.03051), a baseline: low-rank factors from what the compressed model's own layers read.

Layer by layer, a linear is factorised for the inputs ``x`` that reach it once everything before it is compressed, and
for a target between its own output and the output of the uncompressed model, whose inputs there are ``x_f``:

    min ‖(U V − W) X‖² + α ‖U V X − W X_f‖²,    β = α ÷ (1 + α)

With ``H = E[x xᵀ] = L Lᵀ`` and ``Δ = E[(x_f − x) xᵀ]`` the optimum is the truncated singular value decomposition of
``W (H + β Δ) L⁻ᵀ``, times ``L⁻¹``. β is chosen for each linear (ACES): it minimises the share of energy outside the
leading subspaces, which are those of β = 0. Ranks are uniform, as published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrcompile.backends.onnxruntime import OnnxRuntime
from lrcompile.files import AtomicSet
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.linop import low_rank
from lrcompile.zoo import smollm2

CLAMP = (0.25, 0.75)
"""Published range of β: beyond it the result is worse."""
FLOOR = 1e-12
"""Smallest eigenvalue of H over its largest."""
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Linears of a Llama layer, in the order of execution; those of a group read one value."""

Factors = tuple[Tensor, Tensor]


# -- one linear ----------------------------------------------------------------------------------


def factors(weight: Tensor, second: Tensor, moved: Tensor, rank: int, clamp: tuple[float, float] = CLAMP) -> Factors:
    """The factors (out, rank), (rank, in) of a weight (out, in), in its dtype.

    Args:
        second: (in, in) float64, ``E[x xᵀ]`` of the compressed model's inputs.
        moved: (in, in) float64, ``E[(x_f − x) xᵀ]``.
        clamp: range of β.
    """
    root, inverse = roots(second)
    whole, shifted = weight.double() @ root, weight.double() @ moved @ inverse.T
    beta = aces(whole, shifted, rank, clamp)
    left, values, right = torch.linalg.svd(whole + beta * shifted, full_matrices=False)
    scale = values[:rank].sqrt()
    return (left[:, :rank] * scale).to(weight), (scale[:, None] * right[:rank] @ inverse).to(weight)


def roots(second: Tensor) -> tuple[Tensor, Tensor]:
    """L and its inverse with ``L Lᵀ = second``, whose smallest eigenvalues are raised."""
    values, vectors = torch.linalg.eigh((second + second.T) / 2)
    scale = values.clamp_min(max(FLOOR * float(values[-1]), 1e-300)).sqrt()
    return vectors * scale, (vectors / scale).T


def aces(whole: Tensor, shifted: Tensor, rank: int, clamp: tuple[float, float] = CLAMP) -> float:
    """The β in ``clamp`` at which the least share of energy is lost, with the subspaces of ``whole``.

    Args:
        whole, shifted: ``W L`` and ``W Δ L⁻ᵀ``; their sum ``whole + β · shifted`` is what is truncated.
    """
    (a, b, c), (al, bl, cl) = energies(whole, shifted, rank)
    square, linear, constant = c * bl - b * cl, c * al - a * cl, b * al - a * bl
    inside = [root for root in _real_roots(square, linear, constant) if clamp[0] <= root <= clamp[1]]
    return min((*clamp, *inside), key=lambda beta: lost(beta, (a, b, c), (al, bl, cl)))


def lost(beta: float, outside: Sequence[float], total: Sequence[float]) -> float:
    """Share of energy outside the subspaces: both are quadratics ``a + 2 b β + c β²``."""
    (a, b, c), (al, bl, cl) = outside, total
    return (a + 2 * b * beta + c * beta * beta) / max(al + 2 * bl * beta + cl * beta * beta, 1e-300)


def energies(whole: Tensor, shifted: Tensor, rank: int) -> tuple[tuple[float, float, float], ...]:
    """Coefficients of the energy outside the leading subspaces of ``whole``, and of all energy."""
    left, _, right = torch.linalg.svd(whole, full_matrices=False)
    left, right = left[:, :rank], right[:rank]

    def outside(matrix: Tensor) -> Tensor:
        matrix = matrix - left @ (left.T @ matrix)
        return matrix - (matrix @ right.T) @ right

    pairs = ((outside(whole), outside(shifted)), (whole, shifted))
    return tuple((float((s * s).sum()), float((s * d).sum()), float((d * d).sum())) for s, d in pairs)


def _real_roots(square: float, linear: float, constant: float) -> list[float]:
    if square == 0:
        return [] if linear == 0 else [-constant / linear]
    under = linear * linear - 4 * square * constant
    if under < 0:
        return []
    sign = 1.0 if linear >= 0 else -1.0
    far = -(linear + sign * under**0.5) / 2  # without cancellation
    return [far / square, *([constant / far] if far else [])]


# -- a model, layer by layer ---------------------------------------------------------------------


Factorise = Callable[[str, Tensor, Tensor, Tensor], Factors | None]
"""Factors of a linear by its path, from its weight, ``E[x xᵀ]`` and ``E[(x_f − x) xᵀ]``; None leaves it as it is."""


@torch.no_grad()
def sequential(model: nn.Module, batches: Sequence[Tensor], make: Factorise) -> dict[str, Factors]:
    """Factors of every linear of the layers of a Llama model, by its path in ``model``; they also replace its weights.

    Args:
        model: a causal language model of ``transformers``; its layers are changed in place.
        batches: token ids (batch, tokens), all of one shape.
    """
    layers: Any = model.get_submodule("model.layers")
    plain, extra = _entering(model, layers[0], batches)
    compressed, found = [each.clone() for each in plain], {}
    for place, layer in enumerate(layers):
        plain, originals = _through(layer, plain, extra)
        for group in GROUPS:
            second, moved = _moments(layer, group[0], compressed, originals[group[0]], extra)
            for name in group:
                linear, path = layer.get_submodule(name), f"model.layers.{place}.{name}"
                pair = make(path, linear.weight, second, moved)
                if pair is not None:
                    linear.weight.copy_(pair[0] @ pair[1])
                    found[path] = pair
            del originals[group[0]]
        compressed = [_call(layer, each, extra) for each in compressed]
        print(f"layer {place}", flush=True)
    return found


def uniform(keep: float) -> Factorise:
    """Every weight at the largest rank whose factors take at most ``keep`` of its values, as published."""
    return lambda _, weight, second, moved: factors(weight, second, moved, uniform_rank(weight, keep))


def uniform_rank(weight: Tensor, keep: float) -> int:
    """The largest rank whose factors take at most ``keep`` of the weight's values."""
    return max(1, int(keep * weight.numel() / sum(weight.shape)))


class _Stop(Exception):
    """The value that was waited for has been seen."""


@contextmanager
def _seeing(module: nn.Module, sink: list[Any], *, stop: bool) -> Iterator[None]:
    """Appends the arguments of every call of a module; ``stop`` ends the run there."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sink.append((args, kwargs))
        if stop:
            raise _Stop

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    except _Stop:
        pass
    finally:
        handle.remove()


def _entering(model: nn.Module, first: nn.Module, batches: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
    """What enters the first layer, for each batch, and the arguments that all layers get beside it."""
    seen: list[Any] = []
    for ids in batches:
        with _seeing(first, seen, stop=True):
            model(input_ids=ids, use_cache=False)
    return [args[0] if args else kwargs["hidden_states"] for args, kwargs in seen], _others(seen[0][1])


def _others(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _call(layer: nn.Module, hidden: Tensor, extra: Mapping[str, Any]) -> Tensor:
    found = layer(hidden, **extra)
    return found[0] if isinstance(found, tuple) else found


def _through(
    layer: nn.Module, stream: Sequence[Tensor], extra: Mapping[str, Any]
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """What leaves the layer, and what the first linear of each group reads, for each batch."""
    leaving, read = [], {group[0]: [] for group in GROUPS}
    for hidden in stream:
        seen: dict[str, list[Any]] = {name: [] for name in read}
        with ExitStack() as watched:
            for name, sink in seen.items():
                watched.enter_context(_seeing(layer.get_submodule(name), sink, stop=False))
            leaving.append(_call(layer, hidden, extra))
        for name, [(args, _)] in seen.items():
            read[name].append(args[0].flatten(0, -2))
    return leaving, read


def _moments(
    layer: nn.Module, name: str, stream: Sequence[Tensor], originals: Sequence[Tensor], extra: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """``E[x xᵀ]`` and ``E[(x_f − x) xᵀ]`` at a linear, from the layer as it stands."""
    size = originals[0].shape[-1]
    second, moved = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
    for hidden, before in zip(stream, originals, strict=True):
        seen: list[Any] = []
        with _seeing(layer.get_submodule(name), seen, stop=True):
            _call(layer, hidden, extra)
        now = seen[0][0][0].flatten(0, -2)
        second += (now.T @ now).double()
        moved += ((before - now).T @ now).double()
    tokens = sum(len(each) for each in originals)
    return second / tokens, moved / tokens


def calibration() -> list[Tensor]:
    """SmolLM2's calibration data, batch by batch."""
    return [torch.from_numpy(batch["input_ids"]) for batch in smollm2.calibration()]


# -- the file ------------------------------------------------------------------------------------


def saes(dense: Path, keep: float, out: Path) -> Path:
    """Writes SmolLM2's ONNX file with the factors of SAES-SVD in the place of its 210 linears."""
    graph, found = OnnxGraph.load(dense), sequential(smollm2.causal_lm(), calibration(), uniform(keep))
    sites = {site.name: site for site in graph.linear_sites() if not site.frozen}
    for name, pair in found.items():
        graph.replace(sites[f"model.{name}"], low_rank(*(each.contiguous() for each in pair)))
    with AtomicSet(out, force=True) as files:
        OnnxRuntime().build(graph, out=files)
    return files.target
