"""The TensorFlow twin of :class:`dopt_api.quantizer.Statistics`: the same parts, kept in variables of the graph.

Each batch costs two reductions over the activations, one where they come from a rectifier, and a few operations on the
probed elements; nothing is copied to Python, and memory does not grow with the number of batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from dopt_api.quantizer import Statistics, lattice
from dopt_api.quantizer.statistics import BINS, HALF_BINS, LIMB_BITS, LIMB_UNITS, LOWEST_EXPONENT, PROBED

__all__ = ["DeviceStatistics", "arrangement", "merge", "probe", "rectified"]

_RECTIFIERS = frozenset({"Relu", "Relu6"})
_KEEP_SIGNS = frozenset({"Identity", "MaxPool", "Reshape", "Squeeze"})


class DeviceStatistics:
    """Statistics of one activation as variables.

    Attributes:
        parts: The parts of :class:`dopt_api.quantizer.Statistics` by name, same shapes and dtypes.
    """

    def __init__(self) -> None:
        """Make the variables, in the name scope that is open."""
        self.parts = {
            name: tf.compat.v1.Variable(part, name=f"statistics/{name}", trainable=False, use_resource=True)
            for name, part in Statistics().arrays().items()
        }

    @staticmethod
    def to_core(values: Mapping[str, NDArray[np.generic]]) -> Statistics:
        """Return the core's statistics from the values of the parts."""
        return Statistics.from_arrays(values)


def rectified(x: tf.Tensor) -> bool:
    """Return whether a tensor is known to have no negative element, since a rectifier made it."""
    op = x.op
    while op.type in _KEEP_SIGNS:
        op = op.inputs[0].op
    return op.type in _RECTIFIERS


def merge(
    own: Mapping[str, tf.Tensor], x: tf.Tensor, positions: tf.Tensor, not_negative: tf.Tensor | bool = False
) -> dict[str, tf.Tensor]:
    """Return the parts of statistics that have taken in a batch, as the core does, to the bit.

    Args:
        own: The parts before.
        x: The batch in the shape ``[N, before, inner, after]`` of :func:`arrangement`.
        positions: Which of the inner positions the histogram looks at.
        not_negative: Whether the batch is known to have no negative element.
    """
    probed = tf.gather(x, positions, axis=2)
    low, high = _extremes(x, probed, not_negative)
    finite = tf.math.is_finite(low) & tf.math.is_finite(high)
    kept = tf.where(finite, tf.stack([low, high]), 0.0)
    peak = tf.reduce_max(tf.maximum(-kept[0], kept[1]))
    exponent = tf.maximum(_exponent(tf.maximum(peak, 2.0 ** (LOWEST_EXPONENT - 1))), own["exponent"])
    probed = tf.cond(tf.reduce_all(finite), lambda: probed, lambda: tf.boolean_mask(probed, finite))
    bins = tf.cast(tf.cast(probed, tf.float32) * _power_of_two(11 - exponent, tf.float32), tf.int32)
    counts = tf.raw_ops.Bincount(
        arr=tf.reshape(bins, [-1]) + (HALF_BINS - 1), size=BINS, weights=tf.zeros([0], tf.int64)
    )
    count = tf.reduce_sum(tf.cast(finite, tf.int64))
    infinite = tf.constant(np.inf, tf.float32)
    return {
        "samples": own["samples"] + count,
        "non_finite": own["non_finite"] + tf.shape(finite, tf.int64)[0] - count,
        # adding 0 makes -0.0 into 0.0
        "minimum": tf.minimum(own["minimum"], tf.reduce_min(tf.where(finite, low, infinite))) + 0.0,
        "maximum": tf.maximum(own["maximum"], tf.reduce_max(tf.where(finite, high, -infinite))) + 0.0,
        "sums": own["sums"] + _limbs(kept),
        "exponent": exponent,
        "counts": _coarsen(own["counts"], exponent - own["exponent"]) + counts,
    }


def probe(x: tf.Tensor, channel_axis: int) -> tf.Tensor:
    """Return the elements of a batch that :func:`dopt_api.quantizer.lattice` chooses, ``[N, before, P, after]``."""
    shape, positions = arrangement(x, channel_axis)
    return tf.gather(tf.reshape(x, shape), positions, axis=2)


