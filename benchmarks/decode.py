"""Greedy decoding of SmolLM2 with its cache: tokens a second, bytes, memory and perplexity of several forms.

``LRCOMPILE_DECODE_TOKENS`` (128: of the prompt, and as many new ones) and ``LRCOMPILE_DECODE_RUNS`` (5) make trials
short, ``LRCOMPILE_DECODE_REUSE=1`` takes model files that an earlier run made, ``LRCOMPILE_LLAMA_PYTHON`` names a
Python that has llama-cpp-python, instead of an environment that is built under ``.cache/benchmarks`` (some minutes).
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import decode_child
from benchmarks.common import WORK, table, write
from lrcompile import Budget, Options, optimize
from lrcompile.files import sha256
from lrcompile.planning import Settings
from lrcompile.zoo import exported, smollm2, smollm2_cached, texts
from lrcompile.zoo.base import package_folder

TOKENS = int(os.environ.get("LRCOMPILE_DECODE_TOKENS", "128"))
RUNS = int(os.environ.get("LRCOMPILE_DECODE_RUNS", "5"))
THREADS = (1, 2)
KEEPS = (0.8, 0.6)
SCORED = (4, 512)
"""Evaluation sequences of each domain, and their tokens."""
LLAMA = "llama-cpp-python==0.3.36"
_HEAD = f"""A prompt of {TOKENS} tokens of news, then {TOKENS} new ones, batch 1, greedy. Every run is a process of its
own that loads one file, generates a few tokens, and is then timed; {RUNS} rounds, in each all files in random order.
Figures are medians with the lowest and the highest; ratios to dense are of the same round. One loop drives all files
in ONNX Runtime: outputs are bound as the next inputs, so no cache is copied outside the graph. Prompt: its tokens by
the seconds to the first new one. Peak memory is of the process with Python and the runtime in it. Perplexity: one
scorer, the same {SCORED[0]} sequences of {SCORED[1]} token ids for each of three domains, no special token before them.

Keep counts values of the 210 decoder linears; their calibration is that of the SmolLM2 table. int8 is
`quantize_dynamic` (weights per channel, MatMul only), int4 `MatMulNBitsQuantizer` with blocks of 32 and accuracy level
4. Both tools take weights that are constants: SmolLM2's head is its transposed embedding, which they leave in
float32. "Head too": `quant_pre_process` first folds the transpose, so that the head becomes a constant and is
quantised, while the embedding stays beside it. int8 and int4 round activations too, as they run. The GGUF file is
Q4_1, head and embedding included, and all weights here come from it: they lie on its grid of four bits, which flatters
rows of few bits, llama.cpp's most of all, which loses nothing; the table `degridded` shows int4 off the grid."""


@dataclass(eq=False)
class Row:
    """One file and what was measured of it."""

    name: str
    path: Path
    runtime: str = "onnxruntime"
    losses: list[float] = field(default_factory=list)
    runs: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # by threads


def main() -> None:
    """Makes the files, scores them, then times them in turns; the table is written after each number of threads."""
    WORK.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    rows = [*_onnx_files(), *_llama(notes)]
    ids = np.concatenate([smollm2.sequences(d, "EVALUATION", *SCORED) for d in texts.EVALUATION])
    scored, prompt = _saved("decode-scored", ids), _saved("decode-prompt", _prompt())
    for row in rows:
        row.losses = _child(row, "score", 1, scored)["losses"]
        print(row.name, f"{math.exp(np.mean(row.losses)):.3f}", flush=True)
    for threads in THREADS:
        for _ in range(RUNS):
            for row in random.sample(rows, len(rows)):
                row.runs.setdefault(threads, []).append(_child(row, "loop", threads, prompt, TOKENS))
        _write(rows, notes)


def _prompt() -> np.ndarray:
    return smollm2.sequences("news", "EVALUATION", 1, TOKENS, draw=1)[0]


def _saved(name: str, ids: np.ndarray) -> Path:
    path = WORK / f"{name}.npy"
    np.save(path, ids)
    return path


# -- files ---------------------------------------------------------------------------------------


def _onnx_files() -> Iterator[Row]:
    dense = exported("smollm2_cached")
    yield Row("float32", dense)
    for keep in KEEPS:
        yield Row(f"lrcompile, keep {keep}", _made(f"keep-{keep}", lambda out, keep=keep: _ours(dense, keep, out)))
    flat = WORK / "decode-folded.onnx"
    for name, quantise in (("int8", _int8), ("int4", _int4)):
        yield Row(f"ONNX Runtime {name}", _made(name, lambda out, how=quantise: how(dense, out)))
        out = _made(f"{name}-head", lambda out, how=quantise: how(_folded(dense, flat), out))
        yield Row(f"ONNX Runtime {name}, head too", out)
    flat.unlink(missing_ok=True)


