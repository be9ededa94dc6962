"""What the tests of the torch backend share: small networks, and the way from a model to a quantized one."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
from padded_network import Net, batches
from torch import Tensor, nn

import dopt_api
from dopt.dopt_torch.opt_main import generate_config_file, optimize_model, set_calibrate_state

hypothesis.settings.register_profile("dev", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


class SmallNet(nn.Module):
    """Convolutions with batch normalization, a depthwise one, a residual sum, and a linear layer."""

    input_shape = "x:2,3,12,12"

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = y + torch.relu(self.bn2(self.conv2(y)))
        return self.fc(y.mean((2, 3)))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(2)


@pytest.fixture
def small_net() -> SmallNet:
    """A small network in evaluation mode whose batch normalizations have statistics like trained ones."""
    net = SmallNet()
    for norm in (net.bn1, net.bn2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return net.eval()


@pytest.fixture
def config_of(tmp_path) -> Callable[..., Path]:
    """Write the strategy file of a model, every layer (or those named) set to a strategy."""

    def write(model, input_shape, strategy="Quant_INT8-8", only=None, **extra):
        path = dopt_api.generate_config(model, input_shape, tmp_path / "config.json")
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, layer in content["layer_strategy"].items():
            if only is None or name in only:
                layer.update(quant_strategy=strategy, **extra)
        path.write_text(json.dumps(content, indent=4), encoding="utf-8")
        return path

    return write


@pytest.fixture
def quantize(config_of) -> Callable[..., nn.Module]:
    """Return the quantized copy of a model, calibrated on the given batches (none: not calibrated)."""

    def make(model, input_shape, *batches, **options):
        quantized = dopt_api.optimize(model, config_of(model, input_shape, **options))
        if batches:
            dopt_api.set_calibrate_state(quantized, True)
            with torch.no_grad():
                for batch in batches:
                    quantized(batch)
            dopt_api.set_calibrate_state(quantized, False)
        return quantized

    return make


@pytest.fixture
def make(tmp_path):
    """Return a function that quantizes a model (the padded network), all layers at a strategy, and calibrates it."""

    def quantized(model=None, strategy="Quant_INT8-4", data=None, shape="x:1,3,16,16", calibrate=True):
        model = Net().eval() if model is None else model.eval()
        file = tmp_path / "config.json"
        generate_config_file(model, shape, str(file))
        content = json.loads(file.read_text())
        for entry in content["layer_strategy"].values():
            entry["quant_strategy"] = strategy
        file.write_text(json.dumps(content))
        made = optimize_model(model, str(file))
        if calibrate:
            set_calibrate_state(made, True)
            with torch.no_grad():
                for batch in batches() if data is None else data:
                    made(batch)
            set_calibrate_state(made, False)
        return made

    return quantized
