"""A float model rewritten so that its quantized layers, and what lies between, run in integers."""

from __future__ import annotations

from typing import Any

import numpy as np

from dopt_tf.litert.flatbuffer import FlatModel, schema
from dopt_tf.litert.grids import COMPUTING, Grids
from dopt_tf.litert.layers import MOVING, Place, Step, Sums

__all__ = ["rewrite"]

_FLOAT, _INT8, _INT32 = schema.TensorType.FLOAT32, schema.TensorType.INT8, schema.TensorType.INT32

_VERSION_OF_PER_CHANNEL = 5  # of DEQUANTIZE
_VERSIONS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 3} | MOVING | COMPUTING


def rewrite(model: FlatModel, places: dict[int, Place], grids: Grids) -> None:
    """Rewrite a model.

    Args:
        model: The float model.
        places: Its quantized layers, by the place of their operator among the operators.
        grids: Which tensors are integers.
    """
    _Rewriting(model, grids).run(places)


class _Rewriting:
    """The new operators, and in which forms each tensor of the float model exists by now."""

    def __init__(self, model: FlatModel, grids: Grids) -> None:
        self.model, self.grids = model, grids
        self.operators: list[Any] = []
        self.integer: dict[int, dict[Step, int]] = {}
        self.rounded: dict[tuple[int, Step], int] = {}  # float, on a grid
        self.in_float: set[int] = set(model.inputs)

    def run(self, places: dict[int, Place]) -> None:
        for index, operator in enumerate(self.model.operators):
            place = places.get(index)
            sums = None if place is None else place.sums
            if not self.grids.in_integers(index):
                self._float(operator, place)
            elif place is None or sums is None:
                self._between(operator)
            elif self.model.name_of(operator) == "FULLY_CONNECTED":
                self._matrix_product(operator, place, sums)
            else:
                self._layer(operator, place, sums)
        for number in self.model.outputs:
            self._read_float(number)
        self.model.graph.operators = self.operators

    def _float(self, operator: Any, place: Place | None) -> None:
        """Keep an operator float; a layer reads its input and its weight from their grids."""
        outputs = list(operator.outputs)
        for position, number in enumerate(operator.inputs):
            if place is not None and position == place.kind.weight:
                operator.inputs[position] = self._stored_weight(number, place)
            elif place is not None and place.input is not None and position == place.kind.input:
                operator.inputs[position] = self._read_rounded(number, place.input)
            else:
                operator.inputs[position] = self._read_float(number)
        self.operators.append(operator)
        for position, number in enumerate(outputs):
            step = self.grids.of.get(number)
            if step is None:
                self.in_float.add(number)
            else:
                operator.outputs[position] = self._like(number, "float")
                self._quantize(operator.outputs[position], number, step)

    def _between(self, operator: Any) -> None:
        """Let an operator between layers run in integers."""
        name, output = self.model.name_of(operator), operator.outputs[0]
        for position, number in enumerate(operator.inputs):
            if self.model.is_float(number):
                step = self.grids.of[output if name in MOVING else number]
                operator.inputs[position] = self._read_integers(number, step)
        self._write_integers(operator)

    def _layer(self, operator: Any, place: Place, sums: Sums) -> None:
        """Let a convolution run in integers."""
        weight = self._constant_weight(place.weight, place, place.axis)
        bias = self._constant_bias(place, sums)
        operator.inputs = [self._read_integers(operator.inputs[place.kind.input], sums.input), weight, bias]
        self._write_integers(operator)

    def _matrix_product(self, operator: Any, place: Place, sums: Sums) -> None:
        """Let a matrix product run in integers: as a convolution, since old kernels of the former have one scale."""
        source, output = operator.inputs[place.kind.input], operator.outputs[0]
        outputs, inputs = place.weight.shape
        step, columns = self.grids.of[output], [-1, 1, 1, inputs]
        pictures = self._like(source, "as_picture", columns, sums.input)
        self._reshape(self._read_integers(source, sums.input), pictures, columns)
        weight = self._constant_weight(place.weight.reshape(outputs, 1, 1, inputs), place, place.axis)
        bias = self._constant_bias(place, sums)
        result = self._like(output, "as_picture", [-1, 1, 1, outputs], step)
        layer = self.model.operator(
            "CONV_2D", [pictures, weight, bias], [result], _VERSIONS["CONV_2D"], "Conv2DOptions"
        )
        layer.builtinOptions.strideH = layer.builtinOptions.strideW = 1
        layer.builtinOptions.padding = schema.Padding.VALID
        layer.builtinOptions.fusedActivationFunction = operator.builtinOptions.fusedActivationFunction
        self.operators.append(layer)
        self._reshape(result, self._write(output, step), [-1, outputs])

    def _write_integers(self, operator: Any) -> None:
        operator.outputs = [self._write(number, self.grids.of[number]) for number in operator.outputs]
        self.model.raise_version(operator, _VERSIONS[self.model.name_of(operator)])
        self.operators.append(operator)

    def _write(self, number: int, step: Step) -> int:
        """Add the tensor for a tensor's integers."""
        forms = self.integer.setdefault(number, {})
        forms[step] = self._like(number, f"int8_{len(forms)}" if forms else "int8", step=step)
        return forms[step]

    def _read_integers(self, number: int, step: Step) -> int:
        """Return a tensor's integers on a grid; from integers on another one if there are no floats."""
        forms = self.integer.setdefault(number, {})
        if step not in forms:
            source = number if number in self.in_float or not forms else next(iter(forms.values()))
            self._quantize(source, number, step, version=1 if source == number else 2)
        return forms[step]

    def _read_rounded(self, number: int, step: Step) -> int:
        """Return a tensor as float32 on a grid."""
        if (number, step) not in self.rounded:
            result = self._like(number, "rounded")
            self._dequantize(self._read_integers(number, step), result)
            self.rounded[number, step] = result
        return self.rounded[number, step]

    def _read_float(self, number: int) -> int:
        """Return a tensor as float32; of one that was computed in integers, what these mean."""
        forms = self.integer.get(number)
        if forms and number not in self.in_float and self.model.is_float(number):
            self._dequantize(next(iter(forms.values())), number)
            self.in_float.add(number)
        return number

    def _quantize(self, source: int, number: int, step: Step, version: int = 1) -> None:
        target = self._write(number, step)
        self.operators.append(self.model.operator("QUANTIZE", [source], [target], version, "QuantizeOptions"))

    def _dequantize(self, source: int, target: int, version: int = 2) -> None:
        self.operators.append(self.model.operator("DEQUANTIZE", [source], [target], version, "DequantizeOptions"))

    def _reshape(self, source: int, target: int, shape: list[int]) -> None:
        data = np.array(shape, np.int32)
        wanted = self.model.add_tensor(
            f"{self.model.tensor(target).name.decode()}/shape", _INT32, [len(shape)], data=data
        )
        operator = self.model.operator("RESHAPE", [source, wanted], [target], 1, "ReshapeOptions")
        operator.builtinOptions.newShape = shape
        self.operators.append(operator)

    def _like(self, number: int, suffix: str, shape: list[int] | None = None, step: Step | None = None) -> int:
        """Add a tensor for another form of one."""
        return self.model.add_tensor(
            f"{self.model.tensor(number).name.decode()}/{suffix}",
            _FLOAT if step is None else _INT8,
            self.model.shape_of(number) if shape is None else shape,
            scale=() if step is None else (step.scale,),
            zero_point=() if step is None else (step.zero_point,),
        )

    def _stored_weight(self, number: int, place: Place) -> int:
        result = self._like(number, "dequantized")
        weight = self._constant_weight(place.weight, place, place.axis)
        self._dequantize(weight, result, 2 if place.axis is None else _VERSION_OF_PER_CHANNEL)
        return result

    def _constant_weight(self, values: Any, place: Place, axis: int | None) -> int:
        part = place.params.weight
        shift = 128 if part.dtype.startswith("u") else 0
        return self.model.add_tensor(
            part.tensor,
            _INT8,
            values.shape,
            scale=part.scale,
            zero_point=[zero_point - shift for zero_point in part.zero_point],
            axis=0 if axis is None else axis,
            data=values,
        )

    def _constant_bias(self, place: Place, sums: Sums) -> int:
        name = f"{place.params.name}/bias" if place.params.bias is None else place.params.bias.tensor
        zeros = np.zeros(sums.bias.size, np.int64)
        return self.model.add_tensor(name, _INT32, sums.bias.shape, scale=sums.scale, zero_point=zeros, data=sums.bias)
