"""The format ``aimet_encodings``: scales and zero points as AIMET's encodings, which Qualcomm's converters take.

Layout 2.0.0, whose entries are named and computed as in ONNX ``QuantizeLinear``; for whole tensors and channels, 2.1.0
is the same. It goes beside the exported graph as it is: weights there lie on their grids. Biases have no entry: the
converters derive them from input and weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dopt_api.errors import FormatError
from dopt_api.params import LayerParams, QuantParams, TensorParams

__all__ = ["write"]

VERSION = "2.0.0"


def write(model: Path, params: QuantParams, folder: Path) -> None:
    """Write the encodings of the graph ``model.onnx`` to ``model.encodings``; the model is not looked at.

    Raises:
        FormatError: Layers that read one tensor have different grids for it, or the model is no ONNX graph.
    """
    if model.suffix != ".onnx":
        raise FormatError(
            f"The format 'aimet_encodings' is for ONNX graphs, and the model is {model.name!r}",
            where=str(model.absolute()),
            expected="an export of the PyTorch backend",
        )
    found: dict[str, dict[str, Any]] = {}
    for layer in params.layers:
        for name, part in _tensors(layer):
            entry = _entry(name, part)
            if found.setdefault(name, entry) != entry:
                raise FormatError(
                    f"The format 'aimet_encodings' has one grid for a tensor, and {name!r} has two",
                    where=f"layer {layer.name!r}",
                    expected="one strategy and one range for layers that read one tensor",
                    fix="Give these layers the same 'quant_strategy' and 'range', or leave one at 'float'.",
                )
    text = json.dumps({"version": VERSION, "encodings": list(found.values())}, indent=2, ensure_ascii=False)
    (folder / f"{model.stem}.encodings").write_text(f"{text}\n", encoding="utf-8", newline="\n")


def _tensors(layer: LayerParams) -> Iterator[tuple[str, TensorParams]]:
    if layer.weight.group is not None:
        raise FormatError(
            "The format 'aimet_encodings' is written for whole channels",
            where=f"layer {layer.name!r}",
            expected="a strategy without groups",
            fix="Set 'quant_strategy' to 'Quant_FLOAT-4', or use another format.",
        )
    if layer.input.quantized:
        yield layer.input.tensor, layer.input
        yield from ((edge, layer.input) for _, edge in layer.other_calls)
    yield layer.weight.tensor, layer.weight
    if layer.output is not None:
        yield from ((edge, layer.output) for edge in (layer.output.tensor, *layer.other_outputs))


def _entry(name: str, part: TensorParams) -> dict[str, Any]:
    scales, zero_points = [float(np.float32(scale)) for scale in part.scale], list(part.zero_point)
    per_channel = {} if part.axis is None else {"axis": part.axis}
    return {
        "name": name,
        "output_dtype": part.dtype,
        "y_scale": scales if per_channel else scales[0],
        **({"y_zero_point": zero_points if per_channel else zero_points[0]} if any(zero_points) else {}),
        **per_channel,
    }
