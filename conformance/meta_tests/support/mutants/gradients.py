"""Wrong gradients, and wrong learned scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dopt_api.quantizer import fake_quantize, fake_quantize_gradients
from dopt_api.quantizer.affine import broadcast
from mutants.mutant import mutant, replace

LAW = "laws/test_gradients.py::"


def gradients(
    *, of_data: Callable[..., Any] = lambda dx, *_: dx, of_scale: Callable[..., Any] = lambda dscale, *_: dscale
) -> Callable[..., Any]:
    """Return gradients like those of the core, with one of the two changed by a function of it and of all arguments."""

    def run(upstream: Any, x: Any, scale: Any, zero_point: Any, grid: Any, *, axis: int | None = None) -> Any:
        arguments = upstream, x, scale, zero_point, grid, axis
        dx, dscale = fake_quantize_gradients(*arguments[:-1], axis=axis)
        return of_data(dx, *arguments), of_scale(dscale, *arguments)

    return run


def unmasked(_dscale: Any, upstream: Any, x: Any, scale: Any, zero_point: Any, grid: Any, axis: int | None) -> Any:
    """Return the gradient of the scale as if nothing were clipped."""
    data = np.asarray(x, np.float64)
    on_data = broadcast(np.asarray(scale, np.float64), data.ndim, axis)
    with np.errstate(all="ignore"):
        slope = (fake_quantize(x, scale, zero_point, grid, axis=axis) - data) / on_data
        terms = np.where(np.isfinite(slope), upstream * slope, 0)
    return terms.sum(axis=None if axis is None else tuple(i for i in range(data.ndim) if i != axis))


@mutant(LAW + "test_the_gradient_of_the_scale_by_hand")
def the_gradient_of_the_scale_has_the_other_sign(patch: pytest.MonkeyPatch) -> None:
    """Training moves scales away from where they should be."""
    replace(patch, "fake_quantize_gradients", gradients(of_scale=lambda dscale, *_: -dscale))


@mutant(LAW + "test_the_gradient_of_the_scale_is_that_of_the_reference")
def the_gradient_of_the_scale_has_no_mask(patch: pytest.MonkeyPatch) -> None:
    """Clipped elements pull the scale as if they were not clipped."""
    replace(patch, "fake_quantize_gradients", gradients(of_scale=unmasked))


@mutant(LAW + "test_the_gradient_of_the_scale_is_that_of_the_reference")
def the_gradient_of_the_scale_is_a_mean(patch: pytest.MonkeyPatch) -> None:
    """The sum over elements is divided by their number."""
    replace(patch, "fake_quantize_gradients", gradients(of_scale=lambda dscale, dy, *_: dscale / np.size(dy)))


@mutant(LAW + "test_the_gradient_passes_where_the_integer_is_on_the_grid")
def the_gradient_passes_where_it_is_clipped(patch: pytest.MonkeyPatch) -> None:
    """Straight through, outside the range as well."""
    replace(patch, "fake_quantize_gradients", gradients(of_data=lambda _dx, dy, *_: np.asarray(dy)))


@mutant(LAW + "test_what_rounds_to_an_end_of_the_grid_is_on_it")
def the_gradient_does_not_pass_half_a_step_outside(patch: pytest.MonkeyPatch) -> None:
    """What rounds to an end of the grid from outside counts as clipped."""

    def strict(dx: Any, _dy: Any, x: Any, scale: Any, zero_point: Any, grid: Any, axis: int | None) -> Any:
        data = np.asarray(x, np.float32)
        on_data, shift = (broadcast(np.asarray(part, np.float32), data.ndim, axis) for part in (scale, zero_point))
        with np.errstate(all="ignore"):
            integers = data / on_data + shift
        return np.where((integers >= grid.qmin) & (integers <= grid.qmax), dx, np.float32(0))

    replace(patch, "fake_quantize_gradients", gradients(of_data=strict))


@mutant(LAW + "test_the_gradient_of_the_gain_is_that_of_the_reference")
def the_gradient_of_the_gain_is_that_of_a_factor(patch: pytest.MonkeyPatch) -> None:
    """The gradient is that of positive gains, also below 0."""
    replace(patch, "gain_gradient", lambda dscale, scale, _gain: np.asarray(dscale, np.float64) * scale)


@mutant(LAW + "test_scales_with_gains_are_the_reference_s_to_the_bit")
def gains_are_exponents(patch: pytest.MonkeyPatch) -> None:
    """The multiplier is an exponential of the gain."""
    replace(patch, "learned_scale", lambda scale, gain: np.asarray(scale * np.exp(gain), np.float32))
