"""Sensitivity: what is predicted for a layer alone is what is measured, and nothing of the model changes."""

import json
import math

import pytest
import torch
from torch import nn

from dopt.dopt_torch.opt_main import generate_config_file, optimize_model, set_calibrate_state
from dopt_api.errors import CalibrationError, ModelError
from dopt_api.search import choose
from dopt_torch.sensitivity import measure_sensitivity


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU6(inplace=True)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 6)
        self.drop = nn.Dropout()
        with torch.no_grad():
            self.norm.running_var.uniform_(0.3, 2)
            self.norm.running_mean.uniform_(-0.5, 0.5)

    def forward(self, x):
        x = self.deep(self.act(self.norm(self.stem(x))))
        return self.head(self.drop(torch.relu_(self.up(x)).mean((2, 3))))


def batches(count=4, size=16):
    torch.manual_seed(0)
    return [torch.randn(size, 3, 8, 8) for _ in range(count)]


@pytest.fixture
def quantized(tmp_path):
    """Return a function that makes the model with layers at a strategy, calibrated."""

    def make(strategy, only=None, model=None):
        model = Net().eval() if model is None else model
        file = tmp_path / "config.json"
        generate_config_file(model, "x:1,3,8,8", str(file))
        content = json.loads(file.read_text())
        for name, entry in content["layer_strategy"].items():
            if only is None or name == only:
                entry["quant_strategy"] = strategy
        file.write_text(json.dumps(content))
        made = optimize_model(model, str(file))
        set_calibrate_state(made, True)
        with torch.no_grad():
            for batch in batches():
                made(batch)
        set_calibrate_state(made, False)
        return made

    return make


LAYERS = ["stem/Conv2D", "deep/Conv2D", "up/ConvTranspose2D", "head/Linear"]


def test_the_prediction_for_a_layer_alone_is_what_is_measured(quantized):
    many = batches(24)
    choices = measure_sensitivity(quantized("Quant_INT8-8"), many, ["Quant_INT8-4"])
    predicted = {choice.layer: choice.damage for choice in choices if choice.strategy == "Quant_INT8-4"}
    assert list(predicted) == LAYERS
    float_model = Net().eval()
    for layer in LAYERS:
        alone = quantized("Quant_INT8-4", layer).eval()
        with torch.no_grad():
            exact = torch.cat([float_model(batch) for batch in many])
            error = torch.cat([alone(batch) for batch in many]) - exact
        measured = float(error.square().sum() / exact.square().sum())
        # 384 directions: the estimate has a relative standard deviation of some 10 %
        assert abs(math.log(predicted[layer] / measured)) < math.log(1.6), layer


def test_fewer_bits_do_more_damage_and_cost_less(quantized):
    strategies = ["Quant_INT16-8", "Quant_INT8-8", "Quant_INT8-7", "Quant_INT8-4", "Quant_INT4-4"]
    choices = measure_sensitivity(quantized("Quant_INT8-8"), batches(), strategies)
    for layer in LAYERS:
        rows = {choice.strategy: choice for choice in choices if choice.layer == layer}
        damages = [
            rows[name].damage for name in ("float", "Quant_INT8-8", "Quant_INT8-7", "Quant_INT8-4", "Quant_INT4-4")
        ]
        assert damages == sorted(damages)
        assert damages[0] == 0 < damages[1]
        assert rows["Quant_INT16-8"].damage < rows["Quant_INT8-8"].damage
        assert rows["Quant_INT8-4"].cost * 2 == rows["Quant_INT8-8"].cost


def test_costs_are_bits_and_products(quantized):
    model = quantized("Quant_INT8-8")
    size = {c.layer: c.cost for c in measure_sensitivity(model, batches(1), ["Quant_INT8-4"]) if c.strategy != "float"}
    assert size == {"stem/Conv2D": 4 * 216, "deep/Conv2D": 4 * 72, "up/ConvTranspose2D": 4 * 128, "head/Linear": 4 * 24}
    work = measure_sensitivity(model, batches(1), ["Quant_INT8-4"], cost="bit_operations")
    work = {choice.layer: choice.cost for choice in work if choice.strategy != "float"}
    assert work == {
        "stem/Conv2D": 32 * 216 * 64,
        "deep/Conv2D": 32 * 72 * 64,
        "up/ConvTranspose2D": 32 * 128 * 64,
        "head/Linear": 32 * 24,
    }


def test_the_search_spends_bits_where_they_help(quantized):
    choices = measure_sensitivity(quantized("Quant_INT8-8"), batches(), ["Quant_INT8-8", "Quant_INT8-4"])
    full = sum(choice.cost for choice in choices if choice.strategy == "Quant_INT8-8")
    point = choose(choices, 0.75 * full)
    assert set(point.strategies.values()) <= {"Quant_INT8-8", "Quant_INT8-4"}
    assert 0.5 * full < point.cost <= 0.75 * full


def test_the_model_stays_as_it_is(quantized):
    model = quantized("Quant_INT8-8").train()
    model.stem.weight.requires_grad_(False)
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    data, state = batches(2), torch.get_rng_state()
    with torch.no_grad():
        first = measure_sensitivity(model, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [module.training for module in model.modules()]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["stem.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "forward" not in model.stem.__dict__
    assert first == measure_sensitivity(model, batches(2)), "the same directions each time"


def test_inputs_by_position_and_by_name(quantized):
    model, (batch,) = quantized("Quant_INT8-8"), batches(1)
    wanted = measure_sensitivity(model, [batch])
    assert measure_sensitivity(model, [(batch,)]) == wanted
    assert measure_sensitivity(model, [{"x": batch}]) == wanted


def test_layers_left_float_are_not_measured(quantized):
    choices = measure_sensitivity(quantized("Quant_INT8-8", "deep/Conv2D"), batches(1), ["Quant_INT8-4"])
    assert [(choice.layer, choice.strategy) for choice in choices] == [
        ("deep/Conv2D", "Quant_INT8-4"),
        ("deep/Conv2D", "float"),
    ]


class Detached(Net):
    def forward(self, x):
        return super().forward(x).detach()


@pytest.mark.parametrize(
    ("model", "data", "error", "what"),
    [
        (lambda make: Net(), batches(1), ModelError, "not a quantized model"),
        (lambda make: make("Quant_INT8-8"), [], CalibrationError, "There are no batches"),
        (lambda make: make("Quant_INT8-8", model=Detached().eval()), batches(1), ModelError, "No output of the model"),
    ],
    ids=["float", "no data", "detached"],
)
def test_what_cannot_be_measured_is_said(quantized, model, data, error, what):
    with pytest.raises(error, match=what):
        measure_sensitivity(model(quantized), data)


def test_what_was_never_calibrated_is_named(tmp_path):
    file = tmp_path / "config.json"
    generate_config_file(Net().eval(), "x:1,3,8,8", str(file))
    file.write_text(file.read_text().replace('"quant_strategy": "float"', '"quant_strategy": "Quant_INT8-8"'))
    with pytest.raises(CalibrationError, match="stem/Conv2D"):
        measure_sensitivity(optimize_model(Net().eval(), str(file)), batches(1))
