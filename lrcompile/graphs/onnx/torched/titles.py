"""Names of a model's stored tensors as parameters: those of the file, or of the site that reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import onnx_ir as ir
from torch import nn

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
            paths = {_address(tensor): path for path, tensor in tensors(match.operator)}
            for value in _weights(match):
                tensor = constant(value)
                path = "" if tensor is None else paths.get(_address(to_torch(tensor)), "")
                title = _weight_title(str(value.name), site, match, path)
                if title:
                    wanted.setdefault(str(value.name), title)
            if match.bias is not None and is_generated(str(match.bias.name)):
                wanted.setdefault(str(match.bias.name), f"{site}.bias")
    return wanted


def _weights(match: Match) -> list[ir.Value]:
    behind = [origin(value)[0] for node in match.nodes for value in node.inputs if value is not None]
    return [
        value for value in behind if constant(value) is not None and value.shape is not None and len(value.shape) > 1
    ]


def _weight_title(name: str, site: str, match: Match, path: str) -> str:
    """The site's name with that of the factor; the tensor's own name where it says the same."""
    if isinstance(match.operator, Dense) or not path:
        same = (name.removesuffix("weight").rstrip("._") or name) == site
        return "" if same or not isinstance(match.operator, Dense) else f"{site}.weight"
    return f"{site}.factors.{path}"


def _address(tensor: object) -> int:
    return tensor.data_ptr()  # type: ignore[attr-defined]


def _legal(name: str) -> str:
    parts = [re.sub(r"[^\w@$-]", "_", part, flags=re.ASCII) for part in name.split(".") if part]
    return (
        ".".join(f"{part}_" if part in _TAKEN and part not in ("bias", "weight") else part for part in parts)
        or "tensor"
    )
