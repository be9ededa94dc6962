"""The model drawn from top to bottom: what is quantized, what stays float, and what goes around other operations.

A line of the drawing is an operation and those that follow it alone, such as a convolution with its activation
function. Consecutive lines are joined by a stroke; all other connections are arcs beside them, in as few lanes as do
not touch. Without an ONNX graph there are the quantized layers alone, in their order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopt_api.params import QuantParams
from dopt_api.report.table import kind

if TYPE_CHECKING:
    from dopt_api.formats.integer_nodes import NodeKind

__all__ = ["STATES", "Arc", "Drawing", "Line", "draw"]

STATES = {
    "quantized": "quantized",
    "kept": "left float by the strategy file",
    "refused": "not quantizable",
    "float": "multiplies, stays float",
    "plain": "other operations",
}
"""What a line can be, and how the legend calls it."""

MULTIPLYING = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "Einsum")
LANES = 12
"""Lanes of arcs beside the lines; where more are needed, some share one."""


@dataclass
class Line:
    """A line of the drawing.

    Attributes:
        text: The layer's or the operation's name.
        state: One of :data:`STATES`.
        kinds: The operations, in order.
        place: Of the quantized layer in execution, from 1; else 0.
        about: The strategy, or why it is not quantized.
    """

    text: str
    state: str
    kinds: list[str]
    place: int = 0
    about: str = ""


@dataclass(frozen=True)
class Arc:
    """A connection of lines that are not neighbours: numbers of lines from 0, and its lane from 0."""

    first: int
    last: int
    lane: int


@dataclass(frozen=True)
class Drawing:
    """Lines, which neighbours are joined (by the number of the upper), and arcs."""

    lines: list[Line]
    joined: set[int] = field(default_factory=set)
    arcs: list[Arc] = field(default_factory=list)
    complete: bool = True

    @property
    def lanes(self) -> int:
        """How many lanes there are."""
        return max((arc.lane + 1 for arc in self.arcs), default=0)

    @property
    def states(self) -> dict[str, int]:
        """How many lines are what, in the order of the legend."""
        counts = Counter(line.state for line in self.lines)
        return {state: counts[state] for state in STATES if counts[state]}


def draw(
    model: Path, params: QuantParams, about: Mapping[str, Any], nodes: Mapping[str, NodeKind] | None = None
) -> Drawing:
    """Return the drawing of an exported model.

    Args:
        model: The exported graph, ONNX or another.
        params: Its parameters.
        about: What ``dopt quantize`` noted, or nothing.
        nodes: How ONNX Runtime computes nodes, by their names, where that is known.
    """
    graph = _graph(model)
    if graph is None:
        lines = [
            Line(layer.name, "quantized", [kind(layer)], place, layer.strategy)
            for place, layer in enumerate(params.layers, 1)
        ]
        return Drawing(lines, complete=False)
    return _Drawer(graph, params, about, nodes or {}).drawing()


def _graph(model: Path) -> Any:
    """Return the graph of an ONNX model, ``None`` where there is none or the package is missing."""
    if model.suffix != ".onnx":
        return None
    try:
        import onnx  # noqa: PLC0415  # an extra
    except ModuleNotFoundError:
        return None
    return onnx.load(str(model), load_external_data=False).graph


class _Drawer:
    """Makes lines of nodes."""

    def __init__(
        self, graph: Any, params: QuantParams, about: Mapping[str, Any], nodes: Mapping[str, NodeKind]
    ) -> None:
        self.graph, self.nodes = graph, nodes
        self.quantized = {
            node: (place, layer)
            for place, layer in enumerate(params.layers, 1)
            for node in (layer.node, *(name for name, _ in layer.other_calls))
        }
        self.kept = {_plain(name) for name in about.get("float", [])}
        self.refused = {_plain(one["name"]): one["reason"] for one in about.get("not_quantizable", [])}
        self.lines: list[Line] = []
        self.ends: list[str] = []  # the edge that the last operation of each line gives
        self.owner: dict[str, int] = {}  # the line that makes an edge

    def drawing(self) -> Drawing:
        """Return lines and connections."""
        constants = {tensor.name for tensor in self.graph.initializer}
        inputs = [value.name for value in self.graph.input if value.name not in constants]
        takers = Counter(edge for node in self.graph.node for edge in set(node.input))
        takers.update(value.name for value in self.graph.output)
        for name in inputs:
            self._begin(Line(name, "plain", ["input"]), [name])
        pairs: set[tuple[int, int]] = set()
        for node in self.graph.node:
            edges = [edge for edge in dict.fromkeys(node.input) if edge in self.owner]
            if not edges or node.op_type in ("Shape", "Size"):
                continue  # constants and sizes alone
            sources = [self.owner[edge] for edge in edges]
            line = self._line(node, constants)
            end = self.ends[sources[0]]
            if line.state == "plain" and len(edges) == 1 and edges[0] == end and takers[end] == 1:
                self.lines[sources[0]].kinds.append(node.op_type)
                self.ends[sources[0]] = str(node.output[0])
                self.owner.update(dict.fromkeys(node.output, sources[0]))
                continue
            number = self._begin(line, list(node.output))
            pairs.update((source, number) for source in sources)
        joined = {first for first, last in pairs if last == first + 1}
        return Drawing(self.lines, joined, arcs(pair for pair in sorted(pairs) if pair[1] > pair[0] + 1))

    def _begin(self, line: Line, edges: Sequence[str]) -> int:
        self.lines.append(line)
        self.ends.append(str(edges[0]))
        self.owner.update(dict.fromkeys(edges, len(self.lines) - 1))
        return len(self.lines) - 1

    def _line(self, node: Any, constants: set[str]) -> Line:
        """Return the line that begins with a node."""
        if node.name in self.quantized:
            place, layer = self.quantized[node.name]
            return Line(layer.name, "quantized", [node.op_type], place, f"{layer.strategy}{self._runs(node)}")
        own = _plain(node.name)
        if own in self.refused:
            return Line(node.name, "refused", [node.op_type], about=self.refused[own])
        if own in self.kept:
            return Line(node.name, "kept", [node.op_type])
        state = "float" if node.op_type in MULTIPLYING else "plain"
        about = "" if state == "plain" or constants.intersection(node.input) else "of two activations"
        return Line(node.name or node.op_type, state, [node.op_type], about=about)

    def _runs(self, node: Any) -> str:
        """Return how ONNX Runtime computes a node, as far as that is known."""
        if node.name not in self.nodes:
            return ""
        found = self.nodes[node.name]
        return ", in integers" if found.integer else f", in float: {found.reason}"


def arcs(pairs: Iterable[tuple[int, int]]) -> list[Arc]:
    """Return arcs for pairs of lines, in ascending order, in as few lanes as do not touch.

    Example:
        >>> [arc.lane for arc in arcs([(0, 4), (1, 3), (4, 6)])]
        [0, 1, 0]
    """
    until: list[int] = []
    found = []
    for first, last in pairs:
        free = next((lane for lane, end in enumerate(until) if end <= first), None)
        if free is None:
            free = len(until) if len(until) < LANES else min(range(LANES), key=until.__getitem__)
        until[free : free + 1] = [last]
        found.append(Arc(first, last, free))
    return found


def _plain(name: str) -> str:
    """Return a name without its kind and the ways of writing it: ``/a.b/c/Conv`` and ``a.b.c/Conv2D`` are the same."""
    path, _, last = name.strip("/").rpartition("/")
    return re.sub(r"[/.]+", ".", path or last)
