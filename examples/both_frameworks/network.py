"""What both frameworks are given, and what is kept of what they give."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dopt_api.params import QuantParams, render_params

__all__ = ["Array", "Quantized", "Weights", "integers", "neutral"]

Array = NDArray[np.float32]
Weights = dict[str, Array]
"""Weights and biases by name, such as ``conv1.weight``, in PyTorch's layout."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """A network as one framework has quantized it.

    Attributes:
        params: The exported parameters.
        integers: The integers of each layer's weight, in PyTorch's layout, read from the exported graph.
        logits: Of the simulation, ``[N, 10]``.
    """

    params: QuantParams
    integers: dict[str, NDArray[np.int32]]
    logits: Array


def integers(weight: Array, scale: tuple[float, ...]) -> NDArray[np.int32]:
    """Return the integers of an exported weight, whose output channels come first."""
    per_channel: Array = np.array(scale, np.float32).reshape(-1, *[1] * (weight.ndim - 1))
    found: Array = np.rint(weight / per_channel)
    return found.astype(np.int32)


def neutral(params: QuantParams) -> str:
    """Return the text of a parameter file without what each framework has its own of: names, and the layout."""
    layers = []
    for layer in params.layers:
        parts: dict[str, Any] = {"input": dataclasses.replace(layer.input, tensor="input")}
        parts["weight"] = dataclasses.replace(layer.weight, tensor="weight", axis=0)
        if layer.bias is not None:
            parts["bias"] = dataclasses.replace(layer.bias, tensor="bias")
        layers.append(dataclasses.replace(layer, node="node", op_type="kind", **parts))
    return render_params(QuantParams("model", tuple(layers)))
