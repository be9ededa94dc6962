"""The TensorFlow twin of :class:`dopt_api.quantizer.Statistics`: the same parts, kept in variables of the graph.

Each batch costs two reductions over the activations and a few operations on the probed elements; nothing is copied to
Python, and memory does not grow with the number of batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from dopt_api.quantizer import Statistics, lattice
from dopt_api.quantizer.statistics import BINS, HALF_BINS, LIMB_BITS, LIMB_UNITS, LOWEST_EXPONENT, PROBED

__all__ = ["DeviceStatistics", "probe"]


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

    def read(self) -> dict[str, tf.Tensor]:
        """Return the parts as they are when the tensors are computed."""
        return {name: variable.read_value() for name, variable in self.parts.items()}

    def update(self, x: tf.Tensor, channel_axis: int) -> tf.Operation:
        """Return the operation that takes in a batch ``[N, ...]``, samples first, as the core does, to the bit."""
        own = self.read()
        low, high = _extremes(x)
        finite = tf.math.is_finite(low) & tf.math.is_finite(high)
        count = tf.reduce_sum(tf.cast(finite, tf.int64))
        kept = tf.where(finite, tf.stack([low, high]), 0.0)
        peak = tf.reduce_max(tf.maximum(-kept[0], kept[1]))
        exponent = _exponent(tf.maximum(peak, 2.0 ** (LOWEST_EXPONENT - 1)))
        exponent = tf.maximum(exponent, own["exponent"])
        total = tf.shape(finite, tf.int64)[0]
        # samples that are left out get bin -1, which is cut off
        probed = tf.cast(tf.reshape(probe(x, channel_axis), tf.stack([total, -1])), tf.float32)
        probed = tf.where(finite[:, tf.newaxis], probed, 0.0)
        bins = tf.cast(probed * _power_of_two(11 - exponent, tf.float32), tf.int32) + HALF_BINS
        bins = tf.where(finite[:, tf.newaxis], bins, 0)
        new = tf.raw_ops.Bincount(arr=tf.reshape(bins, [-1]), size=BINS + 1, weights=tf.zeros([0], tf.int64))[1:]
        infinite = tf.constant(np.inf, tf.float32)
        merged = {
            "samples": own["samples"] + count,
            "non_finite": own["non_finite"] + total - count,
            # adding 0 makes -0.0 into 0.0
            "minimum": tf.minimum(own["minimum"], tf.reduce_min(tf.where(finite, low, infinite))) + 0.0,
            "maximum": tf.maximum(own["maximum"], tf.reduce_max(tf.where(finite, high, -infinite))) + 0.0,
            "sums": own["sums"] + _limbs(kept),
            "exponent": exponent,
            "counts": _coarsen(own["counts"], exponent - own["exponent"]) + new,
        }
        with tf.control_dependencies(list(merged.values())):
            return tf.group(*(self.parts[name].assign(value, read_value=False) for name, value in merged.items()))

    @staticmethod
    def to_core(values: Mapping[str, NDArray[np.generic]]) -> Statistics:
        """Return the core's statistics from the values of the parts."""
        return Statistics.from_arrays(values)


def probe(x: tf.Tensor, channel_axis: int) -> tf.Tensor:
    """Return the elements of a batch that :func:`dopt_api.quantizer.lattice` chooses; shapes may be open."""
    sizes = x.shape.as_list()
    channels = channel_axis % len(sizes)
    inner = [axis for axis in range(1, len(sizes)) if axis != channels]
    if not inner:
        return x
    if all(sizes[axis] is not None for axis in (channels, *inner)):
        return x[lattice((1, *sizes[1:]), channels)]
    shape = tf.shape(x)
    allowed = tf.maximum(1, PROBED // tf.maximum(1, shape[channels]))
    open_sizes = tf.gather(shape, inner)
    strides = tf.range(1, tf.reduce_max(open_sizes) + 2)[:, tf.newaxis]
    starts = tf.where(strides > 1, tf.minimum(strides // 2, open_sizes - 1), 0)
    counts = -((starts - open_sizes) // strides)
    fitting = tf.reduce_prod(tf.cast(counts, tf.int64), 1) <= tf.cast(allowed, tf.int64)
    stride = tf.cast(tf.argmax(tf.cast(fitting, tf.int32)), tf.int32) + 1
    start = tf.where(stride > 1, tf.minimum(stride // 2, shape - 1), tf.zeros_like(shape))
    chosen = np.isin(np.arange(len(sizes)), inner)
    return tf.strided_slice(x, tf.where(chosen, start, 0), shape, tf.where(chosen, stride, 1))


def _extremes(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the least and the greatest value of each sample, float32 ``[N]``."""
    sizes = x.shape.as_list()[1:]
    rows = tf.reshape(x, [-1, prod(sizes)] if None not in sizes else tf.stack([tf.shape(x)[0], -1]))
    return tf.cast(tf.reduce_min(rows, 1), tf.float32), tf.cast(tf.reduce_max(rows, 1), tf.float32)


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
