"""Quantized layers in a model of LiteRT: which operator computes each, and its grids and integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dopt_api.errors import FormatError
from dopt_api.params import LayerParams, TensorParams
from dopt_tf.litert.flatbuffer import FlatModel
from dopt_tf.litert.frozen_graph import FrozenGraph
from dopt_tf.litert.integers import bias_integers, weight_integers

__all__ = ["MOVING", "Kind", "Place", "Step", "Sums", "check_strategy", "place_layer", "step_of", "unplaced"]


class Step(NamedTuple):
    """The grid of an int8 tensor: ``(integer - zero_point) * scale``."""

    scale: float
    zero_point: int


class Kind(NamedTuple):
    """Where an operator has its input, weight and bias, and which axis of the weight has the output channels."""

    input: int
    weight: int
    bias: int
    axis: int
    integer: bool


KINDS = {
    "CONV_2D": Kind(0, 1, 2, 0, True),
    "DEPTHWISE_CONV_2D": Kind(0, 1, 2, 3, True),
    "FULLY_CONNECTED": Kind(0, 1, 2, 0, True),
    "TRANSPOSE_CONV": Kind(2, 1, 3, 0, False),
    "CONV_3D": Kind(0, 1, 2, 4, False),
    "CONV_3D_TRANSPOSE": Kind(2, 1, 3, 3, False),
}
"""The operators that layers become; of the last three, the weight alone is stored in integers."""

MOVING = {
    "RESHAPE": 1,
    "SQUEEZE": 1,
    "EXPAND_DIMS": 1,
    "TRANSPOSE": 2,
    "PAD": 2,
    "STRIDED_SLICE": 2,
    "SLICE": 2,
    "SPACE_TO_DEPTH": 2,
    "DEPTH_TO_SPACE": 2,
    "RESIZE_NEAREST_NEIGHBOR": 2,
    "MAX_POOL_2D": 2,
    "RELU": 2,
    "RELU6": 2,
    "CONCATENATION": 2,
}
"""Operators that move numbers or choose among them, so that it does not matter whether a tensor is rounded to a grid
before or after them; and their versions for int8."""


@dataclass(frozen=True)
class Sums:
    """What an integer kernel needs beside the weight.

    Attributes:
        input: The grid of what it reads.
        bias: The bias, int32 ``[C]``; zeros without one.
        scale: The scale of each channel's sums and of its bias, ``[C]``.
    """

    input: Step
    bias: NDArray[np.int32]
    scale: NDArray[np.float32]


@dataclass(frozen=True)
class Place:
    """A quantized layer in the model.

    Attributes:
        params: The layer's parameters.
        operator: What computes it.
        kind: Where this operator has what.
        input: The grid that it reads, or ``None`` where its input stays float.
        weight: The weight, int8, as it stands in the operator.
        axis: The axis of its scales, or ``None`` with one for all.
        sums: What an integer kernel needs; ``None`` where the input is float, or the bias does not fit.
    """

    params: LayerParams
    operator: Any
    kind: Kind
    input: Step | None
    weight: NDArray[np.int8]
    axis: int | None
    sums: Sums | None

    @property
    def in_integers(self) -> bool:
        """Whether there is an integer kernel for it, if its output has a grid."""
        return self.kind.integer and self.sums is not None


def check_strategy(layer: LayerParams) -> None:
    """Refuse what has no int8 form.

    Raises:
        FormatError: Activations are not of 8 bits, or weights have more, are in groups, or are asymmetric with them.
    """
    weight = layer.weight
    wide = weight.bits > 8 or (layer.input.quantized and layer.input.bits != 8)
    if wide or weight.group is not None or (layer.input.quantized and any(weight.zero_point)):
        raise FormatError(
            f"The format 'litert' cannot express the strategy {layer.strategy!r}",
            where=f"layer {layer.name!r}",
            expected="activations of 8 bits and symmetric weights of at most 8, or float activations; no groups",
            fix="Use the strategy 'Quant_INT8-8', 'Quant_INT8-7', 'Quant_INT8-4' or 'Quant_FLOAT-8'.",
        )


def step_of(part: TensorParams | None) -> Step | None:
    """Return a tensor's grid in int8, which has the zero point of uint8 less 128; ``None`` if it is not quantized."""
    if part is None or not part.quantized:
        return None
    shift = 128 if part.dtype.startswith("u") else 0
    return Step(float(np.float32(part.scale[0])), part.zero_point[0] - shift)


