"""Scales of weights: from the greatest magnitude of each channel, as the core computes them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dopt_api.quantizer import channel_maximum, scale_zero_point
from dopt_conformance.laws.drawing import weight_cases, weight_grids

pytestmark = pytest.mark.since("1.0")

F32 = np.float32


def reference(weight, grid, axis):
    extreme = channel_maximum(weight, axis)
    return scale_zero_point(-extreme, extreme, grid)[0]


def finite(case):
    return np.where(np.isinf(case.x), F32(1.0), case.x)


@given(case=weight_cases())
def test_scales_are_the_reference_s_to_the_bit(harness, case):
    weight = finite(case)
    found = harness.weight_scale(weight, case.grid, case.axis)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, reference(weight, case.grid, case.axis))


@given(case=weight_cases())
def test_every_weight_is_within_its_grid(harness, case):
    weight = finite(case)
    scale = harness.weight_scale(weight, case.grid, case.axis)
    steps = np.abs(weight.astype(np.float64)) / case.on_data(scale)
    assert (steps <= (case.grid.qmax - case.grid.qmin) / 2 * (1 + 2.0**-22)).all()


@given(case=weight_cases(-40, 40), exponent=st.integers(-20, 20))
def test_powers_of_two_carry_over(harness, case, exponent):
    weight, factor = finite(case), F32(2.0**exponent)
    found = harness.weight_scale(weight * factor, case.grid, case.axis)
    once = harness.weight_scale(weight, case.grid, case.axis)
    zero = channel_maximum(weight, case.axis) == 0
    np.testing.assert_array_equal(found, np.where(zero, once, once * factor))


@given(grid=weight_grids, axis=st.integers(0, 1))
def test_a_channel_of_zeros_has_the_scale_one(harness, grid, axis):
    weight = F32([[0.0, 0.0], [0.0, 3.0]])
    found = harness.weight_scale(weight, grid, axis)
    assert found[0] == 1.0
    assert found[1] == reference(weight, grid, axis)[1]


@given(grid=weight_grids, exponent=st.integers(-149, -127))
def test_subnormal_weights(harness, grid, exponent):
    weight = np.full((2, 3), F32(2.0**exponent))
    np.testing.assert_array_equal(harness.weight_scale(weight, grid, 0), reference(weight, grid, 0))
