"""An exported frozen graph as ONNX, with the parameters by the names and axes of that graph.

The conversion is tf2onnx's. So that none of its rewriting touches an integer, it never sees the quantized layers'
weights: they are inputs of the graph while it is converted, and so is traced what it does with each. Biases are taken
out before and given to the layers' nodes afterwards.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tensorflow as tf
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from tensorflow.compat.v1 import NodeDef
from tf2onnx import optimizer, tfonnx

from dopt_api.errors import FormatError, ParamsError
from dopt_api.params import LayerParams, QuantParams, TensorParams
from dopt_tf.export import OUTPUT
from dopt_tf.inference_graph import split
from dopt_tf.layer_kinds import KINDS

__all__ = ["to_onnx"]

OPSET = 15
"""As the PyTorch backend writes."""

_COMPUTES = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_MOVES = ("Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Operators that move the elements of a weight and leave their values alone."""

_PLACEHOLDERS = ("Placeholder", "PlaceholderV2", "PlaceholderWithDefault")

Float32 = NDArray[np.float32]


def to_onnx(model: Path, params: QuantParams, file: Path) -> QuantParams:
    """Write a frozen graph as ONNX and return its parameters for that graph.

    Inputs and outputs keep the names of their tensors (``x:0``) and their layouts, layers' nodes the names of the
    operations, weights and biases the names of their tensors. Weights have ONNX's layouts: ``[O, I, ...]``.

    Args:
        model: The exported ``model.pb``.
        params: Its parameters.
        file: The ONNX file to write.

    Raises:
        ParamsError: The parameters are not those of the model.
        FormatError: The model is no frozen graph, or has operations that ONNX has not.

    Example:
        >>> to_onnx(Path("out/model.pb"), read_params("out/quant_params.json"), Path("model.onnx"))  # doctest: +SKIP
    """
    frozen = _Frozen(model)
    for layer in params.layers:
        frozen.take_out(layer)
    editor = _Editor(frozen.convert(), model)
    layers = tuple(
        editor.settle(layer, frozen.weights[layer.name], frozen.biases.get(layer.name)) for layer in params.layers
    )
    file.write_bytes(editor.finish().SerializeToString(deterministic=True))
    return QuantParams(file.name, tuple(editor.final(layer) for layer in layers))