def arrangement(x: tf.Tensor, channel_axis: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Return how a batch stands with its inner axes as one, and which of their positions are probed.

    Gathering positions copies all channels of one at once where channels are last. Shapes may be open.

    Args:
        x: The batch, samples first.
        channel_axis: 1 or the last.

    Returns:
        The shape ``[-1, before, inner, after]``, where one of ``before`` and ``after`` is the channels and the other 1,
        and the positions ``[P]``; both int32.
    """
    sizes = x.shape.as_list()
    channels = channel_axis % len(sizes)
    inner = [axis for axis in range(1, len(sizes)) if axis != channels]
    shape = tf.shape(x)
    size = shape[channels] if sizes[channels] is None else sizes[channels]
    if not inner:
        count, positions = 1, np.zeros(1, np.int32)
    elif None in sizes[1:]:
        count, positions = tf.reduce_prod(tf.gather(shape, inner)), _open_positions(shape, channels, inner)
    else:
        chosen = lattice((1, *sizes[1:]), channels)
        numbers = np.arange(prod(sizes[axis] for axis in inner), dtype=np.int32)
        positions = numbers.reshape([sizes[axis] for axis in inner])[tuple(chosen[axis] for axis in inner)].ravel()
        count = numbers.size
    return tf.stack([-1, size, count, 1] if channels == 1 else [-1, 1, count, size]), tf.convert_to_tensor(positions)


def _open_positions(shape: tf.Tensor, channels: int, inner: list[int]) -> tf.Tensor:
    """Return the positions where sizes are known in a step only."""
    allowed = tf.maximum(1, PROBED // tf.maximum(1, shape[channels]))
    sizes = tf.gather(shape, inner)
    strides = tf.range(1, tf.reduce_max(sizes) + 2)[:, tf.newaxis]
    starts = tf.where(strides > 1, tf.minimum(strides // 2, sizes - 1), 0)
    counts = -((starts - sizes) // strides)
    fitting = tf.reduce_prod(tf.cast(counts, tf.int64), 1) <= tf.cast(allowed, tf.int64)
    least = tf.argmax(tf.cast(fitting, tf.int32))
    stride, start = strides[least, 0], starts[least]
    positions = tf.zeros([1], tf.int32)
    for i in range(len(inner)):
        positions = tf.reshape(positions[:, tf.newaxis] * sizes[i] + tf.range(start[i], sizes[i], stride), [-1])
    return positions


def _extremes(x: tf.Tensor, probed: tf.Tensor, not_negative: tf.Tensor | bool) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the least and the greatest value of each sample, float32 ``[N]``.

    Where nothing is negative, a sample with a zero among its probed elements need not be searched for its least one.
    """
    shape = tf.shape(x)
    rows = tf.reshape(x, tf.stack([shape[0], tf.reduce_prod(shape[1:])]))
    with_zero = tf.reduce_any(tf.equal(probed, tf.zeros([], x.dtype)), [1, 2, 3])
    high = tf.reduce_max(rows, 1)
    low = tf.cond(
        not_negative & tf.reduce_all(with_zero), lambda: tf.minimum(high, 0), lambda: tf.reduce_min(rows, 1)
    )  # the minimum with zero hands on NaN
    return tf.cast(low, tf.float32), tf.cast(high, tf.float32)


def _exponent(x: tf.Tensor) -> tf.Tensor:
    """Return ``e`` with ``2**(e - 1) <= x < 2**e`` for a normal positive float32, int64."""
    return tf.cast(tf.bitcast(x, tf.int32) // 2**23, tf.int64) - 126


def _power_of_two(exponent: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Return ``2**exponent`` exactly, for exponents of normal numbers (int64)."""
    if dtype == tf.float32:
        return tf.bitcast(tf.cast(exponent + 127, tf.int32) * 2**23, tf.float32)
    return tf.bitcast((exponent + 1023) * 2**52, tf.float64)


def _coarsen(counts: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
    """Return the histogram with bins ``2**shift`` times as wide."""
    bins = tf.constant(np.arange(1 - HALF_BINS, HALF_BINS), tf.float64)
    coarse = tf.cast(bins * _power_of_two(-shift, tf.float64), tf.int32) + (HALF_BINS - 1)
    return tf.math.unsorted_segment_sum(counts, coarse, BINS)


def _limbs(values: tf.Tensor) -> tf.Tensor:
    """Return the exact sums over the last axis as limbs: ``[2, N]`` float32 to ``[2, 9]`` int64."""
    units = tf.floor(tf.cast(values, tf.float64)[..., tf.newaxis] / tf.constant(LIMB_UNITS))
    higher = tf.concat([units[..., 1:], tf.zeros_like(units[..., :1])], -1)
    return tf.reduce_sum(tf.cast(units - higher * 2.0**LIMB_BITS, tf.int64), -2)
