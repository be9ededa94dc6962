"""Sums of two products in 16 bits: which weights are paired, what overflows, and rounding that stays within."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dopt_api.quantizer import Grid, learned_scale
from dopt_api.quantizer.rounding import Moments, round_layer
from dopt_api.quantizer.short_sums import overflowing, partners, within_pairs

WEIGHTS = Grid(8, signed=True, symmetric=True, narrow=True)


def saturates(integers, pairs):
    """What a kernel does, tried with the extremes of 8-bit data."""
    found = np.zeros(len(integers), bool)
    for place, other in enumerate(pairs):
        for data in ((255, 255), (255, 0), (0, 255)):
            total = data[0] * integers[:, place] + (data[1] * integers[:, other] if other != place else 0)
            found |= (total > 2**15 - 1) | (total < -(2**15))
    return found


@given(groups=st.integers(1, 2), outputs=st.integers(1, 3), channels=st.integers(1, 5), taps=st.integers(1, 9))
def test_partners_are_neighbours_in_the_order_of_taps_then_channels(groups, outputs, channels, taps):
    first = partners(groups, outputs, channels, taps, channels_last=False)
    last = partners(groups, outputs, channels, taps, channels_last=True)
    if groups > 1 and outputs == channels == 1:
        assert first is last is None
        return
    np.testing.assert_array_equal(first[first], np.arange(channels * taps))  # partners of each other
    names = np.arange(channels * taps).reshape(channels, taps)
    in_order = names.T.reshape(-1)
    for place, name in enumerate(in_order):
        other = place ^ 1
        wanted = other if other < in_order.size else place
        assert last[place] == wanted
        assert first[name] == in_order[wanted]


@given(seed=st.integers(0, 2**32 - 1), channels=st.integers(1, 4), taps=st.integers(1, 5))
def test_what_overflows_is_what_a_kernel_saturates_at(seed, channels, taps):
    pairs = partners(1, 6, channels, taps, channels_last=False)
    integers = np.random.default_rng(seed).integers(-128, 128, (6, channels * taps))
    np.testing.assert_array_equal(overflowing(integers, pairs), saturates(integers, pairs))
    kept = within_pairs(integers, pairs)
    assert not saturates(kept, pairs).any()
    assert (np.abs(kept) <= np.abs(integers)).all()
    unchanged = ~overflowing(integers, pairs)
    np.testing.assert_array_equal(kept[unchanged], integers[unchanged])


@given(seed=st.integers(0, 2**32 - 1), groups=st.integers(1, 2), spread=st.sampled_from([0.0, 1.0, 4.0]))
def test_a_layer_is_rounded_within_what_cannot_overflow(seed, groups, spread):
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((groups, 3, 6)) + spread
    scale = np.abs(weight).max(axis=2) / 127
    moments = Moments()
    x = generator.standard_normal((40, groups, 6)) @ generator.standard_normal((6, 6))
    moments.add(x, np.einsum("ngk,gok->ngo", x, weight))
    pairs = partners(groups, 3, 2, 3, channels_last=False)
    found = round_layer(weight, scale, moments, WEIGHTS, pairs=pairs)
    integers = on_grid(found.weight, found.gain)
    assert not saturates(integers, pairs).any()
    assert found.rounded <= found.nearest


def on_grid(weight, gain):
    """The integers of a rounded layer, ``[G * O, K]``, by the scales that its extremes and its gain give."""
    rows = weight.reshape(-1, weight.shape[2])
    scale = learned_scale(np.abs(rows).max(axis=1) / 127, gain)
    integers = rows / scale[:, None]
    np.testing.assert_allclose(integers, np.rint(integers), atol=1e-3)
    return np.rint(integers)


def test_a_range_is_reduced_no_further_than_it_must_be():
    weight = np.array([[[1.0, 0.5, -1.0, 0.2], [1.0, -0.5, 1.0, -0.2]]])
    moments = Moments()
    x = np.random.default_rng(0).standard_normal((4000, 1, 4))
    moments.add(x, x @ weight[0].T)
    pairs = partners(1, 2, 4, 1, channels_last=True)
    found = round_layer(weight, [[1 / 127, 1 / 127]], moments, WEIGHTS, pairs=pairs)
    integers = np.abs(on_grid(found.weight, found.gain)).max(axis=1)
    assert integers[0] == pytest.approx(85, abs=2)  # two thirds of 127: 1 + 0.5 has to fit, and not half
    assert integers[1] > 100  # pairs of unlike signs cannot overflow
