"""Wrong kernels of fake quantization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace as but
from typing import Any

import numpy as np
import pytest

from dopt_api.quantizer import fake_quantize
from dopt_api.quantizer.affine import broadcast
from mutants.mutant import mutant, replace

LAW = "laws/test_fake_quantize.py::"

F32 = np.float32


def kernel(
    *,
    steps: Callable[..., Any] = np.divide,
    rounding: Callable[..., Any] = np.rint,
    low: int = 0,
    high: int = 0,
    back: int = 0,
) -> Callable[..., Any]:
    """Return a kernel like that of the core.

    Args:
        steps: From data and scale to the real steps.
        rounding: From the real steps to integers.
        low: What is added to the lowest integer of the grid.
        high: What is added to the highest.
        back: What is added to the zero point on the way back.
    """

    def run(x: Any, scale: Any, zero_point: Any, grid: Any, *, axis: int | None = None) -> Any:
        data = np.asarray(x, F32)
        on_data, shift = (broadcast(np.asarray(part, F32), data.ndim, axis) for part in (scale, zero_point))
        with np.errstate(all="ignore"):
            integers = np.clip(rounding(steps(data, on_data)) + shift, F32(grid.qmin + low), F32(grid.qmax + high))
            return np.asarray((integers - shift - F32(back)) * on_data, F32)

    return run


def before(change: Callable[..., Any]) -> Callable[..., Any]:
    """Return the core's kernel on other data."""
    return lambda x, *rest, axis=None: fake_quantize(change(np.asarray(x, F32)), *rest, axis=axis)


@mutant(LAW + "test_every_integer_and_every_tie")
def ties_are_rounded_up(patch: pytest.MonkeyPatch) -> None:
    """0.5 steps become 1."""
    replace(patch, "fake_quantize", kernel(rounding=lambda v: np.floor(v + F32(0.5))))


@mutant(LAW + "test_every_integer_and_every_tie")
def ties_are_rounded_away_from_zero(patch: pytest.MonkeyPatch) -> None:
    """0.5 steps become 1, and -0.5 steps -1."""
    replace(patch, "fake_quantize", kernel(rounding=lambda v: np.copysign(np.floor(np.abs(v) + F32(0.5)), v)))


@mutant(LAW + "test_inside_the_range_the_error_is_half_a_step")
def steps_are_truncated(patch: pytest.MonkeyPatch) -> None:
    """0.9 steps become 0."""
    replace(patch, "fake_quantize", kernel(rounding=np.trunc))


@mutant(LAW + "test_every_integer_and_every_tie")
def the_zero_point_is_added_before_rounding(patch: pytest.MonkeyPatch) -> None:
    """Ties fall the other way where the zero point is odd."""

    def run(x: Any, scale: Any, zero_point: Any, grid: Any, *, axis: int | None = None) -> Any:
        data = np.asarray(x, F32)
        on_data, shift = (broadcast(np.asarray(part, F32), data.ndim, axis) for part in (scale, zero_point))
        with np.errstate(all="ignore"):
            integers = np.clip(np.rint(data / on_data + shift), F32(grid.qmin), F32(grid.qmax))
            return np.asarray((integers - shift) * on_data, F32)

    replace(patch, "fake_quantize", run)


@mutant(LAW + "test_what_is_beyond_saturates")
def the_lowest_integer_is_not_used(patch: pytest.MonkeyPatch) -> None:
    """The lower bound of clipping is one too high."""
    replace(patch, "fake_quantize", kernel(low=1))


@mutant(LAW + "test_what_is_beyond_saturates")
def the_highest_integer_is_not_used(patch: pytest.MonkeyPatch) -> None:
    """The upper bound of clipping is one too low."""
    replace(patch, "fake_quantize", kernel(high=-1))


@mutant(LAW + "test_what_is_beyond_saturates")
def an_integer_beyond_the_grid_is_used(patch: pytest.MonkeyPatch) -> None:
    """The upper bound of clipping is one too high."""
    replace(patch, "fake_quantize", kernel(high=1))


@mutant(LAW + "test_symmetric_grids_mirror")
def narrow_grids_are_taken_for_full_ones(patch: pytest.MonkeyPatch) -> None:
    """A weight may become -128."""

    def run(x: Any, scale: Any, zero_point: Any, grid: Any, *, axis: int | None = None) -> Any:
        return fake_quantize(x, scale, zero_point, but(grid, narrow=False), axis=axis)

    replace(patch, "fake_quantize", run)


@mutant(LAW + "test_zero_is_exact")
def the_zero_point_is_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """The zero point that is taken off is one more than the one that was added."""
    replace(patch, "fake_quantize", kernel(back=1))


@mutant(LAW + "test_activations_agree_with_the_reference")
def a_coarse_reciprocal_takes_the_place_of_the_division(patch: pytest.MonkeyPatch) -> None:
    """1 / scale has 8 bits, which decides otherwise far from ties."""

    def steps(x: Any, scale: Any) -> Any:
        mantissa, exponent = np.frexp(F32(1) / scale)
        return x * np.ldexp(np.rint(mantissa * F32(256)) / F32(256), exponent)

    replace(patch, "fake_quantize", kernel(steps=steps))


@mutant(LAW + "test_channels_are_quantized_each_by_itself")
def all_channels_have_the_greatest_scale(patch: pytest.MonkeyPatch) -> None:
    """One scale for the whole weight."""

    def run(x: Any, scale: Any, zero_point: Any, grid: Any, *, axis: int | None = None) -> Any:
        return fake_quantize(x, np.full_like(scale, np.max(scale, initial=0)), zero_point, grid, axis=axis)

    replace(patch, "fake_quantize", run)


@mutant(LAW + "test_nan_is_not_made_into_a_number")
def nan_becomes_zero(patch: pytest.MonkeyPatch) -> None:
    """NaN passes silently, as 0."""
    replace(patch, "fake_quantize", before(lambda x: np.where(np.isnan(x), F32(0), x)))


@mutant(LAW + "test_what_is_beyond_saturates")
def infinity_becomes_zero(patch: pytest.MonkeyPatch) -> None:
    """Infinity does not saturate."""
    replace(patch, "fake_quantize", before(lambda x: np.where(np.isinf(x), F32(0), x)))


@mutant(LAW + "test_subnormal_data")
def subnormal_data_count_as_zero(patch: pytest.MonkeyPatch) -> None:
    """Subnormal numbers are flushed."""
    replace(patch, "fake_quantize", before(lambda x: np.where(np.abs(x) < np.finfo(F32).tiny, F32(0), x)))


@mutant(LAW + "test_activations_agree_with_the_reference")
def results_are_float64(patch: pytest.MonkeyPatch) -> None:
    """The right values in another type."""

    def run(*arguments: Any, axis: int | None = None) -> Any:
        return fake_quantize(*arguments, axis=axis).astype(np.float64)

    replace(patch, "fake_quantize", run)
