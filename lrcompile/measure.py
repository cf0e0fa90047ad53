"""Latency and memory of model files, measured in a process of their own.

Runs as ``python -m lrcompile.measure FEEDS.npz A.onnx B.onnx``: it imports numpy and ONNX Runtime
only, times the files in turns so that a noisy machine hurts them alike, and prints JSON.
"""

from __future__ import annotations

import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Timing:
    """Milliseconds per run of each file, and the ratio of the last to the first with its 95 % interval."""

    median_ms: tuple[float, ...]
    p10_ms: tuple[float, ...]
    p90_ms: tuple[float, ...]
    ratio: float
    low: float
    high: float
    runs: int
    threads: int


def interval(first: Sequence[float], second: Sequence[float], *, draws: int = 1000) -> tuple[float, float, float]:
    """Median of the paired ratios ``second / first`` and its bootstrap interval (2.5 %, 97.5 %)."""
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(draws))
    return statistics.median(ratios), medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1]


def time_files(files: Sequence[Path], feeds: Path, *, seconds: float = 4.0, threads: int = 0) -> Timing | None:
    """Times the files in turns; None where one of them does not run on the CPU."""
    found = _child(["time", str(feeds), str(seconds), str(threads), *map(str, files)])
    if found is None:
        return None
    rows: list[list[float]] = found["ms"]
    ratio, low, high = interval(rows[0], rows[-1])
    columns = [sorted(row) for row in rows]
    return Timing(
        tuple(statistics.median(row) for row in columns),
        tuple(row[len(row) // 10] for row in columns),
        tuple(row[len(row) * 9 // 10] for row in columns),
        ratio,
        low,
        high,
        len(rows[0]),
        threads,
    )


def peak_memory(file: Path, feeds: Path) -> int | None:
    """Peak resident bytes of a process that loads the file and runs it once."""
    found = _child(["memory", str(feeds), "0", "0", str(file)])
    return None if found is None else int(found["bytes"])


def _child(arguments: list[str]) -> dict | None:
    command = [sys.executable, "-P", __file__, *arguments]  # by its file: nothing of lrcompile need be importable
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


def _main(mode: str, feeds: str, seconds: str, threads: str, *files: str) -> None:
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = int(threads)
    options.log_severity_level = 4
    sessions = [ort.InferenceSession(file, options, providers=["CPUExecutionProvider"]) for file in files]
    with np.load(feeds) as stored:
        inputs = {name: stored[name] for name in stored.files}

    def run(session) -> float:
        start = time.perf_counter()
        session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})
        return (time.perf_counter() - start) * 1000

    rows = [[run(session)] for session in sessions]  # the first run of each allocates; it is dropped below
    if mode == "time":
        deadline = time.perf_counter() + float(seconds)
        while len(rows[0]) < 6 or (time.perf_counter() < deadline and len(rows[0]) < 2000):
            order = list(range(len(sessions)))
            random.shuffle(order)
            for index in order:
                rows[index].append(run(sessions[index]))
    print(json.dumps({"ms": [row[1:] for row in rows], "bytes": _peak()}))


def _peak() -> int:
    """Peak resident bytes of this program; getrusage would count what its parent held when it forked."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    _main(*sys.argv[1:])
