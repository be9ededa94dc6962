"""Smoothing factors: laws, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dopt_api.quantizer import smoothing_factors

magnitudes = st.lists(st.tuples(*[st.one_of(st.just(0.0), st.floats(1e-30, 1e30))] * 2), min_size=1, max_size=30)
strengths = st.floats(0.0, 1.0)


@given(magnitudes, strengths)
def test_factors_are_powers_of_two_within_bounds(pairs, strength):
    factors = smoothing_factors(*zip(*pairs, strict=True), strength)
    assert factors.dtype == np.float32
    mantissa, exponent = np.frexp(factors)
    assert (mantissa == 0.5).all()
    assert (np.abs(exponent - 1) <= 16).all()
    assert all(factor == 1.0 for factor, pair in zip(factors, pairs, strict=True) if 0.0 in pair)


@given(magnitudes, strengths)
def test_a_channel_of_greater_values_is_multiplied_by_no_more(pairs, strength):
    inputs = np.array([a for a, w in pairs if a and w])
    factors = smoothing_factors(inputs, np.ones_like(inputs), strength)
    assert (np.diff(factors[np.argsort(inputs)]) <= 0).all()


@given(st.lists(st.integers(-8, 8), min_size=1, max_size=10))
def test_full_strength_makes_channels_of_powers_of_two_alike(exponents):
    inputs = 2.0 ** np.array(exponents)
    balanced = inputs * smoothing_factors(inputs, np.ones_like(inputs), 1.0)
    assert len(set(balanced.tolist())) == 1


def test_no_strength_looks_at_the_weights_alone():
    assert smoothing_factors([9.0, 0.1], [1.0, 4.0], 0.0).tolist() == [0.5, 2.0]


def test_no_channels_give_no_factors():
    assert smoothing_factors([], []).shape == (0,)


@pytest.mark.parametrize(
    ("inputs", "weights", "strength", "message"),
    [
        ([1.0], [1.0, 2.0], 0.5, "shapes"),
        ([[1.0]], [[1.0]], 0.5, "shapes"),
        ([float("nan")], [1.0], 0.5, "NaN"),
        ([1.0], [float("inf")], 0.5, "infinite"),
        ([-1.0], [1.0], 0.5, "negative"),
        ([1.0], [1.0], 1.5, "from 0 to 1"),
        ([1.0], [1.0], float("nan"), "from 0 to 1"),
    ],
)
def test_what_is_refused(inputs, weights, strength, message):
    with pytest.raises(ValueError, match=message):
        smoothing_factors(inputs, weights, strength)
