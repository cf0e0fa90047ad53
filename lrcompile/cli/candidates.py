"""Candidates of a search: how each is made from the model, and what the emulator and ONNX Runtime say about it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lrcompile import verify
from lrcompile.backends.c import deploy
from lrcompile.backends.c.deploy import Board
from lrcompile.backends.c.target import Target
from lrcompile.data import Batches
from lrcompile.errors import GateError, InfeasibleError, UnsupportedError, UsageError
from lrcompile.graphs.onnx.graph import OnnxGraph
from lrcompile.graphs.onnx.session import FileSession
from lrcompile.progress import Progress

FLOAT, INT8 = "float32", "int8"


@dataclass(frozen=True)
class Setting:
    """A point of the search space.

    Args:
        keep: share of the linear weights' values that stays; ranks are given to the layers under it.
        precision: ``float32`` or ``int8``.
        ram: bytes that the schedule must fit; a smaller number means smaller tiles and more instructions.
    """

    keep: float
    precision: str
    ram: int

    @property
    def file(self) -> str:
        """Name of the model file; the schedule does not change it."""
        return f"keep{self.keep:.3f}-{self.precision}.onnx"

    @property
    def name(self) -> str:
        return f"keep {self.keep:g} {self.precision}, {self.ram:,} B"


@dataclass(eq=False)
class Candidate:
    """What became of a setting.

    Attributes:
        ram, flash: parts and ``total`` in bytes, of the linked program.
        drift: of the file against the original, on evaluation samples.
        reason: why it does not qualify; empty where it does.
    """

    setting: Setting
    drift: verify.Drift | None = None
    ram: Mapping[str, int] = field(default_factory=dict)
    flash: Mapping[str, int] = field(default_factory=dict)
    instructions: int = 0
    max_error: float = 0.0
    samples: int = 0
    task: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def fits(self) -> bool:
        return not self.reason

    @property
    def costs(self) -> tuple[float, ...]:
        """What is minimised."""
        loss = float("inf") if self.drift is None else self.drift.value
        return loss, self.ram["total"], self.flash["total"], self.instructions


@dataclass(eq=False)
class Workshop:
    """Makes and tries candidates; files and their drift are kept for every other schedule of them.

    Args:
        flash: bytes, or None.
        limit: of the drift.
        shapes: static shapes of the inputs.
        samples: how many evaluation samples each candidate executes.
    """

    model: Path
    calibration: Batches
    evaluation: Batches
    folder: Path
    target: Target
    flash: int | None
    limit: float
    shapes: Mapping[str, tuple[int, ...]]
    samples: int = 4
    metric: verify.Metric | None = None
    task: Any = None
    tell: Progress = field(default_factory=Progress)
    _files: dict[str, tuple[Path, verify.Drift] | str] = field(default_factory=dict)

    def tried(self, setting: Setting) -> Candidate:
        """Makes the file, the firmware, and runs it."""
        found = self.made(setting)
        if isinstance(found, str):
            return Candidate(setting, reason=found)
        path, drift = found
        candidate = Candidate(setting, drift)
        if not drift.value <= self.limit:
            candidate.reason = f"the outputs drift by {drift.value:.3g}, {self.limit:g} is allowed"
        elif self.flash is not None and weights(path) > self.flash:
            candidate.reason = f"the weights alone take {weights(path):,} bytes of flash"
        else:
            self._deployed(candidate, path)
        return candidate

    def made(self, setting: Setting) -> tuple[Path, verify.Drift] | str:
        """The file of a setting and its drift, or why there is none."""
        if setting.file not in self._files:
            self.tell(f"making {setting.file}")
            try:
                path = self._written(setting)
                reference, candidate = FileSession(str(self.model)), FileSession(str(path))
                drift = verify.measure(reference.run, candidate.run, self.evaluation, metric=self.metric)
                self._files[setting.file] = path, drift
            except (GateError, InfeasibleError, UnsupportedError) as error:
                self._files[setting.file] = error.message
        return self._files[setting.file]

    def _written(self, setting: Setting) -> Path:
        dense = self._compressed(setting.keep)
        return dense if setting.precision == FLOAT else self._quantised(dense, self.folder / setting.file)

    def _compressed(self, keep: float) -> Path:
        """The model with its weights cut to a share; ranks by what an error of each layer does to the outputs."""
        if keep >= 1:
            return self.model
        out = self.folder / Setting(keep, FLOAT, 0).file
        if not out.exists():
            from lrcompile import cache
            from lrcompile.api import optimize
            from lrcompile.budget import Budget
            from lrcompile.options import Options
            from lrcompile.planning import Settings

            options = Options(max_drift=1e9, latency=False, settings=Settings(cache=cache.folder()))
            optimize(
                self.model,
                Budget(keep=keep),
                calibration=self.calibration,
                evaluation=self.evaluation,
                options=options,
                out=out,
            )
        return out if out.exists() else self.model

    def _quantised(self, dense: Path, out: Path) -> Path:
        import onnx_ir as ir

        from lrcompile.graphs.onnx.quantise import quantise

        graph = OnnxGraph.load(dense)
        ir.save(quantise(graph.model, (batch for batch in self.calibration.cut(1))), out)
        return out

    def _deployed(self, candidate: Candidate, path: Path) -> None:
        """Plans, compiles and executes; whatever stops it is the candidate's reason."""
        setting = candidate.setting
        board = Board(self.target, ram=setting.ram, flash=self.flash)
        try:
            self.tell(f"scheduling {setting.name}")
            found = deploy.plan(deploy.formulas(path, self.shapes), board)
            self.tell(f"compiling {setting.name}")
            firmware = deploy.compile_to(self.folder / "firmware", found, board)
            self.tell(f"running {setting.name}", total=self.samples)
            check = deploy.check(firmware, path, self._some())
        except (GateError, UnsupportedError) as error:
            candidate.reason = error.message
            return
        candidate.ram, candidate.flash = firmware.board.ram(), firmware.board.flash()
        candidate.instructions, candidate.max_error = check.instructions, check.max_error
        candidate.samples = check.samples

    def _some(self) -> Any:
        for batch in itertools.islice(self.evaluation.cut(1), self.samples):
            yield batch
            self.tell.advance()

    def scored(self, candidates: Sequence[Candidate]) -> None:
        """Adds the task's scores, for the report: nothing is chosen by them."""
        for each in candidates:
            found = self.made(each.setting)
            if self.task is not None and not isinstance(found, str):
                self.tell(f"scoring {each.setting.file}")
                each.task = self.task(FileSession(str(found[0])).run)


def weights(path: Path) -> int:
    """Bytes of all stored tensors of a file; those of a Q/DQ file are its codes and scales."""
    return OnnxGraph.load(path).nbytes


def static_shapes(graph: OnnxGraph, data: Batches, given: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Shapes of all inputs: those given, else one sample of the data.

    Raises:
        UsageError: a name that is no input.
    """
    batch: Mapping[str, np.ndarray] = next(iter(data.cut(1)))
    found = {name: tuple(array.shape) for name, array in batch.items()}
    unknown = set(given) - {spec.name for spec in graph.input_specs}
    if unknown:
        raise UsageError(f"no input '{min(unknown)}'", where="--shape", hint="give the name of an input")
    return found | {name: tuple(shape) for name, shape in given.items()}
