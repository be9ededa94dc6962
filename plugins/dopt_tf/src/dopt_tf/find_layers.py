"""What is in a graph: its layers in order, what cannot be quantized and why, and what can be folded."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tensorflow as tf

from dopt_api.errors import ModelError
from dopt_api.types import LayerInfo, ModelLayers
from dopt_tf.inference_graph import NORMS, InferenceGraph, NodeDef, in_gradients, source_of, split
from dopt_tf.layer_kinds import KINDS, Layout, channelwise_shape, layout_of

__all__ = ["Layer", "Norm", "Structure", "find_layers", "graph_of", "output_readers", "quantization_of"]

_FROM_VARIABLE = (
    *("Identity", "ReadVariableOp", "Cast", "Reshape", "ExpandDims", "Squeeze", "Transpose", "ConcatV2", "Concat"),
    *("Snapshot", "StopGradient", "PreventGradient", "Enter", "RefEnter", "Switch", "RefSwitch"),
)
_SUMS = ("Add", "AddV2")
_VARIABLES = ("VarHandleOp", "VariableV2", "Variable")
_FLOATS = (tf.float32, tf.float16, tf.bfloat16, tf.float64)

_IN_BRANCH = "it stands in a branch of a conditional, where it cannot be rewritten"
_IN_LOOP = "it stands in the body of a loop, whose passes would share one range"
_PRODUCT = "a product of two activations is not quantized in this version"
_BATCHED = "batched products are not quantized in this version"
_SPARSE = "sparse products are not quantized in this version"
_RECURRENT = "recurrent layers are not quantized in this version"
_OTHERS = {
    **dict.fromkeys(("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum"), _BATCHED),
    **dict.fromkeys(("SparseMatMul", "SparseTensorDenseMatMul"), _SPARSE),
    **dict.fromkeys(("CudnnRNN", "CudnnRNNV2", "CudnnRNNV3"), _RECURRENT),
    **dict.fromkeys(("LSTMBlockCell", "BlockLSTM", "BlockLSTMV2", "GRUBlockCell"), _RECURRENT),
}


@dataclass(frozen=True)
class Norm:
    """A batch normalization that is folded into a layer: the tensors that it reads, as nodes write their inputs.

    Attributes:
        node: The last node of the normalization.
        gamma: Scale, or ``None``.
        beta: Shift, or ``None``.
        mean: Running mean.
        variance: Running variance.
        epsilon: What is added to the variance.
    """

    node: str
    gamma: str | None
    beta: str | None
    mean: str
    variance: str
    epsilon: float


@dataclass(frozen=True)
class Layer:
    """One layer in inference.

    Attributes:
        name: Name of the operation.
        layout: How it is laid out.
        weight: The tensor of its weight.
        bias: The tensor of the bias that is added to its output, or ``None``.
        norm: The batch normalization after it, or ``None``.
        last: The node that bias and normalization end with, or the operation itself.
        bias_node: The node that adds the bias, or ``None``.
    """

    name: str
    layout: Layout
    weight: str
    bias: str | None
    norm: Norm | None
    last: str
    bias_node: str | None = None

    def without(self, outputs: Container[str]) -> Layer:
        """Return the layer as far as it can be folded where these nodes are outputs themselves."""
        if self.name in outputs:
            return replace(self, bias=None, norm=None, last=self.name)
        if self.norm is not None and self.bias_node is not None and self.bias_node in outputs:
            return replace(self, norm=None, last=self.bias_node)
        return self


@dataclass(frozen=True)
class Structure:
    """What is known of a graph.

    Attributes:
        graph: The graph in inference.
        layers: Every layer that can be quantized, by name.
    """

    graph: InferenceGraph
    layers: dict[str, Layer]


def find_layers(sess: Any, input_shape: str | None) -> ModelLayers:
    """List what is in the graph of a session; nothing is run and nothing changed.

    Args:
        sess: The session that holds the float graph.
        input_shape: Not looked at: a graph knows its shapes, and a strategy file may have been written for a framework
            that needs it.

    Raises:
        ModelError: The graph is already quantized.
    """
    del input_shape
    graph = graph_of(sess)
    if quantization_of(graph) is not None:
        raise ModelError(
            "The graph is already quantized",
            where=f"graph of {type(sess).__name__}",
            expected="a float graph",
            fix="Build the float graph anew, in a new tf.Graph and session, and pass that session.",
        )
    return _list(graph)


def graph_of(sess: Any) -> tf.Graph:
    """Return the graph of a session."""
    return sess.graph


def quantization_of(graph: tf.Graph) -> Any:
    """Return what :func:`dopt_tf.optimize.optimize` keeps of a graph, or ``None`` for a float graph."""
    return getattr(graph, "dopt_quantization", None)


def output_readers(inference: InferenceGraph, layer: Layer) -> tuple[list[tuple[NodeDef, int]], str | None]:
    """Return what reads a layer's output, with the index of the input, and the rectifier if that alone does."""
    name, users = layer.last, inference.users(layer.last)
    while len(users) == 1 and users[0][0].op in ("Identity", "EnsureShape") and inference.users(users[0][0].name):
        name = users[0][0].name
        users = inference.users(name)
    readers = [(node, index) for node, index in users if split(node.input[index]) == (name, 0)]
    alone = readers[0][0].op if len(readers) == 1 else None
    return readers, alone if alone in ("Relu", "Relu6") else None


