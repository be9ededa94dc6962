"""Ranges: what each method makes of statistics, and that every outcome is a usable scale or a named error."""

from __future__ import annotations

import numpy as np
import pytest
from dopt_strategies import batches, statistics_of
from hypothesis import assume, given
from hypothesis import strategies as st

from dopt_api.errors import CalibrationError
from dopt_api.quantizer import (
    DEFAULT_RANGE,
    RANGE_METHODS,
    SMALLEST_SCALE,
    Grid,
    Statistics,
    activation_parameters,
    fake_quantize,
    scale_zero_point,
)
from dopt_api.quantizer.affine import LARGEST_END
from dopt_api.quantizer.ranges import TAIL, mse

F32 = np.float32
UINT8 = Grid(8)
usable = st.floats(float(F32(-LARGEST_END)), float(F32(LARGEST_END)), width=32)
every_method = pytest.mark.parametrize("method", RANGE_METHODS)


def histogram_error(statistics: Statistics, ends: tuple[float, float], grid: Grid = UINT8) -> float:
    """Return the squared error of the bins' centres, by the quantizer itself."""
    edges = statistics.bin_edges()
    centres = ((edges[1:] + edges[:-1]) / 2).astype(F32)
    error = fake_quantize(centres, *scale_zero_point(*ends, grid), grid).astype(np.float64) - centres
    return float((error**2 * statistics.counts).sum())


def data_error(x, ends: tuple[float, float], grid: Grid = UINT8) -> float:
    return float(((fake_quantize(x, *scale_zero_point(*ends, grid), grid) - x) ** 2).mean())


@every_method
@given(parts=batches(usable))
def test_any_finite_data_give_a_usable_scale(method, parts):
    statistics = statistics_of(*parts)
    assume(int(statistics.samples))
    scale, zero_point = activation_parameters(statistics, UINT8, layer="fc", method=method)
    assert isinstance(scale, F32)
    assert isinstance(zero_point, int)
    assert np.isfinite(scale)
    assert scale >= SMALLEST_SCALE
    assert UINT8.qmin <= zero_point <= UINT8.qmax


@every_method
@given(parts=batches(usable))
def test_ranges_lie_within_the_extremes_and_zero(method, parts):
    statistics = statistics_of(*parts)
    assume(int(statistics.samples))
    low, high = RANGE_METHODS[method](statistics, UINT8)
    assert min(float(statistics.minimum), 0.0) <= low <= high <= max(float(statistics.maximum), 0.0)


@every_method
@given(parts=batches(usable))
def test_ranges_do_not_depend_on_order_and_batch_size(method, parts):
    assume(sum(map(len, parts)))
    one_by_one = statistics_of(*(sample[None] for part in reversed(parts) for sample in part[::-1]))
    assert RANGE_METHODS[method](one_by_one, UINT8) == RANGE_METHODS[method](statistics_of(*parts), UINT8)


def test_min_max_is_the_default_and_clips_nothing():
    statistics = statistics_of([[-1.0, 2.0], [0.5, 0.75]])
    assert DEFAULT_RANGE == "min_max"
    assert RANGE_METHODS["min_max"](statistics, UINT8) == (-1.0, 2.0)
    assert activation_parameters(statistics, UINT8, layer="fc") == (F32(3.0 / 255), 85)


def test_moving_average_is_the_mean_of_the_samples_extremes():
    statistics = statistics_of([[-1.0, 2.0]], [[-3.0, 6.0], [-2.0, 1.0]])
    assert RANGE_METHODS["moving_average"](statistics, UINT8) == (-2.0, 3.0)


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 8]), st.floats(-3.0, 3.0))
def test_mse_is_never_worse_than_min_max_on_the_histogram(seed, bits, shift):
    grid = Grid(bits)
    statistics = statistics_of(np.random.default_rng(seed).laplace(shift, size=(4, 300)).astype(F32))
    best = histogram_error(statistics, mse(statistics, grid), grid)
    plain = histogram_error(statistics, RANGE_METHODS["min_max"](statistics, grid), grid)
    assert best <= plain * (1 + 1e-5)


