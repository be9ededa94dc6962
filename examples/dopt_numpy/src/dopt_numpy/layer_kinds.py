"""The kinds of layer that can be quantized, and what is known of the others."""

from __future__ import annotations

from dopt_numpy.network import (
    BatchNorm,
    Chain,
    Conv2D,
    Dense,
    Flatten,
    GlobalAveragePool,
    Layer,
    MaxPool2D,
    Network,
    ReLU,
    Residual,
    Scale,
)

__all__ = ["CONTAINERS", "PLAIN", "WEIGHT_AXIS", "is_quantizable", "layer_name", "why_not"]

WEIGHT_AXIS = 0
"""The axis of every weight with the output channels."""

QUANTIZABLE = (Conv2D, Dense)
CONTAINERS = (Chain, Residual, Network)
PLAIN = (ReLU, MaxPool2D, GlobalAveragePool, Flatten, BatchNorm)
"""Layers that stay float without being listed: they multiply by nothing, or are folded or told in a note."""


def is_quantizable(layer: Layer) -> bool:
    """Say whether a layer can be quantized. A subclass may compute something else, and so is no layer of its kind."""
    return type(layer) in QUANTIZABLE


def why_not(layer: Layer) -> str:
    """Return why a layer cannot be quantized."""
    if type(layer) is Scale:
        return "one factor a channel is no weight whose products are summed"
    return f"{type(layer).__module__}.{type(layer).__qualname__} is not a kind of layer that this backend knows"


def layer_name(path: str, layer: Layer) -> str:
    """Return the name of a layer in strategy files: ``conv1`` and a :class:`Conv2D` give ``conv1/Conv2D``."""
    return f"{path}/{type(layer).__name__}"
