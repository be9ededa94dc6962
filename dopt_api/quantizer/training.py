r"""Learned scales, gradients of fake quantization and the quantization loss, as NumPy references.

Straight-through estimator (Bengio et al. 2013, https://arxiv.org/abs/1308.3432): the rounding passes gradients on
where the integer stays on the grid, clipping stops them. The derivative with respect to the scale is that of LSQ (Esser
et al. 2020, https://arxiv.org/abs/1902.08153, equation 3): with :math:`v = x / s`, :math:`r` the clipped and rounded
:math:`v` (so :math:`\hat x = r s`) and :math:`m = 1` where :math:`v` rounds to the grid,

.. math:: \partial \hat x / \partial x = m, \qquad \partial \hat x / \partial s = r - m v

``m`` is 1 for ``qmin - zero_point - 0.5 <= v <= qmax - zero_point + 0.5``, compared in float32. What is learned is not
the scale but a :func:`gain <learned_scale>` on it, so that steps are relative to the scale.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dopt_api.quantizer.affine import SMALLEST_SCALE, broadcast, fake_quantize
from dopt_api.quantizer.grid import Grid

__all__ = ["fake_quantize_gradients", "gain_gradient", "gain_of", "learned_scale", "relative_squared_error"]


def learned_scale(scale: ArrayLike, gain: ArrayLike) -> NDArray[np.float32]:
    r"""Return the scale in use: the one that was chosen from data, times what training has made of it.

    .. math:: s' = s\,(1 + g) \quad (g \ge 0), \qquad s' = s / (1 - g) \quad (g < 0)

    The multiplier is 1 at ``g = 0``, positive everywhere and smooth, with slope 1 at 0. An optimizer's step is thus
    relative to the scale, as in training logarithms of thresholds (Jain et al. 2020,
    https://arxiv.org/abs/1903.08066), and none can make a scale negative; weight decay draws it to the calibrated one.
    Sum, quotient and product are rounded exactly alike in every framework, as an exponential is not.

    Args:
        scale: As chosen from statistics or from the weight's extremes, ``[]`` or ``[C]``.
        gain: What is learned, starting at 0, of the same shape.

    Returns:
        Float32 of that shape, at least :data:`~dopt_api.quantizer.SMALLEST_SCALE`.

    Example:
        >>> learned_scale([0.5, 0.5, 0.5], [0.0, 1.0, -1.0]).tolist()
        [0.5, 1.0, 0.25]
    """
    base, g, one = np.asarray(scale, np.float32), np.asarray(gain, np.float32), np.float32(1.0)
    multiplier = np.where(g < 0, one / (one - np.minimum(g, np.float32(0.0))), one + g)
    return np.asarray(np.maximum(base * multiplier, np.float32(SMALLEST_SCALE)), np.float32)


def gain_of(ratio: ArrayLike) -> NDArray[np.float64]:
    """Return the gain that makes :func:`learned_scale` multiply a scale by a positive ratio.

    Example:
        >>> gain_of([2.0, 1.0, 0.5]).tolist()
        [1.0, 0.0, -1.0]
    """
    r = np.asarray(ratio, np.float64)
    return np.where(r >= 1.0, r - 1.0, 1.0 - 1.0 / r)


def gain_gradient(scale_gradient: ArrayLike, scale: ArrayLike, gain: ArrayLike) -> NDArray[np.float64]:
    r"""Return the gradient of a gain from that of the scale in use.

    .. math:: \partial s' / \partial g = s \;\; (g \ge 0), \qquad \partial s' / \partial g = s / (1 - g)^2 \;\; (g < 0)

    Args:
        scale_gradient: The loss's gradient with respect to the scale in use, ``[]`` or ``[C]``.
        scale: The scale without its gain, of the same shape.
        gain: What is learned, of the same shape.

    Example:
        >>> gain_gradient([3.0, 3.0], [0.5, 0.5], [0.0, -1.0]).tolist()
        [1.5, 0.375]
    """
    g = np.minimum(np.asarray(gain, np.float64), 0.0)
    return np.asarray(scale_gradient, np.float64) * np.asarray(scale, np.float64) / (1.0 - g) ** 2


def fake_quantize_gradients(
    upstream: ArrayLike,
    x: ArrayLike,
    scale: ArrayLike,
    zero_point: ArrayLike,
    grid: Grid,
    *,
    axis: int | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return the gradients of a loss with respect to ``x`` and to the scale.

    Args:
        upstream: Gradient of the loss with respect to the fake-quantized data, the shape of ``x``.
        x: The data.
        scale: ``[]`` or ``[C]`` with ``axis``.
        zero_point: Integers of the same shape.
        grid: The integer grid.
        axis: The channel axis, or ``None``.

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
    return np.where(inside, dy, np.float32(0.0)), np.asarray((dy * slope).sum(axis=others))


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
