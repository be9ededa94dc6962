"""Exact integer sums: against ONNX's own reference, and against loops."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from dopt_api.integer_sums import convolution_sums, matrix_sums


@settings(max_examples=25)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(0, 99)
)
def test_a_convolution_is_that_of_the_onnx_reference(groups, size, stride, dilation, pad, seed):
    generator = np.random.default_rng(seed)
    x = generator.integers(-255, 256, (2, 2 * groups, 9, 8))
    weight = generator.integers(-127, 128, (3 * groups, 2, size, 2))
    options = {"strides": [stride, 1], "dilations": [1, dilation], "pads": [pad, 1, 0, 2]}
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=groups, **options)
    ends = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, [None] * 4) for name in "xwy"]
    model = helper.make_model(
        helper.make_graph([node], "g", ends[:2], ends[2:]), opset_imports=[helper.make_opsetid("", 15)]
    )
    (wanted,) = ReferenceEvaluator(onnx.load_from_string(model.SerializeToString())).run(
        None, {"x": x.astype(np.float64), "w": weight.astype(np.float64)}
    )
    found = convolution_sums(x, weight, groups=groups, **options)
    assert found.dtype == np.int64
    assert np.array_equal(found, wanted)


def test_one_and_three_dimensions_are_sums_over_windows():
    generator = np.random.default_rng(0)
    x, weight = generator.integers(-9, 9, (1, 2, 4, 5, 6)), generator.integers(-9, 9, (3, 2, 2, 3, 1))
    found = convolution_sums(x, weight, pads=[0] * 6, strides=[1, 2, 1], dilations=[1, 1, 1])
    assert found.shape == (1, 3, 3, 2, 6)
    assert found[0, 1, 2, 1, 5] == (x[0, :, 2:4, 2:5, 5:6] * weight[1]).sum()


def test_sums_beyond_float32_are_exact():
    x, weight = np.full((1, 70000), 65535), np.full((70000, 1), 127)
    x[0, 0] += 1
    assert matrix_sums(x, weight)[0, 0] == 127 * (65535 * 70000 + 1)


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
def test_matrices_may_have_any_leading_dimensions(shape):
    x, weight = np.arange(np.prod(shape)).reshape(shape), np.arange(12).reshape(6, 2)
    assert np.array_equal(matrix_sums(x, weight), x @ weight)
