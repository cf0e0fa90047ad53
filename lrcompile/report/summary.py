"""The comparison behind the table and the page: which rows there are, and what they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from lrcompile.report.record import Decision, Drift, Ratio, Report, Size
from lrcompile.report.text import human_bytes, human_change, human_count, human_float, human_ms, visible

Verdict = Literal["better", "worse", "same", ""]
SLOWER = 1.02
"""A result counts as slower where even the lower end of its interval is above this."""
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One line of the comparison; ``interval`` bounds a measured ratio."""

    label: str
    before: str
    after: str
    change: str = ""
    ratio: float | None = None
    interval: tuple[float, float] | None = None
    verdict: Verdict = ""


@dataclass(frozen=True)
class DriftRow:
    """A measure of drift; ``scale`` is the right end of its picture, None where it has none."""

    label: str
    value: float | None
    text: str
    limit: float | None = None
    scale: float | None = None


_SIZES: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("parameters", "parameters", human_count),
    ("bytes", "on disk", human_bytes),
    ("macs", "MACs per sample", human_count),
    ("latency_ms", "latency", human_ms),
    ("peak_rss", "peak memory", human_bytes),
)


def comparison(report: Report) -> list[Row]:
    """Rows of sizes, then of task metrics; empty where nothing was measured."""
    rows = [] if report.before is None else _size_rows(report, report.before)
    return rows + [_task_row(name, value) for name, value in sorted(report.task.items())]


def _size_rows(report: Report, before: Size) -> list[Row]:
    ratio = report.ratio or (Ratio.of(before, report.after) if report.after else Ratio())
    rows = []
    for name, label, human in _SIZES:
        old, new = getattr(before, name), getattr(report.after, name, None)
        share = getattr(ratio, name.removesuffix("_ms"), None)
        if old is None and new is None:
            continue
        if share is None and old and new is not None:
            share = new / old
        predicted = old * share if new is None and old is not None and share is not None else None
        after = human(new) if predicted is None else f"≈ {human(predicted)}"
        rows.append(
            _latency_row(ratio, human(old), after)
            if share is not None and name == "latency_ms"
            else Row(label, human(old), after, human_change(share), share, None, _verdict(share))
        )
    return rows


def _latency_row(ratio: Ratio, before: str, after: str) -> Row:
    share, low, high = ratio.latency, ratio.latency_low, ratio.latency_high
    change = "" if share is None else f"×{share:.2f}"
    if low is None or high is None:
        return Row("latency", before, after, change, share, None, _verdict(share, 0.02))
    verdict: Verdict = "better" if high < 1 else "worse" if low > SLOWER else "same"
    return Row("latency", before, after, f"{change} [{low:.2f}–{high:.2f}]", share, (low, high), verdict)


def _task_row(name: str, value: Any) -> Row:
    pair = value if isinstance(value, Mapping) else {"after": value}
    before, after = pair.get("before"), pair.get("after")
    change = ""
    if isinstance(before, (int, float)) and isinstance(after, (int, float)):
        change = "same" if before == after else f"{after - before:+.4g}".replace("-", "−")
    return Row(visible(str(name)), human_float(before), human_float(after), change)


def _verdict(share: float | None, slack: float = 0.0005) -> Verdict:
    if share is None:
        return ""
    return "better" if share < 1 - slack else "worse" if share > 1 + slack else "same"


def drift_rows(drift: Drift | None) -> list[DriftRow]:
    """The measures of drift that apply."""
    if drift is None:
        return []
    top = max(each for each in (drift.limit, drift.relative_l2, 0.0) if each is not None and math.isfinite(each))
    rows = [
        DriftRow("relative L2", drift.relative_l2, human_float(drift.relative_l2), drift.limit, top * 1.2 or None),
        DriftRow("cosine similarity", drift.cosine, human_float(drift.cosine), None, 1.0),
        DriftRow("top-1 agreement", drift.top1, _percent(drift.top1), None, 1.0),
        DriftRow("KL divergence (nats)", drift.kl, human_float(drift.kl)),
    ]
    rows = [row for row in rows if row.value is not None]
    if drift.metric is not None:
        rows.append(DriftRow("own metric", None, human_float(drift.metric)))
    return rows


def drift_verdict(drift: Drift) -> str:
    """``passed``, ``failed`` or ``not checked``, with the samples and the worst output where they are known."""
    verdict = {True: "passed", False: "failed", None: "not checked"}[drift.passed]
    parts = [verdict]
    if drift.samples is not None:
        parts.append(f"{drift.samples} held-out sample{'' if drift.samples == 1 else 's'}")
    if drift.worst_output:
        parts.append(f"worst output: {visible(drift.worst_output)}")
    return " · ".join(parts)


def budget_rows(report: Report) -> list[tuple[str, str, str]]:
    """Name, target and reached value of every limit; bytes and MACs may be shares or amounts."""
    amounts = {"bytes": human_bytes, "macs": human_count}
    rows = []
    for name, line in report.budget.items():
        human = amounts.get(name, human_float) if line.target > 1 else human_float
        rows.append((visible(name), human(line.target), human(line.reached)))
    return rows


def what(decision: Decision) -> str:
    """What became of a site, in a word or two."""
    if not decision.pass_:
        return "stays dense"
    return f"{decision.pass_}: {decision.structure}" if decision.structure else decision.pass_


def keep_text(decision: Decision) -> str:
    return "–" if decision.keep is None else f"{decision.keep * 100:.0f} %"


def site_counts(report: Report) -> str:
    """``48 sites: 36 rewritten, 8 dense, 4 refused``."""
    parts = [f"{report.sites[name]} {name}" for name in ("rewritten", "dense", "refused") if name in report.sites]
    return f"{report.sites.get('total', len(report.decisions))} sites" + (f": {', '.join(parts)}" if parts else "")


def evenly(items: Sequence[T], limit: int) -> list[T]:
    """At most ``limit`` of the items, evenly spread, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(index * (len(items) - 1) / (limit - 1))] for index in range(limit)]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value * 100:.1f} %"
