"""Comparing two parameter files of the same network, written by different backends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from dopt_api.errors import ParamsError
from dopt_api.params import LayerParams, QuantParams

__all__ = ["LayerDifference", "Scales", "compare", "show"]


@dataclass(frozen=True)
class Scales:
    """How the scales of one tensor compare.

    Attributes:
        equal: Scales that are equal to the bit.
        count: All scales.
        difference: The greatest difference relative to the greater scale.
    """

    equal: int
    count: int
    difference: float


@dataclass(frozen=True)
class LayerDifference:
    """How one layer compares.

    Attributes:
        name: Its name in the first file.
        other: Its name in the second.
        input: The scale of its input.
        weight: The scales of its weight.
        bias: The scales of its bias, or ``None`` if there is none in either file.
        zero_points: The zero point of the input in both files.
    """

    name: str
    other: str
    input: Scales
    weight: Scales
    bias: Scales | None
    zero_points: tuple[int, int]


def compare(params: QuantParams, others: QuantParams) -> list[LayerDifference]:
    """Compare two parameter files layer by layer, in the order of execution; names do not matter.

    Raises:
        ParamsError: They are of different networks.
    """
    if len(params.layers) != len(others.layers):
        raise _different(f"{len(params.layers)} layers", f"{len(others.layers)}")
    return [_layer(layer, other) for layer, other in zip(params.layers, others.layers, strict=True)]


def show(layers: list[LayerDifference], console: Console) -> None:
    """Print a comparison as a table, and its summary."""
    table = Table("layer", title="Scales: greatest relative difference (equal to the bit)")
    for column in ("input", "zero point", "weight"):
        table.add_column(column, justify="right")
    for layer in layers:
        mine, other = layer.zero_points
        zero_point = f"{mine}" if mine == other else f"{mine}, other {other}"
        table.add_row(layer.name, _text(layer.input), zero_point, _text(layer.weight))
    console.print(table)
    console.print(f"zero points equal in {sum(len(set(layer.zero_points)) == 1 for layer in layers)} of {len(layers)}")
    for name in ("input", "weight", "bias"):
        parts: list[Scales] = [part for layer in layers if (part := getattr(layer, name)) is not None]
        equal, count = sum(part.equal for part in parts), sum(part.count for part in parts)
        greatest = max((part.difference for part in parts), default=0.0)
        text = f"{name} scales: {equal} of {count} equal to the bit, greatest relative difference {greatest:.2g}"
        console.print(text, soft_wrap=True)


def _layer(layer: LayerParams, other: LayerParams) -> LayerDifference:
    if (layer.bias is None) != (other.bias is None):
        raise _different(f"a bias of {layer.name!r} or none", f"the opposite for {other.name!r}")
    return LayerDifference(
        name=layer.name,
        other=other.name,
        input=_scales(layer, other, layer.input.scale, other.input.scale),
        weight=_scales(layer, other, layer.weight.scale, other.weight.scale),
        bias=None
        if layer.bias is None or other.bias is None
        else _scales(layer, other, layer.bias.scale, other.bias.scale),
        zero_points=(layer.input.zero_point[0], other.input.zero_point[0]),
    )


def _scales(layer: LayerParams, other: LayerParams, mine: tuple[float, ...], others: tuple[float, ...]) -> Scales:
    if len(mine) != len(others):
        raise _different(f"{len(mine)} scales of {layer.name!r}", f"{len(others)} of {other.name!r}")
    a: NDArray[np.float32] = np.array(mine, np.float32)
    b: NDArray[np.float32] = np.array(others, np.float32)
    exact, given = a.astype(np.float64), b.astype(np.float64)
    return Scales(
        equal=int((a == b).sum()),
        count=a.size,
        difference=float((np.abs(exact - given) / np.maximum(exact, given)).max()),
    )


def _text(scales: Scales) -> str:
    if scales.equal == scales.count:
        return "equal"
    return f"{scales.difference:.2g}" + (f" ({scales.equal}/{scales.count})" if scales.count > 1 else "")


def _different(mine: str, other: str) -> ParamsError:
    return ParamsError(
        f"The parameter files are of different networks: {mine} here, {other} in the other file",
        expected="two exports of the same network with the same strategies",
        fix="Pass the quant_params.json that make demo wrote.",
    )
