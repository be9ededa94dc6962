"""Statistics: what they count, and that they merge to the bit in any order and grouping."""

from __future__ import annotations

import random
from fractions import Fraction
from math import prod

import numpy as np
import pytest
from dopt_strategies import batches, finite, same_bits, statistics_of
from exact import exact, float64
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dopt_api.errors import CalibrationError
from dopt_api.quantizer import Statistics, lattice
from dopt_api.quantizer.statistics import BINS, HALF_BINS, LOWEST_EXPONENT, PROBED, pool

F32 = np.float32
anything = st.one_of(finite, st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0]))


# ---- merging


@given(batches(anything), batches(anything))
def test_merge_is_commutative_to_the_bit(left, right):
    first, second = statistics_of(*left), statistics_of(*right)
    assert same_bits(first.merge(second), second.merge(first))


@given(batches(anything), batches(anything), batches(anything))
def test_merge_is_associative_to_the_bit(left, middle, right):
    first, second, third = statistics_of(*left), statistics_of(*middle), statistics_of(*right)
    assert same_bits(first.merge(second).merge(third), first.merge(second.merge(third)))


@given(batches(anything))
def test_empty_statistics_are_the_identity_to_the_bit(parts):
    statistics = statistics_of(*parts)
    assert same_bits(statistics.merge(Statistics()), statistics)
    assert same_bits(Statistics().merge(statistics), statistics)


@given(batches(anything), st.randoms(use_true_random=False))
def test_order_grouping_and_batch_size_do_not_matter(parts, rng: random.Random):
    whole = np.concatenate(parts)
    samples = [sample[None] for sample in whole]
    rng.shuffle(samples)
    cut = rng.randint(0, len(samples))
    two_processes = pool([statistics_of(*samples[:cut]), statistics_of(*samples[cut:])])
    assert same_bits(statistics_of(*parts), statistics_of(whole))
    assert same_bits(two_processes, statistics_of(whole))
    assert same_bits(pool([statistics_of(part) for part in parts]), statistics_of(whole))


def test_merging_does_not_change_its_parts():
    first, second = statistics_of([[1.0, 2.0]]), statistics_of([[-900.0]])
    before = statistics_of([[1.0, 2.0]])
    first.merge(second)
    assert same_bits(first, before)


def test_the_sign_of_zero_does_not_depend_on_the_order():
    positive, negative = statistics_of([[0.0]]), statistics_of([[-0.0]])
    for merged in (positive.merge(negative), negative.merge(positive), negative):
        assert not np.signbit(merged.minimum)
        assert not np.signbit(merged.maximum)


# ---- what is collected


@given(batches(anything))
def test_samples_extremes_and_non_finite_samples(parts):
    samples = [sample for part in parts for sample in part]
    good = [sample for sample in samples if np.isfinite(sample).all()]
    statistics = statistics_of(*parts)
    assert int(statistics.samples) == len(good)
    assert int(statistics.non_finite) == len(samples) - len(good)
    assert float(statistics.minimum) == min((float(v) for s in good for v in s.ravel()), default=np.inf)
    assert float(statistics.maximum) == max((float(v) for s in good for v in s.ravel()), default=-np.inf)


@given(batches(anything))
def test_samples_with_nan_or_infinity_leave_no_other_trace(parts):
    whole = np.concatenate(parts)
    finite_only = statistics_of(whole[np.isfinite(whole).all(axis=tuple(range(1, whole.ndim)))])
    statistics = statistics_of(whole)
    statistics.non_finite = finite_only.non_finite
    assert same_bits(statistics, finite_only)


@given(batches())
@example([np.array([[3e38]] * 3, F32), np.array([[1e-45]], F32)])
@example([np.array([[1e8], [1.0], [-1e8]], F32)])
def test_mean_extremes_are_exact_means_rounded_once(parts):
    samples = [[exact(value) for value in sample.ravel()] for part in parts for sample in part]
    if not samples:
        return
    low = sum(map(min, samples), Fraction(0)) / len(samples)
    high = sum(map(max, samples), Fraction(0)) / len(samples)
    found = statistics_of(*parts).mean_extremes()
    assert (exact(found[0]), exact(found[1])) == (float64(low), float64(high))


@given(batches())
def test_histogram_counts_every_probed_value_in_its_bin(parts):
    statistics = statistics_of(*parts)
    values = [exact(value) for part in parts for value in part.ravel()]
    width = Fraction(2) ** (int(statistics.exponent) - 11)
    expected = np.zeros(BINS, np.int64)
    for value in values:
        expected[int(value / width) + HALF_BINS - 1] += 1  # int() truncates towards zero
    np.testing.assert_array_equal(statistics.counts, expected)


@given(batches())
def test_histogram_is_the_finest_that_holds_the_data(parts):
    statistics = statistics_of(*parts)
    peak = max((abs(exact(value)) for part in parts for value in part.ravel()), default=Fraction(0))
    exponent = int(statistics.exponent)
    assert peak < Fraction(2) ** exponent
    assert exponent == LOWEST_EXPONENT or peak >= Fraction(2) ** (exponent - 1)


@given(hnp.arrays(F32, (4, 5), elements=finite), st.integers(-149, 127))
def test_histogram_widens_without_losing_counts(x, power):
    statistics = statistics_of(x)
    statistics.update(np.array([[2.0**power]], F32))
    assert int(statistics.counts.sum()) == x.size + 1
    assert same_bits(statistics, statistics_of([[2.0**power]]).merge(statistics_of(x)))


