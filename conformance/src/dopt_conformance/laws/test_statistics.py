"""Statistics of activations: exact, and independent of how the data came in batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dopt_api.quantizer import Grid, Statistics, activation_parameters

pytestmark = pytest.mark.since("1.0")

F32 = np.float32
SHAPES = [((7,), 1), ((5, 4), 1), ((4, 5), -1), ((3, 6, 5), 1), ((6, 5, 3), -1), ((40, 41, 2), -1), ((2, 3, 4, 2), 1)]
"""Shapes of samples with the axis of the channels; the sixth has more positions than the histogram looks at."""


@st.composite
def data(draw, samples=6):
    """Draw samples of magnitudes far apart, and the axis of their channels."""
    shape, axis = draw(st.sampled_from(SHAPES))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0, 3, 30]))
    exponents = numbers.integers(-spread, spread + 1, (samples, *[1] * len(shape)))
    x = numbers.standard_normal((samples, *shape)) * 2.0**exponents
    kind = draw(st.sampled_from(["both signs", "positive", "rectified", "negative"]))
    x = {"both signs": x, "positive": np.abs(x), "rectified": np.maximum(x, 0), "negative": -np.abs(x)}[kind]
    return x.astype(F32), axis


def reference(batches, axis):
    statistics = Statistics()
    for batch in batches:
        statistics.update(batch, axis)
    return statistics


def assert_same(found, wanted):
    for name, part in wanted.arrays().items():
        np.testing.assert_array_equal(found.arrays()[name], part, err_msg=name)


@given(drawn=data())
def test_one_batch_is_the_reference_s_to_the_bit(harness, drawn):
    x, axis = drawn
    assert_same(harness.collect([x], axis), reference([x], axis))


@given(drawn=data(), cuts=st.lists(st.integers(0, 6), max_size=4))
def test_batches_do_not_matter(harness, drawn, cuts):
    x, axis = drawn
    batches = np.split(x, sorted(cuts))  # empty ones are among them
    assert_same(harness.collect(batches, axis), reference([x], axis))


@given(drawn=data(), seed=st.integers(0, 2**32 - 1))
def test_order_does_not_matter(harness, drawn, seed):
    x, axis = drawn
    mixed = x[np.random.default_rng(seed).permutation(len(x))]
    assert_same(harness.collect(np.split(mixed, 3), axis), harness.collect(np.split(x, 2), axis))


@given(drawn=data())
def test_statistics_merge(harness, drawn):
    x, axis = drawn
    first, second = (harness.collect([part], axis) for part in np.split(x, 2))
    whole = harness.collect([x], axis)
    assert_same(first.merge(second), whole)
    assert_same(second.merge(first), whole)
    assert_same(whole.merge(harness.collect([], axis)), whole)


def test_no_batch_and_empty_batches_leave_nothing(harness):
    assert_same(harness.collect([], 1), Statistics())
    assert_same(harness.collect([np.zeros((0, 3, 4, 4), F32)], 1), Statistics())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_with_nan_or_infinity_are_counted_and_left_out(harness, bad):
    x = np.random.default_rng(0).standard_normal((5, 4, 6, 6)).astype(F32)
    x[1, 2, 3, 3] = x[4, 0, 0, 0] = bad  # one where the histogram may not look, one in a corner
    found = harness.collect([x[:3], x[3:]], 1)
    assert int(found.non_finite) == 2
    assert_same(found, reference([x], 1))
    with pytest.raises(Exception, match="NaN or infinity"):
        activation_parameters(found, Grid(8), layer="layer")


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0, 2.0**-40, 3.0e38, -(2.0**-20)])
def test_constant_data(harness, value):
    x = np.full((3, 4, 5, 5), value, F32)
    found = harness.collect([x, x], 1)
    assert_same(found, reference([x, x], 1))
    assert not np.signbit(found.minimum) or value < 0  # zero is positive zero


@pytest.mark.parametrize("exponent", [-99, -60, 0, 60, 126])
def test_magnitudes_far_apart(harness, exponent):
    x = np.random.default_rng(1).uniform(-1, 1, (4, 3, 5, 5)).astype(F32)
    batches = [x, x * F32(2.0**exponent)]
    for order in (batches, batches[::-1]):
        assert_same(harness.collect(order, 1), reference(batches, 1))


def test_subnormal_samples(harness):
    x = np.random.default_rng(2).uniform(-1, 1, (4, 3, 5, 5)).astype(F32) * F32(2.0**-130)
    assert_same(harness.collect([x], 1), reference([x], 1))
