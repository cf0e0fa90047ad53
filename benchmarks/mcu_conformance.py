"""How many of the onnx package's node cases the emitted C passes, and why the others are refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.common import table, write
from benchmarks.mcu_cases import Verdict, cases, verdicts

PROCESSES = 2
NOTE = (
    "Each case is compiled with the C compiler of this machine (`-std=c99 -Wall -Wextra -Werror -O2`) and compared "
    "under the tolerance that the case states. *as it stands*: every input of the case is an input of the C function. "
    "*parameters constant*: integer inputs of rank 0 or 1 behind the first one (axes, shapes, pads, …) were made "
    "constants, as exporters write them, because the operator is refused where they are known only at run time."
)


def _judge(at: int) -> Verdict:
    return next(verdicts([cases()[at]]))


def _reason(verdict: Verdict) -> str:
    """A refusal without the names of the node."""
    found = re.search(r"operator .*|the type \S+ .*|the input has .*", verdict.reason)
    return re.sub(r" \(give one.*| \(--shape.*", "", found.group(0) if found else verdict.reason)[:110]


def _plain(reason: str) -> str:
    """One line without the folders of this machine."""
    return " ".join(re.sub(r"/\S*/", "", reason).replace("|", "/").split())[:160]


def report(found: Sequence[Verdict]) -> list[str]:
    """The parts of the result: counts, refusals by reason, wrong cases."""
    kinds = Counter(verdict.kind for verdict in found)
    single = Counter(verdict.kind for verdict in found if "_expanded" not in verdict.name)
    names = {"passed": "as it stands", "fixed": "parameters constant", "refused": "refused", "wrong": "wrong"}
    rows = [[names[kind], kinds[kind], single[kind]] for kind in names]
    rows.append(["all", len(found), sum(single.values())])
    refused = Counter(_reason(verdict) for verdict in found if verdict.kind == "refused")
    wrong = [[verdict.name, _plain(verdict.reason)] for verdict in found if verdict.kind == "wrong"]
    parts = [NOTE, table(["cases", "all", "without expanded functions"], rows)]
    parts += ["## Wrong", table(["case", "what"], wrong) if wrong else "None."]
    return [*parts, "## Refused", table(["reason", "cases"], refused.most_common())]


def main() -> None:
    """Judges all cases in two processes; a crash of one ends the measurement."""
    count = len(cases())
    with ProcessPoolExecutor(PROCESSES, get_context("fork")) as pool:
        found = list(pool.map(_judge, range(count), chunksize=8))
    write("mcu_conformance", "ONNX node cases in emitted C", report(found))
