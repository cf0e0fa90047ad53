"""Times the products of a model on this machine and writes ``costs.json``.

Needs Python 3.9, numpy and onnxruntime, and nothing else. Run it in the folder that it came in:

    python measure.py [--threads N] [--seconds S] [-o costs.json]

The models beside it hold no weights: those are made up here, in a file that is removed at the end.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

ROUNDS = 6
"""How often the sessions of the whole model are made anew."""
FOLDER = Path(__file__).resolve().parent


def main():
    kit = json.loads((FOLDER / "kit.json").read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description="Times the products of a model on this machine.")
    parser.add_argument("--threads", type=int, default=kit["threads"], help="0: all cores (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each size of each form (default: %(default)s)")
    parser.add_argument("-o", "--output", default="costs.json")
    given = parser.parse_args()
    if kit.get("schema") != "lrcompile.kit/1":
        raise SystemExit("this kit was made for another script")
    made = []
    try:
        for name, (kind, size) in kit["weights"].items():
            made.append(FOLDER / name)
            make_weights(FOLDER / name, kind, size)
        found = measure(kit, given.threads, given.seconds)
    finally:
        for path in made:
            path.unlink(missing_ok=True)
    temporary = Path(given.output + ".tmp")
    temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, given.output)
    print(f"wrote {given.output}", file=sys.stderr)


def make_weights(path, kind, size):
    """Normal numbers as weights have them: zeros, infinities and denormals would change the times."""
    generator = np.random.default_rng(0)
    with open(path, "wb") as stream:
        while size > 0:
            block = generator.standard_normal(2**20, dtype=np.float32) * np.float32(0.02)
            raw = generator.bytes(2**22) if kind == "bytes" else block.astype(kind).tobytes()
            stream.write(raw[:size])
            size -= len(raw)


def measure(kit, threads, seconds):
    shapes = []
    for index, each in enumerate(kit["shapes"]):
        print(f"shape {index + 1} of {len(kit['shapes'])}", file=sys.stderr)
        shapes.append(measured_shape(each, threads, seconds))
    print("the whole model", file=sys.stderr)
    total, anchor = measured_model(kit["model"], threads, seconds)
    return {
        "schema": "lrcompile.costs/1",
        "runtime": "onnxruntime",
        "threads": threads,
        "total_ms": total,
        "anchor": anchor,
        "inputs": kit["inputs"],
        "machine": {"cpu": processor(), "cores": cores(), "os": f"{platform.system()} {platform.machine()}"},
        "versions": {
            "python": platform.python_version(),
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
            "kit": kit["made_by"],
        },
        "shapes": shapes,
    }


def measured_shape(each, threads, seconds):
    """The dense product, and every form at every size in turns with it."""
    generator = np.random.default_rng(0)
    x = {"x": generator.standard_normal(each["input"], dtype=np.float32).astype(each["dtype"])}
    absolute, forms = [], []
    for form in each["forms"]:
        points = []
        for point in form["points"]:
            ratio, times = in_turns([each["file"], point["file"]], x, threads, seconds)
            absolute += times
            points.append((point, ratio))
        forms.append((form, points))
    absolute = absolute or in_turns([each["file"]], x, threads, seconds)[1]
    ms = statistics.median(absolute) / each["copies"]
    described = {key: each[key] for key in ("out", "into", "tokens", "dtype", "window", "sites")}
    found = [
        {"form": form["form"], "points": [{"macs": p["macs"], "rank": p["rank"], "ms": ms * r} for p, r in points]}
        for form, points in forms
    ]
    return {**described, "ms": ms, "forms": found}


def measured_model(model, threads, seconds):
    """The whole model, in turns with one that has something cheaper at every site."""
    with np.load(FOLDER / model["inputs"]) as stored:
        inputs = {name: stored[name] for name in stored.files}
    files = [model["file"]] + ([model["anchor"]["file"]] if model["anchor"] else [])
    ratio, times = in_turns(files, inputs, threads, 10 * seconds, ROUNDS)
    anchor = {"ratio": ratio, "sites": model["anchor"]["sites"]} if model["anchor"] else None
    return statistics.median(times), anchor


def in_turns(files, inputs, threads, seconds, rounds=2):
    """The ratio of the last file to the first, and milliseconds of the first.

    Where a session's weights lie in memory changes its speed, and so does which was made first: sessions are made
    anew in every round, in the other order.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    ratios, times = [], []
    for number in range(rounds):
        turn = -1 if number % 2 else 1
        runs = [runner(session(file, threads), inputs) for file in files[::turn]]
        rows = interleaved(runs, seconds / rounds, clock)[::turn]
        del runs
        ratios.append(paired(rows))
        times += rows[0]
    return statistics.geometric_mean(ratios), times


def session(file, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(FOLDER / file), options, providers=["CPUExecutionProvider"])


def runner(one, inputs):
    own = {value.name: inputs[value.name] for value in one.get_inputs()}
    return lambda: one.run(None, own)


def interleaved(runs, seconds, clock):
    """Milliseconds of calls in turns of random order, at least four of each; the first of each is not counted."""
    for run in runs:
        run()
    rows = [[] for _ in runs]
    order, begun = list(range(len(runs))), time.perf_counter()
    while len(rows[0]) < 4 or (time.perf_counter() - begun < seconds and len(rows[0]) < 2000):
        random.shuffle(order)
        for index in order:
            start = clock()
            runs[index]()
            rows[index].append((clock() - start) * 1000)
    return rows


def paired(rows):
    """Median of the ratios of the last to the first."""
    return statistics.median(rows[-1][index] / ms for index, ms in enumerate(rows[0]))


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
