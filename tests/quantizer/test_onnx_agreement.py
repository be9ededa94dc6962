"""Equality with ONNX QuantizeLinear and DequantizeLinear, to the bit, as ONNX Runtime computes them."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime
import pytest
from dopt_strategies import data, finite, scales
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from dopt_api.quantizer import Grid, dequantize, quantize, scale_zero_point

F32 = np.float32
GRIDS = {"uint8": Grid(8), "int8": Grid(8, signed=True), "uint16": Grid(16), "int16": Grid(16, signed=True)}
every_grid = pytest.mark.parametrize("dtype", GRIDS)


@cache
def session(dtype: str, axis: int | None) -> onnxruntime.InferenceSession:
    """Return a session that computes ``q`` from ``x``, and ``y`` from ``q``."""
    kind = getattr(TensorProto, dtype.upper())
    shape = [] if axis is None else [None]
    options = {} if axis is None else {"axis": axis}
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"], **options),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero_point"], ["y"], **options),
        ],
        "agreement",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("zero_point", kind, shape),
        ],
        [helper.make_tensor_value_info("q", kind, None), helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def assert_agrees(x, scale, zero_point, dtype: str, axis: int | None = None) -> None:
    feeds = {"x": x, "scale": np.asarray(scale, F32), "zero_point": np.asarray(zero_point, dtype)}
    theirs, values = session(dtype, axis).run(["q", "y"], feeds)
    ours = quantize(x, scale, zero_point, GRIDS[dtype], axis=axis)
    np.testing.assert_array_equal(ours, theirs.astype(np.int32))
    np.testing.assert_array_equal(dequantize(ours, scale, zero_point, axis=axis), values)


@every_grid
@given(data(finite | st.sampled_from([np.inf, -np.inf])).filter(lambda x: x.size), scales, st.data())
def test_any_data_and_scale(dtype, x, scale, draw):
    assert_agrees(x, scale, draw.draw(st.integers(GRIDS[dtype].qmin, GRIDS[dtype].qmax)), dtype)


@every_grid
def test_many_numbers_and_ties(dtype):
    generator = np.random.default_rng(0)
    x = (generator.standard_normal(20_000) * 3).astype(F32)
    scale, zero_point = scale_zero_point(x.min(), x.max(), GRIDS[dtype])
    assert_agrees(x, scale, zero_point, dtype)
    assert_agrees(np.arange(-300, 300, dtype=F32) + F32(0.5), 1.0, 7, dtype)
    ties = (np.arange(-300, 300) + 0.5).astype(F32) * scale
    assert_agrees(np.concatenate([ties, np.nextafter(ties, F32(9)), np.nextafter(ties, F32(-9))]), scale, 7, dtype)


@every_grid
@given(st.data(), st.integers(0, 2))
def test_any_data_and_scales_per_channel(dtype, draw, axis):
    grid = GRIDS[dtype]
    x = draw.draw(hnp.arrays(F32, (2, 3, 4), elements=finite))
    scale = draw.draw(hnp.arrays(F32, x.shape[axis], elements=scales))
    zero_point = draw.draw(hnp.arrays(np.int32, x.shape[axis], elements=st.integers(grid.qmin, grid.qmax)))
    assert_agrees(x, scale, zero_point, dtype, axis)
