"""An ``nn.Module`` as a graph of linear sites.

The user's module is never changed: the graph works on a copy of the module tree that holds the
same tensors (see :func:`lrcompile.graphs.module_sites.share`), and a replacement swaps modules in that
copy. Which modules read one and the same tensor, and who reads a weight behind its
module's back is only known from a run: :meth:`ModuleGraph.check`, called by whatever runs the module first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace as changed
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lrcompile.calibrate import Moments
from lrcompile.data import InputSpec
from lrcompile.errors import GateError, UsageError
from lrcompile.graphs import module_gradients, module_observe, module_store
from lrcompile.graphs.base import Inputs, Journal, Outputs, Replacement
from lrcompile.graphs.module_run import call, few, input_specs, macs, run
from lrcompile.graphs.module_sites import Found, check_finite, find, share
from lrcompile.graphs.module_trace import Trace, trace
from lrcompile.graphs.structured import Change, Pool, arranged, install, shifted
from lrcompile.linop import LinearOperator, tensors
from lrcompile.order import Region
from lrcompile.sites import LinearSite, Use, Window
from lrcompile.sketch import Importance
from lrcompile.windows import unfit


class ModuleGraph:
    """A module with its linear sites and what replaces them.

    ``run``, ``observe``, ``probe``, ``fingerprint``, ``nbytes`` and ``parameters`` are about the module as
    it was given; :attr:`model` is the module with all replacements in place.

    Attributes:
        sample: a few samples of the batch of :meth:`check`, for tracing; None before.

    Args:
        model: not modified; its tensors are shared, not copied.
        path: the folder that it was read from, if it was.
        sample: a batch for :meth:`check`.

    Raises:
        InvalidInputError: a parameter holds NaN or infinity.
        UnsupportedError: a script module, parameters on the meta device, or a tree that cannot be copied.
    """

    kind: ClassVar[str] = "module"

    def __init__(self, model: nn.Module, path: Path | None = None, *, sample: Any = None) -> None:
        self.path = path
        self._start(model)
        if sample is not None:
            self.check(sample)

    def _start(self, model: nn.Module) -> None:
        check_finite(model)
        self._root = nn.Module()  # a holder, so that the model itself may be a site
        self._root.add_module("model", share(model))
        self.journal = Journal()
        self.replacements: dict[str, Replacement] = {}
        self._changes: dict[str, list[Change]] = {}
        self._pool = Pool(self.model.parameters())
        self._trace: Trace | None = None
        self._regions: Sequence[Region] | None = None  # tracing takes long, and replacements leave the wiring alone
        self.sample: Any = None
        holder = self._root if not list(self.model.children()) else self.model
        self._found = {found.site.name: found for found in find(holder)}

    @property
    def model(self) -> nn.Module:
        """The module with every replacement in place."""
        return self._root.get_submodule("model")

    # -- sites -----------------------------------------------------------------------------

    def linear_sites(self) -> Sequence[LinearSite]:
        """Every constant linear map, in order of registration, with what it holds now.

        Before :meth:`check` a site's input bears the name of its own module. After it, sites that read one
        and the same tensor have one input, and those that cannot be written back are frozen.
        """
        return [self._current(found.site) for found in self._found.values()]

    def _current(self, site: LinearSite) -> LinearSite:
        current = self.replacements.get(site.name)
        return site if current is None else changed(site, operator=current.operator)

    def found(self, name: str) -> Found:
        """The site as it was given, and the modules that apply it."""
        return self._found[name]

    def original(self, name: str) -> LinearSite:
        """The site as it stood in the given module."""
        return self._found[name].site

    def check(self, batch: Inputs) -> None:
        """Runs one batch and learns which weights are read outside their modules, and which inputs are shared.

        Sharing is taken from this one batch: a model whose wiring depends on its inputs must not be given.

        Raises:
            UnsupportedError: the model fails on the batch.
        """
        with self.as_given():
            self._trace = trace(self.model, list(self._found.values()), lambda: call(self.model, batch))
        self.sample, self._regions = few(batch), None
        keys: dict[tuple, str] = {}
        for name, found in self._found.items():
            uses = tuple(self._shared(use, found.site.window, self._trace, keys) for use in found.site.uses)
            frozen = found.site.frozen or self._trace.reason(found)
            self._found[name] = Found(changed(found.site, uses=uses, frozen=frozen), found.readers)

    @staticmethod
    def _shared(use: Use, window: Window | None, trace: Trace, keys: dict[tuple, str]) -> Use:
        """The use with the name of the first module that reads the very same tensors through an equal window."""
        reads = tuple(trace.reads.get(use.node, ()))
        shared = reads and use.role == "apply"
        return changed(use, input=keys.setdefault((reads, window), use.node)) if shared else use

    def _ensure_checked(self, batches: Iterable[Inputs]) -> None:
        if self._trace is None:
            for batch in batches:
                self.check(batch)
                break  # one batch tells all

    # -- replacing -------------------------------------------------------------------------

    def replace(self, site: LinearSite, by: LinearOperator, shift: Tensor | None = None) -> None:
        """Installs an expression in every module that applies the site.

        Raises:
            UsageError: the site cannot be written, or the shapes differ.
        """
        original = self.original(site.name)
        if original.frozen:
            raise UsageError(f"cannot be replaced: {original.frozen}", where=site.name)
        if by.shape != original.shape:
            raise UsageError(f"shape {by.shape} cannot replace {original.shape}", where=site.name)
        reason = unfit(by, original.window)
        if reason:
            raise UsageError(f"cannot be written: {reason}", where=site.name)
        self.journal.entries.append((site.name, self.replacements.get(site.name)))
        self._set(site.name, Replacement(by, shift))

    def regions(self) -> Sequence[Region]:
        """Values between sites whose channels may come in any order, as torch traces the samples that were checked."""
        if self.sample is None:
            return []
        if self._regions is None:
            from lrcompile.graphs.module_regions import regions

            with self.as_given():
                self._regions = regions(self.model, self.sample, self._found)
        return self._regions

    def reorder(self, orders: Sequence[tuple[Region, Tensor]], operators: Mapping[str, LinearOperator]) -> None:
        """Puts the channels of regions in other orders; one entry of the journal for each change.

        Args:
            orders: for each place (size,) of a region the channel that comes there.
            operators: what the writers and readers hold then.
        """
        moved = {writer: order for region, order in orders for writer in region.writers}
        for name, operator in operators.items():
            held = self.replacements.get(name)
            shift, order = (None, None) if held is None else (held.shift, held.order)
            if name in moved:
                shift = None if shift is None else shift[moved[name]]
                order = moved[name] if order is None else order[moved[name]]
            self.journal.entries.append((name, held))
            self._set(name, Replacement(operator, shift, order))

    def rollback(self, mark: int) -> None:
        """Undoes every replacement since ``mark``; what was never replaced before is the original module again."""
        while len(self.journal.entries) > mark:
            self._set(*self.journal.entries.pop())
        if not self.replacements:
            self._pool = Pool(self.model.parameters())

    def _set(self, name: str, replacement: Replacement | None) -> None:
        for change in reversed(self._changes.pop(name, [])):
            change.undo()
        self.replacements.pop(name, None)
        if replacement is None:
            return
        done: list[Change] = []
        for reader in self._found[name].readers:
            weight = reader.weight
            factors = self._pool.factors(replacement.operator, device=weight.device, trainable=weight.requires_grad)
            bias = shifted(arranged(reader.bias, replacement.order), replacement.shift, weight)
            done += install(self._root, reader.module, reader.structured(factors, bias))
        self._changes[name] = done
        self.replacements[name] = replacement

    def adopt(self, model: nn.Module) -> None:
        """Continues with a module that an exact graph pass derived from this one.

        Raises:
            UsageError: sites were replaced already; graph passes come first.
        """
        if self.replacements:
            raise UsageError("graph rewrites must come before weight rewrites in a pipeline")
        self._start(model)

    @contextmanager
    def as_given(self) -> Iterator[None]:
        """The original modules in their places."""
        changes = [change for done in self._changes.values() for change in done]
        for change in reversed(changes):
            change.undo()
        try:
            yield
        finally:
            for change in changes:
                change.redo()

    # -- running ---------------------------------------------------------------------------

    def run(self, inputs: Inputs) -> Outputs:
        """Outputs of the module as it was given, dropout off; bfloat16 comes back as float32."""
        self._ensure_checked([inputs])
        with self.as_given():
            return run(self.model, inputs)

    def release(self) -> None:
        """Nothing is kept between runs."""

    def observe(self, batches: Iterable[Inputs], sites: Sequence[LinearSite], *, memory: int) -> Mapping[str, Moments]:
        """Moments of what the sites read, keyed by :attr:`LinearSite.input`.

        Sites that read one and the same tensor get one and the same object, under every key that is asked for.
        """
        batches = module_observe.reusable(batches)
        self._ensure_checked(batches)
        keys = {site.input: self.original(site.name) for site in sites}
        wanted = {original.input: self.found(original.name) for original in keys.values()}
        with self.as_given():
            moments = module_observe.observe(self.model, batches, wanted, memory=memory)
        asked = {key: moments[original.input] for key, original in keys.items() if original.input in moments}
        return {**moments, **asked}

    def probe(self, batches: Iterable[Inputs], changes: Mapping[str, Replacement]) -> Mapping[str, float]:
        """Squared relative change of the outputs when each site alone is replaced."""
        batches = module_observe.reusable(batches)
        self._ensure_checked(batches)
        founds = {name: self.found(name) for name in changes}
        with self.as_given():
            return module_observe.probe(self.model, batches, founds, changes)

    def gradients(
        self, batches: Iterable[Inputs], sites: Sequence[LinearSite], *, memory: int, seed: int
    ) -> Importance:
        """Moments of the outputs' gradients at what the sites give, by site name; see :mod:`lrcompile.sketch`."""
        batches = module_observe.reusable(batches)
        self._ensure_checked(batches)
        founds = {site.name: self.found(site.name) for site in sites}
        with self.as_given():
            return module_gradients.gradients(
                self.model, batches, founds, memory=memory, seed=seed, whole=self._whole_batches
            )

    @property
    def _whole_batches(self) -> bool:
        """Whether a batch cannot be taken apart."""
        return False

    def macs(self, sample: Inputs) -> int:
        """Multiply–accumulates of all matrix products, convolutions and attention on ``sample``."""
        self._ensure_checked([sample])
        with self.as_given():
            return macs(self.model, sample)

    def clean(self) -> tuple[bool, str]:
        """A module tree is code: what of it is unused cannot be told, so nothing is taken out."""
        return False, "nothing is taken out of a module tree"

    # -- facts -----------------------------------------------------------------------------

    @property
    def input_specs(self) -> list[InputSpec]:
        """The inputs that must be fed: names only, since a signature says no more."""
        return self.specs_for(())

    def specs_for(self, names: Iterable[str]) -> list[InputSpec]:
        """The required inputs and those of ``names``, in the order of ``forward``.

        Raises:
            InvalidInputError: a name that ``forward`` does not take.
        """
        return input_specs(self.model, names)

    @property
    def opset(self) -> None:
        """A module has none."""
        return None

    @property
    def outputs(self) -> list[dict[str, Any]]:
        """A signature does not tell them."""
        return []

    @property
    def nodes(self) -> int:
        """Number of modules without children."""
        return sum(1 for module in self.model.modules() if not list(module.children()))

    @property
    def files(self) -> list[Path]:
        """Weights and configuration in the folder that the module was read from."""
        if self.path is None:
            return []
        wanted = {".safetensors", ".json", ".bin", ".txt", ".model"}
        return sorted(file for file in self.path.iterdir() if file.suffix in wanted and file.is_file())

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors (parameters and persistent buffers), each once."""
        with self.as_given():
            return module_store.nbytes(self.model)

    @property
    def parameters(self) -> int:
        """Number of values in all stored floating-point tensors, each once."""
        with self.as_given():
            return module_store.parameters(self.model)

    def fingerprint(self) -> str:
        """SHA-256 over the structure and every stored tensor."""
        with self.as_given():
            return module_store.fingerprint(self.model)

    def verify(self) -> None:
        """Checks that every replacement stands where it belongs and holds finite numbers.

        Raises:
            GateError: it does not; the site is named.
        """
        alive = {id(module) for module in self.model.modules()} | {id(self.model)}
        for name, replacement in self.replacements.items():
            found = self.found(name)
            if found.site.frozen:
                raise GateError(f"was replaced although {found.site.frozen}", where=name)
            if any(id(reader.module) in alive for reader in found.readers):
                raise GateError("the original module is still in place", where=name)
            for path, tensor in tensors(replacement.operator):
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise GateError(f"{path} holds NaN or infinity", where=name)
