"""A vision transformer trained on real handwritten digits; weights, ONNX file and digits are shipped (under 1 MB).

Importing this package imports neither torch nor scikit-learn.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lrcompile.zoo.base import Batch, Run, ZooModel
from lrcompile.zoo.digits_vit.data import digits

if TYPE_CHECKING:
    from lrcompile.zoo.digits_vit.network import DigitsViT

FOLDER = Path(__file__).parent
WEIGHTS, ONNX, DOCUMENTATION = FOLDER / "model.safetensors", FOLDER / "model.onnx", FOLDER / "README.md"
OUTPUT = "logits"
BATCH = 32

__all__ = ["ONNX", "WEIGHTS", "calibration", "digits", "evaluation", "export", "metric", "model", "module", "write_npz"]


def module() -> DigitsViT:
    """The trained network in eval mode, float32, on the CPU."""
    from safetensors.torch import load_file

    from lrcompile.zoo.digits_vit.network import DigitsViT

    network = DigitsViT()
    network.load_state_dict(load_file(WEIGHTS), strict=True)
    return network.eval()


def _batches(images: np.ndarray) -> list[Batch]:
    return [{"images": images[i : i + BATCH]} for i in range(0, len(images), BATCH)]


def calibration() -> list[Batch]:
    """256 training images in 8 batches ``{"images": (32, 1, 8, 8)}``."""
    return _batches(digits("calibration")[0])


def evaluation() -> list[Batch]:
    """The 180 validation images in batches of at most 32."""
    return _batches(digits("evaluation")[0])


def metric(run: Run) -> dict[str, float]:
    """``accuracy`` and ``cross_entropy`` (nats) of a run on the test digits (README: how often counted)."""
    images, labels = digits("test")
    logits = np.concatenate([run(batch)[OUTPUT] for batch in _batches(images)]).astype(np.float64)
    shifted = logits - logits.max(1, keepdims=True)
    nats = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
    return {"accuracy": float((logits.argmax(1) == labels).mean()), "cross_entropy": float(nats.mean())}


def export(path: Path) -> None:
    """Write the network as ONNX (opset 20), input ``images`` with a dynamic batch axis, output ``logits``."""
    import torch

    from lrcompile.zoo.export import export_onnx

    example = {"images": torch.zeros(2, 1, 8, 8)}
    export_onnx(module(), example, Path(path), outputs=(OUTPUT,), axes={"images": {0: "batch"}})


def write_npz(folder: Path) -> tuple[Path, Path]:
    """Write ``calib.npz`` and ``eval.npz`` in the command line's format: ``images`` (samples, 1, 8, 8) float32."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "calib.npz", folder / "eval.npz"
    np.savez_compressed(paths[0], images=digits("calibration")[0])
    np.savez_compressed(paths[1], images=digits("evaluation")[0])
    return paths


def model() -> ZooModel:
    """The registry's entry."""
    text = DOCUMENTATION.read_text(encoding="utf-8")
    return ZooModel("digits_vit", text, (OUTPUT,), module, calibration, evaluation, metric, export)
