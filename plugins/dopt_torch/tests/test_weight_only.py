"""Layers with integer weights and a float input, in groups and with zero points: the core's numbers, the whole way."""

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import dopt_api
from dopt_api.config import assign
from dopt_api.errors import StrategyError
from dopt_api.formats import convert
from dopt_api.params import quantize_layer, read_params
from dopt_api.quantizer.training import fake_quantize_gradients, gain_gradient
from dopt_api.strategy import INTEGER_STRATEGIES, STRATEGIES
from dopt_torch.export import _float_layer
from dopt_torch.optimize import get_quant_loss
from dopt_torch.quantized_layer import norm_factor, norm_of, quantized_layers
from dopt_torch.retraining import fit_weight_scales
from dopt_torch.rounding import round_weights
from dopt_torch.sensitivity import measure_sensitivity
from dopt_torch.smoothing import smooth

ALONE = [name for name in STRATEGIES if name not in INTEGER_STRATEGIES]


class Tokens(nn.Module):
    """Linear layers in two and three dimensions, one with a batch normalization, behind a convolution."""

    input_shape = "x:2,3,8,8"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Linear(64, 96)
        self.head = nn.Linear(96, 32, bias=False)
        self.norm = nn.BatchNorm1d(32)
        self.last = nn.Linear(32, 5)

    def forward(self, x):
        tokens = torch.relu(self.wide(self.conv(x).flatten(2)))
        return self.last(torch.relu(self.norm(self.head(tokens.mean(1)))))


@pytest.fixture
def tokens():
    model = Tokens().eval()
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    nn.init.uniform_(model.norm.running_var, 0.5, 2.0)
    nn.init.uniform_(model.norm.running_mean, -0.5, 0.5)
    return model


@pytest.fixture
def alone(config_of):
    """Return a function that quantizes the linear layers of a model by one strategy, and the convolution at 8 bits."""

    def make(model, strategy):
        file = config_of(model, model.input_shape, "Quant_FLOAT-8")
        assign(file, dict.fromkeys(("wide/Linear", "head/Linear", "last/Linear"), strategy))
        return dopt_api.optimize(model, file), file

    return make


@pytest.mark.parametrize("strategy", ALONE)
def test_weights_are_those_of_the_core_to_the_bit(tokens, alone, strategy):
    quantized, _ = alone(tokens, strategy)
    for layer in quantized_layers(quantized):
        quantizer = layer.dopt_quantizer
        with torch.no_grad():
            quantizer.weight_gain.uniform_(-0.3, 0.3)
        gain = quantizer.weight_gain.detach().numpy()
        wanted = quantize_layer(_float_layer(layer, norm_of(layer)), quantizer.plan, None, weight_gain=gain)
        found = quantizer.quantize_weight(layer.weight, norm_factor(layer)).detach()
        factor = norm_factor(layer)
        if factor is None:
            np.testing.assert_array_equal(found.numpy(), wanted.weight)
        else:
            np.testing.assert_allclose((found * factor[:, None]).numpy(), wanted.weight, rtol=1e-6)


