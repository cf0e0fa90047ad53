"""One measurement of one model file, in a process and maybe an environment of its own; prints JSON.

    python decode_child.py loop|score onnxruntime|llama FILE THREADS IDS.npy [NEW]

``loop`` reads a prompt (tokens,) and generates NEW tokens greedily; ``score`` reads sequences (count, tokens) and gives
the mean −log p of each one's tokens after the first. It needs numpy and the one runtime, and nothing of lrcompile.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


class OnnxRuntime:
    """A decoder in ONNX Runtime; caches stay where the runtime put them, and outputs become inputs without a copy."""

    def __init__(self, file: str, threads: int, tokens: int) -> None:
        import onnxruntime

        del tokens  # nothing is reserved
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.past = [each for each in self.session.get_inputs() if each.name.startswith("past_key_values.")]
        self.outputs = [each.name for each in self.session.get_outputs()]
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens."""
        empty = [np.zeros([1, each.shape[1], 0, each.shape[3]], np.float32) for each in self.past]
        self.caches, self.seen = [self.value(array) for array in empty], 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits (tokens, vocabulary) of the next tokens."""
        self.seen += len(ids)
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids[None])
        binding.bind_cpu_input("attention_mask", np.ones((1, self.seen), np.int64))
        for each, cache in zip(self.past, self.caches, strict=True):
            binding.bind_ortvalue_input(each.name, cache)
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        found = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        presents = [each.name.replace("past_key_values", "present") for each in self.past]
        self.caches = [found[name] for name in presents]
        return found["logits"].numpy()[0]


class Llama:
    """The same in llama.cpp."""

    def __init__(self, file: str, threads: int, tokens: int) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports] - in an environment of its own

        self.llama = llama_cpp.Llama(
            file, n_ctx=tokens, n_threads=threads, n_threads_batch=threads, logits_all=True, verbose=False
        )

    def reset(self) -> None:
        """Forgets all tokens."""
        self.llama.reset()

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits (tokens, vocabulary) of the next tokens."""
        self.llama.eval(ids.tolist())
        return self.llama.scores[self.llama.n_tokens - len(ids) : self.llama.n_tokens]


def loop(runtime: Any, prompt: np.ndarray, count: int) -> dict[str, Any]:
    """Seconds for the prompt (its first new token among them), and for all further tokens; what they are."""
    _generated(runtime, prompt, 4)  # not counted
    tokens, seconds = _generated(runtime, prompt, count)
    return {"prompt": seconds[0], "decode": sum(seconds[1:]), "tokens": tokens}


def _generated(runtime: Any, prompt: np.ndarray, count: int) -> tuple[list[int], list[float]]:
    runtime.reset()
    tokens: list[int] = []
    seconds: list[float] = []
    step = prompt
    for _ in range(count + 1):
        start = time.perf_counter()
        tokens.append(int(runtime.step(step)[-1].argmax()))
        seconds.append(time.perf_counter() - start)
        step = np.array(tokens[-1:], np.int64)
    return tokens, seconds


def score(runtime: Any, sequences: np.ndarray) -> dict[str, Any]:
    """Mean −log p of every sequence."""
    found = []
    for ids in sequences:
        runtime.reset()
        logits = runtime.step(ids)[:-1].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        norm = top[:, 0] + np.log(np.exp(logits - top).sum(-1))
        found.append(float((norm - logits[np.arange(len(ids) - 1), ids[1:]]).mean()))
    return {"losses": found}


def _peak() -> int:
    """Peak resident bytes of this process."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    """Runs one measurement."""
    what, runtime, file, threads, ids, *count = sys.argv[1:]
    given = np.load(ids)
    new = int(count[0]) if count else 0
    kinds: dict[str, Callable[..., Any]] = {"onnxruntime": OnnxRuntime, "llama": Llama}
    model = kinds[runtime](file, int(threads), given.shape[-1] + new + 1)
    found = loop(model, given, new) if what == "loop" else score(model, given)
    print(json.dumps({**found, "peak": _peak()}))


if __name__ == "__main__":
    main()
