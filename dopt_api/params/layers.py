"""From a float layer to its integers: the one place where what is written to a file is quantized."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dopt_api.errors import NumbersError
from dopt_api.quantizer.affine import channel_maximum, dequantize, quantize, scale_zero_point
from dopt_api.quantizer.folding import BatchNorm, fold_batch_norm
from dopt_api.types import LayerPlan

__all__ = ["FloatLayer", "QuantizedLayer", "fold", "quantize_layer"]

Float32 = NDArray[np.float32]

BIAS_LIMIT = float(2**31 - 1)


@dataclass(frozen=True, eq=False)
class FloatLayer:
    """A trained layer as a backend found it, before folding and quantization.

    Attributes:
        weight: Any shape.
        bias: ``[C]``, or ``None``.
        norm: The batch normalization to fold in, or ``None``.
        axis: The axis of ``weight`` with the output channels.
    """

    weight: NDArray[np.floating]
    bias: NDArray[np.floating] | None
    norm: BatchNorm | None
    axis: int


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A quantized layer.

    Attributes:
        plan: Its name, kind and strategy.
        integers: The weight on its grid, int32, the shape of the weight.
        weight: The same as float32, exactly ``integers * weight_scale``.
        bias: Folded bias, float32 ``[C]``, or ``None``.
        input_scale: Scale of the input.
        input_zero_point: Zero point of the input.
        weight_scale: Float32, one per channel of ``axis``.
        bias_scale: ``input_scale * weight_scale`` in float32 for each output channel, or ``None``.
        axis: The axis of the weight with the output channels.
    """

    plan: LayerPlan
    integers: NDArray[np.int32]
    weight: Float32
    bias: Float32 | None
    input_scale: np.float32
    input_zero_point: int
    weight_scale: Float32
    bias_scale: Float32 | None
    axis: int


def fold(layer: FloatLayer) -> tuple[Float32, Float32 | None]:
    """Return the layer's weight and bias as float32, with its batch normalization folded in."""
    if layer.norm is not None:
        return fold_batch_norm(layer.weight, layer.bias, layer.norm, axis=layer.axis)
    return layer.weight.astype(np.float32), None if layer.bias is None else layer.bias.astype(np.float32)


def quantize_layer(
    layer: FloatLayer,
    plan: LayerPlan,
    input_scale: np.float32,
    input_zero_point: int,
    weight_scale: NDArray[np.floating] | None = None,
) -> QuantizedLayer:
    """Fold and quantize one layer.

    Where a weight channel is so small that its bias would not fit int32 at the scale ``input * weight``, the weight's
    scale is raised until it does; the weights of such a channel are far below one step of its bias anyway.

    Args:
        layer: The float layer.
        plan: Its name and strategy.
        input_scale: Scale of the input.
        input_zero_point: Zero point of the input.
        weight_scale: Learned scales ``[C]``; without them they are taken from the folded weight's extremes.

    Raises:
        NumbersError: The weight, bias or a scale has NaN or infinity; the message names the layer.
    """
    weight, bias = fold(layer)
    for kind, values in (("weight", weight), ("bias", bias)):
        if values is not None and not np.isfinite(values).all():
            raise NumbersError(
                f"The {kind} of layer {plan.name!r} has NaN or infinity (after folding its batch normalization)",
                where=f"layer {plan.name!r}",
                expected="finite numbers",
                fix="Check the checkpoint: the training has diverged, or a running variance is negative.",
            )
    grid = plan.strategy.weight
    axis = layer.axis if grid.per_channel else None
    if weight_scale is None:
        extreme = channel_maximum(weight, axis)
        weight_scale, _ = scale_zero_point(-extreme, extreme, grid)
    scale = np.asarray(weight_scale, np.float32)
    if bias is not None:
        needed = np.abs(bias).astype(np.float64).reshape(-1, scale.size).max(axis=0)
        least = (needed / (float(input_scale) * BIAS_LIMIT)).reshape(scale.shape)
        scale = np.where(least > scale, np.nextafter(least.astype(np.float32), np.float32(np.inf)), scale)
    integers = quantize(weight, scale, 0, grid, axis=axis)
    return QuantizedLayer(
        plan=plan,
        integers=integers,
        weight=dequantize(integers, scale, 0, axis=axis),
        bias=bias,
        input_scale=np.float32(input_scale),
        input_zero_point=int(input_zero_point),
        weight_scale=scale,
        bias_scale=None if bias is None else np.tile(np.float32(input_scale) * scale, bias.size // scale.size),
        axis=layer.axis,
    )
