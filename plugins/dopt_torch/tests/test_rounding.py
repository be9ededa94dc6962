"""Rounding by what the outputs lose: nearer to float, exported as chosen, and nothing else changed."""

import json
import math

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional

from dopt.dopt_torch.opt_main import (
    generate_config_file,
    generate_final_model,
    optimize_model,
    set_calibrate_state,
)
from dopt_api.errors import CalibrationError, ModelError
from dopt_api.params import read_params
from dopt_api.strategy import STRATEGIES
from dopt_torch import rounding
from dopt_torch.rounding import round_weights


class Padded(nn.Conv2d):
    """A convolution that pads by itself, as exported networks have it."""

    def forward(self, x):
        return functional.conv2d(
            functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, 1, self.groups
        )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.stem = Padded(3, 16, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.act = nn.ReLU6(inplace=True)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.wide = nn.Conv2d(16, 24, (3, 1), padding=(1, 0), dilation=1)
        self.head = nn.Linear(24, 6)
        with torch.no_grad():
            self.norm.running_var.uniform_(0.3, 2)
            self.norm.running_mean.uniform_(-0.5, 0.5)

    def forward(self, x):
        x = self.deep(self.act(self.norm(self.stem(x))))
        return self.head(torch.relu_(self.wide(x)).mean((2, 3)))


def batches(count=4, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = [torch.randn(size, 3, 5, 5, generator=generator) for _ in range(count)]
    return [functional.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False) for x in coarse]


@pytest.fixture
def make(tmp_path):
    """Return a function that quantizes a model, all layers at a strategy, and calibrates it."""

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


def sqnr(model, exact, data):
    with torch.no_grad():
        wanted, found = (torch.cat([one(x) for x in data]) for one in (exact, model))
    return 10 * math.log10(float(wanted.square().sum() / (found - wanted).square().sum()))


@pytest.mark.parametrize(("strategy", "gain"), [("Quant_INT8-4", 3.0), ("Quant_INT8-8", 0.5)])
def test_the_outputs_come_nearer_to_float_on_other_data(make, strategy, gain):
    model, other = make(strategy=strategy).eval(), batches(seed=9)
    before = sqnr(model, Net().eval(), other)
    report = round_weights(model, batches(), positions=32)
    assert [layer.name for layer in report] == ["stem/Conv2D", "deep/Conv2D", "wide/Conv2D", "head/Linear"]
    assert all(layer.reason == "" and 0 < layer.rounded <= layer.nearest < 1 for layer in report)
    assert sqnr(model, Net().eval(), other) > before + gain


@pytest.mark.parametrize("search", [True, False], ids=["searched scales", "scales that reach no end of the grid"])
@pytest.mark.parametrize("strategy", ["Quant_INT8-4", "Quant_INT8-8"])
def test_exporting_gives_the_integers_and_scales_that_were_chosen(make, tmp_path, monkeypatch, strategy, search):
    chosen, scales = [], []

    def spy(weight, scale, *args, **options):
        chosen.append(real(weight, scale, *args, **options))
        scales.append(scale.reshape(-1))
        return chosen[-1]

    real = rounding.round_weight
    monkeypatch.setattr(rounding, "round_weight", spy)
    if not search:
        monkeypatch.setattr(rounding, "best_scale", lambda weight, scale, moments, grid: scale * 1.5)
    model = make(strategy=strategy)
    round_weights(model, batches(), positions=32)
    torch.save(model.state_dict(), tmp_path / "rounded.pth")
    result = generate_final_model(
        Net().eval(), str(tmp_path / "config.json"), str(tmp_path / "rounded.pth"), str(tmp_path)
    )
    graph = onnx.load(str(result.model)).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    layers = read_params(result.params).layers
    for entry, integers in zip(layers, chosen, strict=True):
        weight = stored[entry.weight.tensor]
        weight = np.moveaxis(weight, entry.weight.axis, 0).reshape(len(entry.weight.scale), -1)
        found = weight / np.float32(entry.weight.scale)[:, None]
        np.testing.assert_allclose(found, np.rint(found), atol=1e-4)
        np.testing.assert_array_equal(np.rint(found), integers.reshape(found.shape), err_msg=entry.name)
    for entry, scale in zip(layers, scales, strict=True):
        np.testing.assert_allclose(entry.weight.scale, scale, rtol=1e-6)
    ends = {int(np.abs(row).max()) for integers in chosen for row in integers.reshape(-1, integers.shape[-1])}
    assert search or max(ends) < STRATEGIES[strategy].weight.qmax


def test_the_mean_of_the_outputs_is_that_of_float(make):
    model = make()
    round_weights(model, batches(), positions=256)
    with torch.no_grad():
        exact, found = (torch.cat([one(x) for x in batches()]) for one in (Net().eval(), model.eval()))
    spread = (found - exact).std(0)
    assert ((found - exact).mean(0).abs() < 0.35 * spread).all()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2), bias=False),
        nn.Conv2d(4, 8, (3, 2), dilation=(1, 2), groups=2, padding="valid"),
        nn.Conv2d(4, 8, (3, 2), dilation=(1, 2), groups=4, padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        Padded(4, 6, 3, stride=2),
        nn.Linear(9, 5),
    ],
    ids=["plain", "stride", "dilation", "same", "circular", "own", "linear"],
)
def test_patches_times_weight_are_the_layers_outputs(layer):
    watched = torch.randn(3, 4, 8, 9).as_subclass(rounding._Watched)
    watched.calls = []
    function = "linear" if isinstance(layer, nn.Linear) else "conv2d"
    with torch.no_grad():
        y = layer(watched).as_subclass(torch.Tensor)
    call = rounding._call_of(watched.calls, function)
    sampler = rounding._Sampler.__new__(rounding._Sampler)
    sampler.function, sampler.positions, sampler.seed = function, 7, 5
    sampler.restart()
    patches = sampler.patches(call)
    weight = layer.weight.detach().reshape(patches.shape[1], -1, patches.shape[2])
    found = torch.einsum("ngk,gok->ngo", patches, weight).reshape(len(patches), -1)
    if layer.bias is not None:
        found = found + layer.bias.detach()
    generator = torch.Generator().manual_seed(5)
    if function == "linear":
        wanted = y.reshape(-1, 5)[torch.randint(96, (21,), generator=generator)]
    else:
        top, left = (torch.randint(size, (3, 7), generator=generator) for size in y.shape[2:])
        wanted = y[torch.arange(3)[:, None], :, top, left].reshape(21, -1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


class Odd(nn.Module):
    """Layers that cannot be rounded, and one that is called twice a pass."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.up = nn.ConvTranspose2d(3, 4, 2)
        self.twice = nn.Conv2d(4, 4, 1)
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x):
        x = self.twice(torch.relu(self.twice(self.up(x)))).mean((2, 3))
        return self.other(torch.relu(self.one(x)))


def test_what_is_left_alone_is_listed_with_the_reason(make):
    model = make(Odd())
    weights = {name: value.clone() for name, value in model.named_parameters()}
    report = {layer.name: layer.reason for layer in round_weights(model, batches())}
    assert report["up/ConvTranspose2D"] == "ConvTranspose2D is not rounded by this method"
    assert report["twice/Conv2D"] == ""
    assert "another layer's too" in report["one/Linear"]
    assert torch.equal(model.up.weight, weights["up.weight"])
    assert torch.equal(model.one.weight, weights["one.weight"])
    assert not torch.equal(model.twice.weight, weights["twice.weight"])


def test_modes_keys_and_everything_else_stay(make):
    model = make().train()
    model.norm.eval()
    keys, modes = list(model.state_dict()), [module.training for module in model.modules()]
    scale = model.deep.dopt_quantizer.input_scale.clone()
    round_weights(model, batches())
    assert list(model.state_dict()) == keys
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.deep.dopt_quantizer.input_scale, scale)
    assert "forward" not in model.deep.__dict__


def test_equal_calls_give_equal_weights(make):
    first, second = make(), make()
    round_weights(first, batches(), seed=3)
    round_weights(second, batches(), seed=3)
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_failure_leaves_the_model_as_it_was(make):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def stop_at_the_third(layers):
        for number, layer in enumerate(layers):
            if number == 3:
                raise KeyboardInterrupt
            yield layer

    with pytest.raises(KeyboardInterrupt):
        round_weights(model, batches(), progress=stop_at_the_third)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "forward" not in model.deep.__dict__


def test_mistakes_are_answered(make):
    with pytest.raises(ModelError, match="not a quantized model"):
        round_weights(Net(), batches())
    with pytest.raises(CalibrationError, match="There are no batches"):
        round_weights(make(), [])
    with pytest.raises(CalibrationError, match="stem/Conv2D"):
        round_weights(make(calibrate=False), batches())
