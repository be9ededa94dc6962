"""Calibration: float while it is on, ranges decided by the core from all that was seen, nothing else changed."""

import numpy as np
import pytest

from dopt_api.errors import CalibrationError, DoptError, ModelError
from dopt_api.params import quantize_layer, read_params
from dopt_api.quantizer import DEFAULT_RANGE, RANGE_METHODS, Statistics, activation_parameters

pytestmark = pytest.mark.since("1.0")


def assert_identical(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def inputs_of(params):
    return {layer.name: (layer.input.scale, layer.input.zero_point) for layer in params.layers}


def decided(harness, way, name, batches, method):
    """Return what the core decides from the activations of the float model, as the parameter file has it."""
    plans, found = way.plans(name, method), {}
    for layer, plan in plans.items():
        statistics = Statistics()
        for batch in batches:
            statistics.update(harness.activations(name, batch)[layer], harness.channel_axis(name, layer))
        scale, zero_point = activation_parameters(statistics, plan.strategy.activation, layer=layer, method=method)
        found[layer] = np.float32(scale), zero_point
    return found


def test_while_it_is_on_the_model_is_float_to_the_bit(harness, way, name):
    model = way.quantized(name, way.config(name))
    way.switch(model, True)
    for batch in way.batches(name):
        assert_identical(harness.run(model, batch), harness.run(harness.build(name), batch))
    way.switch(model, False)


def test_afterwards_the_model_is_quantized(harness, deployed):
    exact = harness.run(harness.build(deployed.name), deployed.batches[0])
    assert_identical(exact, deployed.exact)
    assert any((one != other).any() for one, other in zip(exact, deployed.simulated, strict=True))


@pytest.mark.parametrize("method", sorted(RANGE_METHODS))
def test_ranges_are_those_of_the_core_to_the_bit(harness, way, name, method):
    batches = way.batches(name)
    config = way.config(name, range=method)
    files = way.export(name, config, way.save(way.calibrated(name, config, batches)))
    found = {
        layer: (np.float32(scale[0]), zero_point[0])
        for layer, (scale, zero_point) in inputs_of(read_params(files.params)).items()
    }
    assert found == decided(harness, way, name, batches, method)


def test_a_range_contains_zero(harness, way, main):
    batches = [
        {key: np.abs(data) + data.dtype.type(2) if data.dtype.kind == "f" else data for key, data in batch.items()}
        for batch in way.batches(main)
    ]
    config = way.config(main)
    files = way.export(main, config, way.save(way.calibrated(main, config, batches)))
    found = {
        layer: (np.float32(scale[0]), zero_point[0])
        for layer, (scale, zero_point) in inputs_of(read_params(files.params)).items()
    }
    assert found == decided(harness, way, main, batches, DEFAULT_RANGE)


def test_weight_scales_and_integers_are_those_of_the_core(harness, way, deployed):
    floats = harness.float_layers(deployed.name)
    for layer, plan in way.plans(deployed.name).items():
        entry = deployed.layers[layer]
        scale, zero_point = np.float32(entry.input.scale[0]), entry.input.zero_point[0]
        wanted = quantize_layer(floats[layer], plan, scale, zero_point)
        np.testing.assert_array_equal(np.float32(entry.weight.scale), wanted.weight_scale, err_msg=layer)
        assert (entry.bias is None) == (wanted.bias is None)
        if entry.bias is not None:
            np.testing.assert_array_equal(np.float32(entry.bias.scale), wanted.bias_scale, err_msg=layer)


def test_order_of_batches_does_not_matter(way, name):
    config, batches = way.config(name), way.batches(name)
    files = [
        way.params_of(name, config, way.calibrated(name, config, given))
        for given in (batches, batches[::-1], (*batches, batches[0]))
    ]
    assert files[0] == files[1], "the order of the batches matters"
    assert files[0] == files[2], "with the default range, a batch seen twice changes nothing"


def test_every_batch_counts(harness, way, name):
    config, batches = way.config(name), way.batches(name)
    first = next(iter(harness.float_layers(name)))

    def range_of(given):
        model = way.calibrated(name, config, given)
        return inputs_of(read_params(way.export(name, config, way.save(model)).params))[first]

    (key,), usual = batches[0], range_of(batches)
    for position in range(len(batches)):
        wide = [batch if i != position else {key: 3 * batch[key]} for i, batch in enumerate(batches)]
        assert range_of(wide) != usual, f"batch {position} of {len(batches)} was not seen"


def test_after_it_is_off_nothing_is_collected(harness, way, name):
    config, batches = way.config(name), way.batches(name)
    model = way.calibrated(name, config, batches)
    before = way.params_of(name, config, model)
    (key,) = batches[0]
    for batch in batches:
        harness.run(model, {key: 10 * batch[key]})
    assert way.params_of(name, config, model) == before


def test_switching_it_on_again_starts_from_nothing(way, name):
    config, batches = way.config(name), way.batches(name)
    (key,) = batches[0]
    model = way.calibrated(name, config, [{key: 10 * batch[key]} for batch in batches])
    way.calibrate(model, batches)
    fresh = way.calibrated(name, config, batches)
    assert way.params_of(name, config, model) == way.params_of(name, config, fresh)


def test_switching_to_what_is_already_so_changes_nothing(harness, way, name):
    config, batches = way.config(name), way.batches(name)
    model = way.quantized(name, config)
    way.switch(model, False)  # it is off from the start
    way.switch(model, True)
    harness.run(model, batches[0])
    way.switch(model, True)
    for batch in batches[1:]:
        harness.run(model, batch)
    way.switch(model, False)
    way.switch(model, False)
    fresh = way.calibrated(name, config, batches)
    assert way.params_of(name, config, model) == way.params_of(name, config, fresh)


def test_no_weight_changes(harness, way, name):
    model = way.quantized(name, way.config(name))
    before = harness.weights(model)
    way.calibrate(model, way.batches(name))
    harness.run(model, way.batches(name)[0])
    after = harness.weights(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value, err_msg=key)


def test_a_layer_that_saw_nothing_is_named(harness, way, main):
    model = way.quantized(main, way.config(main))
    way.switch(model, True)
    with pytest.raises(CalibrationError) as caught:
        way.switch(model, False)
    assert any(layer in str(caught.value) for layer in harness.float_layers(main))


def test_nan_in_the_data_is_told_by_layer(harness, way, main):
    model = way.quantized(main, way.config(main))
    (batch,) = way.batches(main, 1)
    (key,) = batch
    broken = np.array(batch[key])
    broken.flat[0] = np.nan
    way.switch(model, True)
    harness.run(model, {key: broken})
    with pytest.raises(CalibrationError, match="NaN") as caught:
        way.switch(model, False)
    assert next(iter(harness.float_layers(main))) in str(caught.value)


def test_a_float_model_has_no_calibration(harness, way, main):
    with pytest.raises(ModelError):
        way.switch(harness.build(main), True)


def test_a_quantized_model_is_not_quantized_again(harness, way, main):
    config = way.config(main)
    with pytest.raises(DoptError):
        harness.optimize(way.quantized(main, config), config)