class _Frozen:
    """A frozen graph from which weights and biases of the quantized layers are taken out.

    Attributes:
        weights: What was taken out, by layer.
        biases: The names of their tensors and their values, by layer.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.weights: dict[str, Float32] = {}
        self.biases: dict[str, tuple[str, Float32]] = {}
        graph = _read(file)
        self.versions = graph.versions
        self.library = graph.library
        self.nodes: dict[str, NodeDef] = {node.name: node for node in graph.node}
        used = {split(name)[0] for node in graph.node for name in node.input if not name.startswith("^")}
        self.outputs = [node.name for node in graph.node if node.name not in used or OUTPUT in node.attr]
        self.inputs = [node.name for node in graph.node if node.op in _PLACEHOLDERS]

    def take_out(self, layer: LayerParams) -> None:
        """Let a layer's weight be an input of the graph, and its output be without its bias."""
        node = self.nodes.get(layer.node)
        if node is None or node.op != layer.op_type or node.op not in KINDS or layer.other_calls:
            raise _foreign(self.file, layer, f"there is no {layer.op_type} {layer.node!r}")
        sources = ["{}:{}".format(*split(name)) for name in node.input]
        if layer.input.tensor not in sources:
            raise _foreign(self.file, layer, f"the node {layer.node!r} has no input {layer.input.tensor!r}")
        if node.attr["T"].type != tf.float32.as_datatype_enum:
            raise FormatError(
                f"The layer {layer.name!r} computes in {tf.as_dtype(node.attr['T'].type).name}",
                where=str(self.file.absolute()),
                expected="layers that compute in float32",
                fix="Use the format 'csv' or 'amct_record', or build the graph in float32.",
            )
        place = next((i for i, name in enumerate(sources) if self._origin(name) == layer.weight.tensor), None)
        if place is None:
            raise _foreign(self.file, layer, f"the node {layer.node!r} has no weight {layer.weight.tensor!r}")
        weight = self.nodes[split(layer.weight.tensor)[0]]
        self.weights[layer.name] = values = tf.make_ndarray(weight.attr["value"].tensor)
        if values.ndim <= (layer.weight.axis or 0):
            raise _foreign(self.file, layer, f"{layer.weight.tensor!r} has the shape {values.shape}")
        self._open(weight, values.shape)
        if node.op == "MatMul" and place == 0:
            node = self._turned(node)
        self._take_bias(layer, node)
        if layer.output is not None and split(layer.output.tensor)[0] not in self.nodes:
            raise _foreign(self.file, layer, f"there is no output {layer.output.tensor!r}")

    def convert(self) -> Any:
        """Return the graph as ONNX, with an input for each weight.

        Raises:
            FormatError: tf2onnx cannot convert it.
        """
        content = tf.compat.v1.GraphDef(versions=self.versions, library=self.library, node=self.nodes.values())
        taken = [f"{node.name}:0" for node in self.nodes.values() if node.op in _PLACEHOLDERS]
        try:
            with _quiet("tf2onnx"), tf.Graph().as_default() as graph, tf.device("cpu"):
                tf.import_graph_def(content, name="")
                made = tfonnx.process_tf_graph(
                    graph, opset=OPSET, input_names=taken, output_names=[f"{name}:0" for name in self.outputs]
                )
                return optimizer.optimize_graph(made).make_model("dopt")
        except Exception as error:  # TensorFlow and tf2onnx raise many kinds
            raise FormatError(
                f"The frozen graph cannot be converted to ONNX: {' '.join(str(error).split())[:400]}",
                where=str(self.file.absolute()),
                expected="operations that tf2onnx knows",
                fix="Use a format that needs no ONNX graph, such as 'csv' or 'amct_record'.",
            ) from error

    def _origin(self, tensor: str) -> str:
        """Return the constant that a tensor has the values of, however shaped."""
        while (node := self.nodes.get(split(tensor)[0])) is not None and node.op in ("Identity", "Reshape"):
            tensor = node.input[0]
        return "{}:{}".format(*split(tensor)) if node is not None and node.op == "Const" else ""

    def _open(self, constant: NodeDef, shape: Sequence[int]) -> None:
        """Make a placeholder of a constant."""
        self._put("Placeholder", constant.name, [], dtype=constant.attr["dtype"])
        self.nodes[constant.name].attr["shape"].shape.CopyFrom(tf.TensorShape(shape).as_proto())

    def _turned(self, node: NodeDef) -> NodeDef:
        """Compute weight times data as the transposition of data times weight, and return the node of that product."""
        product, name = NodeDef(), f"{node.name}/dopt/product"
        product.CopyFrom(node)
        product.name = name
        product.input[:] = node.input[1::-1]
        product.attr["transpose_a"].b = not node.attr["transpose_b"].b
        product.attr["transpose_b"].b = not node.attr["transpose_a"].b
        self.nodes[name] = product
        order = self._put_integers(f"{name}/order", [1, 0])
        self._put("Transpose", node.name, [name, order], T=node.attr["T"], Tperm=tf.int32)
        return product

    def _take_bias(self, layer: LayerParams, node: NodeDef) -> None:
        """Take a layer's bias out; that of a transposed convolution becomes a plain sum.

        For what a transposed convolution does not reach, tf2onnx adds zeros, and these get the bias as well.
        """
        added = self._bias_of(node)
        name = "" if added is None else self._origin(added.input[1])
        if layer.bias is not None and name != layer.bias.tensor:
            raise _foreign(self.file, layer, f"there is no bias {layer.bias.tensor!r}")
        if added is None or not name:
            return
        constant = self.nodes[split(name)[0]]
        values = tf.make_ndarray(constant.attr["value"].tensor)
        self.biases[layer.name] = name, values
        if "Backprop" not in node.op:
            self._put("Identity", added.name, added.input[:1], T=added.attr["T"])
            return
        self._open(constant, values.shape)
        axes = 4 if node.op.startswith("Conv2D") else 5
        shape = [
            -1 if axis == (1 if added.attr["data_format"].s == b"NCHW" else axes - 1) else 1 for axis in range(axes)
        ]
        sizes = self._put_integers(f"{added.name}/dopt/shape", shape)
        shaped = self._put(
            "Reshape", f"{added.name}/dopt/shaped", [added.input[1], sizes], T=added.attr["T"], Tshape=tf.int32
        )
        self._put("AddV2", added.name, [added.input[0], shaped], T=added.attr["T"])

    def _bias_of(self, node: NodeDef) -> NodeDef | None:
        """Return the node that adds a bias to the output channels of a node and that alone takes its output."""
        users = [one for one in self.nodes.values() if node.name in {split(name)[0] for name in one.input}]
        if len(users) != 1 or users[0].op != "BiasAdd" or node.name in self.outputs:
            return None
        along_rows = node.op == "MatMul" and users[0].attr["data_format"].s == b"NCHW"
        return None if along_rows else users[0]

    def _put(self, op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Put a node into the graph, in place of one of its name, and return the name."""
        self.nodes[name] = node = NodeDef(name=name, op=op, input=inputs)
        for key, value in attributes.items():
            if isinstance(value, tf.DType):
                node.attr[key].type = value.as_datatype_enum
            else:
                node.attr[key].CopyFrom(value)
        return name

    def _put_integers(self, name: str, values: Sequence[int]) -> str:
        self._put("Const", name, [], dtype=tf.int32)
        self.nodes[name].attr["value"].tensor.CopyFrom(tf.make_tensor_proto(values, tf.int32))
        return name


def _read(file: Path) -> tf.compat.v1.GraphDef:
    """Read a frozen graph.

    Raises:
        FormatError: It cannot be read, or is empty.
    """
    try:
        graph, reason = tf.compat.v1.GraphDef.FromString(file.read_bytes()), "it has no nodes"
    except Exception as error:  # noqa: BLE001  # protobuf raises many kinds, all of which mean that the file is no good
        graph, reason = None, f"{type(error).__name__}: {error}"
    if graph is None or not graph.node:
        raise FormatError(
            f"The model {file.name!r} cannot be read: {reason}",
            where=str(file.absolute()),
            expected="a frozen graph",
            fix="Export the model again.",
        )
    return graph


class _Editor:
    """A converted graph, whose layers are settled one by one."""

    def __init__(self, model: Any, file: Path) -> None:
        self.model, self.file = model, file
        self.graph = model.graph
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}
        self.fixed = {value.name for value in [*self.graph.input, *self.graph.output]}
        self.names: dict[str, str] = {}  # of edges, in the end

    def settle(self, layer: LayerParams, values: Float32, bias: tuple[str, Float32] | None) -> LayerParams:
        """Put a layer's weight and bias back, name its node, and return its parameters for this graph."""
        node, moves = self._computation(layer)
        axis = layer.weight.axis or 0
        channels = np.broadcast_to(
            np.arange(values.shape[axis], dtype=np.float32).reshape([-1] + [1] * (values.ndim - 1 - axis)), values.shape
        )
        weight, places = (self._moved(moves, layer.weight.tensor, one) for one in (values, channels))
        new_axis = next(
            i for i in range(places.ndim) if places.shape[i] == values.shape[axis] and _varies_along(places, i)
        )
        if bias is not None and node.op_type == "MatMul":
            node.op_type, weight = "Gemm", np.moveaxis(weight, new_axis, 0)
            node.attribute.extend([helper.make_attribute("transB", 1)])
            new_axis = 0
        if bias is not None:
            self._store(*bias)
            if node.op_type != "ConvTranspose":
                node.input.append(bias[0])
        self._store(layer.weight.tensor, weight)
        node.input[1] = layer.weight.tensor
        _explicit_padding(node, weight.ndim - 2)
        self._name(node, layer.node)
        edge = str(node.input[0])
        if edge not in self.fixed and edge not in self.names:
            taken = {*self.fixed, *self.names.values()}
            wanted = (layer.input.tensor, f"{layer.node}/input:0")
            self.names[edge] = next(name for name in wanted if name not in taken)
        return replace(
            layer,
            input=replace(layer.input, tensor=edge),
            output=self._output(layer, node),
            weight=replace(layer.weight, axis=None if layer.weight.axis is None else int(new_axis)),
        )

    def finish(self) -> Any:
        """Remove what nothing takes any more, name the edges, check the graph and return it."""
        live = self._ordered()
        used = dict.fromkeys(name for node in live for name in [*node.input, *_inner_names(node)])
        inputs = [value for value in self.graph.input if value.name not in self.constants]
        tensors = [self.constants[name] for name in used if name in self.constants]
        for field, content in ((self.graph.node, live), (self.graph.input, inputs), (self.graph.initializer, tensors)):
            copies = [type(one).FromString(one.SerializeToString()) for one in content]
            del field[:]
            field.extend(copies)
        del self.graph.value_info[:]
        self._rename()
        self._check()
        return self.model

    def final(self, layer: LayerParams) -> LayerParams:
        """Return a layer's parameters with the final names of its input and output."""
        made = layer.output
        return replace(
            layer,
            input=replace(layer.input, tensor=self.names.get(layer.input.tensor, layer.input.tensor)),
            output=None if made is None else replace(made, tensor=self.names.get(made.tensor, made.tensor)),
        )

    def _output(self, layer: LayerParams, node: Any) -> TensorParams | None:
        """Return a layer's recorded output with its edge here: of its name, or the node's own.

        Where the name is that of the sum with the bias, which is in the node now, it may be gone.
        """
        if layer.output is None:
            return None
        there = any(layer.output.tensor in one.output for one in self.graph.node)
        return replace(layer.output, tensor=layer.output.tensor if there else node.output[0])

    def _computation(self, layer: LayerParams) -> tuple[Any, list[Any]]:
        """Return the node that computes with a layer's weight, and the nodes that move the weight's elements before."""
        edge = layer.weight.tensor
        moves: list[Any] = []
        while len(users := [node for node in self.graph.node if edge in node.input]) == 1:
            (node,) = users
            if node.op_type in _COMPUTES and list(node.input).index(edge) == 1:
                return node, moves
            if node.op_type not in _MOVES:
                break
            moves.append(node)
            edge = node.output[0]
        raise FormatError(
            f"tf2onnx converts the layer {layer.name!r} in a way that is not known here: its weight goes to "
            f"{', '.join(node.op_type for node in users) or 'nothing'}",
            where=str(self.file.absolute()),
            expected=f"one of {', '.join(_COMPUTES)}",
            fix="Set this layer to 'float' in the strategy file, and report it.",
        )

    def _moved(self, moves: Sequence[Any], name: str, values: Float32) -> Float32:
        """Return what moves make of an array that stands on the edge ``name``."""
        if not moves:
            return np.ascontiguousarray(values)
        used = {edge for node in moves for edge in node.input}
        tensors = [tensor for edge, tensor in self.constants.items() if edge in used and edge != name]
        given = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, values.shape)
        out = onnx.ValueInfoProto(name=moves[-1].output[0])
        graph = helper.make_graph(list(moves), "moves", [given], [out], tensors)
        model = helper.make_model(graph, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        (found,) = ReferenceEvaluator(model).run([out.name], {name: np.ascontiguousarray(values)})
        return np.ascontiguousarray(found)

    def _store(self, name: str, values: Float32) -> None:
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        self.fixed.add(name)

    def _name(self, node: Any, name: str) -> None:
        for other in self.graph.node:
            if other is not node and other.name == name:
                other.name = f"{name}/dopt/moved"
        node.name = name

    def _ordered(self) -> list[Any]:
        """Return the nodes on which the outputs depend, each behind those that it takes from.

        tf2onnx's own order, like its names, depends on the process.
        """
        nodes = list(self.graph.node)
        makers = {edge: i for i, node in enumerate(nodes) for edge in node.output}
        ordered: list[Any] = []
        seen: set[int] = set()
        waiting = [(makers[value.name], False) for value in reversed(self.graph.output) if value.name in makers]
        while waiting:
            place, complete = waiting.pop()
            node = nodes[place]
            if complete:
                ordered.append(node)
            elif place not in seen:
                seen.add(place)
                taken = [*node.input, *_inner_names(node)]
                waiting.append((place, True))
                waiting.extend((makers[name], False) for name in reversed(taken) if name in makers)
        return ordered

    def _rename(self) -> None:
        """Name edges after what reads or makes them: tf2onnx's names hold a count of the process."""
        known = {**{name: name for name in self.fixed}, **self.names}
        taken, taken_nodes = set(known.values()), {node.name for node in self.graph.node if not _counted(node.name)}
        for node in self.graph.node:
            if _counted(node.name):
                node.name = _unused(_uncounted(node.name), taken_nodes)
                taken_nodes.add(node.name)
            for place, name in enumerate([*node.input, *node.output]):
                if name and name not in known:  # equal constants are one, with the name of any
                    wanted = f"{node.name}/constant_{place}" if name in self.constants else _uncounted(name)
                    known[name] = _unused(wanted, taken)
                    taken.add(known[name])
        self.names = known
        for node in self.graph.node:
            _rename_edges(node, known)
        for tensor in self.graph.initializer:
            tensor.name = known.get(tensor.name, tensor.name)
        for value in [*self.graph.input, *self.graph.output]:
            for place, size in enumerate(value.type.tensor_type.shape.dim):
                if size.dim_param:
                    size.dim_param = "batch" if place == 0 else f"{split(value.name)[0]}/{place}"

    def _check(self) -> None:
        """Check the graph.

        Raises:
            FormatError: It has operations that ONNX has not, or is not valid.
        """
        known = {one.domain: one.version for one in self.model.opset_import}
        missing = sorted(
            {
                node.op_type
                for node in self.graph.node
                if node.domain in ("", "ai.onnx") and not _exists(node.op_type, known.get(node.domain, OPSET))
            }
        )
        try:
            if not missing:
                onnx.checker.check_model(self.model)
                return
            reason = f"ONNX has no {', '.join(missing)}"
        except onnx.checker.ValidationError as error:
            reason = " ".join(str(error).split())[:400]
        raise FormatError(
            f"The frozen graph cannot be converted to ONNX: {reason}",
            where=str(self.file.absolute()),
            expected="operations that tf2onnx knows",
            fix="Use a format that needs no ONNX graph, such as 'csv' or 'amct_record'.",
        )


def _explicit_padding(node: Any, axes: int) -> None:
    """Say how many zeros a convolution without strides adds, where sizes of data are open."""
    options = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    if options.get("auto_pad") != b"SAME_UPPER" or set(options.get("strides", [1])) != {1} or node.op_type != "Conv":
        return
    reach = [(k - 1) * d for k, d in zip(options["kernel_shape"], options.get("dilations", [1] * axes), strict=True)]
    pads = [one // 2 for one in reach] + [one - one // 2 for one in reach]
    kept = [one for one in node.attribute if one.name not in ("auto_pad", "pads")]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("pads", pads)])


