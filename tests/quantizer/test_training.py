"""Gradients of fake quantization against numeric differentiation, and the quantization loss."""

from __future__ import annotations

import numpy as np
import pytest
from dopt_strategies import grids
from exact import exact
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dopt_api.quantizer import (
    SMALLEST_SCALE,
    Grid,
    fake_quantize,
    fake_quantize_gradients,
    gain_gradient,
    learned_scale,
    quantize,
    relative_squared_error,
)

F32 = np.float32
values = st.floats(-8.0, 8.0, width=32)
steps = st.floats(2.0**-4, 2.0, width=32)
arrays = hnp.arrays(F32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=4), elements=values)


def surrogate(x: float, scale: float, at: tuple[float, float], zero_point: int, grid: Grid) -> float:
    """Return fake quantization as the straight-through estimator sees it near ``at``: the rounding error is fixed."""
    v = at[0] / at[1]
    error = round(v) - v
    low, high = grid.qmin - zero_point, grid.qmax - zero_point
    return min(max(x / scale + error, low), high) * scale if low <= round(v) <= high else min(max(v, low), high) * scale


@given(values, steps, grids(max_bits=6), st.data())
def test_gradients_are_those_of_the_straight_through_estimator(x, scale, grid, draw):
    zero_point = draw.draw(st.integers(grid.qmin, grid.qmax))
    v = x / scale
    assume(abs(v % 1.0 - 0.5) > 1e-3)  # not beside a step, where the derivative jumps
    tiny = 2.0**-20

    def slope(dx: float, ds: float) -> float:
        ends = [surrogate(x + k * dx, scale + k * ds, (x, scale), zero_point, grid) for k in (-1, 1)]
        return (ends[1] - ends[0]) / (2 * tiny)

    # At the ends of the grid the surrogate has a kink: one-sided slopes differ, so the middle of the steps is taken.
    low, high = grid.qmin - zero_point, grid.qmax - zero_point
    inside = low <= round(v) <= high
    gx, gs = fake_quantize_gradients(1.0, x, scale, zero_point, grid)
    assert float(gx) == float(inside)
    if low < round(v) < high or not inside:
        assert slope(tiny, 0.0) == pytest.approx(float(gx), abs=1e-3)
        assert slope(0.0, tiny) == pytest.approx(float(gs), abs=1e-3 * (1 + abs(v)))


@given(arrays, steps, grids(max_bits=6))
def test_scale_gradient_is_the_integer_minus_the_quotient_inside_and_the_end_outside(x, scale, grid):
    _, gs = fake_quantize_gradients(np.ones_like(x), x, scale, 0, grid)
    expected = 0.0
    for value in x.ravel():
        v = float(F32(value) / F32(scale))
        ends = (grid.qmin, grid.qmax)
        if ends[0] - 0.5 <= v <= ends[1] + 0.5:
            expected += min(max(round(v), ends[0]), ends[1]) - v
        else:
            expected += ends[0] if v < 0 else ends[1]
    assert gs.dtype == np.float64
    assert float(gs) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("v", "passes"), [(-0.5, 1), (3.5, 1), (np.nextafter(F32(3.5), F32(4)), 0), (-0.51, 0)])
def test_the_half_steps_at_the_ends_belong_to_the_grid(v, passes):
    gx, _ = fake_quantize_gradients(1.0, v, 1.0, 0, Grid(2))
    assert float(gx) == passes


@given(arrays, st.integers(0, 2**32 - 1), steps)
def test_data_gradient_is_the_upstream_where_nothing_is_clipped(x, seed, scale):
    dy = np.random.default_rng(seed).standard_normal(x.shape).astype(F32)
    grid = Grid(4, signed=True, symmetric=True, narrow=True)
    gx, _ = fake_quantize_gradients(dy, x, scale, 0, grid)
    inside = np.abs(x / F32(scale)) <= 7.5
    assert gx.dtype == F32
    np.testing.assert_array_equal(gx, np.where(inside, dy, 0.0))


@given(st.data(), st.sampled_from([0, 1, -1]))
def test_per_channel_is_per_tensor_for_each_channel(draw, axis):
    x = draw.draw(arrays)
    dy = draw.draw(hnp.arrays(F32, x.shape, elements=values))
    scale = draw.draw(hnp.arrays(F32, x.shape[axis], elements=steps))
    zero = np.arange(x.shape[axis])
    gx, gs = fake_quantize_gradients(dy, x, scale, zero, Grid(3), axis=axis)
    for c in range(x.shape[axis]):
        one = fake_quantize_gradients(dy.take(c, axis), x.take(c, axis), scale[c], c, Grid(3))
        np.testing.assert_array_equal(gx.take(c, axis), one[0])
        assert gs[c] == pytest.approx(float(one[1]), rel=1e-12, abs=1e-12)


