"""Quantized layers: weights on their grid, biases that fit int32, and errors that name the layer."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from dopt_strategies import finite
from exact import exact
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dopt_api.errors import NumbersError
from dopt_api.params import FloatLayer, QuantizedLayer, fold, quantize_layer
from dopt_api.quantizer import SMALLEST_SCALE, BatchNorm, Grid, learned_scale, scale_zero_point
from dopt_api.quantizer.affine import LARGEST_END
from dopt_api.strategy import STRATEGIES
from dopt_api.types import LayerPlan

F32 = np.float32
PLAN = LayerPlan("block/conv1/Conv2D", "Conv2D", STRATEGIES["Quant_INT8-8"])
PER_TENSOR = replace(PLAN, strategy=replace(PLAN.strategy, weight=Grid(8, signed=True, symmetric=True, narrow=True)))

usable = st.floats(float(F32(-LARGEST_END)), float(F32(LARGEST_END)), width=32)
weights = hnp.arrays(F32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=4), elements=usable)
normal_scales = st.floats(2.0**-60, 2.0**30, width=32)
small = st.one_of(
    st.just(0.0), st.floats(-1e3, 1e3, width=16).map(lambda x: x * 2.0**-80), st.floats(-1e3, 1e3, width=16)
)


def layer_of(weight, bias=None, norm=None, axis=0) -> FloatLayer:
    return FloatLayer(np.asarray(weight, F32), None if bias is None else np.asarray(bias, F32), norm, axis)


def quantized(weight, bias=None, input_scale=0.5, *, plan=PLAN, gain=0.0, axis=0, norm=None) -> QuantizedLayer:
    return quantize_layer(layer_of(weight, bias, norm, axis), plan, F32(input_scale), 3, gain)


# ---- weights


@given(weights, st.integers(-2, 1))
def test_weights_lie_on_their_grid(weight, axis):
    layer = quantized(weight, axis=axis)
    shape = [1] * weight.ndim
    shape[axis] = -1
    assert layer.integers.dtype == np.int32
    assert np.abs(layer.integers).max() <= 127
    assert layer.weight.tobytes() == (layer.integers.astype(F32) * layer.weight_scale.reshape(shape)).tobytes()


@given(weights)
def test_weights_move_by_at_most_half_a_step(weight):
    layer = quantized(weight)
    for channel, scale in enumerate(layer.weight_scale):
        for before, after in zip(weight[channel].ravel(), layer.weight[channel].ravel(), strict=True):
            assert abs(exact(before) - exact(after)) <= exact(scale) * (Fraction(1, 2) + Fraction(1, 2**15))


@given(weights, st.integers(-2, 1))
def test_each_channel_has_the_scale_of_its_greatest_weight(weight, axis):
    layer = quantized(weight, axis=axis)
    for channel, scale in zip(np.moveaxis(weight, axis, 0), layer.weight_scale, strict=True):
        peak = float(np.abs(channel).max())
        assert float(scale) == (max(float(F32(peak / 127)), SMALLEST_SCALE) if peak else 1.0)


@given(weights)
def test_one_scale_per_tensor_where_the_strategy_says_so(weight):
    layer = quantized(weight, np.ones(len(weight)), plan=PER_TENSOR)
    assert layer.weight_scale.shape == ()
    assert layer.bias_scale.shape == (len(weight),)
    assert len(set(layer.bias_scale.tolist())) == 1


@given(hnp.arrays(F32, (3, 4), elements=usable), hnp.arrays(F32, 3, elements=st.floats(-8.0, 8.0, width=32)))
def test_gains_multiply_the_scales_of_the_extremes(weight, gain):
    layer = quantized(weight, gain=gain)
    assert layer.weight_scale.tobytes() == learned_scale(quantized(weight).weight_scale, gain).tobytes()


def test_quantizing_twice_changes_nothing():
    weight = np.random.default_rng(0).standard_normal((8, 3, 3, 3))
    once = quantized(weight, np.ones(8))
    twice = quantized(once.weight, np.ones(8))
    assert twice.weight.tobytes() == once.weight.tobytes()


def test_what_was_given_is_kept():
    layer = quantized([[1.0]], [2.0], 0.25)
    assert (layer.plan, layer.input_scale, layer.input_zero_point, layer.axis) == (PLAN, F32(0.25), 3, 0)
    assert layer.bias.tolist() == [2.0]
    assert quantized([[1.0]]).bias is quantized([[1.0]]).bias_scale is None


# ---- biases


def assert_bias_fits(layer: QuantizedLayer) -> None:
    """Check the bias in exact arithmetic, and as a target computes it in float32."""
    for bias, scale in zip(layer.bias, layer.bias_scale, strict=True):
        assert scale >= SMALLEST_SCALE
        assert abs(round(exact(bias) / exact(scale))) <= 2**31 - 1
        assert abs(float(np.rint(F32(bias) / F32(scale)))) <= 2**31 - 1


@given(
    hnp.arrays(F32, (3, 2), elements=small),
    hnp.arrays(F32, 3, elements=st.floats(-1e6, 1e6, width=32)),
    normal_scales,
    st.booleans(),
)
def test_biases_fit_int32_whatever_the_weights(weight, bias, input_scale, per_tensor):
    assert_bias_fits(quantized(weight, bias, input_scale, plan=PER_TENSOR if per_tensor else PLAN))


@given(st.floats(2.0**-20, 1.0, width=32), st.floats(0.125, 16.0, width=32))
def test_biases_leave_half_of_int32_to_the_sums_at_a_scale_raised_to_the_limit(input_scale, bias):
    layer = quantized([[1e-30]], [bias], input_scale)
    assert_bias_fits(layer)
    assert 2**30 * 0.999 < bias / float(layer.bias_scale[0]) < 2**30 * 1.001  # leaves room for sums, and no more


@given(hnp.arrays(F32, (2, 3), elements=normal_scales), hnp.arrays(F32, 2, elements=finite), normal_scales)
def test_scales_are_raised_only_where_the_bias_does_not_fit(weight, bias, input_scale):
    plain = quantized(weight, input_scale=input_scale).weight_scale
    fits = np.abs(bias.astype(np.float64)) < float(input_scale) * plain.astype(np.float64) * (2**30 - 2**9)
    fits &= float(input_scale) * plain.astype(np.float64) >= 2 * SMALLEST_SCALE
    raised = quantized(weight, np.where(fits, bias, F32(0)), input_scale).weight_scale
    np.testing.assert_array_equal(raised[fits], plain[fits])


@given(hnp.arrays(F32, (2, 3), elements=usable), normal_scales)
def test_bias_scale_is_the_float32_product_of_input_and_weight_scale(weight, input_scale):
    layer = quantized(np.clip(weight, -1e6, 1e6), [1.0, 2.0], input_scale)
    assert layer.bias_scale.tobytes() == (F32(input_scale) * layer.weight_scale).tobytes()


def test_a_channel_without_weights_keeps_its_bias():
    layer = quantized(np.zeros((2, 3)), [7.0, 1e12], 1e-3)
    assert layer.integers.tolist() == [[0, 0, 0]] * 2
    assert layer.weight_scale[0] == 1.0
    assert layer.weight_scale[1] > 1.0
    assert_bias_fits(layer)


def test_a_bias_scale_is_never_zero():
    layer = quantized([[1e-38]], [0.0], 1e-30)
    assert_bias_fits(layer)


def test_groups_of_a_transposed_convolution_share_scales_and_not_biases():
    """Weight ``[groups * 2, 3, k]`` with biases of 6 output channels: channel ``c`` has scale ``c % 3``."""
    layer = quantized(np.full((4, 3, 5), 1e-20), [1.0, 2.0, 3.0, 30.0, 0.2, 0.1], axis=1)
    assert layer.weight_scale.shape == (3,)
    assert layer.bias_scale.tolist() == np.tile(F32(0.5) * layer.weight_scale, 2).tolist()
    assert_bias_fits(layer)
    assert layer.weight_scale[0] > layer.weight_scale[2] > layer.weight_scale[1]


# ---- folding


def test_normalization_is_folded_before_quantization():
    norm = BatchNorm(np.array([4.0]), np.array([1.0]), np.array([2.0]), np.array([4.0]), 0.0)
    layer = quantized([[127.0, -3.0]], [5.0], norm=norm)
    assert layer.weight_scale.tolist() == [2.0]
    assert layer.integers.tolist() == [[127, -3]]
    assert layer.bias.tolist() == [7.0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_fold_returns_float32(dtype):
    weight, bias = fold(FloatLayer(np.ones((1, 2), dtype), np.ones(1, dtype), None, 0))
    assert weight.dtype == bias.dtype == F32
    assert fold(FloatLayer(np.ones((1, 2), dtype), None, None, 0))[1] is None


def test_an_output_has_a_scale_only_where_the_plan_records_it():
    source = layer_of([[1.0]])
    plain = quantize_layer(source, PLAN, F32(0.5), output_scale=F32(0.25), output_zero_point=3)
    assert plain.output_scale is None
    recorded = quantize_layer(source, replace(PLAN, output=True), F32(0.5), output_scale=F32(0.25), output_zero_point=3)
    assert (recorded.output_scale, recorded.output_zero_point) == (F32(0.25), 3)
    with pytest.raises(NumbersError, match="The output scale nan of layer"):
        quantize_layer(source, replace(PLAN, output=True), F32(0.5))


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": [[np.nan]]}, "The weight of layer"),
        ({"weight": [[np.inf]]}, "The weight of layer"),
        ({"weight": [[1.0]], "bias": [np.nan]}, "The bias of layer"),
        ({"weight": [[1.0]], "bias": [-np.inf]}, "The bias of layer"),
        ({"weight": [[3e38]]}, "cannot be quantized: .* too wide"),
        ({"weight": [[1.0]], "gain": np.array([np.nan])}, "The weight scale nan"),
        ({"weight": [[1.0]], "gain": np.array([np.inf])}, "The weight scale inf"),
        ({"weight": [[1.0]], "input_scale": np.nan}, "The input scale nan"),
        ({"weight": [[1.0]], "input_scale": 0.0, "bias": [1.0]}, "The input scale 0"),
        ({"weight": [[1.0]], "input_scale": 1e-38, "bias": [3e38]}, "The bias scale inf"),
        ({"weight": [[1e37]], "input_scale": 1e37, "bias": [0.0]}, "The bias scale inf"),
    ],
)
def test_errors_name_the_layer(arguments, message):
    with pytest.raises(NumbersError, match=message) as caught:
        quantized(**arguments)
    assert "block/conv1/Conv2D" in caught.value.what
    assert caught.value.where == "layer 'block/conv1/Conv2D'"
    assert caught.value.fix


@pytest.mark.parametrize(("variance", "epsilon"), [(-1.0, 1e-3), (0.0, 0.0), (np.nan, 1e-3)])
def test_a_normalization_that_makes_no_sense_is_refused(variance, epsilon):
    norm = BatchNorm(None, None, np.zeros(1), np.array([variance]), epsilon)
    with pytest.raises(NumbersError, match=r"after folding.*a running variance is negative"):
        quantized([[1.0]], norm=norm)


def test_float64_weights_beyond_float32_are_refused():
    layer = FloatLayer(np.array([[1e300]]), None, None, 0)
    with pytest.raises(NumbersError, match="The weight of layer"):
        quantize_layer(layer, PLAN, F32(1.0), 0)


# ---- weights alone

GROUPS = {name: LayerPlan("fc/Linear", "Linear", STRATEGIES[name]) for name in STRATEGIES if "-G32" in name}


@given(
    hnp.arrays(F32, st.tuples(st.integers(1, 4), st.sampled_from([32, 64])), elements=small),
    st.sampled_from(sorted(GROUPS)),
)
def test_a_group_is_quantized_like_a_channel_of_its_own(weight, name):
    layer = quantize_layer(layer_of(weight, np.ones(len(weight))), GROUPS[name], None)
    groups = layer_of(weight.reshape(-1, 32))
    alone = replace(GROUPS[name].strategy, weight=replace(GROUPS[name].strategy.weight, group=None))
    rows = quantize_layer(groups, replace(GROUPS[name], strategy=alone), None)
    assert layer.integers.shape == weight.shape
    assert layer.weight.tobytes() == rows.weight.tobytes()
    assert layer.weight_scale.tobytes() == rows.weight_scale.tobytes()
    assert layer.weight_zero_point.tolist() == rows.weight_zero_point.tolist()


@given(hnp.arrays(F32, (3, 32), elements=small))
def test_asymmetric_weights_use_the_whole_grid_and_keep_zero(weight):
    plan = GROUPS["Quant_FLOAT-4A-G32"]
    layer = quantize_layer(layer_of(weight), plan, None)
    scale, zero_point = scale_zero_point(weight.min(axis=1), weight.max(axis=1), plan.strategy.weight)
    assert layer.weight_scale.tobytes() == scale.tobytes()
    assert layer.weight_zero_point.tolist() == zero_point.tolist()
    assert (layer.integers >= 0).all()
    assert (layer.integers <= 15).all()
    assert (layer.weight[weight == 0] == 0).all()
    found = (layer.integers - zero_point[:, None]).astype(F32) * scale[:, None]
    assert layer.weight.tobytes() == found.tobytes()


def test_weights_alone_need_no_scale_of_the_input_and_leave_the_bias_float():
    plan = LayerPlan("conv/Conv2D", "Conv2D", STRATEGIES["Quant_FLOAT-8"])
    layer = quantize_layer(layer_of([[1e-30]], [1e30]), plan, None)
    assert (layer.input_scale, layer.bias_scale) == (None, None)
    assert layer.bias == [F32(1e30)]
    assert layer.weight_scale == quantized([[1e-30]]).weight_scale  # nothing is raised for the bias
    with pytest.raises(NumbersError, match="The input scale nan of layer"):
        quantize_layer(layer_of([[1.0]]), PLAN, None)


@pytest.mark.parametrize(("shape", "axis"), [((2, 48), 0), ((64, 2), 1), ((2, 32, 1), 0)])
def test_weights_without_such_groups_are_refused_by_name(shape, axis):
    with pytest.raises(NumbersError, match=r"weight of layer 'fc/Linear', \[.*\], has no groups of 32"):
        quantize_layer(layer_of(np.ones(shape), axis=axis), GROUPS["Quant_FLOAT-4-G32"], None)
