"""Hugging Face models: which classes are taken, and building them without their weights.

Only classes of the installed transformers are used, looked up by name; code that a folder brings along
(``auto_map``, ``trust_remote_code``) is never run, and pickled weights are never read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from lrcompile.artifact_read import CONFIG, read_json
from lrcompile.errors import InvalidInputError, LrcompileError, MissingExtraError, UnsupportedError

GENERATION = "generation_config.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""Files beside a model that its tokenizer or processor reads."""


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "zoo") from error
    return transformers


def is_known(model: nn.Module) -> bool:
    """Whether the model's very class is one of the installed transformers, so that its config rebuilds it."""
    transformers = sys.modules.get("transformers")  # a model of its class cannot exist without it
    base = getattr(transformers, "PreTrainedModel", None)
    if transformers is None or base is None or not isinstance(model, base):
        return False
    return getattr(transformers, type(model).__name__, None) is type(model)


def texts(model: Any) -> dict[str, bytes]:
    """``config.json`` and ``generation_config.json`` of a model."""
    config = json.loads(model.config.to_json_string())
    config["architectures"] = [type(model).__name__]
    config.pop("auto_map", None)
    found = {CONFIG: json.dumps(config, indent=2).encode()}
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        found[GENERATION] = generation.to_json_string().encode()
    return found


def tokenizer_files(source: str | Path | None) -> dict[str, bytes]:
    """The tokenizer's files of a local folder, by name."""
    folder = Path(source) if source is not None else None
    if folder is None or not folder.is_dir():
        return {}
    return {name: (folder / name).read_bytes() for name in TOKENIZER if (folder / name).is_file()}


def skeleton(folder: Path) -> nn.Module:
    """The model that ``config.json`` describes, its parameters on the meta device, its buffers real.

    Raises:
        InvalidInputError: a malformed config.
        UnsupportedError: a class that the installed transformers does not have.
        MissingExtraError: transformers is not installed.
    """
    transformers = _transformers()
    config = _config(folder)
    kind = _class(transformers, config, folder)
    try:
        parsed = kind.config_class.from_dict(config)
        with _parameters_on_meta():
            model = kind(parsed)
    except Exception as error:  # configs fail in many ways
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise InvalidInputError(f"cannot build {kind.__name__}: {reason}", where=str(folder / CONFIG)) from error
    if (folder / GENERATION).exists() and hasattr(model, "generation_config"):
        generation = read_json(folder, GENERATION)
        if not isinstance(generation, dict):
            raise InvalidInputError("malformed generation config", where=str(folder / GENERATION))
        model.generation_config = transformers.GenerationConfig.from_dict(generation)
    return model


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder, CONFIG)
    if not isinstance(config, dict):
        raise InvalidInputError("malformed config", where=str(folder / CONFIG))
    config.pop("auto_map", None)
    return config


def _class(transformers: ModuleType, config: dict[str, Any], folder: Path) -> Any:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise UnsupportedError(
            f"the installed transformers {transformers.__version__} has no model class {str(name)[:80]!r}",
            where=str(folder / CONFIG),
            hint="code from a model's folder is never run; build the model yourself and give the nn.Module",
        )
    return kind


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter moves to the meta device as it is registered; buffers are computed as always."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        held = module._parameters.get(name)
        if held is not None and not held.is_meta:
            module._parameters[name] = nn.Parameter(held.to("meta"), requires_grad=held.requires_grad)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """No progress bars of transformers: where they may be shown is the caller's to say."""
    log = transformers.utils.logging
    shown = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            log.enable_progress_bar()


def open_hf(folder: str | Path) -> nn.Module:
    """The model in a Hugging Face folder, in its stored precision and evaluation mode.

    Raises:
        InvalidInputError: no config, or unreadable weights.
        UnsupportedError: a class that the installed transformers does not have.
        MissingExtraError: transformers is not installed.
    """
    folder = Path(folder)
    transformers = _transformers()
    config = _config(folder)
    kind: Any = transformers.AutoModel if not config.get("architectures") else _class(transformers, config, folder)
    try:
        with _quiet(transformers):
            model = kind.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype="auto"
            )
    except LrcompileError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, SafetensorError …
        reason = (str(error).splitlines() or [type(error).__name__])[0][:300]
        hint = "the folder needs config.json and model.safetensors"
        raise InvalidInputError(f"cannot load the model: {reason}", where=str(folder), hint=hint) from error
    return model.eval()
