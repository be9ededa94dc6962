"""Smoothing: moving outliers from channels of an activation into the weight that it is multiplied with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dopt_api.quantizer.affine import as_float32

__all__ = ["EXPONENTS", "smoothing_factors"]

EXPONENTS = 16
"""A factor lies between ``2**-16`` and ``2**16``: far from overflow, and wider than any outlier seen."""


def smoothing_factors(inputs: ArrayLike, weights: ArrayLike, strength: float = 0.75) -> NDArray[np.float32]:
    r"""Return by what the channels of a layer's input are multiplied; its weight is divided by the same.

    One scale serves all channels of an activation, so that a channel of outliers takes the grid from all others. With
    :math:`a_j` the greatest magnitude of channel j and :math:`w_j` that of the weights it is multiplied with, channels
    are divided by :math:`s_j = a_j^\alpha / w_j^{1-\alpha}` (Xiao et al. 2022, "SmoothQuant", equation 4). The
    factors :math:`1 / s_j` are rounded to powers of two and centred about 1, so that a float network with them computes
    the same to the bit (as long as nothing leaves float32's range of normal numbers).

    Args:
        inputs: Greatest magnitudes of the input's channels, ``[C]``, from data.
        weights: Those of the weights that each is multiplied with, ``[C]``.
        strength: :math:`\alpha`, 0 to 1: how much of the outliers goes over to the weight.

    Returns:
        Powers of two, float32 ``[C]``; 1 for channels that are 0 in the data or in the weight.

    Raises:
        ValueError: The shapes differ, a number is negative or not finite, or the strength is not between 0 and 1.

    Example:
        >>> smoothing_factors([8.0, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0], strength=1.0).tolist()
        [0.125, 2.0, 2.0, 2.0]
    """
    a, w = (np.asarray(part, dtype=np.float64) for part in (inputs, weights))
    if a.shape != w.shape or a.ndim != 1:
        raise ValueError(f"The shapes {a.shape} and {w.shape} are not one and the same [C]")
    if not all((np.isfinite(part) & (part >= 0.0)).all() for part in (a, w)):
        raise ValueError("A magnitude is negative, NaN or infinite")
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"The strength is {strength!r}; a number from 0 to 1 was expected, such as 0.75")
    exponents: NDArray[Any] = np.zeros(a.size)
    live = (a > 0.0) & (w > 0.0)
    if live.any():
        wanted = (1.0 - strength) * np.log2(w[live]) - strength * np.log2(a[live])
        exponents[live] = np.clip(np.rint(wanted) - np.rint(wanted.mean()), -EXPONENTS, EXPONENTS)
    return as_float32(np.exp2(exponents))
