"""From a float layer to its integers: the one place where what is written to a file is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dopt_api.errors import NumbersError
from dopt_api.quantizer.affine import (
    SMALLEST_SCALE,
    as_float32,
    dequantize,
    extremes,
    quantize,
    scale_zero_point,
)
from dopt_api.quantizer.folding import BatchNorm, fold_batch_norm
from dopt_api.quantizer.training import learned_scale
from dopt_api.types import LayerPlan

__all__ = ["FloatLayer", "QuantizedLayer", "fold", "quantize_layer"]

Float32 = NDArray[np.float32]

BIAS_LIMIT = float(2**30)
"""The greatest integer of a bias. The other half of int32 is for the sums, to which kernels add it and which wrap
around without a word: enough for 33,000 products of 8 bits by 8 bits."""


@dataclass(frozen=True, eq=False)
class FloatLayer:
    """A trained layer as a backend found it, before folding and quantization.

    Attributes:
        weight: Any shape.
        bias: ``[C]``, or ``None``.
        norm: The batch normalization to fold in, or ``None``.
        axis: The axis of ``weight`` with the output channels.
    """

    weight: NDArray[np.floating[Any]]
    bias: NDArray[np.floating[Any]] | None
    norm: BatchNorm | None
    axis: int


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A quantized layer.

    Attributes:
        plan: Its name, kind and strategy.
        integers: The weight on its grid, int32, the shape of the weight.
        weight: The same as float32, exactly ``(integers - weight_zero_point) * weight_scale``.
        bias: Folded bias, float32 ``[C]``, or ``None``.
        input_scale: Scale of the input, or ``None`` where the strategy leaves it float.
        input_zero_point: Zero point of the input.
        weight_scale: Float32, one per channel of ``axis``; where weights are grouped, ``[C * groups]``, those of a
            channel one after the other.
        weight_zero_point: Int32, as many; all 0 where weights are symmetric.
        bias_scale: ``input_scale * weight_scale`` in float32 for each output channel; ``None`` without a bias, and
            where the input is float.
        axis: The axis of the weight with the output channels.
        output_scale: Scale of the output, or ``None`` where it is not recorded.
        output_zero_point: Zero point of the output.
    """

    plan: LayerPlan
    integers: NDArray[np.int32]
    weight: Float32
    bias: Float32 | None
    input_scale: np.float32 | None
    input_zero_point: int
    weight_scale: Float32
    weight_zero_point: NDArray[np.int32]
    bias_scale: Float32 | None
    axis: int
    output_scale: np.float32 | None = None
    output_zero_point: int = 0


def fold(layer: FloatLayer) -> tuple[Float32, Float32 | None]:
    """Return the layer's weight and bias as float32, with its batch normalization folded in."""
    if layer.norm is not None:
        return fold_batch_norm(layer.weight, layer.bias, layer.norm, axis=layer.axis)
    return as_float32(layer.weight), None if layer.bias is None else as_float32(layer.bias)


def quantize_layer(
    layer: FloatLayer,
    plan: LayerPlan,
    input_scale: np.float32 | None,
    input_zero_point: int = 0,
    weight_gain: ArrayLike = 0.0,
    output_scale: np.float32 | None = None,
    output_zero_point: int = 0,
) -> QuantizedLayer:
    """Fold and quantize one layer.

    Where a weight channel is so small that its bias would not fit half of int32 at the scale ``input * weight``, or
    that this scale would not be a normal float32, the weight's scale is raised until it does; the weights of such a
    channel are far below one step of its bias anyway.

    Args:
        layer: The float layer.
        plan: Its name and strategy.
        input_scale: Scale of the input; not looked at where the strategy leaves it float.
        input_zero_point: Zero point of the input.
        weight_gain: Learned gains, one per scale, on the scales that the folded weight's extremes give.
        output_scale: Scale of the output, where the plan asks for it; otherwise not looked at.
        output_zero_point: Zero point of the output.

    Raises:
        NumbersError: The weight or bias has NaN, infinity or values too large for a scale, or a scale is not positive
            and finite; the message names the layer.
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
    rows, axis = _rows(weight, layer, plan)
    low, high = extremes(rows, axis)
    try:
        derived, zero_point = scale_zero_point(low, high, grid)
    except NumbersError as error:
        raise NumbersError(
            f"The weight of layer {plan.name!r} cannot be quantized: {error.what}",
            where=f"layer {plan.name!r}",
            expected=error.expected,
            fix=error.fix,
        ) from error
    scale, bias_scale = learned_scale(derived, weight_gain), None
    _check_scale("weight", scale, plan)
    if plan.strategy.activation is None:
        input_scale = None
    else:
        _check_scale("input", np.float32(np.nan) if input_scale is None else input_scale, plan)
    if plan.output:
        _check_scale("output", np.float32(np.nan) if output_scale is None else output_scale, plan)
    if bias is not None and input_scale is not None:
        scale = _raised(scale, bias, float(input_scale))
        with np.errstate(over="ignore"):
            bias_scale = np.tile(np.float32(input_scale) * scale, bias.size // scale.size)
        _check_scale("bias", bias_scale, plan)
    integers = quantize(rows, scale, zero_point, grid, axis=axis)
    return QuantizedLayer(
        plan=plan,
        integers=integers.reshape(weight.shape),
        weight=dequantize(integers, scale, zero_point, axis=axis).reshape(weight.shape),
        bias=bias,
        input_scale=None if input_scale is None else np.float32(input_scale),
        input_zero_point=int(input_zero_point),
        weight_scale=scale,
        weight_zero_point=zero_point,
        bias_scale=bias_scale,
        axis=layer.axis,
        output_scale=np.float32(output_scale) if plan.output and output_scale is not None else None,
        output_zero_point=int(output_zero_point),
    )


def _rows(weight: Float32, layer: FloatLayer, plan: LayerPlan) -> tuple[Float32, int | None]:
    """Return the weight with one scale for each index of an axis, and the axis; ``None`` with one scale for all.

    Raises:
        NumbersError: The groups of the grid do not divide the weight.
    """
    grid = plan.strategy.weight
    if grid.group is None:
        return weight, layer.axis if grid.per_channel else None
    if weight.ndim != 2 or layer.axis != 0 or weight.shape[1] % grid.group:
        raise NumbersError(
            f"The weight of layer {plan.name!r}, {list(weight.shape)}, has no groups of {grid.group}",
            where=f"layer {plan.name!r}",
            expected=f"[outputs, inputs], with a number of inputs that {grid.group} divides",
            fix="Set 'quant_strategy' to one without groups.",
        )
    return weight.reshape(-1, grid.group), 0


def _raised(scale: Float32, bias: Float32, input_scale: float) -> Float32:
    """Return weight scales at which the bias fits int32 at a normal float32 scale."""
    needed = np.abs(bias).astype(np.float64).reshape(-1, scale.size).max(axis=0)
    least = np.maximum(needed / (input_scale * BIAS_LIMIT), SMALLEST_SCALE / input_scale).reshape(scale.shape)
    return np.where(least > scale, np.nextafter(as_float32(least), np.float32(np.inf)), scale)


def _check_scale(kind: str, scale: ArrayLike, plan: LayerPlan) -> None:
    values = as_float32(scale)
    if (wrong := ~(np.isfinite(values) & (values > 0.0))).any():
        raise NumbersError(
            f"The {kind} scale {values[wrong][0]:g} of layer {plan.name!r} cannot be used",
            where=f"layer {plan.name!r}",
            expected="positive finite numbers",
            fix="Check the checkpoint: the training has diverged, or a value overflows.",
        )
