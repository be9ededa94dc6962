"""From a frozen graph to a float model of LiteRT in which chosen tensors are known."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from dopt_api.errors import FormatError
from dopt_tf.inference_graph import split
from dopt_tf.litert.flatbuffer import FlatModel
from dopt_tf.litert.frozen_graph import FrozenGraph, edge

__all__ = ["convert"]


def convert(graph: FrozenGraph, wanted: Sequence[str]) -> tuple[FlatModel, dict[str, int]]:
    """Convert a graph, without quantization.

    The converter renames and fuses as it likes, but must keep what it is asked for as an output: so the ``wanted``
    edges are outputs in the conversion, and are none any more in what is returned.

    Args:
        graph: The graph.
        wanted: Edges of it.

    Returns:
        The model, and the number of the tensor of each wanted edge.

    Raises:
        FormatError: The converter refuses the graph, or made more than one subgraph of it.
    """
    real = [edge(name) for name in graph.outputs]
    asked = list(dict.fromkeys([*real, *(tensor for tensor in map(edge, wanted) if not graph.is_input(tensor))]))
    try:
        converter = tf.compat.v1.lite.TFLiteConverter.from_frozen_graph(
            str(graph.file), graph.inputs, [_short(tensor) for tensor in asked]
        )
        model = FlatModel(converter.convert())
    except Exception as error:  # the converter raises many kinds, all of which mean that it cannot
        raise FormatError(
            f"TensorFlow Lite's converter refuses the model {graph.file.name!r}: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:400]}",
            where=str(graph.file.absolute()),
            expected="operations that TensorFlow Lite has itself, and placeholders whose rank is known",
        ) from error
    if model.subgraphs != 1 or len(model.outputs) != len(asked) or len(model.inputs) != len(graph.inputs):
        raise FormatError(
            f"The converter made {model.subgraphs} subgraphs with {len(model.outputs)} outputs of {graph.file.name!r}",
            where=str(graph.file.absolute()),
            expected=f"one, with {len(asked)}: a graph without loops and conditionals",
        )
    tensors = dict(zip(asked, model.outputs, strict=True))
    tensors |= {edge(name): tensor for name, tensor in zip(graph.inputs, model.inputs, strict=True)}
    model.outputs = model.outputs[: len(real)]
    return model, tensors


def _short(tensor: str) -> str:
    name, index = split(tensor)
    return name if index == 0 else tensor