def place_layer(model: FlatModel, graph: FrozenGraph, layer: LayerParams, start: int, end: int) -> Place:
    """Find a layer in the model.

    Args:
        model: The float model.
        graph: The graph that it was made from.
        layer: The layer.
        start: The tensor that it reads.
        end: The tensor in which it ends, with bias and activation.

    Raises:
        ParamsError: The weight is not on the layer's grid.
        FormatError: The converter computes the layer in another way.
    """
    operator = _producer(model, end)
    kind = None if operator is None else KINDS.get(model.name_of(operator))
    if operator is None or kind is None:
        raise unplaced(layer, graph)
    source = operator.inputs[kind.input]
    if start not in _sources(model, source) and source not in _sources(model, start):  # it may do padding itself
        raise unplaced(layer, graph)
    values = model.constant(operator.inputs[kind.weight])
    if values is None or values.dtype != np.float32:
        raise unplaced(layer, graph)
    axis = None if layer.weight.axis is None else kind.axis
    weight = weight_integers(values, layer.weight, axis)
    if weight is None:
        raise graph.foreign(layer, f"the values of {layer.weight.tensor!r} are not on the layer's grid")
    step, found = step_of(layer.input), None
    if len(operator.inputs) > kind.bias:
        found = model.constant(operator.inputs[kind.bias])
    channels = values.shape[kind.axis]
    bias = np.zeros(channels, np.float32) if found is None else found.reshape(-1)
    others = tuple(place for place in range(weight.ndim) if place != kind.axis)
    greatest = 255 * np.abs(weight.astype(np.int64)).sum(axis=others)
    return Place(
        layer, operator, kind, step, weight, axis, None if step is None else _sums(layer, step, bias, greatest)
    )


def _sums(layer: LayerParams, step: Step, bias: NDArray[np.float32], greatest: NDArray[np.int64]) -> Sums | None:
    if layer.bias is not None:
        scale = np.asarray(layer.bias.scale, np.float32)
    else:
        weights = np.broadcast_to(np.asarray(layer.weight.scale, np.float32), bias.shape)
        scale = np.asarray(np.float32(step.scale) * weights, np.float32)
    integers = bias_integers(bias, scale, greatest)
    return None if integers is None else Sums(step, integers, scale)


def _producer(model: FlatModel, number: int) -> Any:
    """Return the operator that computes a tensor, but for moving its numbers; ``None`` of inputs and constants."""
    for operator in model.operators:
        if number in operator.outputs:
            name = model.name_of(operator)
            return _producer(model, operator.inputs[0]) if name in MOVING else operator
    return None


def _sources(model: FlatModel, number: int) -> set[int]:
    """Return a tensor and those that it is made of by moving numbers."""
    found = {number}
    for operator in model.operators:
        if number in operator.outputs and model.name_of(operator) in MOVING:
            for source in operator.inputs:
                found |= _sources(model, source)
    return found


def unplaced(layer: LayerParams, graph: FrozenGraph) -> FormatError:
    """Return the error that says that a layer is not found."""
    return FormatError(
        f"TensorFlow Lite's converter computes the layer {layer.name!r} in a way that has no integer form",
        where=f"{graph.file.name}, node {layer.node!r}",
        expected=f"one of the operators {', '.join(KINDS)} with a constant weight",
        fix="Set the layer to 'float' in the strategy file and export again.",
    )
