"""Quantized layers and the parameter file that describes them."""

from dopt_api.params.file import (
    BiasParams,
    LayerParams,
    QuantParams,
    TensorParams,
    layer_params,
    read_params,
    render_params,
)
from dopt_api.params.layers import FloatLayer, QuantizedLayer, fold, quantize_layer

__all__ = [
    "BiasParams",
    "FloatLayer",
    "LayerParams",
    "QuantParams",
    "QuantizedLayer",
    "TensorParams",
    "fold",
    "layer_params",
    "quantize_layer",
    "read_params",
    "render_params",
]
