r"""Gradients of fake quantization and the quantization loss, as NumPy references.

Straight-through estimator (Bengio et al. 2013, https://arxiv.org/abs/1308.3432): the rounding passes gradients on
where the integer stays on the grid, clipping stops them. Learned step size (LSQ, Esser et al. 2020,
https://arxiv.org/abs/1902.08153, equations 3 to 5): with :math:`v = x / s`, :math:`r` the clipped and rounded
:math:`v` (so :math:`\hat x = r s`) and :math:`m = 1` where :math:`v` rounds to the grid,

.. math:: \partial \hat x / \partial x = m, \qquad \partial \hat x / \partial s = r - m v

and the gradient of the scale is multiplied by :math:`1 / \sqrt{n\, q_{max}}`, with :math:`n` the number of values in
the batch (or in one weight channel) that share the scale, and limited to a tenth of the scale. ``m`` is 1 for
``qmin - zero_point - 0.5 <= v <= qmax - zero_point + 0.5``, compared in float32.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dopt_api.quantizer.affine import broadcast, fake_quantize
from dopt_api.quantizer.grid import Grid

__all__ = [
    "SCALE_GRADIENT_LIMIT",
    "fake_quantize_gradients",
    "limit_scale_gradient",
    "relative_squared_error",
    "scale_gradient_factor",
]

SCALE_GRADIENT_LIMIT = 0.1
"""The greatest magnitude of a scale's gradient, in multiples of the scale."""


def scale_gradient_factor(n: int, grid: Grid) -> float:
    r"""Return LSQ's factor for the gradient of a scale, :math:`1 / \sqrt{n\, q_{max}}`.

    Args:
        n: Number of values in the batch, or in one weight channel, that share the scale.
        grid: The integer grid.
    """
    return 1.0 / sqrt(max(n, 1) * grid.qmax)


def limit_scale_gradient(gradient: ArrayLike, scale: ArrayLike) -> NDArray[np.float64]:
    """Return a scale's gradient, limited to :data:`SCALE_GRADIENT_LIMIT` times the scale.

    Where a range is far too small for its data, as after calibration with other running statistics than those of
    training, clipped values make the gradient so large that one step would carry the scale through zero, from where
    it does not come back. In ordinary training the limit is out of reach.

    Example:
        >>> limit_scale_gradient([3.0, -0.001], [0.5, 0.5]).tolist()
        [0.05, -0.001]
    """
    limit = np.asarray(scale, np.float64) * SCALE_GRADIENT_LIMIT
    return np.asarray(np.clip(np.asarray(gradient, np.float64), -limit, limit))


def fake_quantize_gradients(
    upstream: ArrayLike,
    x: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike,
    grid: Grid,
    *,
    axis: int | None = None,
    factor: float = 1.0,
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return the gradients of a loss with respect to ``x`` and to the scale.

    Args:
        upstream: Gradient of the loss with respect to the fake-quantized data, the shape of ``x``.
        x: The data.
        scale: ``[]`` or ``[C]`` with ``axis``.
        zero_point: Integers of the same shape.
        grid: The integer grid.
        axis: The channel axis, or ``None``.
        factor: Factor of the scale's gradient, see :func:`scale_gradient_factor`.

    Returns:
        Gradient of ``x`` (float32, its shape) and of the scale (float64, its shape).

    Example:
        >>> gx, gs = fake_quantize_gradients([1.0, 1.0], [0.6, 9.0], 1.0, 0, Grid(2))
        >>> gx.tolist(), round(float(gs), 6)
        ([1.0, 0.0], 3.4)
    """
    data, dy = np.asarray(x, np.float32), np.asarray(upstream, np.float32)
    scales = broadcast(np.asarray(scale, np.float32), data.ndim, axis)
    shift = broadcast(np.asarray(zero_point, np.float32), data.ndim, axis)
    with np.errstate(over="ignore"):
        v = data / scales
    low, high = np.float32(grid.qmin) - shift, np.float32(grid.qmax) - shift
    inside = (v >= low - np.float32(0.5)) & (v <= high + np.float32(0.5))
    slope = np.clip(np.rint(v), low, high).astype(np.float64) - np.where(inside, v, np.float32(0.0))
    others = None if axis is None else tuple(i for i in range(data.ndim) if i != axis % data.ndim)
    return np.where(inside, dy, np.float32(0.0)), np.asarray((dy * slope).sum(axis=others) * factor)


def relative_squared_error(
    x: ArrayLike, scale: ArrayLike, zero_point: ArrayLike, grid: Grid, *, axis: int | None = None
) -> float:
    r"""Return :math:`\sum (\hat x - x)^2 / \sum x^2`, dimensionless; 0 where ``x`` is all zero.

    The quantization loss of a model is the mean over its quantized layers of the sum of this for the layer's weight
    and for the probed elements of its input.
    """
    data = np.asarray(x, np.float64)
    error = fake_quantize(x, scale, zero_point, grid, axis=axis).astype(np.float64) - data
    energy = float((data**2).sum())
    return float((error**2).sum()) / energy if energy else 0.0
