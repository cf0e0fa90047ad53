"""What a model is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lrcompile.files import digest
from lrcompile.frontend import open_graph
from lrcompile.graphs.base import Graph
from lrcompile.report import human_bytes, human_count
from lrcompile.samples import first_sample, sample_inputs


def facts(path: Path) -> dict[str, Any]:
    """The JSON fields of ``inspect``; MACs are per sample, on made-up inputs."""
    graph = open_graph(path)
    sample = sample_inputs(graph)
    sites = [
        {
            "name": site.name,
            "shape": list(site.shape),
            "uses": len(site.uses),
            "kind": site.kind,
            "structure": repr(site.operator),
            "input": site.input,
            "frozen": site.frozen or None,
        }
        for site in graph.linear_sites()
    ]
    disk = sum(file.stat().st_size for file in graph.files)
    return {
        "input": {"path": str(path), "sha256": digest(path, graph.files), "bytes": disk},
        **_structure(graph),
        "parameters": graph.parameters,
        "bytes": disk,
        "macs": graph.macs(first_sample(sample, graph)) if sample is not None else None,
        "sites": sites,
    }


def _structure(graph: Graph) -> dict[str, Any]:
    """Opset, inputs, outputs and number of nodes; a module has its layers for nodes."""
    inputs = [
        {"name": spec.name, "dtype": None if spec.dtype is None else str(spec.dtype), "shape": list(spec.shape)}
        for spec in graph.input_specs
    ]
    return {"opset": graph.opset, "inputs": inputs, "outputs": list(graph.outputs), "nodes": graph.nodes}


def show(found: dict[str, Any]) -> None:
    """The same for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    opset = f", opset {found['opset']}" if found["opset"] else ""
    console.print(Text(f"{found['input']['path']}: {found['nodes']} nodes{opset}"))
    for side in ("inputs", "outputs"):
        for item in found[side]:
            shape = "×".join(str(size) if size not in (None, "") else "?" for size in item["shape"])
            console.print(Text(f"  {side[:-1]} {item['name']}  {item['dtype'] or ''} {shape}"))
    macs = human_count(found["macs"]) if found["macs"] else "unknown"
    sizes = f"{human_count(found['parameters'])} parameters, {human_bytes(found['bytes'])}"
    console.print(f"  {sizes}, {macs} MACs per sample")
    table = Table("site", "shape", "uses", "kind", "note", box=None, header_style="bold")
    for site in found["sites"]:
        shape = "×".join(map(str, site["shape"]))
        plain = site["structure"].startswith("Dense ")
        note = site["frozen"] or ("" if plain else site["structure"])
        table.add_row(*map(Text, (site["name"], shape, str(site["uses"]), site["kind"], note)))
    console.print(table)
