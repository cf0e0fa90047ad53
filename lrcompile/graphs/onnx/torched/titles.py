"""Names of a model's stored tensors as parameters: those of the file, or of the site that reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lrcompile.graphs.fx.sites import common, stem
from lrcompile.graphs.onnx.constants import constant, origin
from lrcompile.graphs.onnx.match import Match
from lrcompile.graphs.onnx.naming import is_generated, unique
from lrcompile.graphs.onnx.tensors import to_torch
from lrcompile.linop import Dense, tensors

_TAKEN = frozenset(dir(nn.Module))


def titles(names: Iterable[str], sites: Mapping[str, tuple[Match, ...]]) -> dict[str, str]:
    """Dotted names of parameters by name of the value; the weight of a site is called by the site.

    What no name in an exported program's file may hold becomes an underscore.

    Args:
        names: of stored tensors.
        sites: matches by the name of their site.
    """
    wanted = _by_site(sites)
    found: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        found[name] = unique(_legal(wanted.get(name, name)), taken, "_")
    stems = {title[:at] for title in taken for at, letter in enumerate(title) if letter == "."}
    return {name: f"{title}.weight" if title in stems else title for name, title in found.items()}


def _by_site(sites: Mapping[str, tuple[Match, ...]]) -> dict[str, str]:
    wanted: dict[str, str] = {}
    for site, matches in sites.items():
        for match in matches:
            for name, title in _weights(site, match).items():
                wanted.setdefault(name, title)
            if match.bias is not None and is_generated(str(match.bias.name)):
                wanted.setdefault(str(match.bias.name), f"{site}.bias")
    return wanted


def _weights(site: str, match: Match) -> dict[str, str]:
    """Titles of a site's weights; none where their own names give the site its name."""
    paths = _paths(match)
    stems = [stem(name) for name in paths]
    own = stems[:1] if len(stems) < 2 else [common(stems) or stems[0]]
    ours = any(name == f"{site}.{path.removesuffix('.weight')}" for name, path in paths.items())  # written by a backend
    if own == [site] and not ours and not any(is_generated(name) for name in paths):
        return {}
    if isinstance(match.operator, Dense):
        return {name: f"{site}.weight" for name in paths}
    return {name: f"{site}.factors.{path}" for name, path in paths.items()}


def _paths(match: Match) -> dict[str, str]:
    """The stored tensors that the leaves of an expression are, with the leaves' paths, in the order of the nodes."""
    leaves = {_address(tensor): path for path, tensor in tensors(match.operator)}
    found: dict[str, str] = {}
    for value in (value for node in match.nodes for value in node.inputs if value is not None):
        behind = origin(value)[0]
        tensor = constant(behind)
        path = None if tensor is None else leaves.get(_address(to_torch(tensor)))
        if path is not None:
            found[str(behind.name)] = path
    return found


def _address(tensor: Tensor) -> int:
    return tensor.data_ptr()


def _legal(name: str) -> str:
    parts = [re.sub(r"[^\w@$-]", "_", part, flags=re.ASCII) for part in name.split(".") if part]
    return (
        ".".join(f"{part}_" if part in _TAKEN and part not in ("bias", "weight") else part for part in parts)
        or "tensor"
    )
