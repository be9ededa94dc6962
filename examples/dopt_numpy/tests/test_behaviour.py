"""What users can rely on."""

import json
import logging

import numpy as np
import pytest
from networks import SHAPE, batch, calibrate, make_network, write_config

import dopt_api
from dopt_api.errors import CalibrationError, ModelError, NumbersError
from dopt_api.quantizer import Statistics, activation_parameters
from dopt_api.strategy import STRATEGIES
from dopt_numpy.checkpoint import load_checkpoint, save_checkpoint
from dopt_numpy.network import SGD, BatchNorm, Conv2D, Dense, Network, ReLU, cross_entropy


def test_the_float_model_is_unchanged_and_the_copy_is_its_own(config):
    network = make_network()
    before, y = network.state(), network(batch())
    quantized = calibrate(dopt_api.optimize(network, config), batch())
    for parameter in quantized.parameters():
        parameter.value += 1
    assert (network(batch()) == y).all()
    assert list(network.state()) == list(before)


def test_float_layers_stay_float(tmp_path):
    path = dopt_api.generate_config(make_network(), SHAPE, tmp_path / "config.json")
    quantized = dopt_api.optimize(make_network(), path)
    assert (quantized(batch()) == make_network()(batch())).all()
    assert float(dopt_api.get_quant_loss(quantized)) == 0


def test_quantized_outputs_are_near_the_float_ones_but_not_the_same(quantized):
    wanted, found = make_network()(batch()), quantized(batch())
    assert 0 < np.abs(found - wanted).max() < 0.1 * wanted.std()


def test_a_float_checkpoint_loads_into_the_quantized_network(config, tmp_path):
    path = save_checkpoint(make_network(5), tmp_path / "float.npz")
    quantized = dopt_api.optimize(make_network(), config)
    quantized.load_state(load_checkpoint(path))
    calibrate(quantized, batch())
    other = calibrate(dopt_api.optimize(make_network(5), config), batch())
    assert (quantized(batch()) == other(batch())).all()


def test_a_float_checkpoint_keeps_the_calibration(quantized):
    before = quantized.state()
    quantized.load_state(make_network(5).state())
    for name, array in quantized.state().items():
        assert (array == (before[name] if ".dopt_quantizer." in name else make_network(5).state()[name])).all()


def test_a_checkpoint_restores_the_quantized_network(quantized, checkpoint, config):
    other = dopt_api.optimize(make_network(3), config)
    other.load_state(load_checkpoint(checkpoint))
    assert (other(batch()) == quantized(batch())).all()


def test_the_scale_of_an_input_is_that_of_the_core(tmp_path):
    network = Network({"fc": Dense(4, 2)})
    config = write_config(network, tmp_path / "c.json", "x:1,4", range="moving_average")
    quantized = dopt_api.optimize(network, config)
    data = np.random.default_rng(0).normal(0, 1, (9, 4)).astype(np.float32)
    calibrate(quantized, data[:4], data[4:])
    statistics, grid = Statistics(), STRATEGIES["Quant_INT8-8"].activation
    statistics.update(data)
    scale, zero_point = activation_parameters(statistics, grid, layer="fc", method="moving_average")
    own = quantized.layers["fc"].quantizer
    assert (own.input_scale, own.input_zero_point) == (scale, zero_point)


def test_calibration_passes_are_float_and_move_no_running_statistics(config):
    network = make_network()
    quantized = dopt_api.optimize(network, config)
    dopt_api.set_calibrate_state(quantized, True)
    y, _ = quantized.forward(batch(), training=True)
    assert (y == network(batch())).all()
    assert (quantized.state()["bn.mean"] == network.state()["bn.mean"]).all()
    dopt_api.set_calibrate_state(quantized, False)
    quantized.forward(batch(), training=True)
    assert (quantized.state()["bn.mean"] != network.state()["bn.mean"]).any()


def test_batch_size_and_order_do_not_matter(config):
    data = batch(12)
    whole = calibrate(dopt_api.optimize(make_network(), config), data[:6], data[6:])
    parts = calibrate(dopt_api.optimize(make_network(), config), data[6:], data[:6])
    for name, array in whole.state().items():
        assert (array == parts.state()[name]).all(), name


def test_calibrating_again_starts_from_nothing(quantized, config):
    calibrate(quantized, 100 * batch())
    calibrate(quantized, batch())
    fresh = calibrate(dopt_api.optimize(make_network(), config), batch())
    assert all((fresh.state()[name] == array).all() for name, array in quantized.state().items())


