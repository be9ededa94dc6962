"""The kinds of layer that can be quantized, and how each is laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow as tf
from tensorflow.compat.v1 import NodeDef

__all__ = ["KINDS", "LayerKind", "Layout", "channelwise_shape", "layout_of", "on_weight", "samples_first"]


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer: a type of operation.

    Attributes:
        op_type: The type, as the strategy file names it.
        input: Which input of the operation is the activation.
        weight: Which is the weight.
        weight_axis: The axis of the weight with the output channels, of the weight in its channelwise shape.
    """

    op_type: str
    input: int
    weight: int
    weight_axis: int


KINDS = {
    kind.op_type: kind
    for kind in (
        LayerKind("Conv2D", 0, 1, 3),
        LayerKind("DepthwiseConv2dNative", 0, 1, 2),
        LayerKind("Conv2DBackpropInput", 2, 1, 2),
        LayerKind("Conv3D", 0, 1, 4),
        LayerKind("Conv3DBackpropInputV2", 2, 1, 3),
        LayerKind("MatMul", 0, 1, 1),
    )
}


@dataclass(frozen=True)
class Layout:
    """How one operation is laid out.

    Attributes:
        input: Which input is the activation.
        weight: Which is the weight.
        weight_axis: The axis with the output channels of the weight in its channelwise shape.
        input_axis: The axis of a batch with the input channels, samples first.
        output_axis: The axis of the output with the output channels.
        merged: Whether the last two axes of the weight, channels and multiplier, are one in its channelwise shape.
        samples_last: Whether samples are the last axis of the activation.
    """

    input: int
    weight: int
    weight_axis: int
    input_axis: int
    output_axis: int
    merged: bool = False
    samples_last: bool = False


def layout_of(node: NodeDef, weight: int) -> Layout:
    """Return the layout of an operation of one of the :data:`KINDS`.

    Args:
        node: The operation.
        weight: Which of its inputs comes from a variable; for a matrix product it may be either.
    """
    kind = KINDS[node.op]
    if node.op != "MatMul":
        channels = 1 if node.attr["data_format"].s.startswith(b"NC") else -1
        merged = node.op == "DepthwiseConv2dNative"
        return Layout(kind.input, kind.weight, kind.weight_axis, channels, channels, merged)
    transposed = (node.attr["transpose_a"].b, node.attr["transpose_b"].b)
    if weight == 1:
        return Layout(0, 1, 0 if transposed[1] else 1, 1, -1, samples_last=transposed[0])
    return Layout(1, 0, 1 if transposed[0] else 0, 1, 0, samples_last=not transposed[1])


def on_weight(values: tf.Tensor, dims: int, layout: Layout) -> tf.Tensor:
    """Shape per-channel ``values`` ``[C]`` to stand on the channel axis of a weight in its channelwise shape."""
    return tf.reshape(values, [-1 if axis == layout.weight_axis else 1 for axis in range(dims)])


def samples_first(x: tf.Tensor, layout: Layout) -> tf.Tensor:
    """Return a layer's input as a batch, samples first."""
    return tf.transpose(x) if layout.samples_last else x


def channelwise_shape(shape: Sequence[int], layout: Layout) -> list[int]:
    """Return the shape of a weight with its output channels on one axis, from its own."""
    *spatial, channels, multiplier = shape
    return [*spatial, channels * multiplier] if layout.merged else list(shape)
