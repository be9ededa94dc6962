"""Sums of two products in 16 bits, as kernels for processors with AVX2 and without VNNI form them.

Their instruction ``vpmaddubsw`` multiplies unsigned 8-bit data with signed 8-bit weights and adds neighbouring products
in 16 bits, with saturation (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2). Two weights of one
sign whose sum is beyond 128 can so give a wrong sum: ``255 * 129 > 2 ** 15 - 1``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["PAIR_LIMIT", "overflowing", "partners", "within_pairs"]

PAIR_LIMIT = 128
"""The greatest sum of two weights whose products with 255 do not overflow 16 bits: ``255 * 128 < 2 ** 15``."""


def partners(groups: int, outputs: int, channels: int, taps: int, *, channels_last: bool) -> NDArray[np.intp] | None:
    """Return the weight that each weight of an output channel is paired with; itself where there is none.

    Kernels sum over the taps of a window and, within each, over the channels; neighbours in that order are paired. For
    one input and one output channel a group (depthwise), kernels sum each product in more bits: ``None``.

    Args:
        groups: Of the layer; 1 for matrix products.
        outputs: Output channels of a group.
        channels: Input channels of a group.
        taps: Places of the window; 1 for matrix products.
        channels_last: Whether weights are counted as the kernels do; otherwise channel by channel.

    Returns:
        Indices ``[channels * taps]``.

    Example:
        >>> partners(1, 8, 2, 3, channels_last=False).tolist()
        [3, 4, 5, 0, 1, 2]
    """
    if groups > 1 and outputs == 1 and channels == 1:
        return None
    place = np.arange(channels * taps)
    other = np.where((place ^ 1) < place.size, place ^ 1, place)
    if channels_last:
        return other
    tap, channel = np.divmod(place, channels)  # of each place in the kernels' order
    index = channel * taps + tap
    found = np.empty_like(other)
    found[index] = index[other]
    return found


def overflowing(integers: ArrayLike, pairs: ArrayLike) -> NDArray[np.bool_]:
    """Return which rows of integers ``[..., K]`` have a pair that can overflow, shape ``[...]``.

    Example:
        >>> overflowing([[100, 28], [100, 29], [100, -100]], [1, 0])
        array([False,  True, False])
    """
    q = np.asarray(integers)
    return np.asarray((_excess(q, np.asarray(pairs)) > 0).any(axis=-1))


def within_pairs(integers: ArrayLike, pairs: ArrayLike) -> NDArray[np.float64]:
    """Return integers ``[..., K]`` of -128 to 127 whose pairs cannot overflow: what is too much is taken off evenly.

    Example:
        >>> within_pairs([100, 31, -100], [1, 0, 2])
        array([  98.,   30., -100.])
    """
    q, other = np.asarray(integers, np.float64), np.asarray(pairs)
    half = _excess(q, other) / 2
    first = np.arange(other.size) < other
    result: NDArray[np.float64] = q - np.sign(q) * np.where(first, np.ceil(half), np.floor(half))
    return result


def _excess(q: NDArray[np.generic], pairs: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return by how much each weight and its partner, if of one sign, sum up to too much."""
    signed = np.asarray(q, np.float64)
    other = np.where(pairs == np.arange(pairs.size), 0.0, signed[..., pairs])
    alike = signed * other > 0
    return np.where(alike, np.maximum(np.abs(signed + other) - PAIR_LIMIT, 0.0), 0.0)