def test_switching_to_the_present_state_does_nothing(quantized):
    before = quantized.state()
    dopt_api.set_calibrate_state(quantized, False)
    assert all((quantized.state()[name] == array).all() for name, array in before.items())
    dopt_api.set_calibrate_state(quantized, True)
    quantized(batch())
    dopt_api.set_calibrate_state(quantized, True)  # does not forget
    dopt_api.set_calibrate_state(quantized, False)


def test_no_data_and_broken_data_are_told_with_the_layer(config):
    quantized = dopt_api.optimize(make_network(), config)
    dopt_api.set_calibrate_state(quantized, True)
    with pytest.raises(CalibrationError, match=r"conv/Conv2D.*seen no data.*4 other"):
        dopt_api.set_calibrate_state(quantized, False)
    broken = batch()
    broken[1, 0, 0, 0] = np.nan
    dopt_api.set_calibrate_state(quantized, True)
    quantized(broken)
    with pytest.raises(CalibrationError, match="NaN or infinity in 1 of 4"):
        dopt_api.set_calibrate_state(quantized, False)


def test_before_calibration_inference_is_float_and_says_so_once(config, caplog):
    quantized = dopt_api.optimize(make_network(), config)
    with caplog.at_level(logging.WARNING, "dopt"):
        assert (quantized(batch()) == make_network()(batch())).all()
        first = [record for record in caplog.records if "no input range" in record.message]
        quantized(batch())
    again = [record for record in caplog.records if "no input range" in record.message]
    assert len(first) == len(again) == 5


def test_training_starts_the_scales_from_its_first_batch(config):
    quantized = dopt_api.optimize(make_network(), config)
    quantized.forward(batch(), training=True)
    layers = quantized.quantized_layers.values()
    assert all(layer.quantizer.is_ready() for layer in layers)
    scales = [layer.quantizer.input_scale.copy() for layer in layers]
    quantized.forward(10 * batch(), training=True)
    assert scales == [layer.quantizer.input_scale for layer in layers]


def test_numbers_that_cannot_be_quantized_name_the_layer(quantized):
    quantized.layers["conv"].layer.weight.value[0, 0, 0, 0] = np.nan
    with pytest.raises(NumbersError, match="conv/Conv2D"):
        quantized(batch())


@pytest.mark.parametrize("call", [dopt_api.generate_config, dopt_api.optimize])
def test_a_quantized_network_is_not_quantized_again(quantized, config, call):
    arguments = (config,) if call is dopt_api.optimize else (SHAPE, config)
    with pytest.raises(ModelError, match="already quantized"):
        call(quantized, *arguments)


def test_calibration_and_loss_need_a_quantized_network():
    with pytest.raises(ModelError, match="not a quantized"):
        dopt_api.set_calibrate_state(make_network(), True)
    with pytest.raises(ModelError, match="not a quantized"):
        dopt_api.get_quant_loss(make_network())


def test_a_channel_that_normalization_switches_off_is_quantized_all_the_same(tmp_path):
    network = Network({"conv": Conv2D(2, 2, 1), "bn": BatchNorm(2), "relu": ReLU()})
    network.layers["bn"].gamma.value[0] = 0
    config = write_config(network, tmp_path / "c.json", "x:1,2,4,4")
    x = np.random.default_rng(0).normal(0, 1, (4, 2, 4, 4)).astype(np.float32)
    quantized = calibrate(dopt_api.optimize(network, config), x)
    np.testing.assert_allclose(quantized(x), network(x), atol=0.05)


def test_a_layer_left_float_is_no_part_of_the_plan(tmp_path):
    config = write_config(make_network(), tmp_path / "c.json")
    content = json.loads(config.read_text())
    content["layer_strategy"]["conv/Conv2D"]["quant_strategy"] = "float"
    config.write_text(json.dumps(content))
    quantized = dopt_api.optimize(make_network(), config)
    assert "conv" not in quantized.quantized_layers
    assert "fc" in quantized.quantized_layers


def test_training_moves_weights_and_gains_and_lowers_the_loss(quantized):
    labels = np.arange(16) % 5
    optimizer = SGD(quantized.parameters(), 0.01)
    before, losses = quantized.state(), []
    for _ in range(20):
        logits, pullback = quantized.forward(batch(16), training=True)
        value, gradient = cross_entropy(logits, labels)
        losses.append(value)
        pullback(gradient)
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    after = quantized.state()
    for name in before:
        if name.endswith(("weight", "_gain")):
            assert (after[name] != before[name]).any(), name
