"""From statistics to a range: the methods a layer can choose by its ``range`` key.

Each method takes :class:`~dopt_api.quantizer.Statistics` and a :class:`~dopt_api.quantizer.Grid` and returns
``(minimum, maximum)`` as float64, in units of the data. All are pure functions of the statistics, so the range does
not depend on which backend collected them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dopt_api import extensions
from dopt_api.errors import CalibrationError, ExtensionError, NumbersError
from dopt_api.quantizer.affine import scale_zero_point
from dopt_api.quantizer.grid import Grid
from dopt_api.quantizer.statistics import Statistics

__all__ = [
    "DEFAULT_RANGE",
    "RANGE_METHODS",
    "TAIL",
    "RangeMethod",
    "activation_parameters",
    "entropy",
    "get_range_method",
    "min_max",
    "moving_average",
    "mse",
    "percentile",
    "range_method_names",
]

TAIL = 1e-4
"""The share of the data that :func:`percentile` leaves out."""

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


def percentile(statistics: Statistics, grid: Grid) -> tuple[float, float]:
    """Return the range that leaves out the most extreme ten-thousandth of the histogram's mass, by magnitude.

    Magnitudes are ordered over both signs, so that data of one sign lose :data:`TAIL` on that side, and symmetric data
    half of it on each. The ends lie on edges of bins and within the extremes. The percentile is that of the histogram
    calibrators in use since S. Migacz, "8-bit inference with TensorRT" (GTC 2017).
    """
    del grid
    edges = statistics.bin_edges()
    outer = np.maximum(-edges[:-1], edges[1:])  # the end of each bin that is farther from zero
    order = np.argsort(outer, kind="stable")
    mass = np.cumsum(statistics.counts[order])
    kept = int(np.searchsorted(mass, np.ceil(mass[-1] * (1.0 - TAIL))))
    reach = float(outer[order[min(kept, len(order) - 1)]])
    return max(float(statistics.minimum), -reach), min(float(statistics.maximum), reach)


def entropy(statistics: Statistics, grid: Grid) -> tuple[float, float]:
    """Return the range whose quantized distribution tells most of the data's: least Kullback-Leibler divergence.

    The candidates are those of :func:`mse`, both ends shrunk together. For each, the reference ``P`` is the histogram
    with what lies outside counted into the outermost bins inside; ``Q`` spreads the mass that falls on each integer
    of the grid evenly over that integer's bins that have any. The method is that of S. Migacz, "8-bit inference with
    TensorRT" (GTC 2017), for any grid and for ranges that are not symmetric.
    """
    edges = statistics.bin_edges()
    centres, counts = (edges[1:] + edges[:-1]) / 2, statistics.counts.astype(np.float64)
    seen = counts > 0
    centres, counts = centres[seen], counts[seen]
    low, high = min(float(statistics.minimum), 0.0), max(float(statistics.maximum), 0.0)
    shrink = np.arange(128, 15, -1) / 128
    scales, zero_points = scale_zero_point(low * shrink, high * shrink, grid)
    divergences = [
        _divergence(centres, counts, float(scale), int(zero_point), grid)
        for scale, zero_point in zip(scales, zero_points, strict=True)
    ]
    best = float(shrink[int(np.argmin(divergences))])
    return low * best, high * best


def _divergence(
    x: NDArray[np.float64], counts: NDArray[np.float64], scale: float, zero_point: int, grid: Grid
) -> float:
    """Return the divergence, in nats, of the quantized distribution from the clipped one; ``x`` ascends."""
    steps = np.rint(x / scale) + zero_point
    inside = (steps >= grid.qmin) & (steps <= grid.qmax)
    if not inside.any():
        return np.inf
    first, last = np.flatnonzero(inside)[[0, -1]]
    kept = counts[first : last + 1].copy()
    integers = (steps[first : last + 1] - grid.qmin).astype(np.int64)
    size = grid.qmax - grid.qmin + 1
    shared = np.bincount(integers, kept, size) / np.maximum(np.bincount(integers, minlength=size), 1)
    kept[0] += counts[:first].sum()
    kept[-1] += counts[last + 1 :].sum()
    p, q = kept / kept.sum(), shared[integers] / shared[integers].sum()
    return float(np.sum(p * np.log(p / q)))


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


RANGE_METHODS: dict[str, RangeMethod] = {
    "min_max": min_max,
    "moving_average": moving_average,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}
"""The methods of the toolkit itself, by the name that a strategy file gives them."""

DEFAULT_RANGE = "min_max"
"""The method of a layer that names none."""


def range_method_names() -> tuple[str, ...]:
    """Return the names of all methods, those that installed distributions add last."""
    return extensions.names(extensions.RANGES, RANGE_METHODS)


def get_range_method(name: str) -> RangeMethod:
    """Return the method called ``name``.

    Raises:
        KeyError: There is none.
        ExtensionError: The distribution that adds it is broken.
    """
    if name in RANGE_METHODS:
        return RANGE_METHODS[name]
    found, origin = extensions.load(extensions.RANGES, name)
    if not callable(found):
        raise ExtensionError(
            f"The range method {name!r} is {found!r}",
            where=origin,
            expected="a function of dopt_api.quantizer.Statistics and Grid that returns (minimum, maximum)",
            fix="Tell the author of the distribution.",
        )
    method: RangeMethod = found
    return method


def activation_parameters(
    statistics: Statistics, grid: Grid, *, layer: str, method: str = DEFAULT_RANGE, role: str = "input"
) -> tuple[np.float32, int]:
    """Return the scale and zero point of a layer's input or output, from its statistics.

    Args:
        statistics: What calibration saw.
        grid: The grid of the activations.
        layer: The layer's name, for messages.
        method: One of :func:`range_method_names`.
        role: ``input`` or ``output``, for messages.

    Raises:
        CalibrationError: There are no data, or some had NaN, infinity or values too large for a scale; the message
            names the layer.
    """
    statistics.check(layer, role)
    try:
        scale_zero_point(statistics.minimum, statistics.maximum, grid)  # whichever the method: the extremes are usable
        scale, zero_point = scale_zero_point(*get_range_method(method)(statistics, grid), grid)
    except NumbersError as error:
        raise CalibrationError(
            f"The {role} of layer {layer!r} cannot be quantized: {error.what}",
            where=f"layer {layer!r}",
            expected=error.expected,
            fix=error.fix,
        ) from error
    return np.float32(scale), int(zero_point)