@given(arrays, steps)
def test_scale_gradient_is_linear_in_the_upstream(x, scale):
    dy = np.linspace(-1.0, 1.0, x.size, dtype=F32).reshape(x.shape)
    _, plain = fake_quantize_gradients(dy, x, scale, 1, Grid(4))
    _, doubled = fake_quantize_gradients(2 * dy, x, scale, 1, Grid(4))
    assert float(doubled) == pytest.approx(float(plain) * 2)


def test_huge_quotients_give_finite_gradients():
    gx, gs = fake_quantize_gradients([1.0, 1.0], [3e38, -3e38], 1e-38, 0, Grid(8, signed=True))
    assert gx.tolist() == [0.0, 0.0]
    assert float(gs) == 127 - 128


# ---- what is learned

gains = st.floats(-1e6, 1e6, width=32)
scales = st.floats(2.0**-40, 2.0**40, width=32)


@given(scales)
def test_a_gain_of_zero_leaves_the_scale_to_the_bit(scale):
    assert learned_scale(scale, 0.0) == F32(scale)
    assert learned_scale(scale, -0.0) == F32(scale)


@given(scales, st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_no_gain_makes_a_scale_less_than_the_smallest(scale, gain):
    with np.errstate(over="ignore"):
        assert learned_scale(scale, gain) >= F32(SMALLEST_SCALE)


@given(scales, gains, gains)
def test_scales_grow_with_gains(scale, one, other):
    low, high = sorted((one, other))
    assert learned_scale(scale, low) <= learned_scale(scale, high)


@given(gains)
def test_opposite_gains_are_inverse(gain):
    product = float(learned_scale(1.0, gain)) * float(learned_scale(1.0, -gain))
    assert product == pytest.approx(1.0, rel=1e-6)


@given(st.floats(-50, 50), st.floats(-4, 4))
def test_the_gradient_of_a_gain_is_the_slope_of_the_scale(gain, upstream):
    def scale(g):
        return 0.5 * (1 + g) if g >= 0 else 0.5 / (1 - g)

    tiny = 1e-6
    slope = (scale(gain + tiny) - scale(gain - tiny)) / (2 * tiny)
    assert float(gain_gradient(upstream, 0.5, gain)) == pytest.approx(upstream * slope, rel=1e-4, abs=1e-8)
    assert float(learned_scale(0.5, gain)) == pytest.approx(scale(gain), rel=1e-6)


def test_gains_of_channels_act_on_their_own_scales():
    found = learned_scale([1.0, 2.0, 4.0], [0.5, 0.0, -3.0])
    assert found.dtype == F32
    assert found.tolist() == [1.5, 2.0, 1.0]


# ---- the quantization loss


@given(arrays, steps, grids(max_bits=8))
def test_relative_squared_error_is_the_ratio_of_energies(x, scale, grid):
    kept = fake_quantize(x, scale, 0, grid)
    error = sum((exact(a) - exact(b)) ** 2 for a, b in zip(kept.ravel(), x.ravel(), strict=True))
    energy = sum(exact(value) ** 2 for value in x.ravel())
    expected = float(error / energy) if energy else 0.0
    assert relative_squared_error(x, scale, 0, grid) == pytest.approx(expected, rel=1e-9)


@given(arrays, steps, st.integers(-10, 10))
def test_relative_squared_error_has_no_unit(x, scale, power):
    plain = relative_squared_error(x, scale, 0, Grid(4))
    factor = 2.0**power
    assert relative_squared_error(x * F32(factor), scale * factor, 0, Grid(4)) == pytest.approx(plain)


@given(arrays, steps)
def test_relative_squared_error_is_zero_on_the_grid(x, scale):
    grid = Grid(8, signed=True)
    kept = fake_quantize(x, scale, 0, grid)
    assert relative_squared_error(kept, scale, 0, grid) == 0.0


def test_relative_squared_error_of_zeros_is_zero():
    assert relative_squared_error(np.zeros(3), 1.0, 0, Grid(8)) == 0.0


def test_relative_squared_error_is_per_channel():
    x = np.array([[1.0, 2.0], [0.1, 0.24]])
    assert relative_squared_error(x, [1.0, 0.1], [0, 0], Grid(8), axis=0) == pytest.approx(
        0.04**2 / (1 + 4 + 0.01 + 0.24**2), rel=1e-5
    )
    assert quantize(x, [1.0, 0.1], [0, 0], Grid(8), axis=0).tolist() == [[1, 2], [1, 2]]
