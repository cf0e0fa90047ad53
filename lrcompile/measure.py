"""Latency and memory of model files, measured in a process of their own.

Runs as ``python -m lrcompile.measure FEEDS.npz A.onnx B.onnx``: it imports numpy and ONNX Runtime
only, times the files in turns so that a noisy machine hurts them alike, and prints JSON. Where a session's weights
come to lie in memory makes it up to a tenth faster or slower for as long as it lives, and the session that was made
first is at a disadvantage: so a ratio is of several processes, in half of which the files change places.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 6
"""How many times as long as asked for a measurement may take to become as sharp as asked for."""
PROCESSES = (2, 4)
"""At least so many processes for a ratio, and at most where no precision is asked for."""
AGREED = 0.03
"""Half the width of a ratio's interval at which no further process is needed, where no precision is asked for."""
MOST = 2000


@dataclass(frozen=True)
class Timing:
    """Milliseconds per run of each model, and the ratio of the last to the first with its 95 % interval."""

    median_ms: tuple[float, ...]
    p10_ms: tuple[float, ...]
    p90_ms: tuple[float, ...]
    ratio: float
    low: float
    high: float
    runs: int
    threads: int


Rows = Sequence[Sequence[float]]
"""Milliseconds of calls, for each model; those at one place were made one after the other."""