def _list(graph: tf.Graph) -> ModelLayers:
    graph_def = graph.as_graph_def()
    inference = InferenceGraph(graph_def)
    by_name = {node.name: node for node in graph_def.node}
    inner = _inside(graph_def)
    infos, refused, layers = [], [], {}
    for node in graph_def.node:
        if in_gradients(node.name) or node.op not in (*KINDS, *_OTHERS):
            continue
        weight, reason = _weight(by_name, node) if node.op in KINDS else (0, _OTHERS[node.op])
        reason = inner.get(node.name, reason)
        if reason:
            refused.append(LayerInfo(node.name, node.op, (), reason))
        elif node.name in inference.nodes:
            layers[node.name] = _layer(graph, inference, inference.nodes[node.name], weight)
            infos.append(LayerInfo(node.name, node.op, weight_only=True))
    refused += _in_functions(inference)
    return ModelLayers(tuple(infos), tuple(refused), _notes(inference, layers), Structure(inference, layers))


def _notes(inference: InferenceGraph, layers: dict[str, Layer]) -> tuple[str, ...]:
    folded = {layer.norm.node for layer in layers.values() if layer.norm}
    norms = [node for node in inference.nodes.values() if node.op in NORMS and node.name not in folded]
    left = [node.name for node in norms if not node.attr["is_training"].b]
    training = [node.name for node in norms if node.attr["is_training"].b]
    notes = []
    if left:
        notes.append(f"Batch normalizations that stay, because no layer alone feeds them: {', '.join(left)}")
    if training:
        notes.append(
            "Batch normalizations that use the statistics of the batch in this graph and so cannot be folded; "
            f"export from a graph that is built for inference: {', '.join(training)}"
        )
    return tuple(notes)


def _inside(graph_def: tf.compat.v1.GraphDef) -> dict[str, str]:
    """Return the reason for each node inside a branch or a loop that stays float."""
    depths: dict[str, tuple[int, int]] = {}
    loops = {node.name for node in graph_def.node if node.op == "LoopCond"}
    repeated = {node.name for node in graph_def.node if node.op in ("NextIteration", "RefNextIteration")}

    for _ in range(100):  # a switch may stand behind what it feeds
        before = dict(depths)
        for node in graph_def.node:
            names = [split(name)[0] for name in node.input]
            given = [depths.get(name, (0, 0)) for name in names] or [(0, 0)]
            branch, loop = max(depth[0] for depth in given), max(depth[1] for depth in given)
            if node.op in ("Switch", "RefSwitch"):
                branch += split(node.input[1])[0] not in loops
            elif node.op in ("Merge", "RefMerge"):
                branch -= not repeated.intersection(names)
            elif node.op in ("Enter", "RefEnter"):
                loop += 1
            elif node.op in ("Exit", "RefExit"):
                loop -= 1
            depths[node.name] = max(branch, 0), max(loop, 0)
        if before == depths:
            break
    inside = {name: depth for name, depth in depths.items() if depth != (0, 0)}
    return {name: _IN_LOOP if loop else _IN_BRANCH for name, (_, loop) in inside.items()}


