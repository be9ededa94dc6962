"""A model of LiteRT as objects: tensors, operators and their codes, through TensorFlow's own schema.

Example:
    Of the bytes of a model::

        model = FlatModel(content)
        [model.name_of(operator) for operator in model.operators]  # ["CONV_2D", "ADD", ...]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flatbuffers
import numpy as np
from numpy.typing import ArrayLike, NDArray
from tensorflow.lite.python import schema_py_generated as schema

__all__ = ["ABSENT", "FlatModel", "schema"]

ABSENT = -1
"""The number of an optional tensor that an operator does without."""

_NAMES: dict[int, str] = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
_TYPES: dict[int, type[np.generic]] = {
    schema.TensorType.FLOAT32: np.float32,
    schema.TensorType.INT32: np.int32,
    schema.TensorType.INT64: np.int64,
    schema.TensorType.INT8: np.int8,
}
_LAST_SHORT_CODE = 127  # greater codes do not fit the old field of one byte, which then has this number


class FlatModel:
    """A model with one subgraph, that is being rewritten."""

    def __init__(self, content: bytes) -> None:
        self.model: Any = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
        self.graph: Any = self.model.subgraphs[0]
        self.graph.inputs, self.graph.outputs = (list(map(int, part)) for part in (self.inputs, self.outputs))
        for operator in self.operators:
            operator.inputs, operator.outputs = (
                [] if part is None else list(map(int, part)) for part in (operator.inputs, operator.outputs)
            )

    @property
    def subgraphs(self) -> int:
        """How many subgraphs there are."""
        return len(self.model.subgraphs)

    @property
    def inputs(self) -> list[int]:
        """The numbers of the input tensors."""
        return self.graph.inputs  # type: ignore[no-any-return]  # the schema has no types

    @property
    def outputs(self) -> list[int]:
        """The numbers of the output tensors."""
        return self.graph.outputs  # type: ignore[no-any-return]

    @outputs.setter
    def outputs(self, tensors: list[int]) -> None:
        self.graph.outputs = tensors

    @property
    def operators(self) -> list[Any]:
        """The operators, in the order of execution."""
        return self.graph.operators  # type: ignore[no-any-return]

    def name_of(self, operator: Any) -> str:
        """Return the kind of an operator, such as ``CONV_2D``."""
        code = self.model.operatorCodes[operator.opcodeIndex]
        return _NAMES[max(code.builtinCode, code.deprecatedBuiltinCode)]

    def tensor(self, number: int) -> Any:
        """Return a tensor."""
        return self.graph.tensors[number]

    def shape_of(self, number: int) -> list[int]:
        """Return the shape of a tensor, with -1 for what is open."""
        tensor = self.tensor(number)
        open_shape = tensor.shapeSignature if tensor.shapeSignature is not None else tensor.shape
        return [] if open_shape is None else list(map(int, open_shape))

    def is_float(self, number: int) -> bool:
        """Return whether a tensor is float32."""
        return number != ABSENT and self.tensor(number).type == schema.TensorType.FLOAT32

    def constant(self, number: int) -> NDArray[Any] | None:
        """Return the values of a constant; ``None`` of what is computed, and of types that no layer has."""
        if number == ABSENT:
            return None
        tensor = self.tensor(number)
        data = self.model.buffers[tensor.buffer].data
        if data is None or len(data) == 0 or tensor.type not in _TYPES:
            return None
        shape = [] if tensor.shape is None else list(map(int, tensor.shape))
        return np.frombuffer(np.asarray(data, np.uint8).tobytes(), _TYPES[tensor.type]).reshape(shape)

    def add_tensor(
        self,
        name: str,
        kind: int,
        shape: Sequence[int],
        *,
        scale: ArrayLike = (),
        zero_point: ArrayLike = (),
        axis: int = 0,
        data: NDArray[Any] | None = None,
    ) -> int:
        """Add a tensor and return its number.

        Args:
            name: Its name.
            kind: One of ``schema.TensorType``.
            shape: Its shape, -1 for what is open.
            scale: Of a quantized tensor, one for all or one for each index of ``axis``.
            zero_point: As many.
            axis: The axis that the scales are for.
            data: The values of a constant.
        """
        tensor = schema.TensorT()
        tensor.name, tensor.type, tensor.buffer = name.encode(), kind, 0
        tensor.shape = [max(size, 1) for size in shape]
        if -1 in shape:
            tensor.shapeSignature = list(shape)
        if data is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
            self.model.buffers.append(buffer)
            tensor.buffer = len(self.model.buffers) - 1
        if np.size(scale):
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = np.asarray(scale, np.float32)
            tensor.quantization.zeroPoint = np.asarray(zero_point, np.int64)
            tensor.quantization.quantizedDimension = axis
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def operator(self, kind: str, inputs: list[int], outputs: list[int], version: int = 1, options: str = "") -> Any:
        """Return a new operator; the fields of its ``options``, such as ``ReshapeOptions``, have their defaults."""
        operator = schema.OperatorT()
        operator.inputs, operator.outputs = inputs, outputs
        operator.opcodeIndex = self._code(kind, version)
        if options:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            operator.builtinOptions = getattr(schema, f"{options}T")()
        return operator

    def raise_version(self, operator: Any, version: int) -> None:
        """Let an operator have at least this version of its kind."""
        code = self.model.operatorCodes[operator.opcodeIndex]
        if code.version < version:
            operator.opcodeIndex = self._code(self.name_of(operator), version)

    def drop_dead(self) -> None:
        """Leave out the operators that no output depends on."""
        needed, kept = set(self.outputs), []
        for operator in reversed(self.operators):
            if needed.intersection(operator.outputs):
                kept.append(operator)
                needed.update(operator.inputs)
        self.graph.operators = kept[::-1]

    def content(self) -> bytes:
        """Return the bytes of the model, without the tensors, buffers and codes that nothing uses.

        The converter's metadata are those of the float model, and are left out.
        """
        self.model.metadata, self.model.metadataBuffer = None, None
        self.model.description = b"Converted by TensorFlow, quantized by dopt."
        self._renumber_tensors()
        self._renumber_buffers()
        codes = self.model.operatorCodes
        used = sorted({operator.opcodeIndex for operator in self.operators})
        self.model.operatorCodes = [codes[index] for index in used]
        for operator in self.operators:
            operator.opcodeIndex = used.index(operator.opcodeIndex)
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _code(self, kind: str, version: int) -> int:
        number = getattr(schema.BuiltinOperator, kind)
        for index, code in enumerate(self.model.operatorCodes):
            if max(code.builtinCode, code.deprecatedBuiltinCode) == number and code.version == version:
                return index
        code = schema.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = number, min(number, _LAST_SHORT_CODE), version
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1

    def _renumber_tensors(self) -> None:
        used = {*self.inputs, *self.outputs}
        for operator in self.operators:
            used.update(operator.inputs, operator.outputs)
        kept = sorted(used - {ABSENT})
        places = {old: new for new, old in enumerate(kept)} | {ABSENT: ABSENT}
        self.graph.tensors = [self.graph.tensors[number] for number in kept]
        for part in (self.graph, *self.operators):
            part.inputs, part.outputs = (
                [places[number] for number in numbers] for numbers in (part.inputs, part.outputs)
            )
        for signature in self.model.signatureDefs or ():
            for entry in (*signature.inputs, *signature.outputs):
                entry.tensorIndex = places[entry.tensorIndex]

    def _renumber_buffers(self) -> None:
        kept = sorted({0} | {tensor.buffer for tensor in self.graph.tensors})  # the first is empty, by the schema
        places = {old: new for new, old in enumerate(kept)}
        self.model.buffers = [self.model.buffers[number] for number in kept]
        for tensor in self.graph.tensors:
            tensor.buffer = places[tensor.buffer]