def interval(groups: Sequence[Rows], *, draws: int = 1000) -> tuple[float, float, float]:
    """Ratio of the last to the first with its bootstrap interval (2.5 %, 97.5 %): over groups, then over their pairs.

    Of a group the ratio is the median of its pairs' ratios, of several groups their geometric mean.

    Args:
        groups: what was measured in one process each.
    """
    paired = [[b / a for a, b in zip(rows[0], rows[-1], strict=True)] for rows in groups]
    generator = random.Random(0)

    def drawn(ratios: Sequence[float]) -> float:
        return statistics.median(generator.choices(ratios, k=len(ratios)))

    means = sorted(
        statistics.geometric_mean(map(drawn, generator.choices(paired, k=len(paired)))) for _ in range(draws)
    )
    middle = statistics.geometric_mean(map(statistics.median, paired))
    return middle, means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def interleaved(
    runs: Sequence[Callable[[], object]],
    seconds: float,
    *,
    precision: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Milliseconds of calls that are made in turns of random order; the first of each is not counted.

    Args:
        seconds: how long; a little longer where not even six calls fit.
        precision: go on, up to :data:`PATIENCE` times as long, until the interval of the last to the first
            is narrower than this share to each side; 0 stops after ``seconds``.
        clock: in seconds.
    """
    for run in runs:
        run()
    rows: list[list[float]] = [[] for _ in runs]
    order, begun, check = list(range(len(runs))), time.perf_counter(), seconds
    while True:
        passed = time.perf_counter() - begun
        if len(rows[0]) >= MOST:
            return rows
        if len(rows[0]) >= 6 and passed >= check:
            if passed >= PATIENCE * seconds or not precision or _sharp([rows], precision):
                return rows
            check = passed * 1.3
        random.shuffle(order)
        for index in order:
            start = clock()
            runs[index]()
            rows[index].append((clock() - start) * 1000)


def _sharp(groups: Sequence[Rows], precision: float) -> bool:
    middle, low, high = interval(groups, draws=200)
    return high - low <= 2 * precision * middle


def cores(threads: int) -> int:
    """The threads that a number means: 0 is all usable cores."""
    return threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def summary(groups: Sequence[Rows], threads: int) -> Timing:
    """What :func:`interleaved` rows of one or several processes say."""
    ratio, low, high = interval(groups)
    columns = [sorted(ms for rows in groups for ms in rows[index]) for index in range(len(groups[0]))]
    return Timing(
        tuple(statistics.median(row) for row in columns),
        tuple(row[len(row) // 10] for row in columns),
        tuple(row[len(row) * 9 // 10] for row in columns),
        ratio,
        low,
        high,
        len(columns[0]),
        cores(threads),
    )


def time_files(
    files: Sequence[Path],
    feeds: Path,
    *,
    seconds: float = 4.0,
    threads: int = 0,
    precision: float = 0.0,
    busy: bool = False,
) -> Timing | None:
    """Times the files in turns, in several processes; None where one of them does not run on the CPU.

    Args:
        seconds: of all processes that a ratio takes at least.
        precision: measure in further processes until the interval of the ratio of the last file to the first is
            narrower than this share to each side.
        busy: count the processor time of the only thread: the latency of an idle machine, on one that is not.
    """
    mode = "busy" if busy and threads == 1 else "time"
    most = PATIENCE * PROCESSES[0] if precision else PROCESSES[1]
    groups: list[Rows] = []
    while len(groups) < PROCESSES[0] or (len(groups) < most and not _sharp(groups, precision or AGREED)):
        turn = slice(None, None, -1 if len(groups) % 2 else 1)
        found = _child([mode, str(feeds), str(seconds / PROCESSES[0]), str(threads), *map(str, files[turn])])
        if found is None:
            return None
        groups.append(found["ms"][turn])
    return summary(groups, threads)


def peak_memory(file: Path, feeds: Path) -> int | None:
    """Peak resident bytes of a process that loads the file and runs it once."""
    found = _child(["memory", str(feeds), "0", "0", str(file)])
    return None if found is None else int(found["bytes"])


@dataclass(frozen=True)
class Arena:
    """What ONNX Runtime's CPU allocator counted in one run beyond what it held when the run began.

    Args:
        requested: most bytes that were asked for and not given back, at once.
        in_use: the same as the arena rounds them, at the peak inside a node.
        held: bytes that the arena took from the system.
    """

    requested: int
    in_use: int
    held: int


def arena(file: Path, feeds: Path) -> Arena | None:
    """The allocator's statistics of a first run, in a process of its own; weights do not count."""
    found = _child(["arena", str(feeds), "0", "1", str(file)])
    return None if found is None else Arena(*found["arena"])


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
    # threads that wait for the next run of one session would take the cores from the other
    options.add_session_config_entry("session.force_spinning_stop", "1")
    scratch = tempfile.TemporaryDirectory() if mode == "arena" else None
    if scratch is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(Path(scratch.name) / "run")
    sessions = [ort.InferenceSession(file, options, providers=["CPUExecutionProvider"]) for file in files]
    with np.load(feeds) as stored:
        inputs = {name: stored[name] for name in stored.files}

    def runner(session) -> Callable[[], object]:
        own = {value.name: inputs[value.name] for value in session.get_inputs()}
        return lambda: session.run(None, own)

    runs, rows = [runner(session) for session in sessions], []
    if mode in ("time", "busy"):
        clock = time.thread_time if mode == "busy" else time.perf_counter
        rows = interleaved(runs, float(seconds), clock=clock)
    else:
        for run in runs:
            run()
    counted = None
    if scratch is not None:
        counted = _counted(Path(sessions[0].end_profiling()))
        scratch.cleanup()
    print(json.dumps({"ms": rows, "bytes": _peak(), "arena": counted}))


def _counted(profile: Path) -> tuple[int, int, int]:
    """The fields of :class:`Arena` from the statistics after every node."""
    events = [each["args"] for each in json.loads(profile.read_text(encoding="utf-8")) if each.get("cat") == "Node"]
    first = events[0]

    def grown(name: str, before: str, change: str) -> int:
        return max(int(each[name]) for each in events) - (int(first[before]) - int(first[change]))

    return (
        grown("mem_bytes_requested_in_use", "mem_bytes_requested_in_use", "mem_requested_in_use_delta"),
        grown("mem_in_use_peak", "mem_bytes_in_use", "mem_in_use_delta"),
        grown("mem_arena_held", "mem_arena_held", "mem_arena_held_delta"),
    )


def _peak() -> int:
    """Peak resident bytes of this program; getrusage would count what its parent held when it forked."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    _main(*sys.argv[1:])
