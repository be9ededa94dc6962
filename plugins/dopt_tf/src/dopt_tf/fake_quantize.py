"""Fake quantization on tensors, with the gradients of learned step sizes.

The arithmetic is that of :mod:`dopt_api.quantizer.affine` to the bit: true division by the scale, rounding half to
even, and clipping to the grid less the zero point, which spares adding and subtracting it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import tensorflow as tf

from dopt_api.quantizer import SMALLEST_SCALE, Grid

__all__ = ["fake_quantize", "learned_fake_quantize", "learned_scale", "weight_scale"]


def learned_scale(scale: tf.Tensor, gain: tf.Tensor) -> tf.Tensor:
    """Return :func:`dopt_api.quantizer.learned_scale`, to the bit, differentiable in ``gain``."""
    smaller = 1.0 / (1.0 - tf.minimum(gain, 0.0))
    return tf.maximum(scale * tf.where(gain < 0.0, smaller, 1.0 + gain), SMALLEST_SCALE)


def weight_scale(weight: tf.Tensor, grid: Grid, axis: int, factor: tf.Tensor | None = None) -> tf.Tensor:
    """Return the scales ``[C]`` of a weight from the extremes of its channels, as the core computes them.

    Args:
        weight: Float32, with ``C`` channels on ``axis``.
        grid: The integer grid, symmetric.
        axis: The axis of the channels.
        factor: What folding multiplies the channels by, ``[C]``. Products of rounded numbers are ordered as their
            factors are, so the extremes of the folded weight are products of extremes, to the bit.
    """
    others = [i for i in range(weight.shape.rank) if i != axis]
    constant = tf.stop_gradient(weight)
    extreme = tf.maximum(-tf.reduce_min(constant, others), tf.reduce_max(constant, others))
    if factor is not None:
        extreme *= tf.abs(factor)
    scale = tf.cast(2.0 * tf.cast(extreme, tf.float64) / float(grid.qmax - grid.qmin), tf.float32)
    return tf.where(tf.equal(extreme, 0.0), tf.ones_like(scale), tf.maximum(scale, SMALLEST_SCALE))


def fake_quantize(x: tf.Tensor, scale: tf.Tensor, low: Any, high: Any) -> tf.Tensor:
    """Return ``clip(rint(x / scale), low, high) * scale``, float32 of the shape of ``x``, without a useful gradient.

    Args:
        x: Float32 data.
        scale: Positive float32, ``[]`` or of a shape that broadcasts.
        low: ``qmin - zero_point``, float32.
        high: ``qmax - zero_point``, float32.
    """
    return _rounded(x / scale, low, high) * scale


def learned_fake_quantize(x: tf.Tensor, scale: tf.Tensor, low: Any, high: Any) -> tf.Tensor:
    """Return :func:`fake_quantize` with the gradients of :mod:`dopt_api.quantizer.training`.

    Args:
        x: Float32 data.
        scale: Positive float32: ``[]``, or of the rank of ``x`` with 1 on all axes but that of the channels.
        low: ``qmin - zero_point``.
        high: ``qmax - zero_point``.
    """
    low, high = tf.convert_to_tensor(low, tf.float32), tf.convert_to_tensor(high, tf.float32)
    kernel = _compiled(fake_quantize) if _pays_to_compile(x) else fake_quantize
    y = tf.ensure_shape(kernel(tf.stop_gradient(x), tf.stop_gradient(scale), low, high), x.shape)
    with x.graph.gradient_override_map({"IdentityN": "DoptFakeQuantized"}):
        return tf.identity_n([y, x, scale, low, high])[0]


@tf.RegisterGradient("DoptFakeQuantized")  # type: ignore[untyped-decorator]  # TensorFlow is not typed
def _fake_quantized(op: tf.Operation, dy: tf.Tensor, *_: tf.Tensor) -> list[tf.Tensor | None]:
    """Return the gradients of ``x`` and of the scale; the two are computed by one loop over the data each."""
    _, x, scale, low, high = op.inputs
    functions = [_passed, _slope]
    if _pays_to_compile(x):
        functions = [_compiled(function) for function in functions]
    passed, slope = (function(x, scale, low, high, dy) for function in functions)
    others = None if scale.shape.rank == 0 else [axis for axis, size in enumerate(scale.shape) if size == 1]
    total = tf.reshape(tf.reduce_sum(slope, others), tf.shape(scale))
    return [None, tf.ensure_shape(passed, x.shape), total, None, None]


def _passed(x: tf.Tensor, scale: tf.Tensor, low: tf.Tensor, high: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
    """Return the gradient of the data: passed on where the integer stays on the grid."""
    return tf.where(_inside(x / scale, low, high), dy, 0.0)


def _slope(x: tf.Tensor, scale: tf.Tensor, low: tf.Tensor, high: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
    """Return what each element adds to the gradient of the scale."""
    v = x / scale
    return dy * (_rounded(v, low, high) - tf.where(_inside(v, low, high), v, 0.0))


def _rounded(v: tf.Tensor, low: Any, high: Any) -> tf.Tensor:
    """Round and clip; two operations that work in place are faster than ``tf.clip_by_value``."""
    return tf.maximum(tf.minimum(tf.raw_ops.Rint(x=v), high), low)


def _inside(v: tf.Tensor, low: tf.Tensor, high: tf.Tensor) -> tf.Tensor:
    return (v >= low - 0.5) & (v <= high + 0.5)


@lru_cache
def _compiled(function: Any) -> Any:
    """Return a function of float32 tensors as one loop over the data instead of one an operation, by XLA."""
    arguments = function.__code__.co_argcount
    signature = [tf.TensorSpec(None, tf.float32)] * arguments
    return tf.function(function, input_signature=signature, jit_compile=True, autograph=False)


def _pays_to_compile(x: tf.Tensor) -> bool:
    """Return whether to compile: each new shape costs some milliseconds once, so not where shapes are open.

    Compiling for other devices than the processor needs tools that are often not installed.
    """
    known: bool = x.shape.rank is not None and x.shape[1:].is_fully_defined()
    return known and tf.test.is_built_with_xla() and not tf.config.list_physical_devices("GPU")
