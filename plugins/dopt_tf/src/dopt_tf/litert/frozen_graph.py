"""An exported frozen graph: its inputs and outputs, and where its layers end."""

from __future__ import annotations

from pathlib import Path

from tensorflow.compat.v1 import GraphDef, NodeDef

from dopt_api.errors import FormatError, ParamsError
from dopt_api.params import LayerParams
from dopt_tf.inference_graph import split

__all__ = ["FrozenGraph", "edge"]

_ADDITIONS, _ACTIVATIONS = ("BiasAdd", "Add", "AddV2"), ("Relu", "Relu6")


class FrozenGraph:
    """A frozen graph.

    Attributes:
        file: Where it comes from.
        nodes: All nodes by name.
        inputs: The names of its placeholders.
        outputs: The names of the nodes that nothing reads.
    """

    def __init__(self, file: Path) -> None:
        """Read a graph.

        Raises:
            FormatError: The file cannot be read, or holds no frozen graph.
        """
        self.file = file
        try:
            content = GraphDef.FromString(file.read_bytes())
        except Exception as error:  # protobuf's own, of another package; all mean that the file is no good
            raise self._no_graph(f"cannot be read: {error}") from error
        self.nodes: dict[str, NodeDef] = {node.name: node for node in content.node}
        self.inputs = [node.name for node in content.node if node.op == "Placeholder"]
        self._readers: dict[str, list[NodeDef]] = {}
        for node in content.node:
            for tensor in node.input:
                self._readers.setdefault(edge(tensor), []).append(node)
        read = {split(tensor)[0] for tensor in self._readers}
        self.outputs = [node.name for node in content.node if node.name not in read and node.op != "Placeholder"]
        if not self.inputs or not self.outputs:
            raise self._no_graph("has no placeholder or no node that depends on it")

    def path_of(self, layer: LayerParams, node_name: str, tensor: str) -> list[str]:
        """Return the edges from a layer's node to where the layer ends: behind its bias and a ReLU that alone reads it.

        Args:
            layer: The layer.
            node_name: The node that computes it.
            tensor: The edge that this node reads.

        Raises:
            ParamsError: The graph has no such node, or it does not read this edge and the layer's weight.
        """
        node = self.nodes.get(node_name)
        if node is None:
            raise self.foreign(layer, f"there is no node {node_name!r}")
        if edge(tensor) not in map(edge, node.input):
            raise self.foreign(layer, f"the node {node_name!r} does not read {tensor!r}")
        if split(layer.weight.tensor)[0] not in self.nodes:
            raise self.foreign(layer, f"there is no constant {layer.weight.tensor!r}")
        path = [edge(node.name)]
        for kinds in (_ADDITIONS, _ACTIVATIONS):
            readers = self._readers.get(path[-1], [])
            if len(readers) == 1 and readers[0].op in kinds and self._constants_but_one(readers[0]):
                path.append(edge(readers[0].name))
        return path

    def has(self, tensor: str) -> bool:
        """Return whether there is a node that writes this edge."""
        return split(tensor)[0] in self.nodes

    def is_input(self, tensor: str) -> bool:
        """Return whether an edge is one of the graph's placeholders."""
        return split(tensor)[0] in self.inputs

    def foreign(self, layer: LayerParams, what: str) -> ParamsError:
        """Return the error that says that the parameters are not those of the graph."""
        return ParamsError(
            f"The parameter file is not that of the model: {what}",
            where=f"{self.file.name}, layer {layer.name!r}",
            expected="the two files that one export wrote",
            fix="Export the model again.",
        )

    def _constants_but_one(self, node: NodeDef) -> bool:
        return sum(not self._constant(tensor) for tensor in node.input) == 1

    def _constant(self, tensor: str) -> bool:
        node = self.nodes[split(tensor)[0]]
        return node.op == "Const" or (node.op in ("Identity", "Cast") and self._constant(node.input[0]))

    def _no_graph(self, what: str) -> FormatError:
        return FormatError(
            f"The model {self.file.name!r} {what}",
            where=str(self.file.absolute()),
            expected="a frozen graph that the TensorFlow backend exported",
            fix="Export the model again.",
        )


def edge(tensor: str) -> str:
    """Return the name of an edge in full, as in ``conv:0``."""
    return "{}:{}".format(*split(tensor))