def _in_functions(inference: InferenceGraph) -> list[LayerInfo]:
    """List what stands inside the functions that the graph calls: bodies of loops, branches, ``tf.function``."""
    called: set[tuple[str, str]] = set()
    waiting = [(node.name, node) for node in inference.nodes.values()]
    found = []
    while waiting:
        place, node = waiting.pop(0)
        for value in node.attr.values():
            for name in [value.func.name, *(function.name for function in value.list.func)]:
                if name in inference.library and (place, name) not in called:
                    called.add((place, name))
                    waiting += [(f"{place}/{inner.name}", inner) for inner in inference.library[name].node_def]
        if "/" in place and node.name != place and node.op in (*KINDS, *_OTHERS):
            outer = place[: -len(node.name) - 1]
            reason = f"it stands inside the function that {outer!r} calls as a whole"
            found.append(LayerInfo(place, node.op, (), reason))
    return found


def _weight(nodes: dict[str, NodeDef], node: NodeDef) -> tuple[int, str]:
    """Return which input of an operation is its weight, or the reason why none is."""
    dtype = tf.as_dtype(node.attr["T"].type)
    if dtype not in _FLOATS:
        return 0, f"its type is {dtype.name}"
    candidates = (1, 0) if node.op == "MatMul" else (KINDS[node.op].weight,)
    strange = {index: _strange(nodes, node.input[index]) for index in candidates}
    usable = [index for index in candidates if strange[index] is None]
    if len(usable) == 2:
        return 0, "both of its operands are weights"
    if usable:
        return usable[0], ""
    if all(_fed(nodes, node.input[index]) for index in candidates):
        kind = "matrices" if node.op == "MatMul" else "the input and the weight"
        return 0, _PRODUCT if node.op == "MatMul" else f"{kind} are both activations"
    culprit = next(strange[index] for index in candidates if not _fed(nodes, node.input[index]))
    return 0, f"its weight is computed at run time (by {culprit!r}, a {nodes[culprit or ''].op})"


def _strange(nodes: dict[str, NodeDef], tensor: str) -> str | None:
    """Return the first node, on the way back to variables and constants, that is neither; ``None`` if there is none."""
    waiting, seen = [split(tensor)[0]], set()
    while waiting:
        name = waiting.pop()
        node = nodes[name]
        if name in seen or node.op in (*_VARIABLES, "Const"):
            continue
        seen.add(name)
        if node.op not in _FROM_VARIABLE:
            return name
        data = [split(other)[0] for other in node.input if not other.startswith("^")]
        waiting += data[:1] if node.op in ("Switch", "RefSwitch") else data
    return None


def _fed(nodes: dict[str, NodeDef], tensor: str) -> bool:
    """Say whether a tensor depends on what is fed or read into the graph."""
    waiting, seen = [split(tensor)[0]], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        node = nodes[name]
        if node.op.startswith(("Placeholder", "Iterator", "Queue", "Read", "Decode")) and node.op != "ReadVariableOp":
            return True
        waiting += [split(other)[0] for other in node.input if not other.startswith("^")]
    return False


def _layer(graph: tf.Graph, inference: InferenceGraph, node: NodeDef, weight: int) -> Layer:
    """Follow what comes after an operation as far as it can be folded into it."""
    layout = layout_of(node, weight)
    name, index = split(node.input[weight])
    shape = graph.get_tensor_by_name(f"{name}:{index}").shape
    channels = channelwise_shape(shape.as_list(), layout)[layout.weight_axis] if shape.is_fully_defined() else None
    bias, bias_node, norm, last = None, None, None, node.name
    if layout.output_axis == 0 or channels is None:
        return Layer(node.name, layout, node.input[weight], None, None, last)
    after = _next(inference, last)
    if after is not None and (added := _bias(inference, after, last, layout, int(channels))) is not None:
        bias, last = added, after.name
        bias_node = last
        after = _next(inference, last)
    if after is not None and (norm := _norm(inference, after, last)) is not None:
        last = norm.node
    return Layer(node.name, layout, node.input[weight], bias, norm, last, bias_node)


def _next(inference: InferenceGraph, name: str) -> NodeDef | None:
    """Return the only node that takes what a node gives, past identities; or ``None``."""
    users = inference.users(name)
    while len(users) == 1 and users[0][0].op in ("Identity", "EnsureShape"):
        name = users[0][0].name
        users = inference.users(name)
    return users[0][0] if len({user.name for user, _ in users}) == 1 == len(users) else None