def test_inputs_stay_float_and_nothing_needs_calibration(tokens, alone):
    quantized, _ = alone(tokens, "Quant_FLOAT-8")
    plain = copy.deepcopy(tokens)
    with torch.no_grad():
        for layer, own in zip(
            quantized_layers(quantized), (plain.conv, plain.wide, plain.head, plain.last), strict=True
        ):
            own.weight.copy_(layer.dopt_quantizer.quantize_weight(layer.weight, norm_factor(layer)))
        x = torch.randn(4, 3, 8, 8)
        torch.testing.assert_close(quantized.eval()(x), plain(x), rtol=0, atol=0)
        before = quantized(x)
        dopt_api.set_calibrate_state(quantized, True)
        torch.testing.assert_close(quantized(x), tokens(x), rtol=0, atol=0)  # float while calibrating, as all layers
        dopt_api.set_calibrate_state(quantized, False)
        torch.testing.assert_close(quantized(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("strategy", ["Quant_FLOAT-4-G32", "Quant_FLOAT-4A-G32"])
def test_gradients_are_those_of_the_core(tokens, alone, strategy):
    quantized, _ = alone(tokens, strategy)
    layer, grid = quantized.wide, STRATEGIES[strategy].weight
    quantizer = layer.dopt_quantizer
    with torch.no_grad():
        quantizer.weight_gain.uniform_(-0.5, 0.0)  # some weights are clipped
    dy = torch.randn_like(layer.weight)
    quantizer.quantize_weight(layer.weight, None).backward(dy)
    rows = layer.weight.detach().numpy().reshape(-1, 32)
    low, high = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
    gain = quantizer.weight_gain.detach().numpy()
    core = quantize_layer(_float_layer(layer, None), quantizer.plan, None, weight_gain=gain)
    assert (low < 0).all()
    assert (high > 0).all()
    upstream = dy.numpy().reshape(-1, 32)
    dx, dscale = fake_quantize_gradients(upstream, rows, core.weight_scale, core.weight_zero_point, grid, axis=0)
    np.testing.assert_allclose(layer.weight.grad.numpy().reshape(-1, 32), dx, rtol=1e-6, atol=1e-7)
    assert (dx == 0).any()
    base = quantize_layer(_float_layer(layer, None), quantizer.plan, None).weight_scale
    wanted = gain_gradient(dscale, base, gain)
    np.testing.assert_allclose(quantizer.weight_gain.grad.numpy(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", ALONE)
def test_the_whole_way_ends_with_what_was_simulated(tokens, alone, tmp_path, strategy):
    quantized, file = alone(tokens, strategy)
    x = torch.randn(2, 3, 8, 8)
    wanted = quantized.eval()(x).detach().numpy()
    torch.save(quantized.state_dict(), tmp_path / "quant.pth")
    result = dopt_api.export(tokens, config_file=file, checkpoint=tmp_path / "quant.pth", output_dir=tmp_path)
    (integers,) = convert(result.params, "onnx_qdq", tmp_path)
    for model in (result.model, integers):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float inputs, as asked for
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], wanted, rtol=1e-4, atol=1e-5)
    for layer in read_params(result.params).layers:
        assert not layer.input.quantized
        assert layer.bias is None


def test_training_moves_weights_and_their_scales_and_leaves_no_gradient_for_inputs(tokens, alone):
    quantized, _ = alone(tokens, "Quant_FLOAT-4A-G32")
    quantized.train()
    loss = quantized(torch.randn(8, 3, 8, 8)).square().mean() + get_quant_loss(quantized)
    loss.backward()
    for layer in quantized_layers(quantized):
        assert not layer.dopt_quantizer.input_gain.requires_grad  # or DistributedDataParallel would wait for it
        assert layer.dopt_quantizer.weight_gain.grad.abs().sum() > 0
        assert layer.weight.grad.abs().sum() > 0
    assert 0 < get_quant_loss(quantized) < 0.05


def test_a_layer_without_such_groups_is_refused_with_what_it_can_have(small_net, config_of):
    file = config_of(small_net, small_net.input_shape)
    assert "Quant_FLOAT-4-G32" not in file.read_text()
    assign(file, {"fc/Linear": "Quant_FLOAT-4-G32"})
    with pytest.raises(StrategyError, match="gives 32 weights a scale, and an output channel has 8"):
        dopt_api.optimize(small_net, file)


def test_the_algorithms_know_them(tokens, alone):
    data = [torch.randn(8, 3, 8, 8) for _ in range(2)]
    quantized, file = alone(tokens, "Quant_FLOAT-4-G32")
    results = {row.name: row for row in round_weights(quantized, data)}
    assert results["conv/Conv2D"].rounded <= results["conv/Conv2D"].nearest
    assert "groups" in results["wide/Linear"].reason
    before = [
        float(layer.dopt_quantizer.weight_error(layer.weight, None).detach()) for layer in quantized_layers(quantized)
    ]
    fit_weight_scales(quantized)
    after = [
        float(layer.dopt_quantizer.weight_error(layer.weight, None).detach()) for layer in quantized_layers(quantized)
    ]
    assert after[1] < before[1]
    again = dopt_api.optimize(tokens, file)
    assert smooth(again, data)
    x = data[0]
    assert 0 < (again.eval()(x) - tokens(x)).abs().max() < 1


def test_sensitivity_offers_a_layer_what_it_can_have(small_net, quantize):
    model = quantize(small_net, small_net.input_shape, torch.randn(4, 3, 12, 12))
    choices = measure_sensitivity(
        model, [torch.randn(4, 3, 12, 12)], ["Quant_INT8-4", "Quant_FLOAT-4", "Quant_FLOAT-4-G32"]
    )
    names = {name: {one.strategy for one in choices if one.layer == name} for name in {one.layer for one in choices}}
    assert set(map(frozenset, names.values())) == {frozenset({"Quant_INT8-4", "Quant_FLOAT-4", "float"})}
    damage = {(one.layer, one.strategy): one.damage for one in choices}
    sums = {strategy: sum(damage[name, strategy] for name in names) for strategy in ("Quant_INT8-4", "Quant_FLOAT-4")}
    assert sums["Quant_FLOAT-4"] == pytest.approx(
        sums["Quant_INT8-4"], rel=0.3
    )  # at 4 bits, the weights are the damage
    assert sums["Quant_FLOAT-4"] > 0
