"""The format ``safetensors``: the integers themselves, for runtimes and scripts that load tensors by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from dopt_api.formats.onnx_qdq import stored_integers
from dopt_api.params import QuantParams

__all__ = ["write"]


def write(model: Path, params: QuantParams, folder: Path) -> None:
    """Write ``<model>.safetensors``.

    For each weight and bias, by its name in the graph: the integers (int8, int32), and under the same name with
    ``.scale`` their scales, float32. For each layer ``<layer>.input.scale``, float32, and ``<layer>.input.zero_point``,
    int32, unless the input is float. The metadata say of each weight how many bits and which axis its scales have.
    Weights in groups stand as rows of one group, ``[groups, weights]``; the metadata name the length. Where a weight is
    asymmetric there is a ``.zero_point``.

    Raises:
        ParamsError: The parameters are not those of the model.
        FormatError: The model is not ONNX, or two layers share a weight and quantize it differently.
    """
    tensors: dict[str, NDArray[Any]] = {}
    metadata = {"format": "dopt.integers", "version": "1"}
    for name, (integers, scale) in stored_integers(model, params, "safetensors").items():
        tensors[name], tensors[f"{name}.scale"] = np.ascontiguousarray(integers), np.atleast_1d(scale)
    for layer in params.layers:
        if layer.input.quantized:
            tensors[f"{layer.name}.input.scale"] = np.asarray(layer.input.scale, np.float32)
            tensors[f"{layer.name}.input.zero_point"] = np.asarray(layer.input.zero_point, np.int32)
        weight = layer.weight
        if any(weight.zero_point):
            tensors[f"{weight.tensor}.zero_point"] = np.asarray(weight.zero_point, np.int32)
        metadata[f"{layer.name}.input.dtype"] = layer.input.dtype
        metadata[f"{weight.tensor}.bits"] = str(weight.bits)
        metadata[f"{weight.tensor}.axis"] = str(weight.axis if weight.group is None else 0)
        if weight.group is not None:
            metadata[f"{weight.tensor}.group"] = str(weight.group)
    (folder / f"{model.stem}.safetensors").write_bytes(save(tensors, metadata))
