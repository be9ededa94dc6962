"""Layers that stay float: nothing is done to them."""

from itertools import pairwise

import numpy as np
import pytest

from dopt_api.params import read_params
from dopt_api.quantizer import Statistics, activation_parameters, fake_quantize
from dopt_conformance.way import sqnr

pytestmark = pytest.mark.since("1.0")


def assert_identical(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_file_with_all_layers_float_changes_nothing(harness, way, name):
    model = way.quantized(name, way.float_config(name))
    for batch in way.batches(name):
        assert_identical(harness.run(model, batch), harness.run(harness.build(name), batch))


def test_a_file_with_all_layers_float_exports_no_parameters(harness, way, name):
    config = way.float_config(name)
    (batch,) = way.batches(name, 1)
    files = way.export(name, config, way.save(way.quantized(name, config)))
    assert harness.read_file(files.model).nodes
    exact = harness.run(harness.build(name), batch)
    found = harness.run_file(files.model, batch, harness.output_names(name))
    assert sqnr(exact, found) > 90, "folding moves roundings, no more"


def test_the_model_that_was_given_is_not_changed_where_a_copy_is_returned(harness, way, name):
    (batch,) = way.batches(name, 1)
    given = harness.build(name)
    quantized = harness.optimize(given, way.config(name))
    if quantized is given:
        return  # session graphs are rewritten in place, which is their contract
    weights = harness.weights(harness.build(name))
    way.calibrate(quantized, [batch])
    for key, value in harness.weights(given).items():
        np.testing.assert_array_equal(value, weights[key], err_msg=key)
    assert_identical(harness.run(given, batch), harness.run(harness.build(name), batch))


def test_only_the_chosen_layers_are_quantized(harness, way, name):
    """With the first layer alone quantized, its input and weight are all that changes."""
    layers = harness.float_layers(name)
    (batch,) = way.batches(name, 1)
    seen = []
    for layer in layers:
        config = way.config(name, only=[layer])
        model = way.calibrated(name, config, [batch])
        seen.append(harness.run(model, batch))
        exported = way.export(name, config, way.save(model))
        assert [entry.name for entry in read_params(exported.params).layers] == [layer]
    exact = harness.run(harness.build(name), batch)
    for layer, found in zip(layers, seen, strict=True):
        assert sqnr(exact, found) < 100, f"layer {layer!r} is as in float"
    for one, other in pairwise(seen):
        assert any((a != b).any() for a, b in zip(one, other, strict=True)), "two layers have the same effect"


def test_the_first_layer_sees_its_input_on_the_grid(harness, way, name):
    """What is on the grid already passes the first layer's input quantizer as it is, so both inputs give one output."""
    first = next(iter(harness.float_layers(name)))
    config = way.config(name, only=[first])
    batches = way.batches(name)
    model = way.calibrated(name, config, batches)
    statistics = Statistics()
    for batch in batches:
        statistics.update(harness.activations(name, batch)[first], harness.channel_axis(name, first))
    plan = way.plans(name)[first]
    scale, zero_point = activation_parameters(statistics, plan.strategy.activation, layer=first)
    (key,) = batches[0]
    on_grid = {key: fake_quantize(batches[0][key], scale, zero_point, plan.strategy.activation)}
    assert (on_grid[key] != batches[0][key]).any()
    assert_identical(harness.run(model, on_grid), harness.run(model, batches[0]))
