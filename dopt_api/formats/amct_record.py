"""The format ``amct_record``: scales and offsets as a record file of AMCT, protobuf in text form.

The schema is ``scale_offset_record_pytorch.proto`` of AMCT (Ascend model compression toolkit), proto2. Its activations
are int8, ``clip(round(x / scale_d) + offset_d, -128, 127)``, so the offset is that of uint8 less 128: of data from 0 to
1, the scale is 1/255 and the offset -128.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dopt_api.errors import FormatError
from dopt_api.params import LayerParams, QuantParams

__all__ = ["write"]


def write(model: Path, params: QuantParams, folder: Path) -> None:
    """Write ``record.txt``: a record for each node that computes a quantized layer; the model is not looked at.

    Raises:
        FormatError: A layer has activations that are not of 8 bits, or weights of more than 8.
    """
    del model
    lines = [line for layer in params.layers for line in _records(layer)]
    (folder / "record.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def _records(layer: LayerParams) -> Iterator[str]:
    if layer.input.bits != 8 or layer.weight.bits > 8 or layer.weight.group is not None or any(layer.weight.zero_point):
        raise FormatError(
            f"The format 'amct_record' cannot express the strategy {layer.strategy!r}",
            where=f"layer {layer.name!r}",
            expected="activations of 8 bits and symmetric weights per channel of 8 bits or fewer",
            fix="Use the strategy 'Quant_INT8-8', 'Quant_INT8-7' or 'Quant_INT8-4'.",
        )
    for node in (layer.node, *(other for other, _ in layer.other_calls)):
        yield from ("record {", f"  key: {json.dumps(node, ensure_ascii=False)}", "  value {")
        yield f"    scale_d: {np.float32(layer.input.scale[0])!s}"
        yield f"    offset_d: {layer.input.zero_point[0] - 128}"
        yield from (f"    scale_w: {np.float32(scale)!s}" for scale in layer.weight.scale)
        yield from (f"    offset_w: {zero_point}" for zero_point in layer.weight.zero_point)
        yield "    skip_fusion: true"  # batch normalization is folded already
        yield f'    dst_type: "{"INT4" if layer.weight.bits <= 4 else "INT8"}"'
        yield from ("  }", "}")
