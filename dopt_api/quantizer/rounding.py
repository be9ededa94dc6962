"""Rounding a weight so that a layer's output, and not the weight, has the least error."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dopt_api.errors import NumbersError
from dopt_api.quantizer.grid import Grid

__all__ = ["output_error", "round_weight"]

BLOCK = 64
"""How many columns are rounded before the rest of the weight is told."""


def round_weight(
    weight: ArrayLike, scale: ArrayLike, moments: ArrayLike, grid: Grid, *, damping: float = 0.01
) -> NDArray[np.int32]:
    r"""Return integers for a weight whose error :math:`e` does least to the output: least :math:`e^T M e`.

    :math:`M` is the second moment of what the weight is multiplied with. Column by column, the greatest moment first,
    the weight is rounded to nearest, and the columns that are still to come take over what that changed in the output
    (the second-order update of Frantar et al. 2023, "GPTQ", with the order of columns of that paper's code). An output
    channel for which this comes out worse than rounding to nearest is rounded to nearest.

    Args:
        weight: ``[G, O, K]``: groups, output channels of a group, and what each sums over.
        scale: ``[G, O]``, positive, in the unit of the weight.
        moments: ``[G, K, K]``, symmetric and positive semi-definite.
        grid: The integers; symmetric.
        damping: Added to the diagonal of the moments, as a share of its mean: how little few samples are trusted.

    Returns:
        Integers ``[G, O, K]`` of the grid.

    Raises:
        NumbersError: A number is NaN or infinite, or a scale is not positive.

    Example:
        >>> moments = np.array([[[1.0, 0.9], [0.9, 1.0]]])  # two inputs that are nearly the same
        >>> grid = Grid(8, signed=True, symmetric=True, narrow=True)
        >>> round_weight([[[0.4, 0.4]]], [[1.0]], moments, grid)  # 1 nearly makes up for both; rounding gives 0, 0
        array([[[0, 1]]], dtype=int32)
    """
    w, s, m = (np.asarray(part, np.float64) for part in (weight, scale, moments))
    if not (np.isfinite(w).all() and np.isfinite(m).all() and np.isfinite(s).all() and (s > 0).all()):
        raise NumbersError("A weight, scale or moment is NaN or infinite, or a scale is not positive")
    nearest = np.clip(np.rint(w / s[..., None]), grid.qmin, grid.qmax)
    diagonal = np.diagonal(m, axis1=1, axis2=2)
    mean = diagonal.mean(axis=1, keepdims=True)
    damped = m + np.eye(m.shape[1]) * np.where(mean > 0, damping * mean, 1.0)[..., None]
    order = np.argsort(-diagonal, axis=1, kind="stable")
    along, across = order[:, None, :], order[:, :, None]
    ordered = np.take_along_axis(np.take_along_axis(damped, across, 1), along, 2)
    upper = np.swapaxes(np.linalg.cholesky(np.linalg.inv(ordered)), 1, 2)
    found = np.empty_like(w)
    np.put_along_axis(found, along, _rounded(np.take_along_axis(w, along, 2), s, upper, grid), 2)
    worse = output_error(found * s[..., None] - w, m) > output_error(nearest * s[..., None] - w, m)
    return np.where(worse[..., None], nearest, found).astype(np.int32)


def output_error(error: ArrayLike, moments: ArrayLike) -> NDArray[np.float64]:
    """Return the mean squared error ``[G, O]`` of outputs whose weight is off by ``error`` ``[G, O, K]``."""
    e, m = np.asarray(error, np.float64), np.asarray(moments, np.float64)
    result: NDArray[np.float64] = np.sum((e @ m) * e, axis=2)
    return result


def _rounded(
    weight: NDArray[np.float64], scale: NDArray[np.float64], upper: NDArray[np.float64], grid: Grid
) -> NDArray[np.float64]:
    """Return the integers, column after column; ``upper`` is the factor of the inverse of the moments."""
    rest, integers = weight.copy(), np.empty_like(weight)
    columns = weight.shape[2]
    for start in range(0, columns, BLOCK):
        end = min(columns, start + BLOCK)
        errors = np.empty((*weight.shape[:2], end - start))
        for column in range(start, end):
            values = rest[:, :, column]
            integers[:, :, column] = np.clip(np.rint(values / scale), grid.qmin, grid.qmax)
            error = (values - integers[:, :, column] * scale) / upper[:, column, column][:, None]
            rest[:, :, column:end] -= error[:, :, None] * upper[:, None, column, column:end]
            errors[:, :, column - start] = error
        rest[:, :, end:] -= errors @ upper[:, start:end, end:]
    return integers
