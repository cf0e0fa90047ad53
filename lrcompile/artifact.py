"""Saving a rewritten module to a folder and loading it again: safetensors and JSON, no pickle, no code.

A folder holds ``lrcompile.json`` (the structure of every rewritten layer, names of shared tensors),
``lrcompile.safetensors`` (every tensor once), and what rebuilds the rest of the module: ``config.json`` for a
Hugging Face model, ``program.json`` (see :mod:`lrcompile.program`) where a sample was given. The weights do
not bear the name ``model.safetensors``, because ``from_pretrained`` would take them, miss the rewritten
layers and fill those with random numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lrcompile import artifact_hf
from lrcompile.artifact_load import install_sites, materialise, non_persistent
from lrcompile.artifact_read import CONFIG, PROGRAM, SCHEMA, TARGET, WEIGHTS, read_json, read_manifest, read_tensors
from lrcompile.errors import InvalidInputError, UsageError
from lrcompile.files import AtomicSet, system_error, write_error
from lrcompile.graphs.base import SUFFIXES
from lrcompile.graphs.module import ModuleGraph
from lrcompile.graphs.module_store import stored, update
from lrcompile.graphs.structured import StructuredConv, StructuredLinear, place, structured_modules
from lrcompile.linop import structure, tensors

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from lrcompile.graphs.onnx.graph import OnnxGraph


def save(
    model: nn.Module | ModuleGraph, folder: str | Path, *, sample: Any = None, source: Any = None, force: bool = False
) -> list[str]:
    """Writes a module, rewritten or not, so that :func:`load` brings it back; returns the names of the files.

    Args:
        model: a module, or a graph with its replacements in place.
        folder: created if it does not exist.
        sample: a batch; with it a traced program is stored, so that any module loads on its own in a fresh
            process. Hugging Face models need none: their class is rebuilt from ``config.json``.
        source: the folder that the model came from; its tokenizer files are copied.
        force: replace the files of an earlier artefact.

    Raises:
        UsageError: files exist and ``force`` is not set, or the folder cannot be written.
        UnsupportedError: a sample was given, but the module cannot be traced into plain data.
        ResourceError: the disk is full.
    """
    graph = model if isinstance(model, ModuleGraph) else None
    module = model.model if isinstance(model, ModuleGraph) else model
    if not isinstance(module, nn.Module):
        hint = "an ONNX graph is written by the backend 'onnxruntime'"
        raise UsageError(f"cannot save a {type(model).__name__}", hint=hint)
    folder = _made(Path(folder))
    origin = source if source is not None else graph.path if graph else None
    with AtomicSet(folder / TARGET, force=force) as files:
        return write(module, files, source=origin, sample=sample)


def write(module: nn.Module, files: AtomicSet, *, source: str | Path | None = None, sample: Any = None) -> list[str]:
    """Writes the artefact into a set of files whose target is its ``lrcompile.json``; returns their names."""
    held, aliases = stored(module)
    written = [files.target.name, WEIGHTS]
    is_hf = artifact_hf.is_known(module)
    program: dict[str, Any] | None = None
    if sample is not None and not is_hf:
        from lrcompile.program_export import export

        program, extra = export(module, sample, {place(tensor): name for name, tensor in held.items()})
        held = {**held, **extra}
        files.stage(PROGRAM).write_text(json.dumps(program), encoding="utf-8")
        written.append(PROGRAM)
    texts = artifact_hf.texts(module) if is_hf else {}
    copies = artifact_hf.tokenizer_files(source) if is_hf else {}
    for name, data in {**texts, **copies}.items():
        files.stage(name).write_bytes(data)
        written.append(name)
    content = _content(held)
    _write_tensors(held, files.stage(WEIGHTS), content)
    manifest = {
        "schema": SCHEMA,
        "model": {"module": type(module).__module__, "class": type(module).__qualname__},
        "content": content,
        "aliases": aliases,
        "sites": _sites(module, aliases),
        "buffers": non_persistent(module),
        "parameters": [name for name, tensor in held.items() if isinstance(tensor, nn.Parameter)],
    }
    files.path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return written


def _sites(module: nn.Module, aliases: Mapping[str, str]) -> list[dict[str, Any]]:
    """One entry for each structured layer; layers that share leaves name the same tensors."""
    found = []
    for path, layer in structured_modules(module):
        prefix = f"{path}." if path else ""
        names = {inner: f"{prefix}factors.{inner}" for inner, _ in tensors(layer.operator)}
        found.append(
            {
                "path": path,
                "kind": _kind(layer),
                "structure": structure(layer.operator),
                "tensors": {inner: aliases.get(name, name) for inner, name in names.items()},
                "bias": aliases.get(f"{prefix}bias", f"{prefix}bias") if layer.bias is not None else None,
                "stride": list(layer.stride) if isinstance(layer, StructuredConv) else [],
                "trainable": layer.factors.trainable,
            }
        )
    return found


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, StructuredLinear):
        return "Conv1D" if layer.transposed else "Linear"
    return "Conv"


def _content(held: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(held.items()):
        update(digest, name, tensor)
    return digest.hexdigest()


def _write_tensors(held: Mapping[str, Tensor], path: Path, content: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in held.items():
        value = tensor.detach().cpu().contiguous()
        if value.untyped_storage()._cdata in storages:  # other views of one storage; the format wants disjoint data
            value = value.clone()
        storages.add(value.untyped_storage()._cdata)
        plain[name] = value
    try:
        save_file(plain, path, metadata={"lrcompile": content})  # more entries would come in any order
    except SafetensorError as error:
        raise system_error(error, path) from error


def load(folder: str | Path, into: nn.Module | None = None) -> nn.Module | OnnxGraph | ExportedProgram:
    """What :func:`save` wrote, ready to run.

    Args:
        folder: of :func:`save`, or one with a ``model.onnx`` or ``model.pt2``.
        into: a freshly built dense module of the saved class. It is changed in place: the rewritten
            layers are put in, and every other parameter and buffer gets its stored value.

    Returns:
        ``into``, a Hugging Face model (in evaluation mode), a :class:`lrcompile.program.Program`, an exported
        program, or for ONNX an object with ``run(inputs)``.

    Raises:
        InvalidInputError: unreadable, incomplete or unsafe files, or ``into`` is another model.
        UsageError: nothing in the folder says how to rebuild the module, and ``into`` is not given.
        MissingExtraError: a Hugging Face model, and transformers is not installed.
    """
    folder = Path(folder)
    if not (folder / TARGET).exists() and (folder / "model.onnx").is_file():
        from lrcompile.graphs.onnx.graph import OnnxGraph

        return OnnxGraph.load(folder / "model.onnx")
    if not (folder / TARGET).exists() and (folder / "model.pt2").is_file():
        from lrcompile.graphs.fx.archive import load as load_program

        return load_program(folder / "model.pt2")
    manifest = read_manifest(folder)
    held = read_tensors(folder, manifest)
    if into is not None:
        return install_sites(into, manifest, held)
    if (folder / CONFIG).exists():
        return install_sites(artifact_hf.skeleton(folder), manifest, held).eval()
    if (folder / PROGRAM).exists():
        from lrcompile.program import Program

        spec = read_json(folder, PROGRAM)
        if not isinstance(spec, dict):
            raise InvalidInputError("malformed program", where=PROGRAM)
        return Program(spec, materialise(held, manifest)).eval()
    name = manifest["model"]["class"]
    raise UsageError(
        "the folder holds no program to rebuild the module from",
        where=str(folder),
        hint=f"load(folder, into=<a freshly built {name}>), or save with sample=<a batch>",
    )


def open_folder(folder: str | Path) -> nn.Module:
    """The module in a folder of :func:`save` or of Hugging Face.

    Raises:
        InvalidInputError, UnsupportedError, UsageError, MissingExtraError: as for :func:`load`.
    """
    folder = Path(folder)
    if not (folder / TARGET).exists():
        return artifact_hf.open_hf(folder)
    found = load(folder)
    assert isinstance(found, nn.Module)
    return found


def save_result(result: Any, folder: str | Path, *, force: bool = False) -> Path:
    """Writes a pipeline's result with its reports into a folder; returns the file that stands for it.

    Args:
        result: a :class:`lrcompile.pipeline.Result`.

    Raises:
        UsageError: there is one already and ``force`` is not set.
    """
    from lrcompile.registry import backend_for
    from lrcompile.report import html_text, json_text

    folder = _made(Path(folder))
    suffixes = SUFFIXES.get(result.graph.kind)
    stem = "report" if suffixes is None else "model.report"
    with AtomicSet(folder / (TARGET if suffixes is None else f"model{suffixes[0]}"), force=force) as files:
        graph = result.final or result.graph
        backend_for(graph).build(graph, out=files)
        files.stage(f"{stem}.json").write_text(json_text(result.report), encoding="utf-8")
        files.stage(f"{stem}.html").write_text(html_text(result.report), encoding="utf-8")
    return files.target


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(error, folder) from error
    return folder
