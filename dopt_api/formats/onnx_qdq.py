"""The format ``onnx_qdq``: ONNX with integer weights and quantize/dequantize pairs, as runtimes fuse it.

Weights are stored as int8 and biases as int32, each behind a ``DequantizeLinear``; the input of a quantized layer
passes through ``QuantizeLinear`` and ``DequantizeLinear``, and so does its output where that is recorded. ONNX
Runtime and OpenVINO replace the pattern by integer kernels, TensorRT where all zero points are 0
(https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from dopt_api.errors import FormatError, ParamsError
from dopt_api.params import LayerParams, QuantParams, TensorParams

__all__ = ["integer_form", "stored_integers", "write"]

OPSET = 13
"""The first version of ONNX's operators whose ``DequantizeLinear`` has an axis."""

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators, which quantize to 16 bits where ONNX does so from version 21 only."""

OFF_GRID = 1e-3
"""How far a weight may be from its grid, in steps, before it is taken for that of another model."""


def write(model: Path, params: QuantParams, folder: Path) -> None:
    """Write ``<model>.qdq.onnx``.

    Raises:
        ParamsError: The parameters are not those of the model.
        FormatError: The model is not ONNX, or a strategy has no such form.
    """
    content = integer_form(model, params)
    onnx.checker.check_model(content)
    (folder / f"{model.stem}.qdq.onnx").write_bytes(content.SerializeToString(deterministic=True))


def integer_form(model: Path, params: QuantParams) -> Any:
    """Return what :func:`write` writes, as a model in memory.

    Raises:
        ParamsError: The parameters are not those of the model.
        FormatError: The model is not ONNX, or a strategy has no such form.
    """
    graph = _load(model, "onnx_qdq")
    for layer in params.layers:
        graph.quantize_inputs(layer)
        graph.store(layer)
    for layer in params.layers:
        graph.quantize_outputs(layer)
    graph.finish()
    return graph.content


def stored_integers(model: Path, params: QuantParams, format_name: str) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Return the integers and scales of weights and biases by the names of their initializers.

    Args:
        model: An exported ONNX graph.
        params: Its parameters.
        format_name: Who asks, for messages.

    Raises:
        ParamsError: The parameters are not those of the model.
        FormatError: The model is not ONNX, or two layers share a weight and quantize it differently.
    """
    graph = _load(model, format_name)
    for layer in params.layers:
        graph.store(layer)
    return {
        name: (numpy_helper.to_array(constants[0]), numpy_helper.to_array(constants[1]))
        for name, (_, constants, _) in graph.decoders.items()
    }


def _load(model: Path, format_name: str) -> _Graph:
    if model.suffix != ".onnx":
        raise FormatError(
            f"The format {format_name!r} is not available for {model.name!r}, which is not an ONNX model",
            where=str(model.absolute()),
            expected="a model that the PyTorch backend exported",
            fix="Convert the frozen graph to ONNX first (tf2onnx), or use another format.",
        )
    try:
        content = onnx.load(str(model))
    except Exception as error:  # protobuf and onnx raise many kinds, all of which mean that the file is no good
        raise FormatError(
            f"The model {model.name!r} cannot be read: {type(error).__name__}: {error}",
            where=str(model.absolute()),
            fix="Export the model again.",
        ) from error
    return _Graph(content, model)


