"""The format ``csv``: all scales and zero points as one table, for spreadsheets and small scripts."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dopt_api.params import LayerParams, QuantParams

__all__ = ["write"]

COLUMNS = ("layer", "op_type", "strategy", "role", "tensor", "channel", "dtype", "scale", "zero_point")


def write(model: Path, params: QuantParams, folder: Path) -> None:
    """Write ``quant_params.csv``: a row for each scale; the model is not looked at."""
    del model
    with (folder / "quant_params.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for layer in params.layers:
            table.writerows(_rows(layer))


def _rows(layer: LayerParams) -> Iterator[tuple[object, ...]]:
    head = (layer.name, layer.op_type, layer.strategy)
    for role, part in (("input", layer.input), ("weight", layer.weight), ("output", layer.output)):
        if part is None:
            continue
        for channel, (scale, zero_point) in enumerate(zip(part.scale, part.zero_point, strict=True)):
            where = (part.tensor, "" if part.axis is None else channel)
            yield (*head, role, *where, part.dtype, np.float32(scale), zero_point)
    if layer.bias is not None:
        for channel, scale in enumerate(layer.bias.scale):
            yield (*head, "bias", layer.bias.tensor, channel, layer.bias.dtype, np.float32(scale), 0)
