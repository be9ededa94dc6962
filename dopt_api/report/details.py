"""What the page shows of one layer when it is opened: its weights and its inputs over their grids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from dopt_api.params import LayerParams
from dopt_api.report.table import ends

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dopt_api.quantizer.histogram import Histogram

__all__ = ["BINS", "details_of"]

BINS = 51
"""Bars of a histogram of weights: enough to see its form, few enough for thousands of layers."""


def details_of(
    layer: LayerParams,
    values: NDArray[Any] | None,
    inputs: Histogram | None,
    rounding: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what the page's script draws.

    Args:
        layer: The layer.
        values: Its weights' integers, where they are at hand.
        inputs: What its inputs are like, where that is known.
        rounding: What rounding did to it.
    """
    return {
        "reason": rounding.get("reason", ""),
        "weights": None if values is None else _weights(layer, values),
        "inputs": None if inputs is None or not inputs.counts else _inputs(layer, inputs),
    }


def _weights(layer: LayerParams, values: NDArray[Any]) -> dict[str, Any]:
    """Return how many weights lie in equal parts of the grid, in steps of the grid."""
    bits, signed = layer.weight.bits, layer.weight.dtype.startswith("int")
    least = -(1 << (bits - 1)) if signed else 0
    levels = 1 << bits
    width = -(-levels // BINS)
    places = (values.reshape(-1).astype(np.int64) - least) // width
    counts = np.bincount(places, minlength=-(-levels // width))
    scales = layer.weight.scale
    return {
        "low": least - 0.5,
        "width": width,
        "counts": counts.tolist(),
        "range": [int(values.min()), int(values.max())] if values.size else [0, 0],
        "step": 1,
        "levels": [least, least + levels - 1],
        "scales": [min(scales), max(scales), len(scales)],
        "bits": bits,
    }


def _inputs(layer: LayerParams, inputs: Histogram) -> dict[str, Any]:
    """Return the histogram of the inputs, and where range and steps of the grid are."""
    part, found = layer.input, ends(layer)
    if found is None:
        return asdict(inputs)
    return {
        **asdict(inputs),
        "range": [float(f"{end:.7g}") for end in found],
        "step": part.scale[0],
        "levels": [round(end / part.scale[0]) for end in found],
        "bits": part.bits,
        "zero_point": part.zero_point[0],
    }
