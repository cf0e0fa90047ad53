"""Streaming moments against one batch in float64, masks, groups, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lrcompile import cache
from lrcompile.calibrate import Collector, Moments, groups, token_mask, token_rows
from lrcompile.errors import InvalidInputError


def rows(tokens: int, channels: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed)) + 0.5


def collected(*parts: Tensor) -> Moments:
    moments = Moments.zeros(parts[0].shape[1])
    for part in parts:
        moments.update(part, samples=1)
    return moments


def equal(a: Moments, b: Moments) -> None:
    assert (a.tokens, a.samples) == (b.tokens, b.samples)
    for name in ("gram", "total", "absolute", "absmax"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 9))
def test_streaming_equals_one_batch(sizes: list[int], channels: int):
    parts = [rows(size, channels, seed) for seed, size in enumerate(sizes)]
    moments, wide = collected(*parts), torch.cat(parts).double()
    assert (moments.tokens, moments.samples, moments.channels) == (len(wide), len(sizes), channels)
    torch.testing.assert_close(moments.gram.double(), wide.T @ wide, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.total.double(), wide.sum(0), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.absolute.double(), wide.abs().sum(0), rtol=1e-5, atol=1e-4)
    if len(wide):
        assert torch.equal(moments.absmax.double(), wide.abs().amax(0))
        torch.testing.assert_close(moments.mean(), wide.mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments.covariance(), torch.cov(wide.T, correction=0).reshape(channels, channels),
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


def test_reading_in_between_changes_nothing():
    """Half of the Gram matrix is held; whoever looks gets all of it."""
    moments = Moments.zeros(6)
    for seed in range(4):
        moments.update(rows(9, seed=seed))
        assert torch.equal(moments.gram, moments.gram.T)
    moments.samples = 4
    equal(moments, collected(*(rows(9, seed=seed) for seed in range(4))))


def test_merging_is_associative_and_equals_streaming():
    a, b, c = (collected(rows(size, seed=size)) for size in (5, 17, 30))
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    equal(left, right)
    equal(left, collected(*(rows(size, seed=size) for size in (5, 17, 30))))
    equal(c.merge(b).merge(a), left)
    equal(a.merge(Moments.zeros(6)), a)
    left.update(rows(3), samples=1)
    equal(left, collected(*(rows(size, seed=size) for size in (5, 17, 30)), rows(3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_accumulated_in_float32(dtype: torch.dtype):
    values = rows(40).to(dtype)
    moments = collected(values)
    assert moments.gram.dtype == torch.float32
    torch.testing.assert_close(moments.gram.double(), values.double().T @ values.double(), rtol=1e-5, atol=1e-4)


def test_rows_in_any_layout_and_mode():
    values = rows(12)
    with torch.inference_mode():
        moments = Moments.zeros(6)
        moments.update(values.T.contiguous().T, samples=1)
    moments.update(values.repeat_interleave(2, 0)[::2], samples=1)
    moments.update(values.clone().requires_grad_(), samples=1)
    equal(moments, collected(values, values, values))
    turned = collected(values)
    given = Moments(turned.gram.T, turned.total, turned.absolute, turned.absmax, turned.tokens, turned.samples)
    given.update(values, samples=1)  # given as a whole, in another layout
    equal(given, collected(values, values))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_is_not_finite_is_refused_with_its_name(bad: float):
    """1e30 is a number, but its square is none."""
    values = rows(5)
    values[3, 2] = bad
    collector = Collector()
    collector.add("fine", rows(5), 1)
    with pytest.raises(InvalidInputError, match=r"hidden.3: .*NaN or infinite") as caught:
        collector.add("hidden.3", values, 1)
        _ = collector.moments
    assert (caught.value.code, caught.value.where) == (3, "hidden.3")


def test_a_collector_keeps_values_apart():
    collector = Collector()
    for seed in range(3):
        collector.add("a", rows(4, 6, seed), 2)
        collector.add("b", rows(5, 3, seed), 2)
    assert {name: (m.channels, m.tokens, m.samples) for name, m in collector.moments.items()} == {
        "a": (6, 12, 6), "b": (3, 15, 6),
    }  # fmt: skip


# -- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["attention_mask", "input_mask", "padding_mask", "mask"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_masks_are_known_by_name(name: str, dtype: torch.dtype):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).to(dtype)
    found = token_mask({"input_ids": torch.zeros(2, 3), name: mask})
    assert found is not None and found.tolist() == [[True, True, False], [True, False, False]]


def test_what_is_no_token_mask():
    assert token_mask({"input_ids": torch.ones(2, 3)}) is None
    assert token_mask({"attention_mask": torch.ones(2, 1, 3, 3)}) is None


def test_padding_is_left_out_where_the_mask_fits():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    value = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    expected = value[mask]
    assert torch.equal(token_rows(value, mask), expected)
    assert torch.equal(token_rows(value.reshape(6, 4), mask), expected)
    assert torch.equal(token_rows(value.movedim(-1, 1), mask, channel_axis=1), expected)
    pooled, heads = value[:, 0], value.reshape(2, 2, 3, 2)
    assert torch.equal(token_rows(pooled, mask), pooled)
    assert torch.equal(token_rows(heads, mask), heads.reshape(-1, 2))
    assert torch.equal(token_rows(value, None), value.reshape(-1, 4))
    assert token_rows(value, torch.zeros(2, 3, dtype=torch.bool)).shape == (0, 4)


def test_an_image_is_a_row_of_channels_for_every_pixel():
    image = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    assert torch.equal(token_rows(image, None, channel_axis=1), image.permute(0, 2, 3, 1).reshape(-1, 3))


# -- groups and storage -------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=4), st.integers(1, 64)), st.integers(1, 40_000))
def test_groups_fit_the_memory(sizes: dict[str, int], limit: int):

    def held(channels: int) -> int:
        return Moments.zeros(channels).half.nbytes

    found = list(groups(sizes, limit))
    assert [name for group in found for name in group] == list(sizes)
    for group in found:
        assert len(group) == 1 or sum(held(sizes[name]) for name in group) <= limit
    for group, following in itertools.pairwise(found):
        assert sum(held(sizes[name]) for name in (*group, following[0])) > limit


def test_moments_survive_the_cache(tmp_path: Path):
    shared = collected(rows(9))
    stored = {f"value.{index}": collected(rows(4, 3, index)) for index in range(20)} | {"a": shared, "b": shared}
    cache.store("name", *cache.pack(stored), tmp_path)
    loaded = cache.load("name", tmp_path)
    assert loaded is not None
    found = cache.unpack(*loaded)
    assert set(found) == set(stored) and found["a"] is found["b"]
    for name, moments in stored.items():
        equal(found[name], moments)
    found["a"].update(rows(2))  # what was read can be added to
    assert found["a"].tokens == 11


def test_the_cache_never_gets_in_the_way(tmp_path: Path):
    tensors = {"x": torch.ones(3)}
    assert cache.load("name", None) is None and cache.load("name", tmp_path / "missing") is None
    cache.store("name", tensors, {}, None)
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    cache.store("name", tensors, {}, blocked)
    (tmp_path / "name.safetensors").write_bytes(b"broken")
    assert cache.load("name", tmp_path) is None
    cache.store("name", tensors, {"text": "é"}, tmp_path)
    loaded = cache.load("name", tmp_path)
    assert loaded is not None and torch.equal(loaded[0]["x"], tensors["x"]) and loaded[1] == {"text": "é"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "name.safetensors"]


def test_the_cache_forgets_what_was_used_least_recently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import os

    for index, name in enumerate("abc"):
        cache.store(name, {"x": torch.zeros(100)}, {}, tmp_path)
        os.utime(tmp_path / f"{name}.safetensors", (index, index))
    size = (tmp_path / "a.safetensors").stat().st_size
    cache.load("a", tmp_path)
    monkeypatch.setattr(cache, "LIMIT", 3 * size)
    cache.store("d", {"x": torch.zeros(100)}, {}, tmp_path)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "c", "d"]


def test_keys_tell_parts_apart():
    keys = {cache.key("a", "bc"), cache.key("ab", "c"), cache.key("abc"), cache.key("a", "b", "c")}
    assert len(keys) == 4 and cache.key("a", "bc") in keys
    assert np.all([len(key) == 32 for key in keys])


@pytest.mark.parametrize("channels", [1, 2, 7, 64])
def test_half_a_matrix_is_held_and_can_grow(channels: int):
    rows = torch.randn(50, channels, generator=torch.Generator().manual_seed(0))
    whole, parts = Moments.zeros(channels), Moments.zeros(channels)
    whole.update(rows)
    parts.update(rows[:20])
    assert torch.equal(parts.gram, parts.gram.T) and parts.channels == channels
    place = parts.half.data_ptr()
    parts.update(rows[20:])
    assert parts.half.numel() == channels * (channels + 1) // 2 and parts.half.data_ptr() == place
    torch.testing.assert_close(whole.gram, rows.T @ rows, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(parts.gram, whole.gram)
    torch.testing.assert_close(parts.merge(whole).gram, 2 * whole.gram)
    torch.testing.assert_close(Moments.from_tensors(parts.tensors()).gram, whole.gram)
    given = Moments(whole.gram, whole.total, whole.absolute, whole.absmax)
    assert torch.equal(given.half, whole.half)


def test_a_mask_over_a_cache_gives_the_part_of_the_tokens():
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    past = torch.zeros(2, 4, 3, 8)
    found = token_mask({"attention_mask": mask, "input_ids": torch.zeros(2, 2, dtype=torch.int64), "past": past})
    assert found is not None
    assert torch.equal(found, mask.bool()[:, 3:])
    for others in ({"kind": torch.zeros(2, 2, dtype=torch.int64)}, {"past": past}):  # ids alone, a cache alone
        whole = token_mask({"attention_mask": mask, **others})
        assert whole is not None
        assert torch.equal(whole, mask.bool())
