"""Layers with integer weights and a float input: nothing is calibrated, and the weights are those of the core."""

import numpy as np
import pytest

from dopt_api.params import quantize_layer, read_params
from dopt_conformance.way import sqnr

pytestmark = [pytest.mark.since("1.1"), pytest.mark.capability("weight_only")]

STRATEGY = "Quant_FLOAT-4"


def test_weights_alone_are_quantized_and_without_calibration(harness, way, name):
    config = way.config(name, strategy=STRATEGY)
    model = way.quantized(name, config)
    batches, floats = way.batches(name), harness.float_layers(name)
    exact = harness.run(harness.build(name), batches[0])
    simulated = harness.run(model, batches[0])
    files = way.export(name, config, way.save(model))
    entries = {entry.name: entry for entry in read_params(files.params).layers}
    for layer, plan in way.plans(name, strategy=STRATEGY).items():
        entry, wanted = entries[layer], quantize_layer(floats[layer], plan, None)
        assert not entry.input.quantized
        assert entry.bias is None
        np.testing.assert_array_equal(np.float32(entry.weight.scale), wanted.weight_scale, err_msg=layer)
    assert 6 * 4 - 22 < sqnr(exact, simulated) < 60
    found = harness.run_file(files.model, batches[0], harness.output_names(name))
    assert sqnr(simulated, found) > 80  # the graph has the same weights, and nothing else is quantized


def test_calibration_changes_nothing(harness, way, name):
    config = way.config(name, strategy=STRATEGY)
    model = way.quantized(name, config)
    (batch,) = way.batches(name, 1)
    before = harness.run(model, batch)
    calibrated = way.calibrated(name, config)
    for one, other in zip(before, harness.run(calibrated, batch), strict=True):
        np.testing.assert_array_equal(one, other)
    files = [way.export(name, config, way.save(each)).params.read_bytes() for each in (model, calibrated)]
    assert files[0] == files[1]


def test_float_and_integer_inputs_stand_in_one_model(harness, way, name):
    layers = list(harness.float_layers(name))
    config = way.config(name, only=layers[1:])
    way.edit(config, lambda content: content["layer_strategy"][layers[0]].update(quant_strategy=STRATEGY))
    files = way.export(name, config, way.save(way.calibrated(name, config)))
    quantized = {entry.name: entry.input.quantized for entry in read_params(files.params).layers}
    assert quantized == {layer: layer != layers[0] for layer in layers}