def test_mse_clips_an_outlier_and_is_better_on_the_data():
    x = np.random.default_rng(0).standard_normal((8, 4000)).astype(F32)
    x[0, 0] = 60.0
    statistics = statistics_of(x)
    ends = mse(statistics, Grid(4))
    assert ends[1] < 60.0
    assert data_error(x, ends, Grid(4)) < data_error(x, (float(x.min()), float(x.max())), Grid(4)) / 2


def test_mse_shrinks_each_end_alone():
    x = np.random.default_rng(0).uniform(0.0, 1.0, (8, 1000)).astype(F32)
    x[0, 0] = -4.0
    low, high = mse(statistics_of(x), Grid(4))
    assert -3.0 < low < 0.0
    assert 0.7 < high <= 1.0


def test_percentile_leaves_out_its_share_and_no_more():
    x = np.random.default_rng(0).standard_normal((100, 1000)).astype(F32)
    low, high = RANGE_METHODS["percentile"](statistics_of(x), UINT8)
    outside = np.mean((x < low) | (x > high))
    assert 0.2 * TAIL < outside <= TAIL
    assert low == -high


def test_percentile_of_one_sided_data_takes_all_of_it_there():
    x = np.random.default_rng(0).exponential(size=(100, 1000)).astype(F32)
    low, high = RANGE_METHODS["percentile"](statistics_of(x), UINT8)
    assert low == x.min()
    assert np.mean(x > high) == pytest.approx(TAIL, rel=0.5)


def test_percentile_of_little_data_is_min_max():
    statistics = statistics_of([[-1.0, 2.0], [0.5, 0.75]])
    assert RANGE_METHODS["percentile"](statistics, UINT8) == (-1.0, 2.0)


def test_entropy_keeps_what_has_no_tail_and_clips_what_has():
    generator = np.random.default_rng(0)
    even = generator.uniform(-1.0, 1.0, (100, 1000)).astype(F32)
    low, high = RANGE_METHODS["entropy"](statistics_of(even), UINT8)
    assert low == pytest.approx(-1.0, abs=0.02)
    assert high == pytest.approx(1.0, abs=0.02)
    tailed = generator.standard_normal((100, 1000)).astype(F32)
    tailed[0, 0] = 40.0
    assert 3.0 < RANGE_METHODS["entropy"](statistics_of(tailed), Grid(4))[1] < 20.0


def test_entropy_is_the_least_divergence_by_hand():
    # both values are on the grid of the full range; any other counts the greater one into a bin that lacks it
    statistics = statistics_of([[0.0] * 99 + [3.0]])
    assert RANGE_METHODS["entropy"](statistics, Grid(2)) == (0.0, 3.0)


@pytest.mark.parametrize(("values", "inside"), [([5.0, 5.5], (0.0, 5.5)), ([-5.5, -5.0], (-5.5, 0.0))])
def test_mse_of_data_on_one_side_of_zero(values, inside):
    low, high = mse(statistics_of([values]), UINT8)
    assert inside[0] <= low <= 0.0 <= high <= inside[1]
    assert high - low > 5.0


@every_method
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-45, 1e38])
def test_a_constant_is_kept(method, value):
    parameters = activation_parameters(statistics_of(np.full((4, 8), value)), UINT8, layer="fc", method=method)
    step = float(parameters[0])
    assert abs(float(fake_quantize(value, *parameters, UINT8)) - float(F32(value))) <= step * 0.6
    assert step <= max(abs(value) / 100, SMALLEST_SCALE) or value == 0.0


def test_all_zero_data_have_scale_one():
    assert activation_parameters(statistics_of(np.zeros((2, 3))), UINT8, layer="fc") == (1.0, 0)


@every_method
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((0, 2)), "Layer 'block/fc' has seen no data"),
        ([[1.0], [np.nan]], "The input of layer 'block/fc' had NaN or infinity in 1 of 2 samples"),
        ([[3e38]], "The input of layer 'block/fc' cannot be quantized: .* too wide for float32"),
    ],
)
def test_errors_name_the_layer(method, values, message):
    with pytest.raises(CalibrationError, match=message) as caught:
        activation_parameters(statistics_of(np.array(values)), UINT8, layer="block/fc", method=method)
    assert caught.value.where == "layer 'block/fc'"
    assert caught.value.fix
