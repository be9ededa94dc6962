"""The golden case: a fixed network and fixed data, without any framework's random numbers.

Run as a script, it writes ``quant_params.json`` beside itself: ``python plugins/dopt_torch/tests/golden/network.py``.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import dopt_api

FOLDER = Path(__file__).parent


class Golden(nn.Module):
    """A model input, a normalized layer, a grouped one, a channel of zeros, a matrix product, a plain linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.tokens = nn.Linear(4, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.stem(x)))
        y = self.up(torch.relu(self.depthwise(y)))
        y = torch.relu(self.tokens(y.flatten(2).permute(0, 2, 1)))
        return self.head(y.mean(1))


def build() -> Golden:
    """Return the network in evaluation mode, with weights that are multiples of 1/1024."""
    numbers = np.random.default_rng(20240601)
    net = Golden().eval()
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(numbers.integers(-700, 700, tensor.shape) / 1024))
        net.norm.running_var.abs_().add_(0.125)
        net.depthwise.weight[3] = 0.0
    return net


def batches() -> list[Tensor]:
    """Return two calibration batches."""
    numbers = np.random.default_rng(20240602)
    return [torch.from_numpy(numbers.integers(-512, 512, (n, 3, 8, 8)) / 256).float() for n in (3, 5)]


def export(folder: Path) -> Path:
    """Go the whole way in ``folder`` and return the parameter file."""
    config = dopt_api.generate_config(build(), "x:1,3,8,8", folder / "config.json")
    content = json.loads(config.read_text())
    for layer in content["layer_strategy"].values():
        layer["quant_strategy"] = "Quant_INT8-8"
    config.write_text(json.dumps(content))
    quantized = dopt_api.optimize(build(), config)
    dopt_api.set_calibrate_state(quantized, True)
    with torch.no_grad():
        # the statistics are set to exact numbers, so that no framework's convolution takes part in the golden file
        numbers = np.random.default_rng(20240603)
        quantized(batches()[0])
        for layer in quantized.modules():
            if hasattr(layer, "calibrating"):
                layer.start_calibration()
                shape = (4, 6, 16) if layer.kind.input_axis == -1 else (4, 8, 6, 6)
                layer.observe(torch.from_numpy(numbers.integers(-300, 2000, shape) / 512).float())
    dopt_api.set_calibrate_state(quantized, False)
    torch.save(quantized.state_dict(), folder / "quant.pth")
    return dopt_api.export(build(), config, folder / "quant.pth", folder).params


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        shutil.copy(export(Path(made)), FOLDER / "quant_params.json")
