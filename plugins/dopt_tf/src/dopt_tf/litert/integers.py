"""The integers of constants that lie on a grid."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dopt_api.params import TensorParams
from dopt_api.quantizer import Grid, quantize

__all__ = ["bias_integers", "weight_integers"]

OFF_GRID = 1e-3
"""How far a weight may be from its grid, in steps, before it is taken for that of another model."""


def weight_integers(values: NDArray[Any], part: TensorParams, axis: int | None) -> NDArray[np.int8] | None:
    """Return the integers of a weight; ``None`` if it does not lie on its grid.

    Args:
        values: The weight as it stands in the model, float32.
        part: Its scales, and zero points that belong to unsigned integers where the type is so.
        axis: The axis of ``values`` that has the scales; ``None`` with one scale for all.

    Returns:
        The shape of ``values``; of unsigned integers, 128 less.

    Example:
        >>> part = TensorParams("w", "int8", 8, (0.5,), (0,), None)
        >>> weight_integers(np.array([[-1.0, 0.5]], np.float32), part, None).tolist()
        [[-2, 1]]
    """
    if len(part.scale) != (1 if axis is None else values.shape[axis]):
        return None
    signed = not part.dtype.startswith("u")
    grid = Grid(part.bits, signed=signed, narrow=signed)
    scale, zero_point = np.asarray(part.scale, np.float32), np.asarray(part.zero_point, np.int32)
    if axis is None:
        scale, zero_point = scale[0], zero_point[0]
    found = quantize(values, scale, zero_point, grid, axis=axis)
    shape = [-1 if place == axis else 1 for place in range(values.ndim)] if axis is not None else []
    steps = values.astype(np.float64) / scale.astype(np.float64).reshape(shape) + zero_point.reshape(shape)
    if np.abs(steps - found).max(initial=0) > OFF_GRID:
        return None
    return (found if signed else found - 128).astype(np.int8)


def bias_integers(
    values: NDArray[Any], scale: NDArray[np.float32], greatest_sum: NDArray[np.int64]
) -> NDArray[np.int32] | None:
    """Return the integers of a bias; ``None`` if they do not fit int32.

    Kernels add it to the sums in int32 and overflow silently. A channel whose weights are next to nothing can have a
    bias that nearly fills int32; it gives way by what the sums can be, which is little beside it.

    Args:
        values: The bias, ``[C]``.
        scale: Its scales, ``[C]``.
        greatest_sum: How great the magnitude of the sum of each channel can be, ``[C]``.

    Example:
        >>> bias, scale = np.array([1.0, -2.0], np.float32), np.array([0.5, 2.0**-30], np.float32)
        >>> bias_integers(bias, scale, np.array([100, 100])).tolist()
        [2, -2147483547]
    """
    found = np.rint(values.astype(np.float64) / scale.astype(np.float64))
    limit = np.iinfo(np.int32).max
    if np.abs(found).max(initial=0) > limit + 1 or greatest_sum.max(initial=0) > limit // 2:
        return None
    return np.clip(found, greatest_sum - limit, limit - greatest_sum).astype(np.int32)
