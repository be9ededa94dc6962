r"""Affine quantization, the reference that every backend is held to.

.. math:: q = \mathrm{clip}(\mathrm{rint}(x / s) + z, q_{min}, q_{max}), \qquad \hat x = (q - z)\, s

The division, the rounding (half to even) and the product are float32. This is ONNX ``QuantizeLinear`` and
``DequantizeLinear`` (https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html) to the bit.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dopt_api.errors import NumbersError
from dopt_api.quantizer.grid import Grid

__all__ = [
    "LARGEST_END",
    "SMALLEST_SCALE",
    "as_float32",
    "broadcast",
    "channel_maximum",
    "dequantize",
    "extremes",
    "fake_quantize",
    "quantize",
    "scale_zero_point",
]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
_Kind = TypeVar("_Kind", bound=np.generic)

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)
"""The smallest scale that is ever chosen: the smallest normal float32, about 1.18e-38."""

LARGEST_END = float(np.finfo(np.float32).max) / 2
"""The greatest magnitude of an end of a range: half the largest float32, so that every value of the grid is finite."""


def scale_zero_point(minimum: ArrayLike, maximum: ArrayLike, grid: Grid) -> tuple[Float32, Int32]:
    r"""Return the scale and zero point of a range.

    The range is widened to contain 0, and to ``[-a, a]`` if the grid is symmetric. The scale is
    ``(max - min) / (qmax - qmin)`` in float64, rounded once to float32; the zero point is
    ``rint(qmin - min / scale)``, clipped to the grid (0 if symmetric). A range of no width gets scale 1.
    Scales below the smallest normal float32 are raised to it.

    Args:
        minimum: Lower ends, shape ``[]`` (per tensor) or ``[C]`` (per channel), in units of the data.
        maximum: Upper ends, same shape.
        grid: The integer grid.

    Returns:
        Scale, float32, and zero point, int32, both of the shape of the range.

    Raises:
        NumbersError: An end is NaN, infinite or beyond :data:`LARGEST_END`, or a minimum is above its maximum.

    Example:
        >>> scale, zero_point = scale_zero_point(-1.0, 3.0, Grid(8))
        >>> float(scale), int(zero_point)
        (0.01568627543747425, 64)
    """
    low, high = np.asarray(minimum, np.float64), np.asarray(maximum, np.float64)
    if (wrong := ~(np.isfinite(low) & np.isfinite(high))).any():
        raise NumbersError(
            f"The range {_first(wrong, low, high)} is not finite",
            expected="finite numbers",
            fix="Look for NaN and infinity in the data or the weights.",
        )
    if (wrong := np.maximum(np.abs(low), np.abs(high)) > LARGEST_END).any():
        raise NumbersError(
            f"The range {_first(wrong, low, high)} is too wide for float32",
            expected=f"magnitudes of at most {LARGEST_END:.3g}",
            fix="Look for a value that overflows in the data or the weights.",
        )
    if (wrong := low > high).any():
        raise NumbersError(f"The range {_first(wrong, low, high)} is empty", expected="minimum <= maximum")
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    if grid.symmetric:
        high = np.maximum(-low, high)
        low = -high
    width = high - low
    scale = (width / (grid.qmax - grid.qmin)).astype(np.float32)
    scale = np.where(width == 0.0, np.float32(1.0), np.maximum(scale, np.float32(SMALLEST_SCALE)))
    if grid.symmetric:
        return scale, np.zeros(scale.shape, np.int32)
    zero_point = np.clip(np.rint(grid.qmin - low / scale.astype(np.float64)), grid.qmin, grid.qmax)
    return scale, zero_point.astype(np.int32)


def quantize(x: ArrayLike, scale: ArrayLike, zero_point: ArrayLike, grid: Grid, *, axis: int | None = None) -> Int32:
    """Return the integers of ``x``: ``clip(rint(x / scale) + zero_point, qmin, qmax)`` in float32.

    Args:
        x: Data of any shape; taken as float32. Infinities saturate.
        scale: Positive, shape ``[]``, or ``[C]`` together with ``axis``.
        zero_point: Integers of the same shape.
        grid: The integer grid.
        axis: The axis of ``x`` that has the ``C`` channels; ``None`` for one scale per tensor.

    Returns:
        int32 array of the shape of ``x``, within the grid.

    Raises:
        NumbersError: ``x`` has NaN, or a scale is not positive and finite.

    Example:
        >>> quantize([-1.0, 0.5, 1.5, 9.0], 1.0, 0, Grid(2, signed=True)).tolist()
        [-1, 0, 1, 1]
    """
    data = as_float32(x)
    if np.isnan(data).any():
        raise NumbersError("The data to quantize has NaN", expected="numbers or infinities")
    with np.errstate(over="ignore"):  # a quotient beyond float32 saturates, which is right
        rounded = np.rint(data / _scales(scale, data.ndim, axis))
    shift = broadcast(np.asarray(zero_point, np.float32), data.ndim, axis)
    clipped: Float32 = np.clip(rounded + shift, np.float32(grid.qmin), np.float32(grid.qmax))
    return clipped.astype(np.int32)


def dequantize(q: ArrayLike, scale: ArrayLike, zero_point: ArrayLike, *, axis: int | None = None) -> Float32:
    """Return ``(q - zero_point) * scale`` in float32, the shape of ``q``.

    Example:
        >>> dequantize([0, 255], 0.5, 128).tolist()
        [-64.0, 63.5]
    """
    integers = np.asarray(q, np.int32)
    centred = integers - broadcast(np.asarray(zero_point, np.int32), integers.ndim, axis)
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(centred.astype(np.float32) * _scales(scale, integers.ndim, axis))


def fake_quantize(
    x: ArrayLike, scale: ArrayLike, zero_point: ArrayLike, grid: Grid, *, axis: int | None = None
) -> Float32:
    """Return ``dequantize(quantize(x))``: the nearest value of the grid, as float32."""
    return dequantize(quantize(x, scale, zero_point, grid, axis=axis), scale, zero_point, axis=axis)


def extremes(weight: ArrayLike, axis: int | None) -> tuple[Float32, Float32]:
    """Return the least and the greatest value of each channel, ``[C]`` (or ``[]`` without an axis), float32; 0 of none.

    Example:
        >>> [part.tolist() for part in extremes([[1.0, -2.0], [0.5, 0.0]], axis=0)]
        [[-2.0, 0.0], [1.0, 0.5]]
    """
    data = np.asarray(weight, np.float32)
    others = None if axis is None else tuple(i for i in range(data.ndim) if i != axis % data.ndim)
    low, high = data.min(axis=others, initial=np.inf), data.max(axis=others, initial=-np.inf)
    empty = low > high
    return np.where(empty, np.float32(0.0), low), np.where(empty, np.float32(0.0), high)


def channel_maximum(weight: ArrayLike, axis: int | None) -> Float32:
    """Return the greatest magnitude of each channel, shape ``[C]`` (or ``[]`` without an axis), float32.

    Example:
        >>> channel_maximum([[1.0, -2.0], [0.5, 0.0]], axis=0).tolist()
        [2.0, 0.5]
    """
    low, high = extremes(weight, axis)
    return np.asarray(np.maximum(-low, high), np.float32)


def as_float32(values: ArrayLike) -> Float32:
    """Return ``values`` as float32; what lies beyond float32 becomes infinite, without a warning."""
    with np.errstate(over="ignore"):
        return np.asarray(values, np.float32)


def broadcast(values: NDArray[_Kind], ndim: int, axis: int | None) -> NDArray[_Kind]:
    """Reshape per-channel values ``[C]`` to stand on ``axis`` of an array of ``ndim`` dimensions."""
    if axis is None:
        return values
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def _scales(scale: ArrayLike, ndim: int, axis: int | None) -> Float32:
    scales = as_float32(scale)
    if (wrong := ~(np.isfinite(scales) & (scales > 0.0))).any():
        raise NumbersError(f"The scale {scales[wrong][0]:g} cannot be used", expected="positive finite numbers")
    return broadcast(scales, ndim, axis)


def _first(wrong: NDArray[np.bool_], low: NDArray[np.float64], high: NDArray[np.float64]) -> str:
    """Show the first of the ranges that is wrong, with its channel where there are several."""
    channel = f" of channel {int(np.flatnonzero(wrong)[0])}" if wrong.ndim else ""
    return f"[{low[wrong][0]:g}, {high[wrong][0]:g}]{channel}"