def _made(name: str, make: Callable[[Path], None]) -> Path:
    out = WORK / f"decode-{name}.onnx"
    if not (out.is_file() and os.environ.get("LRCOMPILE_DECODE_REUSE")):
        make(out)
    return out


def _ours(dense: Path, keep: float, out: Path) -> None:
    options = Options(max_drift=9.0, force=True, latency=False, settings=Settings(cache=WORK / "cache"))
    held = [smollm2_cached.fed(batch["input_ids"]) for batch in smollm2.evaluation(3, 64)]  # the gate stays open
    calibration = smollm2_cached.calibration()
    optimize(dense, Budget(keep=keep), calibration=calibration, evaluation=held, options=options, out=out)


def _folded(dense: Path, out: Path) -> Path:
    """The file as ONNX Runtime's own preparation for quantisation leaves it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if not out.is_file():
        quant_pre_process(str(dense), str(out), skip_symbolic_shape=True)
    return out


def _int8(source: Path, out: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, out, op_types_to_quantize=["MatMul"], per_channel=True)


def _int4(source: Path, out: Path) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=4, block_size=32, is_symmetric=False, accuracy_level=4)
    quantizer.process()
    done: Any = quantizer.model
    done.save_model_to_file(str(out))


# -- llama.cpp -----------------------------------------------------------------------------------


def _llama(notes: list[str]) -> list[Row]:
    try:
        _llama_python()
    except subprocess.CalledProcessError as error:
        reason = (error.stderr or "").strip().splitlines() or ["no reason was given"]
        notes.append(f"No row of llama.cpp: {LLAMA} could not be built here ({reason[-1][:200]}).")
        return []
    return [Row(f"llama.cpp Q4_1 ({LLAMA})", package_folder(smollm2.PACKAGE) / smollm2.FILE, "llama")]


def _llama_python() -> str:
    """A Python with llama-cpp-python, built from its source where there is none yet."""
    given = os.environ.get("LRCOMPILE_LLAMA_PYTHON")
    if given:
        return given
    folder = WORK / "llama"
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.is_file() or done.read_text() != LLAMA:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"building {LLAMA}", flush=True)
        for command in ([sys.executable, "-m", "venv", str(folder)], [str(python), "-m", "pip", "install", LLAMA]):
            subprocess.run(command, check=True, capture_output=True, text=True)
        done.write_text(LLAMA)
    return str(python.absolute())


# -- measuring -----------------------------------------------------------------------------------


def _child(row: Row, what: str, threads: int, ids: Path, *count: int) -> dict[str, Any]:
    python = _llama_python() if row.runtime == "llama" else sys.executable
    command = [python, "-P", decode_child.__file__, what, row.runtime, str(row.path), str(threads), str(ids)]
    quiet = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*command, *map(str, count)], capture_output=True, text=True, check=False, env=quiet)
    if done.returncode:
        raise SystemExit(f"{row.name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _write(rows: Sequence[Row], notes: Sequence[str]) -> None:
    columns = ["what", "MB", *(f"perplexity {name}" for name in texts.EVALUATION), "÷ dense"]
    for threads in rows[0].runs:
        said = f"{threads} thread{'s'[: threads > 1]}"
        columns += [f"new tokens/s, {said}", f"× dense, {said}", f"prompt tokens/s, {said}", f"peak MB, {said}"]
    lines = [_line(row, rows[0]) for row in rows]
    write("decode", "Decoding SmolLM2-135M", [_HEAD, table([*columns, "SHA-256"], lines), *notes])


def _line(row: Row, dense: Row) -> list[object]:
    domains = np.reshape(row.losses, (len(texts.EVALUATION), -1)).mean(1)
    cells: list[object] = [row.name, f"{row.path.stat().st_size / 2**20:.1f}", *(f"{math.exp(v):.2f}" for v in domains),
                           f"{math.exp(np.mean(row.losses) - np.mean(dense.losses)):.3f}"]  # fmt: skip
    for threads, runs in row.runs.items():
        speeds = [TOKENS / run["decode"] for run in runs]
        ratios = [mine * run["decode"] / TOKENS for mine, run in zip(speeds, dense.runs[threads], strict=True)]
        peak = statistics.median(run["peak"] for run in runs) / 2**20
        prompts = [TOKENS / run["prompt"] for run in runs]
        cells += [_range(speeds, 1), _range(ratios, 2), f"{statistics.median(prompts):.0f}", f"{peak:.0f}"]
    return [*cells, sha256(row.path)[:12]]


def _range(values: Sequence[float], places: int) -> str:
    return f"{statistics.median(values):.{places}f} [{min(values):.{places}f}, {max(values):.{places}f}]"
