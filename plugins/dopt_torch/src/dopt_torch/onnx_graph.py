"""Finding the quantized layers in an exported ONNX graph, and giving them the same names on every torch version.

Names that the exporter makes up differ between versions. Each quantized layer's weight therefore passes through a
mark, a node that carries the layer's index; the mark is removed here, and the layer's node, weight, bias and input
edge are named after its module path.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from dopt_api.errors import ModelError

__all__ = ["MARK", "GraphEditor", "Place", "mark_value"]

MARK = "LeakyRelu"
"""The operator of a mark: standard, of one input and output, left alone by the exporter, with a number to carry."""

_COMPUTES = ("Conv", "ConvTranspose", "Gemm", "MatMul")

_RECTIFIERS = ("Relu", "Clip")

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Place:
    """Where a layer is in the graph: its calls as (node, input edge), and the names and axis of its tensors.

    ``outputs`` has the edge of each call's output, where that is recorded.
    """

    calls: tuple[tuple[str, str], ...]
    weight_tensor: str
    weight_axis: int
    bias_tensor: str | None
    outputs: tuple[str, ...] = ()


def mark_value(index: int) -> float:
    """Return the number that a mark carries for a layer: negative, as no activation function has it."""
    return -1.0 - index


class GraphEditor:
    """An ONNX graph whose marks are resolved layer by layer with :meth:`settle`, then :meth:`finish`."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.constants: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.makers = {name: i for i, node in enumerate(self.nodes) for name in node.output}
        self.users: dict[str, list[int]] = defaultdict(list)
        for i, node in enumerate(self.nodes):
            for name in node.input:
                self.users[name].append(i)
        self.settled: set[str] = set()
        self.smoothed: dict[tuple[int | str, bytes], NodeProto] = {}
        self.node_names = {node.name for node in self.nodes}
        # names that mean something outside of the nodes' own list, and so stay
        self.fixed = {value.name for value in [*model.graph.input, *model.graph.output]}
        for node in self.nodes:
            self.fixed.update(_inner_names(node))
        self.marks: dict[float, list[int]] = defaultdict(list)
        for i, node in enumerate(self.nodes):
            if node.op_type == MARK and self._is_constant(node.input[0]):
                self.marks[node.attribute[0].f].append(i)

    def settle(
        self,
        index: int,
        path: str,
        weight: Float32,
        bias: Float32 | None,
        axis: int,
        *,
        smoothed: bool = False,
        recorded: bool = False,
        rectified: bool = False,
    ) -> Place | None:
        """Resolve the marks of one layer and name what belongs to it.

        Args:
            index: The layer's index, as marked.
            path: The layer's module path.
            weight: Its weight on the grid, in the layout of the module.
            bias: Its bias, or ``None``.
            axis: The output channels' axis of ``weight``.
            smoothed: Whether its input is multiplied by smoothing factors.
            recorded: Whether its output is quantized.
            rectified: Whether what is quantized is what the rectifier behind it makes.

        Returns:
            Where the layer is; ``None`` if the graph does without it, since no output depends on it.

        Raises:
            ModelError: The graph computes the layer in a way that is not known here.
        """
        found = sorted(self._computation(mark, path) for mark in self.marks[mark_value(index)])
        if not found:
            return None
        prefix = f"{path}." if path else ""
        calls, names = [], []
        bias_tensor = None
        for position, transposed in found:
            node = self.nodes[position]
            both_ways = transposed != found[0][1]  # called as Gemm and as MatMul: two layouts of one weight
            names.append(self._put(f"{prefix}weight{'.transposed' * both_ways}", weight.T if transposed else weight))
            node.input[1] = names[-1]
            if smoothed:
                self._share_smoothing(node, f"{prefix}smoothing")
            if bias is not None:
                bias_tensor = self._put(f"{prefix}bias", bias)
                self._set_bias(node, bias_tensor, path)
            calls.append((self._name_node(node, path), self._name_input(node, path)))
        return Place(
            calls=tuple(calls),
            weight_tensor=names[0],
            weight_axis=1 - axis if found[0][1] else axis,
            bias_tensor=bias_tensor,
            outputs=tuple(self._name_output(at, path, bias is not None, rectified) for at, _ in found if recorded),
        )

    def finish(self) -> ModelProto:
        """Remove what is no longer used, check the graph and return it."""
        graph = self.model.graph
        needed = {value.name for value in graph.output}
        live: list[NodeProto] = []
        for node in reversed(self.nodes):
            if not needed.isdisjoint(node.output):
                needed.update(node.input, _inner_names(node))
                live.append(node)
        live.reverse()
        edges = {name for node in live for name in node.output}
        infos = [info for info in graph.value_info if info.name in edges]
        constants = [tensor for name, tensor in self.constants.items() if name in needed]
        for field, values in ((graph.node, live), (graph.value_info, infos), (graph.initializer, constants)):
            kept = [type(value).FromString(value.SerializeToString()) for value in values]
            del field[:]
            field.extend(kept)
        try:
            onnx.checker.check_model(self.model)
        except onnx.checker.ValidationError as error:
            raise ModelError(
                f"The exported graph is not valid ONNX: {' '.join(str(error).split())[:400]}",
                fix="Try torch.onnx.export on the float model alone; if that works, report this.",
            ) from error
        return self.model

    def _computation(self, mark: int, path: str) -> tuple[int, bool]:
        """Return the position of the node that computes with a marked weight, and whether it takes it transposed."""
        name, transposed = self.nodes[mark].output[0], False
        while len(self.users[name]) == 1:
            position = self.users[name][0]
            node = self.nodes[position]
            if node.op_type in _COMPUTES and node.input[1] == name:
                return position, transposed
            if node.op_type == "Transpose" and len(node.attribute[0].ints) == 2:
                transposed = not transposed
            elif node.op_type != "Identity":
                break
            name = node.output[0]
        found = ", ".join(self.nodes[i].op_type for i in self.users[name]) or "nothing"
        raise ModelError(
            f"The exported graph uses the weight of layer {path!r} in a way that is not known ({found})",
            where=f"module {path!r}",
            expected=f"one of {', '.join(_COMPUTES)}",
            fix="Set this layer to 'float' in the strategy file, and report it.",
        )

    def _put(self, wanted: str, values: Float32) -> str:
        """Add an initializer and return its name; what the exporter called so, if anything else uses it, is renamed."""
        name = _unused(wanted, self.fixed)
        if name not in self.settled:
            taken = {*self.fixed, *self.makers, *self.constants}
            if name in self.makers or name in self.constants:
                self._rename(name, _unused(f"{name}.float", taken))
            self.settled.add(name)
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def _set_bias(self, node: NodeProto, name: str, path: str) -> None:
        if node.op_type != "MatMul":
            del node.input[2:]
            node.input.append(name)
            return
        for user in self.users[node.output[0]]:  # a linear layer on more than two dimensions: MatMul, then Add
            add = self.nodes[user]
            for position, value in enumerate(add.input):
                if add.op_type == "Add" and self._is_constant(value):
                    add.input[position] = name
                    return
        raise ModelError(
            f"The exported graph has no bias for layer {path!r}, which got one from its batch normalization",
            where=f"module {path!r}",
            expected="a layer whose forward uses its 'bias'",
            fix="Let its forward pass self.bias on.",
        )

    def _share_smoothing(self, node: NodeProto, name: str) -> None:
        """Let layers whose common input is multiplied by the same factors share that multiplication."""
        edge = node.input[0]
        mul = self.nodes[self.makers[edge]] if edge in self.makers else None
        if mul is None or mul.op_type != "Mul" or not self._is_constant(mul.input[1]):
            return
        source, factors = mul.input[0], self._constant(mul.input[1])
        first = self.smoothed.setdefault((self.makers.get(source, source), factors.tobytes()), mul)
        if first is mul:
            mul.input[1] = self._put(name, factors)
            return
        node.input[0] = first.output[0]
        reader = next(i for i, one in enumerate(self.nodes) if one is node)
        self.users[edge].remove(reader)
        self.users[first.output[0]].append(reader)

    def _name_node(self, node: NodeProto, path: str) -> str:
        self.node_names.discard(node.name)
        node.name = _unused(_scoped(path, node.op_type), self.node_names)
        self.node_names.add(node.name)
        return node.name

    def _name_input(self, node: NodeProto, path: str) -> str:
        """Name the input edge after the first layer that reads it, unless it has a name that means something."""
        old = str(node.input[0])
        if old in self.fixed or old not in self.makers:
            return old
        new = _unused(_scoped(path, "input"), {*self.fixed, *self.makers, *self.constants} - {old})
        self._rename(old, new)
        self.fixed.add(new)
        return new

    def _name_output(self, position: int, path: str, biased: bool, rectified: bool) -> str:
        """Name the edge after which a layer's output is quantized: behind its bias, and behind its rectifier."""
        edge = str(self.nodes[position].output[0])
        after = self._only_reader(edge)
        if biased and self.nodes[position].op_type == "MatMul" and after is not None and after.op_type == "Add":
            edge = str(after.output[0])
            after = self._only_reader(edge)
        if rectified and after is not None and after.op_type in _RECTIFIERS:
            edge = str(after.output[0])
        if edge in self.fixed:
            return edge
        new = _unused(_scoped(path, "output"), {*self.fixed, *self.makers, *self.constants} - {edge})
        self._rename(edge, new)
        self.fixed.add(new)
        return new

    def _only_reader(self, edge: str) -> NodeProto | None:
        """Return the node that alone reads an edge, or ``None``."""
        outputs = {value.name for value in self.model.graph.output}
        users = self.users[edge]
        return self.nodes[users[0]] if len(users) == 1 and edge not in outputs else None

    def _rename(self, old: str, new: str) -> None:
        """Give an edge or an initializer another name."""
        self.users[new] = self.users.pop(old, [])
        fields = [self.nodes[i].input for i in self.users[new]]
        if old in self.constants:
            tensor = self.constants[new] = self.constants.pop(old)
            tensor.name = new
        if old in self.makers:
            maker = self.makers[new] = self.makers.pop(old)
            fields.append(self.nodes[maker].output)
        for field in fields:
            for position, name in enumerate(field):
                if name == old:
                    field[position] = new
        for info in self.model.graph.value_info:
            if info.name == old:
                info.name = new

    def _is_constant(self, name: str) -> bool:
        """Say whether an edge is an initializer, or one passed on."""
        return self._origin(name) in self.constants

    def _constant(self, name: str) -> Float32:
        """Return the values of such an edge."""
        return numpy_helper.to_array(self.constants[self._origin(name)])

    def _origin(self, name: str) -> str:
        while name in self.makers and self.nodes[self.makers[name]].op_type == "Identity":
            name = self.nodes[self.makers[name]].input[0]
        return name


def _scoped(path: str, name: str) -> str:
    return f"/{path.replace('.', '/')}/{name}" if path else f"/{name}"


def _unused(base: str, taken: Container[str]) -> str:
    name, number = base, 0
    while name in taken:
        number += 1
        name = f"{base}_{number}"
    return name


def _inner_names(node: NodeProto) -> Iterator[str]:
    """Yield the names that the subgraphs of a node (bodies of If and Loop) may take from outside."""
    for attribute in node.attribute:
        for inner in attribute.g.node if attribute.HasField("g") else ():
            yield from inner.input
            yield from _inner_names(inner)
