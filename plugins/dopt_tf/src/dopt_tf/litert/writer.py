"""From an export to the bytes of a model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from dopt_api.params import LayerParams, QuantParams
from dopt_tf.litert.conversion import convert
from dopt_tf.litert.flatbuffer import FlatModel
from dopt_tf.litert.frozen_graph import FrozenGraph, edge
from dopt_tf.litert.grids import Grids
from dopt_tf.litert.layers import Place, check_strategy, place_layer, step_of, unplaced
from dopt_tf.litert.rewriting import rewrite

__all__ = ["integer_model"]

_log = logging.getLogger("dopt")


@dataclass(frozen=True)
class _Call:
    """A place of the graph where a layer is computed: the edges that it reads and writes, and the recorded one."""

    layer: LayerParams
    start: str
    path: tuple[str, ...]
    output: str | None

    @property
    def edges(self) -> list[str]:
        """Return the edges whose tensors are to be known."""
        return [self.start, self.path[-1], *([] if self.output is None or self.output in self.path else [self.output])]

    @property
    def recorded(self) -> str | None:
        """Return the edge of the output's grid, which lets an activation pass, as this only limits."""
        return self.path[-1] if self.output in self.path else self.output


def integer_model(file: Path, params: QuantParams) -> bytes:
    """Return the model of an exported graph and its parameters.

    Raises:
        ParamsError: The parameters are not those of the model.
        FormatError: The model is no frozen graph, a strategy has no such form, or the converter refuses the graph.
    """
    for layer in params.layers:
        check_strategy(layer)
    graph = FrozenGraph(file)
    calls = [call for layer in params.layers for call in _calls(graph, layer)]
    model, tensors = convert(graph, [name for call in calls for name in call.edges])
    found = [
        (call.layer, place_layer(model, graph, call.layer, tensors[call.start], tensors[call.path[-1]]))
        for call in calls
    ]
    model.drop_dead()
    places = _in_order(model, graph, found)
    outputs = {tensors[call.recorded]: step_of(call.layer.output) for call in calls if call.recorded is not None}
    grids = Grids(model, places, {number: step for number, step in outputs.items() if step is not None})
    _report(file.name, places, grids)
    rewrite(model, places, grids)
    return model.content()


def _calls(graph: FrozenGraph, layer: LayerParams) -> list[_Call]:
    starts = ((layer.node, layer.input.tensor), *layer.other_calls)
    ends = (None,) * len(starts) if layer.output is None else (layer.output.tensor, *layer.other_outputs)
    calls = []
    for (node, start), end in zip(starts, ends, strict=True):
        output = None if end is None else edge(end)
        if output is not None and not graph.has(output):
            raise graph.foreign(layer, f"there is no output {end!r}")
        calls.append(_Call(layer, edge(start), tuple(graph.path_of(layer, node, start)), output))
    return calls


def _in_order(model: FlatModel, graph: FrozenGraph, found: list[tuple[LayerParams, Place]]) -> dict[int, Place]:
    """Return the layers by the place of their operator.

    Raises:
        FormatError: The outputs do not depend on what was found, but on a copy that the converter fused otherwise.
    """
    indices = {id(operator): index for index, operator in enumerate(model.operators)}
    for layer, place in found:
        if id(place.operator) not in indices:
            raise unplaced(layer, graph)
    return dict(sorted((indices[id(place.operator)], place) for _, place in found))


def _report(name: str, places: dict[int, Place], grids: Grids) -> None:
    """Say which layers that read integers run in float all the same, and why."""
    reasons: dict[str, list[str]] = {}
    for index, place in places.items():
        if place.input is None or grids.in_integers(index):
            continue
        if not place.kind.integer:
            why = f"{place.params.op_type} is kept float"
        elif place.sums is None:
            why = "the bias does not fit int32"
        else:
            why = "no grid is known for the output"
        reasons.setdefault(why, []).append(place.params.name)
    for why, layers in reasons.items():
        _log.warning(
            "%s: %d of %d quantized layers run in float, with integer weights, as %s: %s",
            *(name, len(layers), len(places), why, ", ".join(layers)),
        )
