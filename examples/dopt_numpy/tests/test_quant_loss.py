"""The quantization loss and its gradients."""

import numpy as np
import pytest
from networks import batch, calibrate, differences, write_config

import dopt_api
from dopt_api.quantizer import Grid, quantize, relative_squared_error
from dopt_numpy.network import SGD, Dense, Network
from dopt_numpy.quant_loss import error_gradients


@pytest.mark.parametrize("axis", [None, 0])
def test_its_gradients_are_those_of_differences_with_the_integers_held_fixed(axis):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (3, 5))
    scale = np.array([0.1, 0.3, 0.02]) if axis == 0 else np.array(0.05)
    zero_point = np.zeros(scale.shape, np.int32)
    grid = Grid(4, signed=True)
    integers = quantize(x, scale, zero_point, grid, axis=axis)

    def error():
        step = scale[:, None] if axis == 0 else scale
        return float(((integers * step - x) ** 2).sum() / (x**2).sum())

    assert error() == pytest.approx(relative_squared_error(x, scale, zero_point, grid, axis=axis), rel=1e-5)
    dx, dscale = error_gradients(x, scale, zero_point, grid, axis=axis)
    np.testing.assert_allclose(dx, differences(error, x), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(dscale, differences(error, scale), rtol=1e-4, atol=1e-6)


def test_zeros_have_no_loss_and_no_gradient():
    dx, dscale = error_gradients(np.zeros((2, 3)), 1.0, 0, Grid(8))
    assert not dx.any()
    assert dscale == 0


def test_it_counts_inputs_after_a_training_pass_only(quantized):
    weights = float(dopt_api.get_quant_loss(quantized))
    quantized(batch())
    assert float(dopt_api.get_quant_loss(quantized)) == weights > 0
    quantized.forward(batch(), training=True)
    assert float(dopt_api.get_quant_loss(quantized)) > 1.1 * weights


def test_descending_it_lowers_it(quantized):
    optimizer = SGD(quantized.parameters(), 3.0, momentum=0.0)
    values = []
    for _ in range(30):
        y, pullback = quantized.forward(batch(), training=True)
        loss = dopt_api.get_quant_loss(quantized)
        values.append(float(loss))
        loss.backward()
        pullback(np.zeros_like(y))
        optimizer.step()
    assert values[-1] < 0.9 * values[0]


def test_the_gradient_of_an_input_reaches_the_layers_before(tmp_path):
    network = Network({"a": Dense(3, 3), "b": Dense(3, 2)})
    config = write_config(network, tmp_path / "c.json", "x:1,3")
    x = np.random.default_rng(0).normal(0, 1, (8, 3)).astype(np.float32)
    quantized = calibrate(dopt_api.optimize(network, config), x)
    bias = quantized.layers["a"].layer.bias
    y, pullback = quantized.forward(x, training=True)
    pullback(np.zeros_like(y))
    assert not bias.gradient.any()
    y, pullback = quantized.forward(x, training=True)
    dopt_api.get_quant_loss(quantized).backward()
    pullback(np.zeros_like(y))
    assert bias.gradient.any()
