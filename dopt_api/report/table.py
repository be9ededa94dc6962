"""The table of layers: what each row says, and what it sorts by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dopt_api.params import LayerParams, QuantParams

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dopt_api.verify import LayerCheck

__all__ = ["COLUMNS", "TEXTS", "empty_columns", "ends", "kind", "rows"]

TEXTS = 3
"""How many of the first columns are texts; the others are numbers."""

COLUMNS = (
    ("layer", ""),
    ("kind", ""),
    ("strategy", ""),
    ("#", "place in execution"),
    ("from", "least value of the input's range"),
    ("to", "greatest value of the input's range"),
    ("weights", "how many"),
    ("nearest", "dB: the layer's own output with weights rounded to nearest, against float"),
    ("rounded", "dB: the same with the weights as exported"),
    ("SQNR", "dB: the layer's output against float, with all layers before it quantized"),
    ("clipped", "share of the inputs beyond the range"),
    ("overflow", "share of channels whose 16-bit sums of two products can overflow"),
)
"""The table's headings and what they mean."""


def rows(
    params: QuantParams,
    integers: Mapping[str, NDArray[Any]],
    rounded: Mapping[str, Mapping[str, Any]],
    checks: Mapping[str, LayerCheck],
) -> list[dict[str, Any]]:
    """Return a row for each layer: the most damaged first, in execution order where nothing is known of that.

    Args:
        params: The layers.
        integers: The weights' integers by tensor, where they are at hand.
        rounded: What rounding did, by the layer's name.
        checks: What verifying found, likewise.
    """
    found: list[dict[str, Any]] = []
    for place, layer in enumerate(params.layers, 1):
        values, check, rounding = integers.get(layer.weight.tensor), checks.get(layer.name), rounded.get(layer.name, {})
        figures = (
            place,
            *(ends(layer) or (None, None)),
            None if values is None else values.size,
            _db(rounding.get("nearest")),
            _db(rounding.get("rounded")),
            None if check is None else check.sqnr_db,
            None if check is None else check.clipped,
            None if check is None else check.hazard,
        )
        found.append(
            {
                "place": place,
                "texts": (layer.name, kind(layer), layer.strategy),
                "figures": [_figure(*pair) for pair in zip(COLUMNS[TEXTS:], figures, strict=True)],
                "damage": math.inf if check is None else check.sqnr_db,
            }
        )
    found.sort(key=lambda row: row["damage"])
    return found


def empty_columns(found: Sequence[Mapping[str, Any]]) -> set[int]:
    """Return the numbers, from 1, of the columns in which no row has anything."""
    texts = [[cell["text"] for cell in row["figures"]] for row in found]
    return {number for number, column in enumerate(zip(*texts, strict=True), TEXTS + 1) if not any(column)}


def kind(layer: LayerParams) -> str:
    """Return the last part of a layer's kind, where that is the name of a class."""
    return layer.op_type.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]


def ends(layer: LayerParams) -> tuple[float, float] | None:
    """Return the range of a layer's input, or ``None`` where it stays float."""
    part = layer.input
    if not part.quantized:
        return None
    least = 0 if part.dtype.startswith("u") else -(1 << (part.bits - 1))
    low, high = ((end - part.zero_point[0]) * part.scale[0] for end in (least, least + (1 << part.bits) - 1))
    return low, high


def _db(share: float | None) -> float | None:
    return -10 * math.log10(share) if share else None


def _figure(column: tuple[str, str], value: float | None) -> dict[str, Any]:
    """Return a cell: its text, and the number to sort by."""
    if value is None or not math.isfinite(value):
        return {"text": "" if value is None else "exact", "sort": "" if value is None else 1e9}
    name, about = column
    text = f"{value:,.0f}" if name == "weights" else f"{value:.1%}" if about.startswith("share") else f"{value:.4g}"
    return {"text": text, "sort": float(value)}
