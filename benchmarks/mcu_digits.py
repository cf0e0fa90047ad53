"""The trained digits model on the emulated device: every test digit, against ONNX Runtime on the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from benchmarks.common import WORK, table

RAM = 16 << 10
SHAPES = {"images": (1, 1, 8, 8)}


def accuracy() -> str:
    """A table of float32 and int8, each under 16 KB of RAM in all."""
    from lrcompile.graphs.onnx.graph import OnnxGraph
    from lrcompile.graphs.onnx.quantise import quantise
    from lrcompile.zoo import digits_vit

    folder = WORK / "mcu"
    folder.mkdir(parents=True, exist_ok=True)
    rounded = folder / "digits_int8.onnx"
    ir.save(quantise(OnnxGraph.load(digits_vit.ONNX).model, digits_vit.calibration()), rounded)
    images, labels = digits_vit.digits("test")
    rows = [_row(name, path, images, labels) for name, path in (("float32", digits_vit.ONNX), ("int8", rounded))]
    head = ["digits ViT", "right on the device", "right in ONNX Runtime", "same answer", "equal to 1e-5"]
    head += ["farthest, relative L2", "RAM in all, B", "arena, B", "stack used, B", "instructions, M", "violations"]
    text = (
        f"All {len(labels)} test digits, one by one, `--ram 16KB`; int8 is calibrated on the zoo's calibration digits."
    )
    return text + "\n\n" + table(head, rows)


def _row(name: str, path: Path, images: np.ndarray, labels: np.ndarray) -> list[object]:
    from lrcompile.backends.c.deploy import Board, compile_to, formulas, plan
    from lrcompile.backends.c.emulator import Emulator
    from lrcompile.backends.c.target import target_named

    board = Board(target_named("cortex-m7"), ram=RAM)
    firmware = compile_to((WORK / "mcu" / f"digits_{name}").resolve(), plan(formulas(path, SHAPES), board), board)
    machine = Emulator(firmware)
    runs = [machine.run({"images": each[None]}) for each in images]
    got = np.concatenate([run.outputs["logits"] for run in runs])
    wanted = _runtime(path, images)
    apart = np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    ram = firmware.board.ram()
    return [
        name,
        *(_share(labels, each) for each in (got, wanted)),
        int((got.argmax(1) == wanted.argmax(1)).sum()),
        int((apart < 1e-5).sum()),
        f"{apart.max():.2g}",
        *(f"{each:,}" for each in (ram["total"], ram["arena"], max(run.stack for run in runs))),
        f"{max(run.instructions for run in runs) / 1e6:.2f}",
        sum(len(run.violations) for run in runs),
    ]


def _share(labels: np.ndarray, logits: np.ndarray) -> str:
    return f"{int((logits.argmax(1) == labels).sum())} of {len(labels)}"


def _runtime(path: Path, images: np.ndarray) -> np.ndarray:
    """ONNX Runtime's logits as the nodes say, without the fusions that round otherwise."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.concatenate([np.asarray(session.run(None, {"images": each[None]})[0]) for each in images])
