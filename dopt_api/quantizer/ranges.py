"""From statistics to a range: the methods a layer can choose by its ``range`` key.

Each method takes :class:`~dopt_api.quantizer.Statistics` and a :class:`~dopt_api.quantizer.Grid` and returns
``(minimum, maximum)`` as float64, in units of the data. All are pure functions of the statistics, so the range does
not depend on which backend collected them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dopt_api.errors import CalibrationError, NumbersError
from dopt_api.quantizer.affine import scale_zero_point
from dopt_api.quantizer.grid import Grid
from dopt_api.quantizer.statistics import Statistics

__all__ = ["DEFAULT_RANGE", "RANGE_METHODS", "RangeMethod", "activation_parameters", "min_max", "moving_average", "mse"]

RangeMethod = Callable[[Statistics, Grid], tuple[float, float]]


def min_max(statistics: Statistics, grid: Grid) -> tuple[float, float]:
    """Return the least and the greatest value seen: nothing is clipped."""
    del grid
    return float(statistics.minimum), float(statistics.maximum)


def moving_average(statistics: Statistics, grid: Grid) -> tuple[float, float]:
    """Return the mean over the samples of their least and of their greatest value.

    The usual moving average weighs batches by their order; this one weighs every sample alike, so that it does not
    depend on batch size, order or the number of processes.
    """
    del grid
    return statistics.mean_extremes()


def mse(statistics: Statistics, grid: Grid) -> tuple[float, float]:
    """Return the range whose quantization error, mean square over the histogram, is least.

    The range contains zero, as every range of the quantizer does. Its ends are shrunk from the extremes towards
    zero, first together, then the upper and the lower alone, in steps of 1/128 of the extremes. Candidates are
    compared with zero kept exact, as the quantizer keeps it.
    """
    width = statistics.bin_edges()
    centres, counts = (width[1:] + width[:-1]) / 2, statistics.counts.astype(np.float64)
    seen = counts > 0
    centres, counts = centres[seen], counts[seen]
    low, high = min(float(statistics.minimum), 0.0), max(float(statistics.maximum), 0.0)
    shrink = np.arange(128, 15, -1) / 128

    def best(lows: NDArray[np.float64], highs: NDArray[np.float64]) -> int:
        return int(np.argmin(_squared_error(centres, counts, lows, highs, grid)))

    together = best(low * shrink, high * shrink)
    low, high = low * shrink[together], high * shrink[together]
    top = high * shrink
    high = float(top[best(np.full_like(top, low), top)])
    bottom = low * shrink
    low = float(bottom[best(bottom, np.full_like(bottom, high))])
    return float(low), float(high)


def _squared_error(
    x: NDArray[np.float64],
    weight: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    grid: Grid,
) -> NDArray[np.float64]:
    """Return the weighted squared error of ``x`` ``[B]`` for candidate ranges ``[K]``, shape ``[K]``."""
    scales, zero_points = scale_zero_point(low, high, grid)
    scale, zero_point = scales.astype(np.float64)[:, None], zero_points.astype(np.float64)[:, None]
    q = np.clip(np.rint(x / scale) + zero_point, grid.qmin, grid.qmax)
    error: NDArray[np.float64] = ((q - zero_point) * scale - x) ** 2 @ weight
    return error


RANGE_METHODS: dict[str, RangeMethod] = {"min_max": min_max, "moving_average": moving_average, "mse": mse}
"""The methods by the name that a strategy file gives them."""

DEFAULT_RANGE = "min_max"
"""The method of a layer that names none."""


def activation_parameters(
    statistics: Statistics, grid: Grid, *, layer: str, method: str = DEFAULT_RANGE
) -> tuple[np.float32, int]:
    """Return the scale and zero point of a layer's input, from its statistics.

    Args:
        statistics: What calibration saw.
        grid: The grid of the activations.
        layer: The layer's name, for messages.
        method: One of :data:`RANGE_METHODS`.

    Raises:
        CalibrationError: There are no data, or some had NaN, infinity or values too large for a scale; the message
            names the layer.
    """
    statistics.check(layer)
    try:
        scale_zero_point(statistics.minimum, statistics.maximum, grid)  # whichever the method: the extremes are usable
        scale, zero_point = scale_zero_point(*RANGE_METHODS[method](statistics, grid), grid)
    except NumbersError as error:
        raise CalibrationError(
            f"The input of layer {layer!r} cannot be quantized: {error.what}",
            where=f"layer {layer!r}",
            expected=error.expected,
            fix=error.fix,
        ) from error
    return np.float32(scale), int(zero_point)
