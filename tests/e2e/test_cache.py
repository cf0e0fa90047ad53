"""A decoder with its key–value cache as inputs and outputs is made smaller, and still decodes step by step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lrcompile import Budget, Options, optimize
from lrcompile.graphs.onnx.session import FileSession
from lrcompile.zoo.smollm2 import OUTPUT
from tests.zoo.tiny_llama import PAST, PRESENT, VOCABULARY, export, fed


@pytest.mark.timeout(400)
def test_it_decodes_with_its_cache_after_it_was_made_smaller(tmp_path: Path):
    dense, small = export(tmp_path / "dense.onnx"), tmp_path / "small.onnx"
    random = np.random.default_rng(0)
    data = [fed(random.integers(0, VOCABULARY, (4, 24))) for _ in range(12)]
    options = Options(max_drift=2.0, latency=False)
    result = optimize(dense, Budget(keep=0.7), calibration=data[:10], evaluation=data[10:], options=options, out=small)
    assert result.report.ratio.parameters < 0.85
    run, ids = FileSession(str(small)).run, random.integers(0, VOCABULARY, (3, 9))
    whole = run(fed(ids))
    past, seen = None, []
    for piece in (ids[:, :5], ids[:, 5:6], ids[:, 6:7], ids[:, 7:]):
        found = run(fed(piece, past))
        past = dict(zip(PAST, (found[name] for name in PRESENT), strict=True))
        seen.append(found[OUTPUT])
    np.testing.assert_allclose(np.concatenate(seen, 1), whole[OUTPUT], atol=1e-3)
    assert past is not None
    np.testing.assert_allclose(past[PAST[0]], whole[PRESENT[0]], atol=1e-3)
    assert not np.allclose(whole[OUTPUT], FileSession(str(dense)).run(fed(ids))[OUTPUT], atol=1e-2)
