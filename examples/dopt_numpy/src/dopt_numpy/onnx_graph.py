"""Writing a network as an ONNX graph, node by node in execution order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from dopt_api.errors import ConfigError, ModelError
from dopt_api.types import InputSpec
from dopt_numpy.network import (
    BatchNorm,
    Chain,
    Conv2D,
    Dense,
    Flatten,
    GlobalAveragePool,
    Layer,
    MaxPool2D,
    Network,
    ReLU,
    Residual,
    Scale,
    channelwise,
)
from dopt_numpy.quantized_layer import QuantizedLayer

__all__ = ["OPSET", "GraphWriter"]

OPSET = 15
IR_VERSION = 8
"""The version of the file format that came with this operator set."""

Weights = Mapping[str, tuple[NDArray[np.float32], "NDArray[np.float32] | None"]]


class GraphWriter:
    """Writes one network.

    A node has the name of the place where its layer is called, its result ``<place>.output``, and initializers the
    names of the state, such as ``conv1.weight``.

    Attributes:
        calls: ``(node, input edge)`` of each call of a weighted layer, by the layer's path.
    """

    def __init__(self, network: Network, weights: Weights, folded: set[int]) -> None:
        """Prepare to write ``network``.

        Args:
            network: What to write.
            weights: Weight and bias to write instead of a layer's own, by its path.
            folded: Identities of the batch normalizations that these contain.
        """
        self.network, self.weights, self.folded = network, weights, folded
        self.paths = {id(layer): path for path, layer in network.named_layers()}
        self.calls: dict[str, list[tuple[str, str]]] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._dimensions: dict[str, int] = {}

    def write(
        self, spec: InputSpec, output: str, output_shape: tuple[int, ...], dynamic_batch: bool
    ) -> onnx.ModelProto:
        """Return the graph as a model.

        Raises:
            ModelError: A layer has no ONNX counterpart.
            ConfigError: The name of the input or output is that of another tensor.
        """
        self._dimensions[spec.name] = len(spec.shape)
        last = self._chain(self.network, "", spec.name)
        self._rename(last, output)
        self._check_names(spec.name, output)

        def described(name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
            sizes: list[str | int] = ["batch", *shape[1:]] if dynamic_batch else list(shape)
            return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes)

        graph = helper.make_graph(
            self._nodes,
            "dopt",
            [described(spec.name, spec.shape)],
            [described(output, output_shape)],
            list(self._initializers.values()),
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="dopt")
        model.ir_version = IR_VERSION
        onnx.checker.check_model(model)
        return model

    def _chain(self, chain: Chain, place: str, edge: str) -> str:
        """Write the layers of a chain and return the edge of its result."""
        for name, layer in chain.layers.items():
            edge = self._layer(layer, f"{place}.{name}" if place else name, edge)
        return edge

    def _layer(self, layer: Layer, place: str, edge: str) -> str:
        path = self.paths[id(layer)]
        own = layer.layer if isinstance(layer, QuantizedLayer) else layer
        if id(own) in self.folded:
            return edge
        if type(own) in (Chain, Network):
            return self._chain(own, place, edge)  # type: ignore[arg-type]  # a chain
        if type(own) is Residual:
            return self._node("Add", place, [edge, self._chain(own, place, edge)])
        if isinstance(own, Conv2D | Dense):
            self.calls.setdefault(path, []).append((place, edge))
        write = _WRITERS.get(type(own))
        if write is None:
            raise ModelError(
                f"Layer {path!r} cannot be written as ONNX: {type(own).__name__} has no counterpart",
                where=f"layer {path!r}",
                expected=f"one of {', '.join(kind.__name__ for kind in _WRITERS)}",
            )
        return write(self, own, path, place, edge)

    def _node(self, op_type: str, place: str, inputs: list[str], **attributes: Any) -> str:
        edge = f"{place}.output"
        self._nodes.append(helper.make_node(op_type, inputs, [edge], name=place, **attributes))
        self._dimensions[edge] = 2 if op_type == "Flatten" else self._dimensions[inputs[0]]
        return edge

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name)
        return name

    def _weighted(self, layer: Conv2D | Dense, path: str) -> list[str]:
        own = (layer.weight.value, None if layer.bias is None else layer.bias.value)
        weight, bias = self.weights.get(path, own)
        names = [self._constant(f"{path}.weight", weight)]
        return names if bias is None else [*names, self._constant(f"{path}.bias", bias)]

    def _rename(self, edge: str, name: str) -> None:
        """Give the result of the network its name."""
        if not self._nodes or edge not in self._nodes[-1].output:  # a network of nothing hands its input on
            self._nodes.append(helper.make_node("Identity", [edge], [name], name=name))
        else:
            self._nodes[-1].output[0] = name

    def _check_names(self, given: str, output: str) -> None:
        names = [given, *self._initializers, *(edge for node in self._nodes for edge in node.output)]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ConfigError(
                f"The name {repeated[0]!r} would stand for two tensors of the graph",
                expected=f"names of input ({given!r}) and output ({output!r}) that no layer's tensors have",
            )


def _conv(graph: GraphWriter, layer: Conv2D, path: str, place: str, edge: str) -> str:
    return graph._node(
        "Conv",
        place,
        [edge, *graph._weighted(layer, path)],
        kernel_shape=layer.weight.value.shape[2:],
        strides=[layer.stride] * 2,
        pads=[layer.padding] * 4,
        group=layer.groups,
    )


def _dense(graph: GraphWriter, layer: Dense, path: str, place: str, edge: str) -> str:
    return graph._node("Gemm", place, [edge, *graph._weighted(layer, path)], transB=1)


def _norm(graph: GraphWriter, layer: BatchNorm, path: str, place: str, edge: str) -> str:
    arrays = {"gamma": layer.gamma.value, "beta": layer.beta.value, "mean": layer.mean, "variance": layer.variance}
    names = [graph._constant(f"{path}.{name}", array) for name, array in arrays.items()]
    return graph._node("BatchNormalization", place, [edge, *names], epsilon=layer.epsilon)


def _scale(graph: GraphWriter, layer: Scale, path: str, place: str, edge: str) -> str:
    factor = channelwise(layer.factor.value, graph._dimensions[edge])
    return graph._node("Mul", place, [edge, graph._constant(f"{path}.factor", factor)])


def _max_pool(graph: GraphWriter, layer: MaxPool2D, _path: str, place: str, edge: str) -> str:
    return graph._node("MaxPool", place, [edge], kernel_shape=[layer.size] * 2, strides=[layer.size] * 2)


def _simple(op_type: str) -> Callable[..., str]:
    return lambda graph, _layer, _path, place, edge: graph._node(op_type, place, [edge])


_WRITERS: dict[type[Layer], Callable[..., str]] = {
    Conv2D: _conv,
    Dense: _dense,
    BatchNorm: _norm,
    Scale: _scale,
    MaxPool2D: _max_pool,
    ReLU: _simple("Relu"),
    GlobalAveragePool: _simple("GlobalAveragePool"),
    Flatten: _simple("Flatten"),
}
