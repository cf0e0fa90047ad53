"""The cost table: interpolation, its scale, and files that are no tables."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrcompile.costs import Anchor, CostTable, Point, Shape, interpolated, load, monotone, parse, to_json
from lrcompile.errors import InvalidInputError

SHAPE, OTHER = Shape(64, 32, 10), Shape(32, 64, 10, "float16", ((1, 1), (2, 2), (0, 0, 0, 0), (1, 1)))
FORMS = {
    (SHAPE, "low-rank"): (Point(100, 1.0, 1), Point(200, 2.0, 2), Point(400, 5.0, 4)),
    (OTHER, "low-rank"): (Point(100, 1.0, 1),),
}
TABLE = CostTable(100.0, {SHAPE: 6.0, OTHER: 2.0}, FORMS, {SHAPE: 8, OTHER: 3}, 2, "onnxruntime", {"x": (1, 10)})


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=12))
def test_monotone_is_the_nearest_sequence_that_never_falls(values: list[float]):
    """Against the closed form: the largest over starts of the smallest over ends of the means between."""
    found, y = monotone(np.array(values)), np.array(values)
    n = len(y)
    expected = [max(min(y[i : j + 1].mean() for j in range(k, n)) for i in range(k + 1)) for k in range(n)]
    assert found == pytest.approx(expected) and (np.diff(found) >= -1e-12).all()


def test_between_points_it_is_linear_and_at_them_exact():
    points = FORMS[SHAPE, "low-rank"]
    assert [interpolated(points, x) for x in (100, 150, 200, 300, 400)] == [1.0, 1.5, 2.0, 3.5, 5.0]
    assert interpolated(points, 10) == 1.0 and interpolated(points, 800) == 10.0


def test_noise_that_makes_more_work_cheaper_is_averaged():
    points = (Point(1, 2.0), Point(2, 1.0), Point(3, 4.0))
    assert [interpolated(points, x) for x in (1, 2, 3)] == [1.5, 1.5, 4.0]


def test_the_anchor_sets_the_scale():
    """Eight sites that save 5 of 100 ms each would save 40 %; the whole model saved 30 %."""
    table = TABLE.anchored(Anchor(0.7, ((SHAPE, "low-rank", 100.0, 8),)))
    assert table.scale == pytest.approx(0.3 / 0.4)
    assert 8 * (table.share(SHAPE) - table.share(SHAPE, "low-rank", 100)) == pytest.approx(0.3)
    assert TABLE.anchored(Anchor(1.1, ((SHAPE, "low-rank", 100.0, 8),))).scale == 1.0


def test_a_table_survives_its_file(tmp_path: Path):
    (tmp_path / "costs.json").write_text(json.dumps(to_json(TABLE)))
    assert load(tmp_path / "costs.json") == TABLE
    report = {"schema": "lrcompile.plan/1", "costs": {"latency": to_json(TABLE)}}
    assert parse(report, "r.json") == TABLE


def test_what_is_missing_is_named():
    with pytest.raises(
        InvalidInputError, match=r"lacks 7×7 float32 at 3 tokens; it holds 32×64 at 10 tokens"
    ) as caught:
        TABLE.share(Shape(7, 7, 3))
    assert "profile" in caught.value.hint
    with pytest.raises(InvalidInputError, match=r"lacks 'other' of 64×32"):
        TABLE.share(SHAPE, "other", 1)


def changed(**more: Any) -> dict[str, Any]:
    return {**copy.deepcopy(to_json(TABLE)), **more}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([], "names no schema"),
        (changed(schema="lrcompile.costs/9"), "'lrcompile.costs/9'; this version reads 'lrcompile.costs/1'"),
        (changed(total_ms=-1), "no measured amount"),
        (changed(total_ms=float("nan")), "no measured amount"),
        (changed(shapes=[{"out": 3}]), "lacks"),
        (changed(shapes=5), "damaged"),
        (changed(anchor={"ratio": "x", "sites": []}), "anchor is damaged"),
        ({"schema": "lrcompile.optimize/1", "costs": {}}, "without --latency"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_refused(found: Any, words: str):
    with pytest.raises(InvalidInputError, match=words) as caught:
        parse(found, "costs.json")
    assert caught.value.code == 3


def test_files_that_are_no_json(tmp_path: Path):
    (tmp_path / "costs.json").write_text("{")
    for name, words in (("costs.json", "is no JSON"), ("absent.json", "cannot be read")):
        with pytest.raises(InvalidInputError, match=words):
            load(tmp_path / name)