def _bias(inference: InferenceGraph, node: NodeDef, before: str, layout: Layout, channels: int) -> str | None:
    """Return the bias that a node adds to what comes from ``before``, or ``None``."""
    if node.op not in ("BiasAdd", "BiasAddV1", "Add", "AddV2"):
        return None
    mine = [split(inference.passed(name))[0] == before for name in node.input[:2]]
    other = node.input[0 if mine[1] else 1]
    if node.op.startswith("BiasAdd") and mine[1]:
        return None
    source = source_of(inference, other)
    if source is None or _strange(inference.nodes, other) is not None:
        return None
    shape = _shape(source)
    trailing = 0 if layout.output_axis == -1 or node.op.startswith("BiasAdd") else 2
    wanted = [channels, *[1] * trailing]
    leading = shape[: -len(wanted)] if shape else [0]
    return other if shape[-len(wanted) :] == wanted and all(size == 1 for size in leading) else None


def _shape(node: NodeDef) -> list[int]:
    """Return the static shape of a variable or constant."""
    if node.op == "Const":
        return [dim.size for dim in node.attr["value"].tensor.tensor_shape.dim]
    return [dim.size for dim in node.attr["shape"].shape.dim]


def _norm(inference: InferenceGraph, node: NodeDef, before: str) -> Norm | None:
    """Return the batch normalization that begins with a node, or ``None``."""
    if split(inference.passed(node.input[0]))[0] != before and node.op in NORMS:
        return None
    found = _fused(node) if node.op in NORMS else _unfused(inference, node, before)
    if found is None:
        return None
    parts = [part for part in (found.gamma, found.beta, found.mean, found.variance) if part is not None]
    return found if all(source_of(inference, part) is not None for part in parts) else None


def _fused(node: NodeDef) -> Norm | None:
    if node.attr["is_training"].b:
        return None
    gamma, beta, mean, variance = node.input[1:5]
    return Norm(node.name, gamma, beta, mean, variance, _decimal(node.attr["epsilon"].f))


def _unfused(inference: InferenceGraph, node: NodeDef, before: str) -> Norm | None:
    """Match ``x * m + (beta - mean * m)`` with ``m = rsqrt(variance + epsilon) * gamma``."""
    add = _next(inference, node.name) if node.op == "Mul" else None
    factor = _other(inference, node, before)
    if add is None or add.op not in _SUMS or factor is None:
        return None
    shift = _other(inference, add, node.name)
    scale, shifted = _scale(inference, factor), _shift(inference, shift, factor)
    if scale is None or shifted is None:
        return None
    (gamma, variance, epsilon), (beta, mean) = scale, shifted
    return Norm(add.name, gamma, beta, mean, variance, epsilon)


def _scale(inference: InferenceGraph, factor: str) -> tuple[str | None, str, float] | None:
    """Return gamma, variance and epsilon of ``rsqrt(variance + epsilon) * gamma``, or ``None``."""
    gamma, root = None, _made(inference, factor, "Rsqrt")
    product = _made(inference, factor, "Mul")
    if product is not None:
        first, second = product.input[:2]
        root, gamma = _made(inference, first, "Rsqrt"), second
        if root is None:
            root, gamma = _made(inference, second, "Rsqrt"), first
    inner = None if root is None else _made(inference, root.input[0], *_SUMS)
    if inner is None:
        return None
    for variance, added in (inner.input[:2], inner.input[1::-1]):
        epsilon = _made(inference, added, "Const")
        if epsilon is not None:
            return gamma, variance, _decimal(tf.make_ndarray(epsilon.attr["value"].tensor))
    return None


def _shift(inference: InferenceGraph, shift: str | None, factor: str) -> tuple[str | None, str] | None:
    """Return beta and mean of ``beta - mean * factor`` or of ``-(mean * factor)``, or ``None``."""
    difference = None if shift is None else _made(inference, shift, "Sub", "Neg")
    product = None if difference is None else _made(inference, difference.input[-1], "Mul")
    if difference is None or product is None:
        return None
    passed = [inference.passed(name) for name in product.input[:2]]
    if factor not in passed:
        return None
    return difference.input[0] if difference.op == "Sub" else None, passed[1 - passed.index(factor)]


def _made(inference: InferenceGraph, tensor: str, *ops: str) -> NodeDef | None:
    """Return the node that makes a tensor, past identities, if it is one of these operations."""
    found = inference.nodes.get(split(inference.passed(tensor))[0])
    return found if found is not None and found.op in ops else None


def _other(inference: InferenceGraph, node: NodeDef, one: str) -> str | None:
    """Return the operand of a node that does not come from ``one``, past identities."""
    passed = [inference.passed(name) for name in node.input[:2]]
    return next((name for name in passed if split(name)[0] != one), None)


def _decimal(value: Any) -> float:
    """Return the shortest decimal that reads as a float32: the number that was written in the program."""
    return float(str(np.float32(value)))