@given(batches())
def test_bin_edges_enclose_what_the_bins_count(parts):
    statistics = statistics_of(*parts)
    edges = statistics.bin_edges()
    assert edges.shape == (BINS + 1,)
    assert (np.diff(edges) > 0).all()
    seen = np.flatnonzero(statistics.counts)
    values = np.concatenate([part.ravel() for part in parts]).astype(np.float64)
    if values.size:
        assert edges[seen[0]] <= values.min() <= edges[seen[0] + 1]
        assert edges[seen[-1]] <= values.max() <= edges[seen[-1] + 1]


def test_the_bin_about_zero_is_twice_as_wide_as_the_others():
    statistics = statistics_of([[1.0]])
    widths = np.diff(statistics.bin_edges())
    assert widths[HALF_BINS - 1] == 2 * widths[0]
    assert np.unique(np.delete(widths, HALF_BINS - 1)).tolist() == [2.0**-10]
    assert statistics.bin_edges()[HALF_BINS - 1 :][:2].tolist() == [-(2.0**-10), 2.0**-10]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0,), (4, 3, 0, 2)])
def test_empty_batches_change_nothing(shape):
    statistics = statistics_of([[1.0, 2.0]])
    statistics.update(np.zeros(shape, F32))
    assert same_bits(statistics, statistics_of([[1.0, 2.0]]))


def test_batches_without_axes_but_samples():
    assert same_bits(statistics_of(np.array([1.0, 5.0])), statistics_of(np.array([[1.0], [5.0]])))


def test_float64_beyond_float32_counts_as_infinite():
    statistics = statistics_of(np.array([[1e300], [1.0]]))
    assert (int(statistics.samples), int(statistics.non_finite)) == (1, 1)


# ---- the lattice


@given(hnp.array_shapes(min_dims=1, max_dims=5, max_side=300), st.data())
def test_lattice_takes_every_sample_and_channel_and_at_most_the_probed_number(shape, draw):
    axis = draw.draw(st.integers(-len(shape), len(shape) - 1))
    index = lattice(shape, axis)
    taken = [len(range(size)[part]) for size, part in zip(shape, index, strict=True)]
    channels = axis % len(shape)
    per_sample = prod(taken[1:])
    assert taken[0] == shape[0]
    assert taken[channels] == shape[channels]
    assert all(taken)
    assert per_sample <= max(PROBED, shape[channels] if channels else 1)


def test_lattice_takes_all_where_that_is_not_too_many():
    assert lattice((8, 4, 16, 16), 1) == (slice(None),) * 4


def test_lattice_is_the_finest_within_the_limit():
    strides = [part.step for part in lattice((1, 64, 56, 56), 1)[2:]]
    assert strides == [13, 13]
    assert len(range(6, 56, 13)) ** 2 * 64 <= PROBED < len(range(6, 56, 12)) ** 2 * 64


@given(st.integers(1, 6), st.integers(1, 200), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_memory_layout_does_not_matter(channels, height, width, seed):
    x = np.random.default_rng(seed).standard_normal((2, channels, height, width)).astype(F32)
    first, last = Statistics(), Statistics()
    first.update(x, channel_axis=1)
    last.update(np.ascontiguousarray(x.transpose(0, 2, 3, 1)), channel_axis=-1)
    assert same_bits(first, last)


def test_extremes_are_taken_over_elements_that_the_histogram_leaves_out():
    x = np.zeros((1, 1, 256, 256), F32)
    rows, columns = lattice(x.shape, 1)[2:]
    assert 1 not in range(256)[rows]
    x[0, 0, 1, 1] = 7.0
    x[0, 0, 3, 1] = np.float32(-5.0)
    statistics = statistics_of(x)
    assert (float(statistics.minimum), float(statistics.maximum)) == (-5.0, 7.0)
    assert int(statistics.counts.sum()) == len(range(256)[rows]) * len(range(256)[columns])


# ---- checkpoints and errors


@given(batches(anything))
def test_arrays_round_trip_to_the_bit(parts):
    statistics = statistics_of(*parts)
    assert same_bits(Statistics.from_arrays(statistics.arrays()), statistics)


def test_rebuilt_statistics_share_no_memory_with_the_checkpoint():
    stored = statistics_of([[1.0, 2.0]]).arrays()
    rebuilt = Statistics.from_arrays(stored)
    assert not any(np.shares_memory(part, stored[name]) for name, part in rebuilt.arrays().items())


@pytest.mark.parametrize("part", Statistics().arrays())
def test_a_missing_or_misshapen_part_is_refused(part):
    arrays = Statistics().arrays()
    with pytest.raises(CalibrationError, match=f"have a wrong '{part}'.*Calibrate again"):
        Statistics.from_arrays({**arrays, part: np.zeros((2, 2))})
    del arrays[part]
    with pytest.raises(CalibrationError, match=f"have no '{part}'"):
        Statistics.from_arrays(arrays)


def test_counts_that_are_no_integers_are_refused():
    with pytest.raises(CalibrationError, match=r"have a wrong 'counts'.*int64 of shape"):
        Statistics.from_arrays({**Statistics().arrays(), "counts": np.full(BINS, 0.5)})


def test_check_names_the_layer_without_data():
    with pytest.raises(CalibrationError, match="Layer 'fc' has seen no data") as caught:
        Statistics().check("fc")
    assert caught.value.where == "layer 'fc'"
    assert "calibration mode is on" in caught.value.fix


def test_check_counts_the_samples_with_nan():
    statistics = statistics_of([[1.0], [np.nan], [np.inf], [2.0]])
    with pytest.raises(CalibrationError, match="The input of layer 'fc' had NaN or infinity in 2 of 4 samples"):
        statistics.check("fc")


def test_check_passes_finite_data():
    statistics_of([[1.0]]).check("fc")


def test_repr_shows_the_facts():
    text = repr(statistics_of([[1.0, -2.5]]))
    assert text == "Statistics(samples=1, non_finite=0, minimum=-2.5, maximum=1, counted=2)"
