"""What a zoo model is, how to run it, and where its files are kept. Importing this costs no torch."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lrcompile.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

Batch = dict[str, np.ndarray]
Run = Callable[[Batch], Batch]


@dataclass(frozen=True, eq=False)
class ZooModel:
    """A real model with the data that it takes to calibrate and to judge it.

    Every field but the first three is a function, so that nothing is loaded before it is asked for.

    Attributes:
        name: the name in the registry.
        documentation: origin, licence, data split and measured quality.
        outputs: names of the outputs, in order.
        module: builds the trained ``nn.Module`` in eval mode.
        calibration: batches keyed by forward argument, which is also the name of the graph input.
        evaluation: the same, disjoint from the calibration data.
        metric: scores a run, a function from an input batch to named outputs.
        export: writes the model as ONNX with dynamic axes.
    """

    name: str
    documentation: str
    outputs: tuple[str, ...]
    module: Callable[[], nn.Module]
    calibration: Callable[[], list[Batch]]
    evaluation: Callable[[], list[Batch]]
    metric: Callable[[Run], dict[str, float]]
    export: Callable[[Path], None]


class MissingPackageError(UsageError):
    """A package that carries weights or data of the zoo is not installed."""

    def __init__(self, package: str) -> None:
        super().__init__(
            f"this model needs the package '{package}', which is not installed",
            where="lrcompile.zoo",
            hint="run 'make zoo' in a checkout, which installs it without its dependencies",
        )


def package_folder(package: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises:
        MissingPackageError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(package)
    return Path(next(iter(spec.submodule_search_locations)))


def cache_folder() -> Path:
    """``$LRCOMPILE_CACHE/zoo``, by default ``.cache/zoo`` of the current folder; created when absent."""
    folder = Path(os.environ.get("LRCOMPILE_CACHE") or ".cache") / "zoo"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def module_run(module: nn.Module, outputs: Sequence[str]) -> Run:
    """A run of a torch module: arrays go in by argument name, arrays come out by output name."""
    import torch

    def run(batch: Mapping[str, np.ndarray]) -> Batch:
        with torch.inference_mode():
            result = module(**{name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in batch.items()})
        values = result if isinstance(result, tuple) else (result,)
        return {name: value.numpy() for name, value in zip(outputs, values, strict=True)}

    return run


def onnx_run(path: Path, *, threads: int = 0) -> Run:
    """A run of an ONNX file in ONNX Runtime on the CPU; ``threads`` 0 leaves the choice to the runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(batch: Mapping[str, np.ndarray]) -> Batch:
        values = session.run(names, dict(batch))
        return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}

    return run
