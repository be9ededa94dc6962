"""Gradients of learned step sizes: straight-through for the data, LSQ for the scale, and that of the gain on it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dopt_api.quantizer import Grid, fake_quantize_gradients, gain_gradient, learned_scale
from dopt_conformance.laws.drawing import activation_cases, weight_cases

pytestmark = [pytest.mark.since("1.0"), pytest.mark.capability("retraining")]

F32 = np.float32
SIZE = 2.0**-18
"""What sums of float32 may be off by, in units of the sum of magnitudes: a few roundings of each of some terms."""


def finite(case):
    """Return the case with its infinite elements large instead."""
    return replace(case, x=np.clip(case.x, -1e30, 1e30).astype(F32))


trained = (
    st.one_of(activation_cases(-20, 20), weight_cases(-20, 20))
    .filter(lambda case: case.x.size and case.x.ndim)
    .map(finite)
)
gains = hnp.arrays(F32, st.integers(1, 5), elements=st.floats(-64, 64, width=16))


def upstream_of(case):
    return np.random.default_rng(case.x.size).standard_normal(case.x.shape).astype(F32)


@given(case=trained)
def test_the_gradient_passes_where_the_integer_is_on_the_grid(harness, case):
    upstream = upstream_of(case)
    found, _ = harness.fake_quantize_gradients(upstream, *case.arguments)
    wanted, _ = fake_quantize_gradients(upstream, *case.arguments[:-1], axis=case.axis)
    steps = case.x.astype(np.float64) / case.on_data(case.scale) + case.on_data(case.zero_point)
    edges = [np.abs(steps - edge) for edge in (case.grid.qmin - 0.5, case.grid.qmax + 0.5)]
    at_an_edge = np.minimum(*edges) <= 4 * np.spacing(np.abs(steps).astype(F32))  # as near to a tie as agreement allows
    np.testing.assert_array_equal(np.where(at_an_edge, 0, found), np.where(at_an_edge, 0, wanted))
    assert np.isin(found, [0.0, *upstream.ravel()]).all()


@given(case=trained)
def test_the_gradient_of_the_scale_is_that_of_the_reference(harness, case):
    upstream = upstream_of(case)
    # ties may fall to either side, which moves the term by one: stay off them
    steps = case.x.astype(np.float64) / case.on_data(case.scale)
    with np.errstate(invalid="ignore"):
        tie = np.abs(steps - np.floor(steps) - 0.5) < 1e-3 + np.abs(steps) * 1e-6
    upstream = np.where(tie, F32(0), upstream)
    _, found = harness.fake_quantize_gradients(upstream, *case.arguments)
    _, wanted = fake_quantize_gradients(upstream, *case.arguments[:-1], axis=case.axis)
    assert np.shape(found) == np.shape(case.scale)
    reach = max(abs(case.grid.qmin), abs(case.grid.qmax)) * 2 + 1
    allowed = SIZE * (float(np.abs(upstream).sum()) * reach) + 1e-30
    assert (np.abs(np.asarray(found, np.float64) - wanted) <= allowed).all(), (found, wanted)


def test_the_gradient_of_the_scale_by_hand(harness):
    x, upstream = F32([0.6, 1.0, -9.0, 9.0]), F32([1.0, 10.0, 100.0, 1000.0])
    case = x, np.asarray(F32(1.0)), np.asarray(0, np.int32), Grid(3, signed=True), None
    passed, scale = harness.fake_quantize_gradients(upstream, *case)
    np.testing.assert_array_equal(passed, [1.0, 10.0, 0.0, 0.0])
    assert float(scale) == pytest.approx(0.4 * 1 + 0 * 10 - 4 * 100 + 3 * 1000, rel=1e-6)


def test_what_rounds_to_an_end_of_the_grid_is_on_it(harness):
    x, upstream = F32([-4.625, -4.375, 3.375, 3.625]), F32([1.0, 10.0, 100.0, 1000.0])
    passed, _ = harness.fake_quantize_gradients(
        upstream, x, np.asarray(F32(1.0)), np.asarray(0, np.int32), Grid(3, signed=True), None
    )
    np.testing.assert_array_equal(passed, [0.0, 10.0, 100.0, 0.0])


@pytest.mark.parametrize("end", [np.inf, -np.inf])
def test_infinite_data_count_as_clipped(harness, end):
    x, upstream = F32([1.0, end, -2.0, 700.0]), F32([1, 2, 3, 4])
    case = x, np.asarray(F32(0.5)), np.asarray(100, np.int32), Grid(8)
    passed, scale = harness.fake_quantize_gradients(upstream, *case, None)
    wanted_passed, wanted = fake_quantize_gradients(upstream, *case)
    np.testing.assert_array_equal(passed, wanted_passed)
    assert float(scale) == pytest.approx(float(wanted))


@given(scale=st.floats(2.0**-20, 2.0**20, width=32), gain=gains)
def test_scales_with_gains_are_the_reference_s_to_the_bit(harness, scale, gain):
    scales = np.full(gain.shape, scale, F32)
    np.testing.assert_array_equal(harness.learned_scale(scales, gain), learned_scale(scales, gain))
    zero = np.zeros_like(gain)
    np.testing.assert_array_equal(harness.learned_scale(scales, zero), scales)


@given(scale=st.floats(2.0**-20, 2.0**20, width=32), gain=gains)
def test_the_gradient_of_the_gain_is_that_of_the_reference(harness, scale, gain):
    scales = np.full(gain.shape, scale, F32)
    upstream = np.random.default_rng(gain.size).standard_normal(gain.shape).astype(F32)
    found = harness.gain_gradient(upstream, scales, gain)
    np.testing.assert_allclose(found, gain_gradient(upstream, scales, gain), rtol=1e-5, atol=0)
