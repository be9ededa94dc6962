"""What a layer of integers computes: exact sums, the arbiter between float simulations and integer kernels.

Products of 8-bit (or 16-bit) data and 8-bit weights are summed in float64, which is exact below ``2**53``: no sum of
fewer than ``2**30`` products of 16 by 8 bits comes near.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["convolution_sums", "matrix_sums"]

Integers = NDArray[np.int64]


def convolution_sums(
    x: NDArray[np.integer],
    weight: NDArray[np.integer],
    *,
    pads: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: int = 1,
) -> Integers:
    """Return the exact sums of a convolution, as ONNX ``Conv`` defines it, without its bias.

    Args:
        x: The input less its zero point, ``[N, C, ...]``.
        weight: ``[O, C / groups, ...]``.
        pads: Zeros before each spatial axis, then those after each.
        strides: Of each spatial axis.
        dilations: Likewise.
        groups: How many groups of channels there are.

    Returns:
        int64 ``[N, O, ...]``.

    Example:
        >>> x, weight = np.arange(5).reshape(1, 1, 5), np.array([[[1, 0, -1]]])
        >>> convolution_sums(x, weight, pads=[0, 0], strides=[1], dilations=[1]).tolist()
        [[[-2, -2, -2]]]
    """
    axes = x.ndim - 2
    around = [(0, 0), (0, 0), *((pads[i], pads[axes + i]) for i in range(axes))]
    padded = np.pad(x.astype(np.float64), around)
    reach = [dilation * (size - 1) + 1 for dilation, size in zip(dilations, weight.shape[2:], strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, tuple(range(2, x.ndim)))
    steps = tuple(slice(None, None, stride) for stride in strides)
    taps = tuple(slice(None, None, dilation) for dilation in dilations)
    every = slice(None)
    index = (every, every, *steps, *taps)
    windows = windows[index]
    batch, channels, *places = windows.shape[: 2 + axes]
    grouped = windows.reshape(batch, groups, channels // groups, int(np.prod(places)), -1)
    rows = grouped.transpose(0, 1, 3, 2, 4).reshape(batch, groups, int(np.prod(places)), -1)
    columns = weight.astype(np.float64).reshape(groups, weight.shape[0] // groups, -1).transpose(0, 2, 1)
    sums: Integers = (rows @ columns).astype(np.int64).transpose(0, 1, 3, 2)
    return sums.reshape(batch, weight.shape[0], *places)


def matrix_sums(x: NDArray[np.integer], weight: NDArray[np.integer]) -> Integers:
    """Return the exact sums of a matrix product ``x @ weight`` of integers, int64.

    Example:
        >>> matrix_sums(np.array([[1, 2]]), np.array([[3], [4]])).tolist()
        [[11]]
    """
    sums: Integers = (x.astype(np.float64) @ weight.astype(np.float64)).astype(np.int64)
    return sums
