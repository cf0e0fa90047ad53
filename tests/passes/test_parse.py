"""Passes as text: what the command line takes, what it refuses and how, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrcompile import registry
from lrcompile.errors import UsageError
from lrcompile.passes.clean import Clean
from lrcompile.passes.low_rank import LowRank
from lrcompile.rewrite import LinearPass, Pass, parse

KNOWN = registry.passes()


@dataclass(frozen=True)
class Every(LinearPass):
    """One option of each kind."""

    name: ClassVar[str] = "every"
    count: int = 3
    share: float = 1
    flag: bool = False
    kind: Literal["float", "int"] = "int"
    limit: int | None = None
    text: str = "x"


@dataclass(frozen=True)
class Needs(LinearPass):
    """An option without a default."""

    name: ClassVar[str] = "needs"
    rank: int


KNOWN = {**KNOWN, "every": Every, "needs": Needs}


def test_ours_are_found_by_name():
    assert {"clean", "exact-low-rank", "low-rank"} <= set(registry.names("passes"))
    assert all(cls.name == name for name, cls in KNOWN.items())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("low-rank", LowRank()),
        (" low-rank ", LowRank()),
        ("low-rank{}", LowRank()),
        ("low-rank{metric=plain}", LowRank(metric="plain")),
        ("low-rank{ metric = diagonal , damp=1e-3,}", LowRank(metric="diagonal", damp=1e-3)),
        ("low-rank{center=false, min_rank=2, shrink=1}", LowRank(center=False, min_rank=2, shrink=1.0)),
        ("clean", Clean()),
        ("every{count=-2, share=2, flag=TRUE, kind=float, limit=8, text=a b}", Every(-2, 2.0, True, "float", 8, "a b")),
        ("every{limit=None}", Every()),
        ("needs{rank=4}", Needs(4)),
    ],
)
def test_text_becomes_a_pass(text: str, expected: Pass):
    assert parse(text, KNOWN) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("low-rnk", "unknown pass 'low-rnk'.*did you mean 'low-rank'"),
        ("", "unknown pass ''"),
        ("low-rank}", "unknown pass"),
        ("low-rank{metric=plain", "closing brace"),
        ("low-rank{metric=plain}}", "is not one of"),
        ("low-rank{metrik=plain}", "unknown option 'metrik'.*did you mean 'metric'"),
        ("low-rank{metric}", "'metric' lacks its value"),
        ("low-rank{damp=1, damp=2}", "'damp' is given twice"),
        ("low-rank{metric=plian}", "low-rank.metric: 'plian' is not one of whitened, diagonal, plain.*'plain'"),
        ("low-rank{damp=small}", "low-rank.damp: 'small' is not float"),
        ("low-rank{min_rank=1.5}", "low-rank.min_rank: '1.5' is not int"),
        ("low-rank{center=maybe}", "low-rank.center: 'maybe' is not bool"),
        ("low-rank{shrink=2}", "shrink lies in 0..1"),
        ("clean{metric=plain}", "unknown option 'metric'"),
        ("every{limit=many}", "'many' is not int"),
        ("needs", "cannot be made"),
    ],
)
def test_mistakes_are_named(text: str, message: str):
    with pytest.raises(UsageError, match=message) as caught:
        parse(text, KNOWN)
    assert caught.value.code == 2


@given(
    st.builds(
        LowRank,
        metric=st.sampled_from(["whitened", "diagonal", "plain"]),
        shrink=st.floats(0, 1),
        damp=st.floats(0, 1e3),
        center=st.booleans(),
        alpha=st.floats(-3, 3),
        min_rank=st.integers(1, 99),
    )
)
def test_a_pass_survives_its_own_text(each: LowRank):
    assert parse(str(each), KNOWN) == each


@given(st.builds(Every, st.integers(), st.floats(allow_nan=False), st.booleans(), st.sampled_from(["float", "int"]),
                 st.none() | st.integers(), st.text("abc xyz-_.", min_size=1).map(str.strip).filter(bool)))  # fmt: skip
def test_so_does_every_kind_of_option(each: Every):
    assert parse(str(each), KNOWN) == each


def test_only_what_differs_is_printed():
    assert str(LowRank()) == "low-rank"
    assert str(LowRank(metric="plain", min_rank=2)) == "low-rank{metric=plain, min_rank=2}"


def test_options_tell_type_and_default():
    options = LowRank.options()
    assert options["damp"] == ("float", 1e-5)
    assert options["center"] == ("bool", True)
    names = ["metric", "shrink", "damp", "center", "two_sided", "gauge", "permute", "columns", "alpha", "min_rank"]
    assert list(options) == names
    assert Clean.options() == {}


def test_unknown_names_in_the_registry():
    with pytest.raises(UsageError, match=r"unknown pass 'lowrank'.*'low-rank'"):
        registry.load("passes", "lowrank")
    with pytest.raises(UsageError, match=r"unknown backend 'onnxruntim'.*'onnxruntime'"):
        registry.load("backends", "onnxruntim")
