"""Laws of the arena planner."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrcompile.dataflow.planner import Planner, Request, bound, exact, greedy

SPANS = st.tuples(st.integers(0, 12), st.integers(0, 5), st.integers(0, 40))
REQUESTS = st.lists(SPANS.map(lambda each: Request(each[2] * 16, each[0], each[0] + each[1])), max_size=9)


def overlaps(requests: list[Request], offsets: tuple[int, ...]) -> list[tuple[int, int]]:
    found = []
    for i, a in enumerate(requests):
        for j, b in enumerate(requests[:i]):
            meet = a.meets(b) and a.size and b.size
            if meet and offsets[i] < offsets[j] + b.size and offsets[j] < offsets[i] + a.size:
                found.append((i, j))
    return found


@given(REQUESTS)
def test_nothing_that_lives_at_once_overlaps(requests: list[Request]):
    for layout in (greedy(requests), exact(requests)):
        assert overlaps(requests, layout.offsets) == []
        ends = [at + each.size for at, each in zip(layout.offsets, requests, strict=True)]
        assert layout.size == max(ends, default=0)


@given(REQUESTS)
def test_between_the_bound_and_greedy(requests: list[Request]):
    layout = exact(requests)
    assert bound(requests) <= layout.size <= greedy(requests).size


@given(REQUESTS)
def test_the_bound_is_the_largest_live_set(requests: list[Request]):
    live = [sum(each.size for each in requests if each.first <= at <= each.last) for at in range(20)]
    assert bound(requests) == max(live, default=0)


def test_exact_beats_greedy_where_descending_size_is_wrong():
    requests = [Request(*each) for each in ((32, 0, 1), (48, 1, 2), (16, 0, 0), (32, 2, 3), (48, 3, 4), (16, 4, 4))]
    assert overlaps(requests, exact(requests).offsets) == []
    assert exact(requests).size == bound(requests)


def test_a_proof_that_the_bound_cannot_be_reached():
    """Two buffers of 1 on both sides of one of 2, pairwise in conflict over time, need a gap more than the bound."""
    requests = [Request(*each) for each in ((16, 0, 1), (32, 1, 2), (16, 2, 3), (32, 3, 4), (16, 4, 5), (48, 0, 0))]
    layout = exact(requests)
    assert layout.optimal
    assert layout.size == 64


def test_sizes_are_rounded_up_to_the_alignment():
    planner = Planner(align=16)
    planner.add(1, 0, 0)
    planner.add(17, 0, 0)
    assert planner.layout().size == 48


@pytest.mark.parametrize("bad", [(-1, 0, 0), (4, 2, 1)])
def test_impossible_requests_are_refused(bad: tuple[int, int, int]):
    with pytest.raises(ValueError):
        Planner().add(*bad)
