"""Fake quantization on tensors, with the gradients of learned step sizes.

The arithmetic is that of :mod:`dopt_api.quantizer.affine` to the bit: true division by the scale, rounding half to
even, and clipping to the grid less the zero point, which spares adding and subtracting it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from dopt_api.quantizer import SMALLEST_SCALE, Grid
from dopt_tf.layer_kinds import Layout, on_weight

__all__ = ["fake_quantize", "fake_quantize_input", "fake_quantize_weight", "learned_scale", "weight_scale"]


def learned_scale(scale: tf.Tensor, gain: tf.Tensor) -> tf.Tensor:
    """Return :func:`dopt_api.quantizer.learned_scale`, to the bit, differentiable in ``gain``."""
    smaller = 1.0 / (1.0 - tf.minimum(gain, 0.0))
    return tf.maximum(scale * tf.where(gain < 0.0, smaller, 1.0 + gain), SMALLEST_SCALE)


def fake_quantize(x: tf.Tensor, scale: tf.Tensor, low: Any, high: Any) -> tf.Tensor:
    """Return ``clip(rint(x / scale), low, high) * scale``, float32 of the shape of ``x``, without a useful gradient.

    Args:
        x: Float32 data.
        scale: Positive float32, ``[]`` or of a shape that broadcasts.
        low: ``qmin - zero_point``, float32.
        high: ``qmax - zero_point``, float32.
    """
    return _clip(tf.raw_ops.Rint(x=x / scale), low, high) * scale


def weight_scale(weight: tf.Tensor, grid: Grid, axis: int) -> tf.Tensor:
    """Return the scales ``[C]`` of a weight from the extremes of its channels, as the core computes them."""
    others = [i for i in range(weight.shape.rank) if i != axis]
    extreme = tf.cast(tf.reduce_max(tf.abs(tf.stop_gradient(weight)), others), tf.float64)
    scale = tf.maximum(tf.cast(2.0 * extreme / float(grid.qmax - grid.qmin), tf.float32), SMALLEST_SCALE)
    return tf.where(tf.equal(extreme, 0.0), tf.ones_like(scale), scale)


def fake_quantize_input(x: tf.Tensor, scale: tf.Tensor, low: tf.Tensor, high: tf.Tensor) -> tf.Tensor:
    """Fake quantization of an activation whose scale is learned; see :mod:`dopt_api.quantizer.training`.

    The last operation has the gradient of the whole, the others pass it on. (``tf.custom_gradient`` would do, but
    makes and adds zeros of the size of the activation in each step.)
    """
    passing = dict.fromkeys(("RealDiv", "Rint", "Minimum", "Maximum"), "DoptPassed")
    with x.graph.gradient_override_map({**passing, "Mul": "DoptFakeQuantized"}):
        return fake_quantize(x, scale, low, high)


@tf.RegisterGradient("DoptPassed")  # type: ignore[untyped-decorator]  # TensorFlow is not typed
def _passed(op: tf.Operation, gradient: tf.Tensor) -> list[tf.Tensor | None]:
    return [gradient, *[None] * (len(op.inputs) - 1)]


@tf.RegisterGradient("DoptFakeQuantized")  # type: ignore[untyped-decorator]  # see above
def _fake_quantized(op: tf.Operation, dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Pass gradients on where the integer stays on the grid; sum the scale's over the activation."""
    scale = op.inputs[1]
    _, low = (above := op.inputs[0].op).inputs
    _, high = (below := above.inputs[0].op).inputs
    x, _ = below.inputs[0].op.inputs[0].op.inputs
    inside = _inside(x / scale, low, high)
    error = op.outputs[0] - tf.math.multiply_no_nan(x, inside)  # (r - m v) scale, since y = r scale and x = v scale
    return tf.math.multiply_no_nan(dy, inside), tf.reduce_sum(dy * error) / scale


def fake_quantize_weight(
    weight: tf.Tensor, scale: tf.Tensor, folding: tf.Tensor | None, grid: Grid, layout: Layout
) -> tf.Tensor:
    """Return the weight whose folded form is on the grid.

    Args:
        weight: Float32, in its channelwise shape.
        scale: ``[C]``, the scales of the folded weight.
        folding: What folding multiplies the weight by, not 0, of a shape that broadcasts; or ``None``.
        grid: The integer grid, symmetric.
        layout: The layout of the layer.
    """
    factor = 1.0 if folding is None else folding

    @tf.custom_gradient  # type: ignore[untyped-decorator]  # see above
    def quantize(weight: tf.Tensor, step: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
        v = (weight if folding is None else weight * folding) / step
        r = _clip(tf.raw_ops.Rint(x=v), float(grid.qmin), float(grid.qmax))

        def backward(dy: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            dx = tf.math.multiply_no_nan(dy, _inside(v, float(grid.qmin), float(grid.qmax)))
            slope = (dy * r - dx * v) / factor
            others = [i for i, size in enumerate(step.shape) if size == 1]
            return dx, tf.reduce_sum(slope, others, keepdims=True)

        return r * (step if folding is None else step / folding), backward

    return quantize(weight, on_weight(scale, weight.shape.rank, layout))


def _inside(v: tf.Tensor, low: Any, high: Any) -> tf.Tensor:
    """Return 1 where ``low - 0.5 <= v <= high + 0.5``, else 0, float32."""
    return tf.cast(tf.equal(v, _clip(v, low - 0.5, high + 0.5)), tf.float32)


def _clip(x: tf.Tensor, low: Any, high: Any) -> tf.Tensor:
    """Clip; two operations that work in place are faster than ``tf.clip_by_value``."""
    return tf.maximum(tf.minimum(x, high), low)
