"""A sample of ONNX's node cases: right as C, or refused by the operator's name."""

from __future__ import annotations

import pytest

from benchmarks.mcu_cases import Verdict, cases, verdicts

RIGHT = (
    *("add_bcast", "and2d", "argmax_default_axis_random_select_last_index", "argmin_keepdims_example"),
    *("averagepool_2d_ceil", "basic_conv_with_padding", "batchnorm_example", "bitshift_left_int32_shift_ge_width"),
    *("cast_DOUBLE_to_FLOAT", "clip_example", "concat_2d_axis_0", "convtranspose_pads", "einsum_batch_matmul"),
    *("gather_negative_indices", "gemm_all_attributes", "hardmax_one_hot", "layer_normalization_2d_axis0"),
    *("maxpool_2d_dilations", "mod_mixed_sign_int32", "mod_float32_mixed_sign_fmod_0", "quantizelinear_axis"),
    *("dropout_default_mask", "isnan", "shape", "softmax_axis_0", "spacetodepth_crd_mode_example"),
    *("sce_mean", "transpose_all_permutations_3", "where_long_example", "attention_4d_causal"),
)
FIXED = (
    "reduce_max_bool_inputs",
    "reduce_sum_do_not_keepdims_random",
    "slice_neg_steps",
    "split_variable_parts_2d_opset18",
)
REFUSED = {
    "nonmaxsuppression_suppress_by_IOU": "NonMaxSuppression",
    "string_concat": "StringConcat",
    "gru_defaults": "GRU",
}


@pytest.fixture(scope="module")
def found() -> dict[str, Verdict]:
    wanted = {f"test_{name}" for name in (*RIGHT, *FIXED, *REFUSED)}
    chosen = [case for case in cases() if case.name in wanted]
    return {verdict.name.removeprefix("test_"): verdict for verdict in verdicts(chosen)}


@pytest.mark.parametrize("name", RIGHT)
def test_a_case_passes_as_it_stands(found: dict[str, Verdict], name: str) -> None:
    assert (found[name].kind, found[name].reason) == ("passed", "")


@pytest.mark.parametrize("name", FIXED)
def test_a_case_passes_once_its_parameters_are_constant(found: dict[str, Verdict], name: str) -> None:
    assert (found[name].kind, found[name].reason) == ("fixed", "")


@pytest.mark.parametrize(("name", "operator"), REFUSED.items())
def test_the_rest_is_refused_by_operator_and_node(found: dict[str, Verdict], name: str, operator: str) -> None:
    assert found[name].kind == "refused"
    assert f"operator {operator}" in found[name].reason
