"""Condensed histograms: nothing is lost, and every value lies in the part that counts it."""

import numpy as np
from dopt_strategies import batches, moderate, statistics_of
from hypothesis import given
from hypothesis import strategies as st

from dopt_api.quantizer import Statistics
from dopt_api.quantizer.histogram import Histogram, condensed


@given(batches(moderate), st.integers(2, 80))
def test_every_value_is_counted_between_the_ends_in_few_parts(parts, most):
    statistics = statistics_of(*parts)
    found = condensed(statistics, most)
    assert len(found.counts) <= most
    assert sum(found.counts) == statistics.counts.sum()
    if found.counts:
        assert found.counts[0]
        assert found.counts[-1]
        bin_width = 2.0 ** (int(statistics.exponent) - 11)
        assert found.low - bin_width <= statistics.minimum
        assert statistics.maximum <= found.high
        assert np.log2(found.width) % 1 == found.low % found.width == 0


def test_parts_are_those_of_numpy_where_bins_do_not_matter():
    values = np.random.default_rng(0).uniform(-3, 9, (1, 4000)).astype(np.float32)
    statistics = statistics_of(values)
    found = condensed(statistics, 30)
    edges = found.low + found.width * np.arange(len(found.counts) + 1)
    wanted, _ = np.histogram(values, edges)
    near_zero = np.abs(edges[:-1]) <= found.width  # the bin about zero is counted to the right
    assert np.array_equal(np.array(found.counts)[~near_zero], wanted[~near_zero])
    assert abs(np.array(found.counts) - wanted)[near_zero].max() < 10


def test_no_data_have_no_parts():
    assert condensed(Statistics()) == Histogram(0.0, 2.0**-111, ())
