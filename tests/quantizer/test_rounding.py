"""Rounding by second moments: integers of the grid, never worse than nearest, and better where inputs are alike."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dopt_api.errors import NumbersError
from dopt_api.quantizer import Grid, learned_scale, scale_zero_point
from dopt_api.quantizer.rounding import (
    BLOCK,
    SHRINKS,
    Moments,
    best_scale,
    compensated_weight,
    output_error,
    round_layer,
    round_weight,
)
from dopt_api.quantizer.training import gain_of

NARROW = Grid(4, signed=True, symmetric=True, narrow=True)


@st.composite
def problems(draw):
    groups, outputs, columns = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 12))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = generator.standard_normal((groups, outputs, columns)) * 10.0 ** draw(st.integers(-6, 6))
    samples = draw(st.integers(0, 30))  # fewer than columns: moments without an inverse
    mixed = generator.standard_normal((groups, max(samples, 1), columns)) @ generator.standard_normal(
        (columns, columns)
    )
    moments = np.swapaxes(mixed, 1, 2) @ mixed * (samples > 0) * 10.0 ** draw(st.integers(-6, 6))
    scale = np.abs(weight).max(axis=2) / NARROW.qmax * draw(st.sampled_from([0.5, 1.0, 2.0]))
    return weight, np.where(scale > 0, scale, 1.0), moments


@given(problem=problems())
def test_integers_are_on_the_grid_and_never_worse_than_nearest(problem):
    weight, scale, moments = problem
    found = round_weight(weight, scale, moments, NARROW)
    assert found.dtype == np.int32
    assert found.min() >= NARROW.qmin
    assert found.max() <= NARROW.qmax
    nearest = np.clip(np.rint(weight / scale[..., None]), NARROW.qmin, NARROW.qmax)
    errors = [output_error(integers * scale[..., None] - weight, moments) for integers in (found, nearest)]
    assert (errors[0] <= errors[1]).all()


@given(problem=problems(), power=st.integers(-20, 20))
def test_units_do_not_matter(problem, power):
    weight, scale, moments = problem
    wanted = round_weight(weight, scale, moments, NARROW)
    np.testing.assert_array_equal(round_weight(weight * 2.0**power, scale * 2.0**power, moments, NARROW), wanted)
    np.testing.assert_array_equal(round_weight(weight, scale, moments * 4.0**power, NARROW), wanted)


@given(problem=problems())
def test_groups_are_rounded_each_by_itself(problem):
    weight, scale, moments = problem
    wanted = round_weight(weight, scale, moments, NARROW)
    for group in range(len(weight)):
        one = slice(group, group + 1)
        np.testing.assert_array_equal(round_weight(weight[one], scale[one], moments[one], NARROW), wanted[one])


def test_inputs_that_have_nothing_to_do_with_each_other_are_rounded_to_nearest():
    weight = np.random.default_rng(0).uniform(-6, 6, (1, 5, 40))
    moments = np.diag(np.arange(1.0, 41.0))[None]
    np.testing.assert_array_equal(round_weight(weight, np.ones((1, 5)), moments, NARROW), np.rint(weight))


def test_what_is_on_the_grid_stays():
    integers = np.random.default_rng(0).integers(-7, 8, (1, 5, 100))
    x = np.random.default_rng(1).standard_normal((300, 100))
    found = round_weight(integers * 0.3, np.full((1, 5), 0.3), (x.T @ x)[None], NARROW)
    np.testing.assert_array_equal(found, integers)


def test_alike_inputs_leave_a_fraction_of_the_error():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((2000, 4)) @ generator.standard_normal((4, 3 * BLOCK)) / 2
    x += 0.1 * generator.standard_normal(x.shape)
    moments, weight = (x.T @ x / len(x))[None], generator.standard_normal((1, 16, 3 * BLOCK))
    scale = np.abs(weight).max(axis=2) / NARROW.qmax
    found = round_weight(weight, scale, moments, NARROW) * scale[..., None] - weight
    nearest = np.rint(weight / scale[..., None]) * scale[..., None] - weight
    assert output_error(found, moments).sum() < output_error(nearest, moments).sum() / 10


def test_the_error_of_the_output_is_that_of_the_output():
    generator = np.random.default_rng(0)
    x, error = generator.standard_normal((50, 6)), generator.standard_normal((1, 3, 6))
    moments = (x.T @ x / len(x))[None]
    np.testing.assert_allclose(output_error(error, moments)[0], np.square(x @ error[0].T).mean(axis=0))


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(part, value):
    parts = [np.ones((1, 1, 2)), np.ones((1, 1)), np.eye(2)[None]]
    parts[part] = parts[part].copy()
    parts[part].flat[0] = value
    with pytest.raises(NumbersError, match="NaN or infinite"):
        round_weight(*parts, NARROW)


@given(problem=problems(), seed=st.integers(0, 2**32 - 1))
def test_errors_count_from_the_weight_that_is_wanted(problem, seed):
    weight, scale, moments = problem
    wanted = weight * np.random.default_rng(seed).uniform(0.8, 1.2, weight.shape)
    found = round_weight(weight, scale, moments, NARROW, wanted=wanted)
    nearest = np.clip(np.rint(weight / scale[..., None]), NARROW.qmin, NARROW.qmax)
    errors = [output_error(integers * scale[..., None] - wanted, moments) for integers in (found, nearest)]
    assert (errors[0] <= errors[1]).all()


def test_sweeps_leave_no_integer_that_one_step_would_better():
    generator = np.random.default_rng(3)
    x, weight = (
        generator.standard_normal((200, 8)) @ generator.standard_normal((8, 8)),
        generator.standard_normal((1, 6, 8)),
    )
    moments, scale = (x.T @ x / len(x))[None], np.abs(weight).max(axis=2) / NARROW.qmax
    found = round_weight(weight, scale, moments, NARROW, damping=0.0)
    least = output_error(found * scale[..., None] - weight, moments)
    for column in range(8):
        for step in (-1, 1):
            other = found.copy()
            other[..., column] = np.clip(other[..., column] + step, NARROW.qmin, NARROW.qmax)
            assert (output_error(other * scale[..., None] - weight, moments) >= least * (1 - 1e-12)).all()


@given(problem=problems())
def test_the_best_scale_is_no_worse_than_any_that_was_tried(problem):
    weight, scale, moments = problem
    best = best_scale(weight, scale, moments, NARROW)

    def error(step):
        nearest = np.clip(np.rint(weight / step[..., None]), NARROW.qmin, NARROW.qmax)
        return output_error(nearest * step[..., None] - weight, moments)

    for shrink in SHRINKS:
        assert (error(best) <= error(scale * shrink)).all()


def test_compensation_finds_the_weight_that_gave_the_outputs():
    generator = np.random.default_rng(0)
    x, true = generator.standard_normal((4000, 5)), generator.standard_normal((1, 3, 5))
    seen = x @ (np.eye(5) + 0.3 * generator.standard_normal((5, 5)))  # what the layer gets in place of x
    moments, cross = (seen.T @ seen / 4000)[None], ((x @ true[0].T).T @ seen / 4000)[None]
    exact = compensated_weight(true, moments, cross, ridge=0.0)
    np.testing.assert_allclose(seen @ exact[0].T, x @ true[0].T, atol=1e-8)
    np.testing.assert_allclose(compensated_weight(true, moments, cross, ridge=1e9), true, rtol=1e-6)
    unchanged = compensated_weight(true, moments, true @ moments)
    np.testing.assert_allclose(unchanged, true, rtol=1e-10)


@st.composite
def layers(draw):
    """Draw a layer: weight, scales, what folding multiplied it by, quantized inputs and float outputs."""
    groups, outputs, columns = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 9))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    factor = generator.uniform(0.5, 2.0, (groups, outputs, 1)) * generator.choice([-1, 1], (groups, outputs, 1))
    weight = generator.standard_normal((groups, outputs, columns)) * factor
    weight[generator.random(weight.shape[:2]) < 0.1] = 0.0
    x = generator.standard_normal((draw(st.integers(2, 40)), groups, columns)) + 1.0
    seen = np.rint(4 * x) / 4
    made = np.einsum("ngk,gok->ngo", x, weight / factor)
    largest = np.abs(weight).max(axis=2)
    scale = np.where(largest > 0, largest, 1.0) / NARROW.qmax
    return weight, scale, factor, seen, made


@given(layers(), st.integers(0, 40))
def test_moments_of_parts_are_those_of_the_whole(layer, cut):
    *_, seen, made = layer
    whole, parts = Moments(), Moments()
    whole.add(seen, made)
    for part in (slice(cut), slice(cut, None)):
        parts.add(seen[part], made[part])
    assert parts.count == whole.count == len(seen)
    for name in ("mean", "covariance", "cross_covariance"):
        np.testing.assert_allclose(getattr(parts, name)(), getattr(whole, name)(), atol=1e-9)
    flat = seen[:, 0] - seen[:, 0].mean(axis=0)
    np.testing.assert_allclose(whole.covariance()[0], flat.T @ flat / len(seen), atol=1e-9)
    cross = (made[:, 0] - made[:, 0].mean(axis=0)).T @ flat / len(seen)
    np.testing.assert_allclose(whole.cross_covariance()[0], cross, atol=1e-9)


@given(layers())
def test_a_rounded_layer_is_no_worse_lies_on_its_grid_and_keeps_its_mean(layer):
    weight, scale, factor, seen, made = layer
    moments = Moments()
    moments.add(seen, made)
    found = round_layer(weight, scale, moments, NARROW, factor=factor)
    assert 0 <= found.rounded <= found.nearest
    folded = (found.weight * factor).reshape(-1, weight.shape[2])
    extreme = np.abs(folded).max(axis=1)
    derived, _ = scale_zero_point(-extreme, extreme, NARROW)
    steps = folded / learned_scale(derived, found.gain)[:, None]
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
    assert np.abs(steps).max() < NARROW.qmax + 0.5
    outputs = np.einsum("ngk,gok->ngo", seen, found.weight).reshape(len(seen), -1) + found.shift
    np.testing.assert_allclose(outputs.mean(axis=0), made.reshape(len(made), -1).mean(axis=0), atol=1e-9)


@given(st.floats(1e-6, 1e6))
def test_a_gain_is_the_inverse_of_what_a_scale_does_with_it(ratio):
    assert float(learned_scale(1.0, gain_of(ratio))) == pytest.approx(ratio, rel=1e-5)
