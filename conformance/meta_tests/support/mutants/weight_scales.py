"""Wrong scales of weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dopt_api.quantizer import channel_maximum, scale_zero_point
from mutants.mutant import mutant, replace

LAW = "laws/test_weight_scale.py::"


@mutant(LAW + "test_scales_are_the_reference_s_to_the_bit")
def the_weight_has_one_scale(patch: pytest.MonkeyPatch) -> None:
    """One scale for the whole weight, repeated for each channel."""

    def run(weight: Any, axis: int | None) -> Any:
        found = channel_maximum(weight, axis)
        return np.full_like(found, found.max(initial=0))

    replace(patch, "channel_maximum", run)


@mutant(LAW + "test_every_weight_is_within_its_grid")
def negative_weights_are_overlooked(patch: pytest.MonkeyPatch) -> None:
    """The greatest weight instead of the greatest magnitude."""
    replace(patch, "channel_maximum", lambda weight, axis: channel_maximum(np.maximum(weight, 0), axis))


@mutant(LAW + "test_scales_are_the_reference_s_to_the_bit")
def weights_have_a_whole_power_of_two_of_steps(patch: pytest.MonkeyPatch) -> None:
    """An asymmetric grid: the range is divided by 255 or 256 and not by 254."""

    def run(low: Any, high: Any, grid: Any) -> Any:
        scale, zero_point = scale_zero_point(low, high, grid)
        steps = grid.qmax - grid.qmin
        return (scale * np.float32(steps / (steps + 1))).astype(np.float32), zero_point

    replace(patch, "scale_zero_point", run)


@mutant(LAW + "test_a_channel_of_zeros_has_the_scale_one")
def a_channel_of_zeros_has_a_tiny_scale(patch: pytest.MonkeyPatch) -> None:
    """Zeros count as the smallest number that there is."""
    replace(patch, "channel_maximum", lambda weight, axis: np.maximum(channel_maximum(weight, axis), 1e-30))


@mutant(LAW + "test_subnormal_weights")
def subnormal_weights_count_as_zero(patch: pytest.MonkeyPatch) -> None:
    """Subnormal numbers are flushed."""
    tiny = np.finfo(np.float32).tiny
    replace(patch, "channel_maximum", lambda weight, axis: channel_maximum(weight * (np.abs(weight) >= tiny), axis))


@mutant(LAW + "test_powers_of_two_carry_over")
def scales_have_a_floor(patch: pytest.MonkeyPatch) -> None:
    """No scale is below 1e-8, as in frameworks that add an epsilon."""

    def run(low: Any, high: Any, grid: Any) -> Any:
        scale, zero_point = scale_zero_point(low, high, grid)
        return np.maximum(scale, np.float32(1e-8)), zero_point

    replace(patch, "scale_zero_point", run)
