"""Which nodes of an export run in integers in ONNX Runtime, and why the others do not.

The answer is read off the integer form (:mod:`dopt_api.formats.onnx_qdq`) by the rules by which ONNX Runtime fuses:
what goes in is dequantized, and, but for matrix products, what comes out is quantized by one node that alone reads it.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from dopt_api.files import StrPath
from dopt_api.formats.onnx_qdq import integer_form
from dopt_api.graphs import as_onnx, read_export
from dopt_api.params import LayerParams, QuantParams

__all__ = ["NodeKind", "integer_nodes", "nodes_of", "summary"]

MULTIPLYING = ("Conv", "ConvTranspose", "Gemm", "MatMul")
OTHERS = ("Add", "Mul", "Concat", "MaxPool", "AveragePool", "GlobalAveragePool")
FLOAT_OUTPUT = ("Gemm", "MatMul")
"""Integer kernels of which there is a form that gives floats."""

PASSING = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")
"""Nodes that the runtime moves quantization through: they change no number."""

RECTIFIERS = ("Relu", "Clip")
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


@dataclass(frozen=True)
class NodeKind:
    """How a node is computed.

    Attributes:
        node: Its name in the graph.
        op_type: Its operator.
        layer: The quantized layer that it computes, or ``""``.
        integer: Whether it runs in integers.
        reason: Why it does not; ``""`` if it does.
    """

    node: str
    op_type: str
    layer: str
    integer: bool
    reason: str = ""


def integer_nodes(params_file: StrPath) -> tuple[NodeKind, ...]:
    """Say of each node that multiplies, adds, joins or pools whether ONNX Runtime computes it in integers.

    Args:
        params_file: The ``quant_params.json`` of an export, with its model beside it.

    Raises:
        ParamsError: The parameter file cannot be read, or is not that of the model.
        FormatError: There is no way from the model to ONNX, or a strategy has no such form.
    """
    with tempfile.TemporaryDirectory(prefix="dopt-nodes-") as folder:
        model, params = as_onnx(*read_export(params_file), Path(folder))
        return nodes_of(integer_form(model, params), params)


def nodes_of(integer: Any, params: QuantParams) -> tuple[NodeKind, ...]:
    """Say the same of an integer form that is there already.

    Args:
        integer: An ONNX model with quantize/dequantize pairs.
        params: The parameters that it was written from.
    """
    graph = _Graph(integer, params)
    return tuple(graph.kind(node) for node in graph.nodes if graph.asked(node))


def summary(kinds: Iterable[NodeKind]) -> str:
    """Return one line about the nodes that multiply."""
    nodes = [kind for kind in kinds if kind.op_type in MULTIPLYING]
    return f"{sum(kind.integer for kind in nodes)} of {len(nodes)} nodes that multiply run in integers"


class _Graph:
    def __init__(self, model: Any, params: QuantParams) -> None:
        self.nodes = list(model.graph.node)
        self.outputs = {value.name for value in model.graph.output}
        self.makers = {edge: node for node in self.nodes for edge in node.output}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for edge in node.input:
                self.readers[edge].append(node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.layers: dict[str, LayerParams] = {
            name: layer for layer in params.layers for name in (layer.node, *(node for node, _ in layer.other_calls))
        }

    def asked(self, node: Any) -> bool:
        """Return whether a node computes with activations in one of the ways that are listed, and is no bias."""
        if node.op_type in MULTIPLYING:
            return True
        return node.op_type in OTHERS and not any(self._constant(edge) for edge in node.input)

    def kind(self, node: Any) -> NodeKind:
        layer = self.layers.get(node.name)
        reason = self._why_not(node, layer)
        return NodeKind(node.name, node.op_type, "" if layer is None else layer.name, not reason, reason)

    def _why_not(self, node: Any, layer: LayerParams | None) -> str:
        """Return why a node runs in float, or nothing if it does not."""
        if node.op_type in MULTIPLYING:
            if layer is None:
                return "it is no quantized layer: left float by the file, or not quantizable"
            if not layer.input.quantized:
                return f"its strategy {layer.strategy} quantizes weights alone"
            if layer.input.bits > 8:
                return f"its input has {layer.input.bits} bits, and the kernels have 8"
        if node.op_type == "ConvTranspose":
            return "there is no integer kernel for transposed convolutions"
        for edge in node.input[:1] if node.op_type in MULTIPLYING else node.input:
            maker = self.makers.get(edge)
            while maker is not None and maker.op_type in PASSING:
                maker = self.makers.get(maker.input[0])
            if maker is None or maker.op_type != DEQUANTIZE:
                return f"its input {edge!r} {self._origin(maker)}"
        return "" if node.op_type in FLOAT_OUTPUT else self._why_float_output(node, layer)

    def _origin(self, maker: Any) -> str:
        if maker is None:
            return "is the network's input, which is not quantized for it"
        return f"is not quantized; it comes from {maker.op_type} {maker.name!r}"

    def _why_float_output(self, node: Any, layer: LayerParams | None) -> str:
        edge, clip = node.output[0], None
        if self._alone(edge) and self.readers[edge][0].op_type in RECTIFIERS:
            clip = self.readers[edge][0]
            edge = clip.output[0]
        while self._alone(edge) and self.readers[edge][0].op_type in PASSING:
            edge = self.readers[edge][0].output[0]
        remedy = 'set "output": true' if layer is not None else "only layers can be recorded"
        if edge in self.outputs:
            return f"its output is the network's output {edge!r}, where no layer records it: {remedy}"
        float_readers = [one for one in self.readers[edge] if one.op_type != QUANTIZE]
        if float_readers:
            reader = float_readers[0]
            return f"its output goes to {reader.op_type} {reader.name!r}, where no layer records it: {remedy}"
        if len(self.readers[edge]) > 1:
            return f"its output is quantized on {len(self.readers[edge])} different grids: {remedy}"
        if clip is not None and not self._redundant(clip, self.readers[edge][0]):
            return f"{clip.op_type} {clip.name!r} behind it does not follow from the grid of its output"
        return ""

    def _redundant(self, clip: Any, quantize: Any) -> bool:
        """Return whether quantization saturates where a rectifier does, or before."""
        scale, zero_point = (numpy_helper.to_array(self.constants[name]) for name in quantize.input[1:3])
        ends = np.iinfo(zero_point.dtype)
        low, high = (float(scale) * (end - int(zero_point)) for end in (ends.min, ends.max))
        if clip.op_type == "Relu":
            return low >= 0.0
        given = [self._value(name) for name in [*clip.input[1:], "", ""][:2]]
        slack = 1e-6 * (high - low)
        return (given[0] is None or low >= given[0] - slack) and (given[1] is None or high <= given[1] + slack)

    def _value(self, edge: str) -> float | None:
        maker = self.makers.get(edge)
        if edge in self.constants:
            return float(numpy_helper.to_array(self.constants[edge]))
        if maker is not None and maker.op_type == "Constant":
            return float(numpy_helper.to_array(helper.get_attribute_value(maker.attribute[0])))
        return None

    def _alone(self, edge: str) -> bool:
        return len(self.readers[edge]) == 1 and edge not in self.outputs

    def _constant(self, edge: str) -> bool:
        """Return whether an edge is a constant, or one that is stored as integers."""
        maker = self.makers.get(edge)
        if maker is None:
            return edge in self.constants
        return maker.op_type == "Constant" or (maker.op_type == DEQUANTIZE and maker.input[0] in self.constants)