def _varies_along(places: Float32, axis: int) -> bool:
    """Say whether an array holds the index of one of its axes."""
    shape = [1] * places.ndim
    shape[axis] = -1
    return bool((places == np.arange(places.shape[axis], dtype=np.float32).reshape(shape)).all())


def _exists(op_type: str, version: int) -> bool:
    try:
        onnx.defs.get_schema(op_type, version)
    except onnx.defs.SchemaError:
        return False
    return True


def _inner_names(node: Any) -> Iterator[str]:
    """Yield the names that the subgraphs of a node may take from outside."""
    for attribute in node.attribute:
        for inner in attribute.g.node if attribute.HasField("g") else ():
            yield from inner.input
            yield from _inner_names(inner)


def _rename_edges(node: Any, names: Mapping[str, str]) -> None:
    """Rename the edges of a node and those that its subgraphs take from outside."""
    for field in (node.input, node.output):
        field[:] = [names.get(name, name) for name in field]
    for attribute in node.attribute:
        for inner in attribute.g.node if attribute.HasField("g") else ():
            _rename_edges(inner, names)


_COUNT = re.compile(r"__\d+")


def _counted(name: str) -> bool:
    return _COUNT.search(name) is not None


def _uncounted(name: str) -> str:
    """Return a name without the numbers that tf2onnx puts into it, which depend on what the process did before."""
    return _COUNT.sub("", name)


def _unused(base: str, taken: set[str]) -> str:
    name, number = base, 0
    while name in taken:
        number += 1
        name = f"{base}__{number}"
    return name


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Keep a logger's remarks from the user."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _foreign(file: Path, layer: LayerParams, what: str) -> ParamsError:
    return ParamsError(
        f"The parameter file is not that of the model: {what}",
        where=f"{file.name}, layer {layer.name!r}",
        expected="the two files that one export wrote",
        fix="Export the model again.",
    )
