"""The network in PyTorch."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import nn

from dopt.dopt_torch.opt_main import (
    generate_config_file,
    generate_final_model,
    optimize_model,
    set_calibrate_state,
)
from dopt_api.params import read_params
from examples.both_frameworks.network import Array, Quantized, Weights, integers
from examples.fashion_mnist.data import CLASSES, Pictures
from examples.torch_fashion_mnist.network import BATCH, INPUT_SHAPE, fit

__all__ = ["quantize", "train", "write_config"]


def build(weights: Weights | None = None) -> nn.Module:
    """Return the network: two convolutions and a linear layer. Layers are ``conv1/Conv2D`` and so on."""
    model = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 8, 3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(8, 16, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(4),
            flat=nn.Flatten(),
            fc=nn.Linear(16 * 3 * 3, CLASSES),
        )
    )
    if weights is not None:
        model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return model.eval()


def train(pictures: Pictures, epochs: int) -> Weights:
    """Train the network in float and return its weights."""
    torch.manual_seed(0)
    model = build()
    fit(model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), pictures, epochs)
    return {name: value.numpy() for name, value in model.state_dict().items()}


def write_config(config_file: Path) -> None:
    """Write the strategy file of the network, every layer float."""
    generate_config_file(build(), INPUT_SHAPE, config_file)


def quantize(weights: Weights, calibration: Array, pictures: Array, config_file: Path, folder: Path) -> Quantized:
    """Calibrate and export.

    Args:
        weights: Of the network.
        calibration: Pictures ``[N, 28, 28]`` to take ranges from.
        pictures: Pictures ``[N, 28, 28]`` to compute logits of.
        config_file: The strategy file.
        folder: For the exported files.
    """
    quant_model = optimize_model(build(weights), config_file)
    set_calibrate_state(quant_model, True)
    with torch.no_grad():
        for batch in torch.split(torch.from_numpy(calibration[:, None]), BATCH):
            quant_model(batch)
    set_calibrate_state(quant_model, False)
    torch.save(quant_model.state_dict(), folder / "quant.pth")
    with torch.no_grad():
        logits = quant_model(torch.from_numpy(pictures[:, None])).numpy()
    exported = generate_final_model(build(weights), config_file, folder / "quant.pth", folder)
    params = read_params(exported.params)
    graph = onnx.load(str(exported.model)).graph
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = {layer.name: integers(values[layer.weight.tensor], layer.weight.scale) for layer in params.layers}
    return Quantized(params, found, logits)
