"""An exported program as a graph of linear sites.

The program is never changed. It is unlifted into a flat module in which every constant-linear part is one
structured layer, so that measuring and replacing are those of :class:`lrcompile.graphs.module.ModuleGraph`;
what leaves is a new exported program in which replaced sites are plain ``aten`` operations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.export import ExportedProgram

from lrcompile.calibrate import Moments
from lrcompile.data import InputSpec
from lrcompile.errors import UsageError
from lrcompile.graphs.base import Inputs, Journal, Outputs, Replacement
from lrcompile.graphs.fx.channels import regions
from lrcompile.graphs.fx.flat import Typed, flat, input_specs, outputs, stored, typed
from lrcompile.graphs.fx.lower import Placed, lowered
from lrcompile.graphs.fx.sites import FxReader, raised
from lrcompile.graphs.module import ModuleGraph
from lrcompile.graphs.module_run import few, run
from lrcompile.graphs.module_sites import Found, check_finite
from lrcompile.graphs.module_store import update
from lrcompile.graphs.structured import Pool, place
from lrcompile.linop import tensors
from lrcompile.order import Region
from lrcompile.sites import LinearSite
from lrcompile.sketch import Importance


class FxGraph(ModuleGraph):
    """An exported program with its linear sites and what replaces them.

    Sites are ``aten.linear``, ``addmm``, ``mm``, ``matmul``, ``bmm``, ``einsum`` and convolutions with a constant
    weight, however it is stored: transposed, sliced (the packed projections of ``nn.MultiheadAttention``), tied or
    computed. Branches of one input that are added up are one site.

    Attributes:
        program: what was given, or what the last node rewrite made of it.

    Args:
        program: not modified; its tensors are shared, not copied.
        path: the ``.pt2`` file that it was read from, if it was.

    Raises:
        InvalidInputError: a parameter holds NaN or infinity.
        UnsupportedError: inputs that are not tensors, or a program that torch cannot turn into a module.
    """

    kind: ClassVar[str] = "fx"  # type: ignore[misc]

    def __init__(self, program: ExportedProgram, path: Path | None = None) -> None:
        self.given = program
        self.path = path
        self.journal = Journal()
        self._raise(program)

    def _raise(self, program: ExportedProgram) -> None:
        self.program = program
        self._specs = input_specs(program)
        names: dict[Hashable, list[str]] = {}
        for name, tensor in {**program.constants, **program.state_dict}.items():
            if isinstance(tensor, Tensor):
                names.setdefault(place(tensor), []).append(name)
        self._places = frozenset(names)
        module = flat(program)
        check_finite(module)
        found = raised(module, names)
        self._root = nn.Module()
        self._root.add_module("model", found.module)
        self._found = dict(found.founds)
        self._roots = found.roots
        self.replacements: dict[str, Replacement] = {}
        self._changes = {}
        self._pool = Pool(self.model.parameters())
        self.sample: Any = None

    # -- sites -----------------------------------------------------------------------------

    def check(self, batch: Inputs) -> None:
        """Keeps a few samples; a graph tells all else without being run."""
        self.sample = few(batch)

    def _ensure_checked(self, batches: Iterable[Inputs]) -> None:
        if self.sample is None:
            for batch in batches:
                self.check(batch)
                break

    def rollback(self, mark: int) -> None:
        """Undoes every replacement and node rewrite since ``mark``."""
        while len(self.journal.entries) > mark:
            name, before = self.journal.entries.pop()
            if isinstance(before, ExportedProgram):
                self._raise(before)
            else:
                self._set(name, before)
        if not self.replacements:
            self._pool = Pool(self.model.parameters())

    def adopt(self, model: Any) -> None:
        """Continues with a program that a graph pass derived from this one.

        Raises:
            UsageError: sites were replaced already; graph passes come first.
        """
        if self.replacements:
            raise UsageError("graph rewrites must come before weight rewrites in a pipeline")
        before = self.program
        self._raise(model)
        self.journal.entries.append(("", before))

    def rewrite_nodes(self, rules: Any) -> list[str]:
        """Applies (pattern, replacement) pairs; returns the name of a node for each match.

        Raises:
            UsageError: no pairs of functions, or sites were replaced already.
            UnsupportedError: a pattern that torch cannot trace or match.
        """
        from lrcompile.graphs.fx.patterns import rewritten

        program, places = rewritten(self.program, rules)
        if places:
            self.adopt(program)
        return places

    def regions(self) -> Sequence[Region]:
        """Values between sites whose channels may come in any order."""
        return regions(self.model, self._found)  # type: ignore[arg-type]

    def lowered(self) -> ExportedProgram:
        """The program with every replacement written as plain operations.

        Raises:
            UnsupportedError: torch cannot trace an expression.
        """
        return lowered(self.program, list(self._placed()))

    def _placed(self) -> Iterator[Placed]:
        """Layers to be written: the replaced ones, and those that a replaced one shares its stored tensor with.

        A slice of a packed weight becomes a weight of its own where another slice was replaced, else the whole
        would have to stay.
        """
        loose = {root for name in self.replacements for root in self._roots[name]}
        for name, found in self._found.items():
            if name not in self.replacements and (
                found.site.frozen or not loose & self._roots[name] or self._whole(found)
            ):
                continue
            for reader in found.readers:
                assert isinstance(reader, FxReader)
                yield Placed(name, reader, self.model.get_submodule(reader.path))  # type: ignore[arg-type]

    def _whole(self, found: Found) -> bool:
        """Whether a site's tensors are stored as they are, so that they stay when others of their root go."""
        return all(place(tensor) in self._places for _, tensor in tensors(found.site.operator))

    # -- running ---------------------------------------------------------------------------

    def run(self, inputs: Inputs) -> Outputs:
        """Named outputs of the program as it was given; bfloat16 comes back as float32."""
        return run(self._given, self._typed(inputs))

    def pair(self) -> tuple[nn.Module, nn.Module]:
        """The program as it was given and as it stands, as modules of plain operations."""
        return self._given, flat(self.lowered())

    @cached_property
    def _given(self) -> nn.Module:
        return flat(self.given)

    def observe(self, batches: Iterable[Inputs], sites: Sequence[LinearSite], *, memory: int) -> Mapping[str, Moments]:
        """Moments of what the sites read, keyed by :attr:`LinearSite.input`."""
        return super().observe(self._all_typed(batches), sites, memory=memory)

    def probe(self, batches: Iterable[Inputs], changes: Mapping[str, Replacement]) -> Mapping[str, float]:
        """Squared relative change of the outputs when each site alone is replaced."""
        return super().probe(self._all_typed(batches), changes)

    def gradients(
        self, batches: Iterable[Inputs], sites: Sequence[LinearSite], *, memory: int, seed: int
    ) -> Importance:
        """Moments of the outputs' gradients at what the sites give, by site name; see :mod:`lrcompile.sketch`."""
        return super().gradients(self._all_typed(batches), sites, memory=memory, seed=seed)

    @property
    def _whole_batches(self) -> bool:
        """A program may have been traced for batches of one size."""
        return any(spec.shape and isinstance(spec.shape[0], int) and spec.shape[0] > 1 for spec in self._specs)

    def macs(self, sample: Inputs) -> int:
        """Multiply–accumulates of all matrix products, convolutions and attention on ``sample``."""
        return super().macs(self._typed(sample))

    def _typed(self, inputs: Inputs) -> Inputs:
        return typed(inputs, self.program)

    def _all_typed(self, batches: Iterable[Inputs]) -> Iterable[Inputs]:
        if iter(batches) is batches:
            return [self._typed(batch) for batch in batches]
        return Typed(batches, self.program)

    # -- facts -----------------------------------------------------------------------------

    @property
    def input_specs(self) -> list[InputSpec]:
        """Name, dtype and shape of every tensor that must be fed."""
        return list(self._specs)

    def specs_for(self, names: Iterable[str]) -> list[InputSpec]:
        """The same: a program takes neither more nor less."""
        return self.input_specs

    @property
    def outputs(self) -> list[dict[str, Any]]:
        """Name, dtype and shape of every named output."""
        return outputs(self.program)

    @property
    def nodes(self) -> int:
        """Number of operations."""
        return sum(node.op not in ("placeholder", "output") for node in self.program.graph.nodes)

    @property
    def files(self) -> list[Path]:
        """The file that the program was read from."""
        return [] if self.path is None else [self.path]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors of the given program, each once."""
        return sum(tensor.numel() * tensor.element_size() for tensor in stored(self.given).values())

    @property
    def parameters(self) -> int:
        """Number of values in all stored floating-point tensors of the given program, each once."""
        return sum(tensor.numel() for tensor in stored(self.given).values() if tensor.is_floating_point())

    def clean(self) -> tuple[bool, str]:
        """torch's exporter leaves nothing unused."""
        return False, "nothing is taken out of an exported program"

    def fingerprint(self) -> str:
        """SHA-256 over the program's operations and every stored tensor."""
        digest = hashlib.sha256(str(self.program.graph).encode())
        for name, tensor in stored(self.program).items():
            update(digest, name, tensor)
        return digest.hexdigest()
