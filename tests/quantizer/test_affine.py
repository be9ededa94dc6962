"""The affine quantizer against rational arithmetic, and the laws it obeys for all data, grids and ranges."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from dopt_strategies import data, finite, grids, moderate, ranges, scales
from exact import exact, float32_quotient, float64, nearest_float32
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dopt_api.errors import NumbersError
from dopt_api.quantizer import (
    SMALLEST_SCALE,
    Grid,
    channel_maximum,
    dequantize,
    fake_quantize,
    quantize,
    scale_zero_point,
)
from dopt_api.quantizer.affine import LARGEST_END

F32 = np.float32
UINT8 = Grid(8)
INT8 = Grid(8, signed=True, symmetric=True, narrow=True)


# ---- scale and zero point


@given(ranges(), grids())
def test_scale_is_the_float64_quotient_rounded_once_to_float32(ends, grid):
    low, high = min(exact(ends[0]), 0), max(exact(ends[1]), 0)
    if grid.symmetric:
        high = max(-low, high)
        low = -high
    width = float64(Fraction(high - low))
    expected = nearest_float32(float64(width / (grid.qmax - grid.qmin)))
    expected = max(expected, exact(SMALLEST_SCALE)) if width else Fraction(1)
    scale, _ = scale_zero_point(*ends, grid)
    assert scale.dtype == F32
    assert exact(scale) == expected


@given(ranges(), grids())
def test_zero_point_is_rounded_half_to_even_and_on_the_grid(ends, grid):
    scale, zero_point = scale_zero_point(*ends, grid)
    real = float64(grid.qmin - float64(min(exact(ends[0]), Fraction(0)) / exact(scale)))
    expected = 0 if grid.symmetric else min(max(round(real), grid.qmin), grid.qmax)
    assert zero_point.dtype == np.int32
    assert int(zero_point) == expected


def test_scale_of_many_ranges_is_rounded_once():
    """Numbers of full precision, where rounding the width to float32 first would show."""
    lows, highs = np.sort(np.random.default_rng(0).standard_normal((2, 500)).astype(F32), axis=0)
    scales_found, _ = scale_zero_point(lows, highs, UINT8)
    for low, high, scale in zip(lows, highs, scales_found, strict=True):
        width = float64(max(exact(high), 0) - min(exact(low), 0))
        assert exact(scale) == nearest_float32(float64(width / 255))


@pytest.mark.parametrize(("low", "zero_point"), [(-0.5, 0), (-1.5, 2), (-2.5, 2), (-3.5, 4), (-252.5, 252)])
def test_a_zero_point_between_two_integers_is_the_even_one(low, zero_point):
    scale, found = scale_zero_point(low, low + 255.0, UINT8)
    assert (float(scale), int(found)) == (1.0, zero_point)


@given(ranges(), grids())
def test_zero_is_exact(ends, grid):
    scale, zero_point = scale_zero_point(*ends, grid)
    assert fake_quantize([0.0, -0.0], scale, zero_point, grid).tolist() == [0.0, 0.0]


@given(ranges(), grids())
def test_every_value_of_the_grid_is_finite(ends, grid):
    scale, zero_point = scale_zero_point(*ends, grid)
    assert np.isfinite(dequantize([grid.qmin, grid.qmax], scale, zero_point)).all()
    assert scale >= SMALLEST_SCALE


@given(ranges(), grids(), st.data())
def test_error_is_at_most_half_a_step_inside_the_range(ends, grid, draw):
    x = draw.draw(st.floats(min(ends[0], 0.0) + 0.0, max(ends[1], 0.0) + 0.0, width=32))
    scale, zero_point = scale_zero_point(*ends, grid)
    error = abs(exact(fake_quantize(x, scale, zero_point, grid)) - exact(x))
    # Rounding of the scale, of the quotient and of the product to float32 move up to 2**-24 of at most N steps each.
    slack = 4 * Fraction(grid.qmax - grid.qmin, 2**24)
    assert error <= (Fraction(1, 2) + slack) * exact(scale)


@given(ranges(), grids(), st.integers(-20, 20))
def test_scale_follows_a_power_of_two(ends, grid, power):
    low, high = (float(np.clip(end, -(2.0**40), 2.0**40)) for end in ends)
    low, high = (0.0 if abs(end) < 2.0**-60 else end for end in (low, high))
    scale, zero_point = scale_zero_point(low, high, grid)
    other, other_zero_point = scale_zero_point(low * 2.0**power, high * 2.0**power, grid)
    assert other == (scale * F32(2.0**power) if low < 0.0 or high > 0.0 else 1.0)
    assert other_zero_point == zero_point


@given(st.lists(ranges(), min_size=1, max_size=4), grids())
def test_ranges_of_channels_are_independent(ends, grid):
    lows, highs = np.array(ends).T
    together = scale_zero_point(lows, highs, grid)
    alone = [scale_zero_point(low, high, grid) for low, high in ends]
    assert together[0].tolist() == [float(scale) for scale, _ in alone]
    assert together[1].tolist() == [int(zero_point) for _, zero_point in alone]


@given(finite.filter(lambda x: abs(x) <= LARGEST_END), st.sampled_from([UINT8, INT8]))
def test_a_constant_is_kept(constant, grid):
    scale, zero_point = scale_zero_point(constant, constant, grid)
    kept = fake_quantize(constant, scale, zero_point, grid)
    if abs(constant) >= 255 * SMALLEST_SCALE:
        assert abs(exact(kept) - exact(constant)) <= abs(exact(constant)) / 2**22
    else:
        assert abs(exact(kept) - exact(constant)) <= exact(SMALLEST_SCALE)


def test_a_range_of_no_width_has_scale_one():
    scale, zero_point = scale_zero_point([0.0, -0.0], [0.0, 0.0], UINT8)
    assert scale.tolist() == [1.0, 1.0]
    assert zero_point.tolist() == [0, 0]


def test_no_channels_give_no_scales():
    scale, zero_point = scale_zero_point(np.zeros(0), np.zeros(0), INT8)
    assert scale.shape == zero_point.shape == (0,)


def test_subnormal_ranges_get_the_smallest_normal_scale():
    scale, zero_point = scale_zero_point(-1e-45, 1e-45, UINT8)
    assert float(scale) == SMALLEST_SCALE
    assert int(zero_point) == 0


@pytest.mark.parametrize(("low", "high"), [(0.0, np.nan), (np.nan, 0.0), (-np.inf, 0.0), (0.0, np.inf)])
def test_a_range_that_is_not_finite_is_refused(low, high):
    with pytest.raises(NumbersError, match=r"is not finite.*Look for NaN"):
        scale_zero_point(low, high, UINT8)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.8e38), (-1.8e38, 0.0), (-1e300, 1e300)])
def test_a_range_too_wide_for_float32_is_refused(low, high):
    with pytest.raises(NumbersError, match="too wide for float32"):
        scale_zero_point(low, high, UINT8)


def test_an_empty_range_is_refused():
    with pytest.raises(NumbersError, match=r"The range \[2, 1\] of channel 1 is empty"):
        scale_zero_point([0.0, 2.0], [1.0, 1.0], UINT8)


# ---- quantize and dequantize


@given(data(), scales, grids(), st.data())
def test_quantize_is_the_rounded_float32_quotient(x, scale, grid, draw):
    zero_point = draw.draw(st.integers(grid.qmin, grid.qmax))
    expected = [
        min(max(round(float32_quotient(value, scale)) + zero_point, grid.qmin), grid.qmax) for value in x.ravel()
    ]
    result = quantize(x, scale, zero_point, grid)
    assert result.dtype == np.int32
    assert result.shape == x.shape
    assert result.ravel().tolist() == expected


@given(st.lists(st.integers(0, 65535), max_size=8), st.integers(0, 65535), scales)
def test_dequantize_is_the_product_rounded_to_float32(q, zero_point, scale):
    expected = [float(nearest_float32((value - zero_point) * exact(scale))) for value in q]
    result = dequantize(np.array(q, np.int32), scale, zero_point)
    assert result.dtype == F32
    assert result.tolist() == expected


@given(data(), ranges(), grids())
def test_fake_quantize_is_idempotent(x, ends, grid):
    parameters = scale_zero_point(*ends, grid)
    once = fake_quantize(x, *parameters, grid)
    assert fake_quantize(once, *parameters, grid).tobytes() == once.tobytes()


@given(ranges(), grids(max_bits=8))
def test_integers_survive_a_round_trip(ends, grid):
    scale, zero_point = scale_zero_point(*ends, grid)
    integers = np.arange(grid.qmin, grid.qmax + 1, dtype=np.int32)
    np.testing.assert_array_equal(quantize(dequantize(integers, scale, zero_point), scale, zero_point, grid), integers)


@given(st.lists(finite | st.just(np.inf) | st.just(-np.inf), min_size=2, max_size=10), ranges(), grids())
def test_quantize_is_monotonic(values, ends, grid):
    parameters = scale_zero_point(*ends, grid)
    x = np.sort(np.array(values, F32))
    for kept in (quantize(x, *parameters, grid), fake_quantize(x, *parameters, grid)):
        assert (kept[1:] >= kept[:-1]).all()


@given(ranges(), grids())
def test_what_lies_outside_saturates(ends, grid):
    parameters = scale_zero_point(*ends, grid)
    largest = float(np.finfo(F32).max)
    assert quantize([-np.inf, -largest, largest, np.inf], *parameters, grid).tolist() == [
        grid.qmin,
        grid.qmin,
        grid.qmax,
        grid.qmax,
    ]


def test_float64_data_beyond_float32_saturate_without_a_warning():
    assert quantize(np.array([-1e300, 1e300]), 1.0, 128, UINT8).tolist() == [0, 255]


@given(data(), scales, st.integers(2, 16))
def test_symmetric_grids_are_odd(x, scale, bits):
    grid = Grid(bits, signed=True, symmetric=True, narrow=True)
    np.testing.assert_array_equal(quantize(-x, scale, 0, grid), -quantize(x, scale, 0, grid))


@given(data(moderate), st.floats(2.0**-20, 2.0**20, width=32), grids(), st.integers(-20, 20))
def test_integers_follow_a_power_of_two(x, scale, grid, power):
    factor = F32(2.0**power)
    np.testing.assert_array_equal(
        quantize(x * factor, F32(scale) * factor, grid.qmin, grid), quantize(x, scale, grid.qmin, grid)
    )


@given(st.data(), grids(), st.integers(-3, 2))
def test_per_channel_is_per_tensor_for_each_channel(draw, grid, axis):
    x = draw.draw(hnp.arrays(F32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=4), elements=finite))
    channels = x.shape[axis]
    scale = draw.draw(hnp.arrays(F32, channels, elements=scales))
    zero_point = draw.draw(hnp.arrays(np.int32, channels, elements=st.integers(grid.qmin, grid.qmax)))
    together = fake_quantize(x, scale, zero_point, grid, axis=axis)
    alone = [fake_quantize(part, scale[c], zero_point[c], grid) for c, part in enumerate(np.moveaxis(x, axis, 0))]
    assert together.tobytes() == np.moveaxis(np.stack(alone), 0, axis).tobytes()


@given(st.data(), st.integers(0, 2))
def test_a_channel_does_not_see_the_others(draw, channel):
    x = draw.draw(hnp.arrays(F32, (3, 4), elements=finite))
    scale = draw.draw(hnp.arrays(F32, 3, elements=scales))
    before = quantize(x, scale, [0, 0, 0], INT8, axis=0)
    others = [c for c in range(3) if c != channel]
    x[others], scale[others] = 7.0, 0.125
    np.testing.assert_array_equal(quantize(x, scale, [0, 0, 0], INT8, axis=0)[channel], before[channel])


def test_ties_go_to_the_even_integer():
    ties = np.array([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5], F32)
    assert quantize(ties, 1.0, 10, UINT8).tolist() == [6, 8, 8, 10, 10, 12, 12, 14]
    assert quantize(ties / 4, 0.25, 0, INT8).tolist() == [-4, -2, -2, 0, 0, 2, 2, 4]


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2, 2)])
def test_empty_data_stay_empty(shape):
    assert fake_quantize(np.zeros(shape), 1.0, 0, UINT8).shape == shape


@given(data(st.floats(width=32, allow_nan=False, min_value=-(2.0**-126), max_value=2.0**-126)))
def test_subnormal_data_are_within_half_the_smallest_scale(x):
    scale, zero_point = scale_zero_point(x.min(initial=0.0), x.max(initial=0.0), UINT8)
    error = np.abs(fake_quantize(x, scale, zero_point, UINT8).astype(np.float64) - x)
    assert (error <= float(scale) / 2).all()


def test_nan_is_refused():
    with pytest.raises(NumbersError, match="The data to quantize has NaN"):
        quantize([0.0, np.nan], 1.0, 0, UINT8)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 1e-50, 1e300])
def test_a_scale_that_is_not_positive_and_finite_in_float32_is_refused(scale):
    with pytest.raises(NumbersError, match="cannot be used"):
        quantize([1.0], scale, 0, UINT8)
    with pytest.raises(NumbersError, match="cannot be used"):
        dequantize([1], [1.0, scale], [0, 0], axis=0)


def test_messages_about_many_channels_name_the_first_wrong_one():
    with pytest.raises(NumbersError, match=r"The range \[-inf, 0\] of channel 500 is not finite"):
        scale_zero_point(np.where(np.arange(1000) < 500, -1.0, -np.inf), np.zeros(1000), UINT8)
    with pytest.raises(NumbersError, match="The scale -3 cannot be used"):
        quantize(np.zeros((3, 1)), [1.0, -3.0, 0.0], [0, 0, 0], UINT8, axis=0)


# ---- channels and grids


@given(st.data(), st.sampled_from([None, -2, -1, 0, 1]))
def test_channel_maximum_is_the_greatest_magnitude(draw, axis):
    x = draw.draw(hnp.arrays(F32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=4), elements=finite))
    parts = [x] if axis is None else list(np.moveaxis(x, axis, 0))
    expected = [max((abs(float(value)) for value in part.ravel()), default=0.0) for part in parts]
    result = channel_maximum(x, axis)
    assert result.dtype == F32
    assert result.tolist() == (expected[0] if axis is None else expected)


def test_channel_maximum_of_channels_without_elements_is_zero():
    assert channel_maximum(np.zeros((2, 0)), 0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("grid", "qmin", "qmax", "dtype"),
    [
        (Grid(8), 0, 255, "uint8"),
        (Grid(8, signed=True), -128, 127, "int8"),
        (Grid(8, signed=True, symmetric=True, narrow=True), -127, 127, "int8"),
        (Grid(4, signed=True, narrow=True), -7, 7, "int4"),
        (Grid(16), 0, 65535, "uint16"),
        (Grid(2, signed=True), -2, 1, "int2"),
    ],
)
def test_grids(grid, qmin, qmax, dtype):
    assert (grid.qmin, grid.qmax, grid.dtype) == (qmin, qmax, dtype)


@pytest.mark.parametrize(
    "arguments", [{"bits": 1}, {"bits": 17}, {"bits": 8, "symmetric": True}, {"bits": 8, "narrow": True}]
)
def test_grids_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError, match=r"bits is|must be signed"):
        Grid(**arguments)
