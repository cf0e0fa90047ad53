"""A MobileNet-like network trained on the digits of ``digits_vit``; weights and ONNX file are shipped (1 MB).

Importing this package imports neither torch nor scikit-learn.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lrcompile.zoo.base import ZooModel
from lrcompile.zoo.digits_vit import OUTPUT, calibration, evaluation, metric, write_npz

if TYPE_CHECKING:
    from lrcompile.zoo.digits_conv.network import DigitsConv

FOLDER = Path(__file__).parent
WEIGHTS, ONNX, DOCUMENTATION = FOLDER / "model.safetensors", FOLDER / "model.onnx", FOLDER / "README.md"

__all__ = ["ONNX", "WEIGHTS", "calibration", "evaluation", "export", "metric", "model", "module", "write_npz"]


def module() -> DigitsConv:
    """The trained network in eval mode, float32, on the CPU."""
    from safetensors.torch import load_file

    from lrcompile.zoo.digits_conv.network import DigitsConv

    network = DigitsConv()
    network.load_state_dict(load_file(WEIGHTS), strict=True)
    return network.eval()


def export(path: Path) -> None:
    """Write the network as ONNX (opset 20), ``images`` with a dynamic batch axis -> ``logits``, norms folded."""
    import torch

    from lrcompile.zoo.export import export_onnx

    example = {"images": torch.zeros(2, 1, 8, 8)}
    export_onnx(module(), example, Path(path), outputs=(OUTPUT,), axes={"images": {0: "batch"}})


def model() -> ZooModel:
    """The registry's entry: data and metric are those of ``digits_vit``."""
    text = DOCUMENTATION.read_text(encoding="utf-8")
    return ZooModel("digits_conv", text, (OUTPUT,), module, calibration, evaluation, metric, export)
