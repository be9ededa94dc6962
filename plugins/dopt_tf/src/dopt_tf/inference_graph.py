"""A session's graph as it is in inference: a copy of its nodes, without training and with its conditionals resolved.

Training graphs say by conditionals which part belongs to training. A conditional's branch that normalizes with the
statistics of the batch, or draws random numbers, is one of training; its predicate then has the other value in
inference. Gradients, assignments, savers and summaries, and what feeds nothing but them, are left out. Nothing here
changes the graph itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.compat.v1 import GraphDef, NodeDef
from tensorflow.python.framework.function_def_to_graph import function_def_to_graph_def

__all__ = ["InferenceGraph", "NodeDef", "in_gradients", "is_training_node", "source_of", "split"]

NORMS = ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
_RANDOM = re.compile("Random|Multinomial")
_TRAINING = re.compile(
    "Assign|^Scatter|^ResourceScatter|^Apply|^ResourceApply|^SparseApply|^ResourceSparseApply|^Save|^Restore|"
    "^MergeV2Checkpoints$|Summary|^WriteFile$|Grad$|GradV[23]$|BackpropFilter|^Queue"
)
_GRADIENTS = re.compile(r"(^|/)gradients(_\d+)?/")
_PASSING = ("Identity", "EnsureShape", "Snapshot", "StopGradient", "PreventGradient", "CheckNumerics", "IdentityN")
_IFS = ("If", "StatelessIf")
_SWITCHES = ("Switch", "RefSwitch")
_MERGES = ("Merge", "RefMerge")


def in_gradients(name: str) -> bool:
    """Say whether an operation of this name was made by ``tf.gradients``."""
    return bool(_GRADIENTS.search(name))


def is_training_node(node: NodeDef) -> bool:
    """Say whether a node only belongs to training, saving or monitoring."""
    return in_gradients(node.name) or bool(_TRAINING.search(node.op))


def split(tensor: str) -> tuple[str, int]:
    """Return node and output index of an input as a node writes it: ``"x"``, ``"x:1"``, or ``"^x"`` with index -1."""
    if tensor.startswith("^"):
        return tensor[1:], -1
    name, _, index = tensor.partition(":")
    return name, int(index or 0)


class InferenceGraph:
    """The nodes of a graph in inference.

    Attributes:
        nodes: The nodes by name, in the order of the graph.
        values: The values in inference of the boolean inputs that tell training from inference, by node name.
        library: The functions of the graph, by name.
    """

    def __init__(self, graph_def: GraphDef) -> None:
        """Copy and resolve ``graph_def``."""
        self.library = {function.signature.name: function for function in graph_def.library.function}
        self._library = graph_def.library
        self._versions = graph_def.versions
        self.nodes: dict[str, NodeDef] = {node.name: node for node in graph_def.node}
        self.values: dict[str, bool] = {}
        self._find_values()
        self._drop_training()
        self._inline()
        self._resolve()
        self._users: dict[str, list[tuple[NodeDef, int]]] = {}
        for node in self.nodes.values():
            for i, name in enumerate(node.input):
                if not name.startswith("^"):
                    self._users.setdefault(split(name)[0], []).append((node, i))

    def users(self, name: str) -> list[tuple[NodeDef, int]]:
        """Return the nodes that take any output of a node, each with the index of its input."""
        return self._users.get(name, [])

    def passed(self, tensor: str) -> str:
        """Return the tensor that a chain of identities begins with, as a node writes an input."""
        name, index = split(tensor)
        while name in self.nodes and self.nodes[name].op in _PASSING:
            name, index = split(self.nodes[name].input[index])
        return f"{name}:{index}" if index else name

    def graph_def(self) -> GraphDef:
        """Return the nodes as they are now."""
        return GraphDef(node=self.nodes.values(), library=self._library, versions=self._versions)

    # ---- changing the copy

    def keep(self, outputs: list[str]) -> None:
        """Drop every node that the outputs do not need, and what ties the others to devices and to one another."""
        needed, waiting = set(), list(outputs)
        while waiting:
            name = waiting.pop()
            if name not in needed:
                needed.add(name)
                waiting += _sources(self.nodes[name])
        self.nodes = {name: self.copy(name) for name in list(self.nodes) if name in needed}
        for node in self.nodes.values():
            node.device = ""
            for key in ("_class", "_output_shapes", "_gradient_op_type"):
                node.attr.pop(key, None)

    def copy(self, name: str) -> NodeDef:
        """Replace a node by a copy that may be changed, and return it."""
        copied = NodeDef()
        copied.CopyFrom(self.nodes[name])
        self.nodes[name] = copied
        return copied

    def add_constant(self, name: str, value: NDArray[np.generic]) -> str:
        """Add a constant and return its name, which is ``name`` unless that is taken."""
        node = self._new(name, "Const")
        proto = tf.make_tensor_proto(value)
        node.attr["dtype"].type = proto.dtype
        node.attr["value"].tensor.CopyFrom(proto)
        return str(node.name)

    def add_reshape(self, name: str, tensor: str, shape: tuple[int, ...]) -> str:
        """Add a reshape of a float32 tensor and return its name."""
        node = self._new(name, "Reshape", tensor, self.add_constant(f"{name}/shape", np.array(shape, np.int32)))
        node.attr["T"].type = tf.float32.as_datatype_enum
        node.attr["Tshape"].type = tf.int32.as_datatype_enum
        return str(node.name)

    def add_cast(self, name: str, tensor: str, dtype: int) -> str:
        """Add a cast of a float32 tensor, unless it is of this type already, and return its name."""
        if dtype == tf.float32.as_datatype_enum:
            return tensor
        node = self._new(name, "Cast", tensor)
        node.attr["SrcT"].type = tf.float32.as_datatype_enum
        node.attr["DstT"].type = dtype
        return str(node.name)

    def _new(self, name: str, op: str, *inputs: str) -> NodeDef:
        while name in self.nodes:
            name += "_"
        node = self.nodes[name] = NodeDef(name=name, op=op, input=inputs)
        return node

    # ---- which branch is that of inference

    def _find_values(self) -> None:
        """Fill :attr:`values`."""
        votes: Counter[tuple[str, bool]] = Counter()
        for switch, taken, kind in [*self._switch_branches(), *self._function_branches()]:
            root = self._predicate(switch)
            if root is not None:
                name, negated = root
                votes[name, (taken ^ negated) ^ (kind == "training")] += 1
        for name in {name for name, _ in votes}:
            self.values[name] = votes[name, True] > votes[name, False]
        for node in self.nodes.values():
            if node.op == "PlaceholderWithDefault" and node.name not in self.values:
                default = self.nodes.get(split(node.input[0])[0])
                if (
                    default is not None
                    and default.op == "Const"
                    and node.attr["dtype"].type == tf.bool.as_datatype_enum
                ):
                    self.values[node.name] = bool(tf.make_ndarray(default.attr["value"].tensor))

    def _predicate(self, tensor: str) -> tuple[str, bool] | None:
        """Return the boolean input that a predicate is, and whether it is negated; or ``None``."""
        negated = False
        name, index = split(self.passed(tensor))
        while name in self.nodes and self.nodes[name].op in ("LogicalNot", "Switch"):
            negated ^= self.nodes[name].op == "LogicalNot"
            name, index = split(self.passed(self.nodes[name].input[0]))
        node = self.nodes.get(name)
        if node is None or index or node.op not in ("Placeholder", "PlaceholderWithDefault", "PlaceholderV2"):
            return None
        return name, negated

    def _switch_branches(self) -> Iterator[tuple[str, bool, str]]:
        """Yield predicate, its value and the kind of each branch of ``Switch`` and ``Merge`` that can be told."""
        users: dict[str, list[tuple[NodeDef, int]]] = {}
        for node in self.nodes.values():
            for name in node.input:
                source, index = split(name)
                users.setdefault(source, []).append((node, index))
        for switch in list(self.nodes.values()):
            if switch.op not in _SWITCHES or in_gradients(switch.name):
                continue
            for taken in (False, True):
                waiting = [node for node, index in users.get(switch.name, []) if index == int(taken)]
                seen: set[str] = set()
                while waiting:
                    node = waiting.pop()
                    if node.name in seen or node.op in (*_MERGES, *_SWITCHES):
                        if node.op in _MERGES and self._moments(switch.input[0]):
                            yield switch.input[1], taken, "training"  # the moments of the batch are chosen here
                        continue
                    seen.add(node.name)
                    kind = _kind(node)
                    if kind:
                        yield switch.input[1], taken, kind
                    waiting += [user for user, _ in users.get(node.name, [])]

    def _function_branches(self) -> Iterator[tuple[str, bool, str]]:
        """Yield the same of each ``If`` node."""
        for node in self.nodes.values():
            if node.op not in _IFS or in_gradients(node.name):
                continue
            for taken, key in ((False, "else_branch"), (True, "then_branch")):
                function = self.library[node.attr[key].func.name]
                kinds = {_kind(inner) for inner in function.node_def} - {""}
                returned = set(function.ret.values()) | {
                    name for inner in function.node_def if inner.op in _PASSING for name in inner.input
                }
                arguments = [argument.name for argument in function.signature.input_arg]
                if any(name in returned and self._moments(node.input[1 + i]) for i, name in enumerate(arguments)):
                    kinds.add("training")
                for kind in kinds:
                    yield node.input[0], taken, kind

    def _moments(self, tensor: str) -> bool:
        """Say whether a tensor is a mean over a batch."""
        name, _ = split(self.passed(tensor))
        while name in self.nodes and self.nodes[name].op in ("Squeeze", "Reshape"):
            name, _ = split(self.passed(self.nodes[name].input[0]))
        return name in self.nodes and self.nodes[name].op == "Mean"

    # ---- leaving the other branch out

    def _known(self, tensor: str) -> bool | None:
        """Return the value of a predicate in inference, or ``None`` if it is not known."""
        name, _ = split(self.passed(tensor))
        node = self.nodes.get(name)
        if node is not None and node.op == "Const":
            return bool(tf.make_ndarray(node.attr["value"].tensor))
        root = self._predicate(tensor)
        return None if root is None or root[0] not in self.values else self.values[root[0]] ^ root[1]

    def _inline(self) -> None:
        """Replace each ``If`` whose predicate is known by the nodes of its branch."""
        while True:
            found = [
                (node, known)
                for node in self.nodes.values()
                if node.op in _IFS and (known := self._known(node.input[0])) is not None
            ]
            if not found:
                return
            outputs: dict[str, list[str]] = {}
            nodes = dict(self.nodes)
            for node, known in found:
                body, outputs[node.name] = self._body(node, known)
                nodes.update(body)
            self.nodes = nodes
            for node in list(nodes.values()):
                self._rewire(node, [_through(name, outputs) for name in node.input])
            self._drop_unused({name for node, _ in found for name in _sources(node)})
            self._find_values()

    def _body(self, node: NodeDef, taken: bool) -> tuple[dict[str, NodeDef], list[str]]:
        """Return the nodes that stand for one ``If`` (its branch, and an identity of its own name) and its outputs."""
        function = self.library[node.attr["then_branch" if taken else "else_branch"].func.name]
        body, flat = function_def_to_graph_def(function)
        count = len(function.signature.input_arg)
        arguments = {inner.name: node.input[1 + i] for i, inner in enumerate(body.node[:count])}
        prefix = f"{node.name}/branch"
        while any(f"{prefix}/{inner.name}" in self.nodes for inner in body.node):
            prefix += "_"

        def outer(tensor: str) -> str:
            name, index = split(tensor)
            if index < 0:
                return f"^{split(arguments[name])[0]}" if name in arguments else f"^{prefix}/{name}"
            if name in arguments:
                return str(arguments[name])
            return f"{prefix}/{name}:{index}" if index else f"{prefix}/{name}"

        result: dict[str, NodeDef] = {}
        for inner in body.node[count:]:
            copied = NodeDef()
            copied.CopyFrom(inner)
            copied.name = f"{prefix}/{inner.name}"
            del copied.input[:]
            copied.input.extend(outer(name) for name in inner.input)
            result[copied.name] = copied
        returned = function.signature.output_arg
        outputs = [outer(flat.get(function.ret[arg.name], function.ret[arg.name])) for arg in returned]
        joined = NodeDef(name=node.name, op="NoOp")
        if outputs:
            joined = _identity(node.name, outputs[0], returned[0].type)
        result[node.name] = joined
        return result, outputs

    def _resolve(self) -> None:
        """Replace each ``Switch`` and ``Merge`` whose predicate is known by identities, and drop the dead branches."""
        dead, gone = self._dead()
        fed = {source for name in gone for source in _sources(self.nodes[name])}
        for name in gone:
            del self.nodes[name]
        for node in list(self.nodes.values()):
            if node.op in _MERGES:
                data = [name for name in node.input if not name.startswith("^")]
                alive = [name for name in data if split(name)[0] not in gone and split(name) not in dead]
                if len(alive) == 1 < len(data):
                    self.nodes[node.name] = _identity(node.name, alive[0], node.attr["T"].type)
            elif node.op in _SWITCHES and self._known(node.input[1]) is not None:
                self.nodes[node.name] = _identity(node.name, node.input[0], node.attr["T"].type)
                fed.add(node.name)
        for node in list(self.nodes.values()):
            self._rewire(node, [kept for i in node.input if (kept := self._alive(i, gone))])
        self._drop_unused(fed)
        for name, value in self.values.items():
            constant = NodeDef(name=name, op="Const")
            constant.attr["dtype"].type = tf.bool.as_datatype_enum
            constant.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value))
            self.nodes[name] = constant

    def _dead(self) -> tuple[set[tuple[str, int]], set[str]]:
        """Return the outputs of switches, and the nodes, that no step in inference computes."""
        dead: set[tuple[str, int]] = set()
        gone: set[str] = set()
        for switch in self.nodes.values():
            if switch.op in _SWITCHES and (known := self._known(switch.input[1])) is not None:
                dead.add((switch.name, int(not known)))
        before = -1
        while before != len(gone):  # nodes of functions and of loops need not stand in order
            before = len(gone)
            for node in self.nodes.values():
                dying = [split(name) in dead or split(name)[0] in gone for name in node.input]
                if dying and (all(dying) if node.op in _MERGES else any(dying)):
                    gone.add(node.name)
        return dead, gone

    def _rewire(self, node: NodeDef, inputs: list[str]) -> None:
        """Give a node other inputs, in a copy."""
        if inputs != list(node.input):
            copied = NodeDef()
            copied.CopyFrom(node)
            del copied.input[:]
            copied.input.extend(inputs)
            self.nodes[node.name] = copied

    def _alive(self, tensor: str, gone: set[str]) -> str:
        """Return an input as it reads once switches are identities, or nothing for a lost control input."""
        name, index = split(tensor)
        if index < 0:
            return "" if name in gone else tensor
        node = self.nodes.get(name)
        return name if node is not None and index == 1 and node.op == "Identity" else tensor

    # ---- leaving training out

    def _drop_training(self) -> None:
        """Drop gradients, assignments, summaries and the like."""
        dropped = {node.name for node in self.nodes.values() if is_training_node(node)}
        for name in dropped:
            del self.nodes[name]
        for node in list(self.nodes.values()):
            self._rewire(node, [i for i in node.input if not (i.startswith("^") and i[1:] in dropped)])

    def _drop_unused(self, sources: set[str]) -> None:
        """Drop what only fed branches that are not taken, going back from what did."""
        counts: Counter[str] = Counter(name for node in self.nodes.values() for name in _sources(node))
        waiting = list(sources)
        while waiting:
            name = waiting.pop()
            node = self.nodes.get(name)
            if node is not None and not counts[name] and not node.op.startswith(("Var", "Placeholder")):
                del self.nodes[name]
                for source in _sources(node):
                    counts[source] -= 1
                    waiting.append(source)


def source_of(graph: InferenceGraph, tensor: str) -> NodeDef | None:
    """Return the variable or constant that a tensor is read from, through identities and casts; or ``None``."""
    name, _ = split(graph.passed(tensor))
    while name in graph.nodes and graph.nodes[name].op in ("ReadVariableOp", "Cast", *_PASSING):
        name, _ = split(graph.passed(graph.nodes[name].input[0]))
    node = graph.nodes.get(name)
    return node if node is not None and node.op in ("VarHandleOp", "VariableV2", "Variable", "Const") else None


def _kind(node: NodeDef) -> str:
    """Say whether a node is one of ``training``, of ``inference``, or tells nothing."""
    if node.op in NORMS:
        return "training" if node.attr["is_training"].b else "inference"
    return "training" if _RANDOM.search(node.op) else ""


def _through(tensor: str, outputs: dict[str, list[str]]) -> str:
    """Return an input of a node once some nodes are replaced by what they give."""
    name, index = split(tensor)
    return outputs[name][index] if index > 0 and name in outputs else tensor


def _sources(node: NodeDef) -> set[str]:
    """Return the names of the nodes that a node takes anything from."""
    return {split(tensor)[0] for tensor in node.input}


def _identity(name: str, tensor: str, dtype: int) -> NodeDef:
    node = NodeDef(name=name, op="Identity", input=[tensor])
    node.attr["T"].type = dtype - 100 if dtype > 100 else dtype  # types above 100 are references
    return node
