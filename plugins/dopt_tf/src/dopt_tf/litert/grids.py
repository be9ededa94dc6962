"""Which tensors of a model are integers, and on which grid.

A tensor has a grid if it is a layer's output and the parameter file has its grid; or if all who read it are layers with
one grid for their input, or such layers together with operators that themselves run in integers. Both go through
operators that only move numbers. What a float layer or operator reads stays float, unless the parameter file says
otherwise: nothing is rounded that the simulation does not round, except at sums and the like between layers, whose
integer kernels have a grid for every operand.
"""

from __future__ import annotations

from typing import Any

from dopt_tf.litert.flatbuffer import FlatModel
from dopt_tf.litert.layers import MOVING, Place, Step

__all__ = ["COMPUTING", "Grids"]

COMPUTING = {"ADD": 2, "SUB": 2, "MUL": 2, "MEAN": 2}
"""Operators whose integer kernels take any grids for input and output; and their versions for int8."""

_FREE = "free"
"""What a reader wants that takes any grid."""

_Want = Step | str | None


class Grids:
    """The grids of a model's tensors.

    Attributes:
        of: The grids by the number of the tensor.
    """

    def __init__(self, model: FlatModel, places: dict[int, Place], outputs: dict[int, Step]) -> None:
        """Find the grids.

        Args:
            model: The float model.
            places: Its quantized layers, by the place of their operator among the operators.
            outputs: The grids that the parameter file has for outputs, by the tensor.
        """
        self.of: dict[int, Step] = {}
        self._model, self._places, self._outputs = model, places, outputs
        self._readers: dict[int, list[tuple[int, int]]] = {}
        for index, operator in enumerate(model.operators):
            for position, number in enumerate(operator.inputs):
                self._readers.setdefault(number, []).append((index, position))
        self._float: set[int] = set()  # the computing operators that cannot run in integers after all
        while True:
            self._backward()
            self._forward()
            more = {index for index in range(len(model.operators)) if self._lacks_input(index)}
            if not more:
                return
            self._float |= more

    def in_integers(self, index: int) -> bool:
        """Return whether an operator runs in integers."""
        return self._can(index) and self._known(self._model.operators[index].outputs)

    def _can(self, index: int) -> bool:
        """Return whether an operator could run in integers, if there are grids."""
        place = self._places.get(index)
        if place is not None:
            return place.in_integers
        name = self._model.name_of(self._model.operators[index])
        return name in MOVING or (name in COMPUTING and index not in self._float)

    def _backward(self) -> None:
        """From the last operator to the first, decide each output's grid from those who read it."""
        self.of = {}
        for index in reversed(range(len(self._model.operators))):
            for number in self._model.operators[index].outputs:
                found = self._wanted(number, index)
                if isinstance(found, Step):
                    self.of[number] = found

    def _wanted(self, number: int, index: int) -> _Want:
        """Return the grid of what an operator writes, or that its readers take any, or ``None`` if it is float."""
        if not self._model.is_float(number):
            return None
        if number in self._outputs:
            return self._outputs[number]
        if not self._can(index):
            return None
        wants = {self._want(reader, position) for reader, position in self._readers.get(number, [])}
        wants |= {None} if number in self._model.outputs else set()
        steps = [want for want in wants if isinstance(want, Step)]
        if len(steps) == 1 and wants <= {steps[0], _FREE}:
            return steps[0]
        return _FREE if wants == {_FREE} else None

    def _want(self, index: int, position: int) -> _Want:
        """Return which grid an operator wants for one of its inputs."""
        place = self._places.get(index)
        if place is not None:
            return place.input if position == place.kind.input else None
        operator = self._model.operators[index]
        name, output = self._model.name_of(operator), operator.outputs[0]
        if name in MOVING:
            return self._wanted(output, index)
        return _FREE if name in COMPUTING and index not in self._float and output in self.of else None

    def _forward(self) -> None:
        """Let operators that move numbers do so in integers where they get them."""
        for operator in self._model.operators:
            if self._model.name_of(operator) in MOVING and not self._known(operator.outputs):
                steps = {self.of.get(number) for number in self._operands(operator)}
                step = steps.pop() if len(steps) == 1 else None
                if step is not None:
                    self.of |= dict.fromkeys(operator.outputs, step)

    def _lacks_input(self, index: int) -> bool:
        operator = self._model.operators[index]
        if self._model.name_of(operator) not in COMPUTING or not self.in_integers(index):
            return False
        return not self._known(self._operands(operator))

    def _operands(self, operator: Any) -> list[int]:
        return [number for number in operator.inputs if self._model.is_float(number)]

    def _known(self, numbers: list[int]) -> bool:
        return all(number in self.of for number in numbers)
