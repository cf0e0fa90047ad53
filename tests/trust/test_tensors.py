"""Weights that are not finite, and weights on their way to torch and back."""

from __future__ import annotations

import warnings

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lrcompile.errors import InvalidInputError, UnsupportedError
from lrcompile.graphs.onnx.load import check_finite, read
from lrcompile.graphs.onnx.tensors import from_torch, to_torch
from tests.trust.models import WEIGHT, model, write


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("outside", [False, True])
def test_weights_that_are_not_finite(tmp_path, dtype, bad, outside):
    values = (WEIGHT + 1).astype(dtype)
    good = write(tmp_path, model(initializers=[ir.to_proto(ir.tensor(values, name="w"))]))
    check_finite(read(good), chunk=3)
    values[2, 3] = bad
    tensor = ir.to_proto(ir.tensor(values, name="w"))
    if outside:
        (tmp_path / "w.bin").write_bytes(values.tobytes())
        tensor = TensorProto(name="w", data_type=tensor.data_type, dims=[4, 4], data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="w.bin")
    found = read(write(tmp_path, model(initializers=[tensor])))
    with pytest.raises(InvalidInputError, match=r"w: contains (NaN|infinite)"):
        check_finite(found, chunk=3)


def test_not_finite_in_a_constant_node(tmp_path):
    bad = numpy_helper.from_array(np.array([1, np.nan], np.float32), "c")
    found = read(write(tmp_path, model([helper.make_node("Constant", [], ["y"], value=bad)], [])))
    with pytest.raises(InvalidInputError, match="c: contains NaN"):
        check_finite(found)


def test_masks_and_bounds_may_be_infinite(tmp_path):
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    bound = numpy_helper.from_array(np.array(np.inf, np.float32), "bound")
    found = read(write(tmp_path, model(initializers=[numpy_helper.from_array(mask, "w"), bound])))
    check_finite(found, chunk=3)


FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(3, 4), (), (0, 2)])
def test_torch_round_trip_without_copies(dtype, shape):
    source = torch.rand(shape).mul(3).to(dtype)
    tensor = from_torch(source, "w")
    back = to_torch(tensor)
    assert (tensor.name, back.dtype, back.shape) == ("w", source.dtype, source.shape)
    assert torch.equal(back.double(), source.double())
    assert source.numel() == 0 or back.data_ptr() == source.data_ptr()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [0, 3, 4096])
def test_torch_from_files_is_exact_silent_and_safe_to_write(tmp_path, dtype, offset):
    source = torch.randn(4, 4).to(dtype)
    tensor = from_torch(source, "w")
    (tmp_path / "w.bin").write_bytes(bytes(offset) + tensor.tobytes())
    shape = ir.Shape([4, 4])
    outside = ir.ExternalTensor("w.bin", offset, tensor.nbytes, tensor.dtype, shape=shape, name="w", base_dir=tmp_path)
    embedded = ir.from_proto(ir.to_proto(tensor))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in (outside, embedded):
            back = to_torch(each)
            assert torch.equal(back.view(torch.uint8), source.view(torch.uint8))
            back.zero_()
            assert torch.equal(to_torch(each).view(torch.uint8), source.view(torch.uint8))
    assert (tmp_path / "w.bin").read_bytes()[offset:] == tensor.tobytes()


def test_torch_from_other_layouts(tmp_path):
    source = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True).T
    assert torch.equal(to_torch(from_torch(source, "w")), source)
    four = ir.tensor(np.array([-8, 7, 1], ml_dtypes.int4), name="q")
    assert to_torch(four).tolist() == [-8, 7, 1]
    with pytest.raises(UnsupportedError):
        to_torch(ir.tensor(["a"], name="s"))
    gone = ir.ExternalTensor("w", 0, 4, ir.DataType.FLOAT, shape=ir.Shape([1]), name="w", base_dir=tmp_path)
    with pytest.raises(InvalidInputError):
        to_torch(gone)