@dataclass
class _Graph:
    """An ONNX graph that is being rewritten."""

    content: Any
    file: Path
    pairs: dict[str, list[Any]] = field(default_factory=dict)  # behind which edge they stand
    decoders: dict[str, tuple[list[Any], list[Any], TensorProto]] = field(default_factory=dict)  # by the initializer
    domains: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.graph = self.content.graph
        self.nodes = {node.name: node for node in self.graph.node}
        self.producers = {edge: node for node in self.graph.node for edge in node.output}
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}

    def quantize_inputs(self, layer: LayerParams) -> None:
        """Let the nodes of a layer read quantized inputs."""
        for node_name, edge in ((layer.node, layer.input.tensor), *layer.other_calls):
            node = self.nodes.get(node_name)
            if node is None or edge not in node.input:
                what = "node" if node is None else f"input {edge!r} of the node"
                raise self._foreign(layer, f"there is no {what} {node_name!r}")
            if not layer.input.quantized:
                continue
            place = list(node.input).index(edge)
            node.input[place] = self._pair(self._without_padding(node, edge), layer.input)

    def quantize_outputs(self, layer: LayerParams) -> None:
        """Let all that reads the recorded output of a layer read quantized values.

        Readers that quantize the edge on a grid of their own do so from those values; an equal grid is one pair.
        """
        if layer.output is None:
            return
        for edge in (layer.output.tensor, *layer.other_outputs):
            if edge not in self.producers:
                raise self._foreign(layer, f"there is no edge {edge!r}")
            made = self._pair(edge, layer.output)
            own = [node for node in self.pairs[edge] if _base(node.output[0]) == _base(made)]
            self.pairs[edge] = [*own, *(node for node in self.pairs[edge] if _base(node.output[0]) != _base(made))]
            readers = [*self.graph.node, *(node for nodes in self.pairs.values() for node in nodes)]
            for node in readers:
                if not any(node is one for one in own):
                    _replace(node.input, edge, made)
            for value in self.graph.output:
                if value.name == edge:
                    self._rename_behind(edge, own)

    def _rename_behind(self, edge: str, pair: list[Any]) -> None:
        """Let an output of the graph be what stands behind its quantization, under the output's name."""
        before = f"{edge}/dopt/float"
        made = pair[-1].output[0]
        _replace(self.producers[edge].output, edge, before)
        _replace(pair[0].input, edge, before)
        _replace(pair[-1].output, made, edge)
        for node in [*self.graph.node, *(node for nodes in self.pairs.values() for node in nodes)]:
            _replace(node.input, made, edge)
        self.pairs[before] = self.pairs.pop(edge)

    def store(self, layer: LayerParams) -> None:
        """Store a layer's weight and bias as integers."""
        weight = layer.weight
        kind = np.dtype(f"{weight.dtype.rstrip('0123456789')}{8 if weight.bits <= 8 else 16}")
        self._decode(layer, weight, kind)
        if layer.bias is not None:
            zeros = (0,) * len(layer.bias.scale)
            bias = TensorParams(layer.bias.tensor, layer.bias.dtype, 32, layer.bias.scale, zeros, 0)
            self._decode(layer, bias, np.dtype(np.int32))

    def finish(self) -> None:
        """Put the new nodes where they belong, and leave out those that nothing takes any more."""
        nodes = self._needed()
        del self.graph.node[:]
        self.graph.node.extend(node for decoder, _, _ in self.decoders.values() for node in decoder)
        for tensor in self.graph.input:
            self.graph.node.extend(self.pairs.pop(tensor.name, []))
        for node in nodes:
            self.graph.node.append(node)
            for edge in node.output:
                self.graph.node.extend(self.pairs.pop(edge, []))
        for name, (_, tensors, _) in self.decoders.items():
            self.graph.initializer.remove(self.initializers[name])
            self.graph.initializer.extend(tensors)
        opset = next(one for one in self.content.opset_import if one.domain in ("", "ai.onnx"))
        opset.version = max(opset.version, OPSET)
        for domain in self.domains:
            self.content.opset_import.append(helper.make_opsetid(domain, 1))

    def _without_padding(self, node: Any, edge: str) -> str:
        """Let a convolution do the zero padding that a node before it did, and return the edge before the padding.

        Runtimes do not see through a padding that stands between a layer and the quantization of its output. Zero is
        an integer of every grid, so it makes no difference whether data are padded before or after they are quantized.
        """
        pad = self.producers.get(edge)
        if node.op_type != "Conv" or pad is None or pad.op_type != "Pad":
            return edge
        amounts = self._zeros_around(pad)
        if amounts is None or _attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            return edge
        own = _attribute(node, "pads", [0] * amounts.size)
        sums = [int(one) + int(other) for one, other in zip(own, amounts.reshape(-1), strict=True)]
        kept = [attribute for attribute in node.attribute if attribute.name not in ("pads", "auto_pad")]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("pads", sums)])
        before: str = pad.input[0]
        return before

    def _zeros_around(self, pad: Any) -> NDArray[np.int64] | None:
        """Return how many zeros a node puts around each spatial axis, ``[2, axes]``, if that is all it does."""
        given = [*pad.input, "", "", ""][1:4]
        amounts, value = (self._constant(name) for name in given[:2])
        if amounts is None or given[2] or _attribute(pad, "mode", b"constant") != b"constant":
            return None
        zero = not given[1] if value is None else not value.any()
        outer, inner = np.split(amounts.astype(np.int64).reshape(2, -1), [2], axis=1)
        return inner if zero and not outer.any() and (inner >= 0).all() else None

    def _constant(self, edge: str) -> NDArray[Any] | None:
        """Return what stands on an edge whatever the network is given, or ``None``."""
        if not edge:
            return None
        nodes, waiting = [], [edge]
        while waiting:
            name = waiting.pop()
            producer = self.producers.get(name)
            if name in self.initializers or not name or producer in nodes:
                continue
            if producer is None or any(attribute.HasField("g") for attribute in producer.attribute):
                return None
            nodes.append(producer)
            waiting += producer.input
        ordered = [node for node in self.graph.node if node in nodes]
        used = {name for node in ordered for name in node.input} | {edge}
        tensors = [tensor for name, tensor in self.initializers.items() if name in used]
        graph = helper.make_graph(ordered, "constant", [], [onnx.ValueInfoProto(name=edge)], tensors)
        model = helper.make_model(graph, opset_imports=self.content.opset_import, ir_version=self.content.ir_version)
        (found,) = ReferenceEvaluator(model).run([edge], {})
        return np.asarray(found)

    def _needed(self) -> list[Any]:
        """Return the nodes on which an output depends, in their order."""
        wanted = {tensor.name for tensor in self.graph.output} | set(self.pairs)
        needed: list[Any] = []
        for node in reversed(self.graph.node):
            if wanted.intersection(node.output):
                needed.append(node)
                wanted.update(node.input)
                for attribute in node.attribute:  # what a branch or a loop takes from around it
                    wanted.update(name for inner in attribute.g.node for name in inner.input)
        return needed[::-1]

    def _pair(self, edge: str, part: TensorParams) -> str:
        """Return the edge behind the quantize/dequantize pair of an edge; equal pairs are one."""
        if part.bits not in (8, 16):
            raise FormatError(
                f"The format 'onnx_qdq' has no activations of {part.bits} bits",
                where=f"edge {edge!r}",
                expected="8 or 16 bits",
                fix="Use a strategy with 8-bit activations, such as 'Quant_INT8-4', for this target.",
            )
        kind = np.dtype(part.dtype)
        base = f"{edge}/dopt/{part.scale[0]!r}/{part.zero_point[0]}/{part.dtype}"
        if any(node.output[0] == f"{base}/dequantized" for node in self.pairs.get(edge, [])):
            return f"{base}/dequantized"
        constants = [f"{base}/scale", f"{base}/zero_point"]
        values = (np.float32(part.scale[0]), np.asarray(part.zero_point[0], kind))
        self.graph.initializer.extend(
            numpy_helper.from_array(np.asarray(value), name) for name, value in zip(constants, values, strict=True)
        )
        domain = "" if part.bits == 8 else MICROSOFT
        if domain:
            self.domains.add(domain)
        edges = [edge, f"{base}/quantized", f"{base}/dequantized"]
        self.pairs.setdefault(edge, []).extend(
            helper.make_node(kind_, [given, *constants], [made], name=made, domain=domain)
            for kind_, given, made in zip(("QuantizeLinear", "DequantizeLinear"), edges, edges[1:], strict=False)
        )
        return edges[2]

    def _decode(self, layer: LayerParams, part: TensorParams, kind: Any) -> None:
        """Store an initializer as integers, which nodes of its own turn into what it was."""
        name = part.tensor
        tensor = self.initializers.get(name)
        if tensor is None:
            raise self._foreign(layer, f"there is no initializer {name!r}")
        whole = numpy_helper.to_array(tensor)
        values, axis = _rows(whole, part), part.axis if part.group is None else 0
        if values is None or (axis is not None and (values.ndim <= axis or values.shape[axis] != len(part.scale))):
            raise self._foreign(
                layer, f"{name!r} has the shape {whole.shape}, which does not fit {len(part.scale)} scales"
            )
        steps, zero_points = np.asarray(part.scale, np.float32), np.asarray(part.zero_point, kind)
        if axis is None:
            steps, zero_points = steps[0], zero_points[0]
        integers = self._integers(layer, part, values, steps, zero_points, axis)
        made = numpy_helper.from_array(integers, f"{name}/dopt/integers")
        if name in self.decoders:
            if self.decoders[name][2].raw_data == made.raw_data:
                return
            raise FormatError(
                f"The weight {name!r} is shared by layers that quantize it differently",
                where=f"layer {layer.name!r}",
                fix="Give these layers one strategy.",
            )
        constants = [made, numpy_helper.from_array(np.asarray(steps), f"{name}/dopt/scale")]
        if kind != np.int32:  # older versions of ONNX Runtime want zero points that say nothing, too
            constants.append(numpy_helper.from_array(np.asarray(zero_points), f"{name}/dopt/zero_point"))
        options: dict[str, Any] = {} if axis is None else {"axis": axis}
        domain = MICROSOFT if kind.itemsize == 2 else ""
        if domain:
            self.domains.add(domain)
        given = [constant.name for constant in constants]
        made_rows = name if part.group is None else f"{name}/dopt/rows"
        nodes = [
            helper.make_node(
                "DequantizeLinear", given, [made_rows], name=f"{name}/dopt/dequantize", domain=domain, **options
            )
        ]
        if part.group is not None:
            nodes += self._whole(part, made_rows, whole.shape, constants)
        self.decoders[name] = (nodes, constants, made)

    def _whole(self, part: TensorParams, rows: str, shape: tuple[int, ...], constants: list[Any]) -> list[Any]:
        """Return nodes that make a weight of its groups, and add the constants that they need."""
        name = part.tensor
        channels_first = shape if part.axis == 0 else shape[::-1]
        constants.append(numpy_helper.from_array(np.asarray(channels_first, np.int64), f"{name}/dopt/shape"))
        edges = [rows, constants[-1].name]
        if part.axis == 0:
            return [helper.make_node("Reshape", edges, [name], name=f"{name}/dopt/reshape")]
        between = f"{name}/dopt/channels_first"
        return [
            helper.make_node("Reshape", edges, [between], name=f"{name}/dopt/reshape"),
            helper.make_node("Transpose", [between], [name], name=f"{name}/dopt/transpose", perm=[1, 0]),
        ]

    def _integers(
        self,
        layer: LayerParams,
        part: TensorParams,
        values: NDArray[Any],
        steps: Any,
        zero_points: Any,
        axis: int | None,
    ) -> NDArray[Any]:
        shape = [1] * values.ndim
        if axis is not None:
            shape[axis] = -1
        wide_steps, shift = (
            np.asarray(one, np.float64).reshape(shape if axis is not None else ()) for one in (steps, zero_points)
        )
        ratio = values.astype(np.float64) / wide_steps
        rounded = np.rint(ratio)
        signed = part.dtype.startswith("int")
        least, greatest = (
            ((1 << (part.bits - 1)) * -1, (1 << (part.bits - 1)) - 1) if signed else (0, (1 << part.bits) - 1)
        )
        if zero_points.dtype != np.int32:
            if not any(part.zero_point):
                least = max(least, -greatest)  # symmetric
            found = rounded + shift
            on_grid = (np.abs(ratio - rounded) <= OFF_GRID).all()
            if not (on_grid and found.min(initial=least) >= least and found.max(initial=greatest) <= greatest):
                raise self._foreign(layer, f"the values of {part.tensor!r} are not on the layer's grid")
        limits = np.iinfo(zero_points.dtype)
        return np.clip(rounded + shift, limits.min, limits.max).astype(zero_points.dtype)

    def _foreign(self, layer: LayerParams, what: str) -> ParamsError:
        return ParamsError(
            f"The parameter file is not that of the model: {what}",
            where=f"{self.file.name}, layer {layer.name!r}",
            expected="the two files that one export wrote",
            fix="Export the model again.",
        )


def _base(edge: str) -> str:
    """Return what the edges of a pair have in common."""
    return edge.rpartition("/")[0]


def _replace(names: Any, old: str, new: str) -> None:
    for place, name in enumerate(names):
        if name == old:
            names[place] = new


def _attribute(node: Any, name: str, default: Any) -> Any:
    """Return the value of a node's attribute."""
    return next((helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)


def _rows(values: NDArray[Any], part: TensorParams) -> NDArray[Any] | None:
    """Return a tensor with a scale for each index of its axis: as it is, or one row for each group of weights.

    ``None`` if its groups do not fit it.
    """
    if part.group is None:
        return values
    if values.ndim != 2 or part.axis not in (0, 1) or values.shape[1 - part.axis] % part.group:
        return None
    return np.moveaxis(values, part.axis, 0).reshape(-1, part.group)
