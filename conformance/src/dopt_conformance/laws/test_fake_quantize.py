"""Fake quantization: ``(clip(rint(x / scale) + zero point) - zero point) * scale``."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dopt_api import DoptError
from dopt_api.quantizer import Grid
from dopt_conformance.laws.agreement import assert_agrees
from dopt_conformance.laws.drawing import Case, activation_cases, grids, weight_cases

pytestmark = pytest.mark.since("1.0")

F32 = np.float32


def ends(case):
    """Return the least and the greatest value of the grid, in the units of the data."""
    low, high = ((F32(end) - case.zero_point.astype(F32)) * case.scale for end in (case.grid.qmin, case.grid.qmax))
    return case.on_data(low), case.on_data(high)


@given(case=activation_cases())
def test_activations_agree_with_the_reference(harness, case):
    assert_agrees(harness.fake_quantize(*case.arguments), case)


@given(case=weight_cases())
def test_weights_agree_with_the_reference(harness, case):
    assert_agrees(harness.fake_quantize(*case.arguments), case)


@pytest.mark.parametrize("bits", [2, 3, 4, 7, 8, 12, 16])
@pytest.mark.parametrize("kind", ["unsigned", "signed", "symmetric", "narrow"])
def test_every_integer_and_every_tie(harness, bits, kind):
    grid = Grid(bits, signed=kind != "unsigned", symmetric=kind in ("symmetric", "narrow"), narrow=kind == "narrow")
    zero_point = 0 if grid.symmetric else ((grid.qmin + grid.qmax) // 2) | 1  # odd: ties are those of x / scale
    integers = np.arange(grid.qmin - zero_point - 2, grid.qmax - zero_point + 3, dtype=F32)
    for offset in (0.0, 0.5):
        case = Case(
            (integers + F32(offset)) * F32(0.25), np.asarray(F32(0.25)), np.asarray(zero_point, np.int32), grid, None
        )
        # a power of two: division and multiplication are exact, so that ties are decided, half to even
        expected = np.clip(np.rint(integers + F32(offset)), grid.qmin - zero_point, grid.qmax - zero_point) * F32(0.25)
        np.testing.assert_array_equal(harness.fake_quantize(*case.arguments), expected)


@given(case=activation_cases())
def test_what_is_on_the_grid_stays(harness, case):
    once = harness.fake_quantize(*case.arguments)
    again = harness.fake_quantize(once, *case.arguments[1:])
    np.testing.assert_array_equal(again, once)


@given(case=activation_cases())
def test_order_is_kept(harness, case):
    x = np.sort(case.x, axis=None).reshape(case.x.shape)
    found = harness.fake_quantize(x, *case.arguments[1:])
    assert (np.diff(found.ravel()) >= 0).all()


@given(case=activation_cases())
def test_inside_the_range_the_error_is_half_a_step(harness, case):
    low, high = ends(case)
    x = np.clip(case.x, low, high)
    error = np.abs(harness.fake_quantize(x, *case.arguments[1:]).astype(np.float64) - x)
    # half a step, and the rounding of x and of the product, which large integers magnify
    allowed = 0.5 * float(case.scale) + 2.0**-22 * np.abs(x)
    assert (error <= allowed).all()


@given(case=st.one_of(activation_cases(), weight_cases()))
def test_zero_is_exact(harness, case):
    found = harness.fake_quantize(np.zeros_like(case.x), *case.arguments[1:])
    np.testing.assert_array_equal(found, np.zeros_like(case.x))


@given(
    case=st.one_of(activation_cases(high=80), weight_cases(high=80)), factor=st.sampled_from([1.0, 2.0, 1e6, np.inf])
)
def test_what_is_beyond_saturates(harness, case, factor):
    low, high = (np.broadcast_to(end, case.x.shape).astype(F32) for end in ends(case))
    step = case.on_data(case.scale)
    for end, sign in ((low, F32(-1)), (high, F32(1))):
        beyond = end + sign * F32(factor) * step
        np.testing.assert_array_equal(harness.fake_quantize(beyond, *case.arguments[1:]), end)


@given(case=weight_cases())
def test_symmetric_grids_mirror(harness, case):
    if not case.grid.narrow:
        _, high = ends(case)
        case = Case(np.clip(case.x, -high, high), *case.arguments[1:])
    found = harness.fake_quantize(*case.arguments)
    np.testing.assert_array_equal(harness.fake_quantize(-case.x, *case.arguments[1:]), -found)


@given(case=st.one_of(activation_cases(-40, 40), weight_cases(-40, 40)), exponent=st.integers(-20, 20))
def test_powers_of_two_carry_over(harness, case, exponent):
    factor = F32(2.0**exponent)
    found = harness.fake_quantize(case.x * factor, case.scale * factor, *case.arguments[2:])
    np.testing.assert_array_equal(found, harness.fake_quantize(*case.arguments) * factor)


@given(case=weight_cases())
def test_channels_are_quantized_each_by_itself(harness, case):
    found = harness.fake_quantize(*case.arguments)
    grid = Grid(case.grid.bits, signed=True, symmetric=True, narrow=case.grid.narrow)
    for channel, scale in enumerate(case.scale):
        alone = Case(np.take(case.x, channel, case.axis), np.asarray(scale), np.asarray(0, np.int32), grid, None)
        kept = np.take(found, channel, case.axis)
        assert_agrees(kept, alone)
        assert_agrees(harness.fake_quantize(*alone.arguments), alone)


@given(grid=grids, position=st.integers(0, 4))
def test_nan_is_not_made_into_a_number(harness, grid, position):
    x = F32([-1.0, -0.25, 0.0, 0.25, 1.0])
    zero_point = 0 if grid.symmetric else (grid.qmin + grid.qmax) // 2
    rest = (np.asarray(F32(0.125)), np.asarray(zero_point, np.int32), grid, None)
    wanted = np.delete(harness.fake_quantize(x, *rest), position)
    x[position] = np.nan
    try:
        found = harness.fake_quantize(x, *rest)
    except (ValueError, ArithmeticError, DoptError):
        return  # refusing it is as good
    assert np.isnan(found[position])
    np.testing.assert_array_equal(np.delete(found, position), wanted)


@given(exponent=st.integers(-149, -127), grid=grids)
def test_subnormal_data(harness, exponent, grid):
    scale = np.asarray(np.finfo(F32).tiny)
    x = F32(2.0**exponent) * F32([-3.0, -1.5, -1.0, 1.0, 1.5, 3.0])
    zero_point = 0 if grid.symmetric else (grid.qmin + grid.qmax) // 2
    case = Case(x.astype(F32), scale, np.asarray(zero_point, np.int32), grid, None)
    assert_agrees(harness.fake_quantize(*case.arguments), case)
