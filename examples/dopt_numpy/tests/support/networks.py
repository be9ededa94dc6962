"""What the tests share: small networks, and the way from a network to its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

import dopt_api
from dopt_numpy.network import (
    BatchNorm,
    Chain,
    Conv2D,
    Dense,
    Flatten,
    GlobalAveragePool,
    MaxPool2D,
    Network,
    ReLU,
    Residual,
    Scale,
)

SHAPE = "x:1,3,8,8"


def make_network(seed: int = 0) -> Network:
    """Return a network with every kind of layer; its batch normalizations have statistics that are not trivial."""
    rng = np.random.default_rng(seed)
    block = {
        "depthwise": Conv2D(8, 8, 3, padding=1, groups=8, bias=False, rng=rng),
        "bn": BatchNorm(8),
        "relu": ReLU(),
        "pointwise": Conv2D(8, 8, 1, rng=rng),
        "scale": Scale(8),
    }
    network = Network(
        {
            "conv": Conv2D(3, 8, 3, padding=1, rng=rng),
            "bn": BatchNorm(8),
            "relu": ReLU(),
            "block": Residual(block),
            "after": BatchNorm(8),
            "pool": MaxPool2D(2),
            "head": Chain({"conv": Conv2D(8, 12, 3, stride=2, rng=rng), "relu": ReLU(), "pool": GlobalAveragePool()}),
            "flatten": Flatten(),
            "fc": Dense(12, 5, rng=rng),
        }
    )
    for _, layer in network.named_layers():
        if isinstance(layer, BatchNorm):
            layer.mean[...] = rng.normal(0, 0.3, layer.mean.shape)
            layer.variance[...] = rng.uniform(0.3, 2.0, layer.variance.shape)
            layer.gamma.value[...] = rng.uniform(0.5, 1.5, layer.gamma.value.shape)
            layer.beta.value[...] = rng.normal(0, 0.3, layer.beta.value.shape)
        if isinstance(layer, Scale):
            layer.factor.value[...] = rng.uniform(0.5, 1.5, layer.factor.value.shape)
        if isinstance(layer, Conv2D) and layer.bias is not None:
            layer.bias.value[...] = rng.normal(0, 0.2, layer.bias.value.shape)
    return network


def batch(size: int = 4, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (size, 3, 8, 8)).astype(np.float32)


def write_config(network: Network, path: Path, shape: str = SHAPE, **keys: str) -> Path:
    """Write a strategy file that quantizes every layer."""
    dopt_api.generate_config(network, shape, path)
    content = json.loads(path.read_text())
    for entry in content["layer_strategy"].values():
        entry.update({"quant_strategy": "Quant_INT8-8", **keys})
    path.write_text(json.dumps(content))
    return path


def calibrate(quantized, *batches):
    dopt_api.set_calibrate_state(quantized, True)
    for x in batches:
        quantized(x)
    dopt_api.set_calibrate_state(quantized, False)
    return quantized


def differences(function: Callable[[], float], array: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """Return the gradient of a function of no arguments by central differences in the elements of ``array``."""
    gradient = np.zeros_like(array)
    for index in np.ndindex(*array.shape):
        before = array[index]
        array[index] = before + step
        up = function()
        array[index] = before - step
        gradient[index] = (up - function()) / (2 * step)
        array[index] = before
    return gradient
