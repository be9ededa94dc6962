"""Outputs of layers that are recorded on request: float in calibration, then quantized, and in the parameter file."""

import numpy as np
import pytest

from dopt_api.errors import CalibrationError, CheckpointError
from dopt_api.params import read_params
from dopt_conformance.way import sqnr

pytestmark = [pytest.mark.since("1.2"), pytest.mark.capability("recorded_outputs")]


def recording(harness, way, name):
    """Return a strategy file of quantized layers that records the output of the first, and that layer's name."""
    first = next(iter(harness.float_layers(name)))
    config = way.config(name)
    return way.edit(config, lambda content: content["layer_strategy"][first].update(output=True)), first


def test_a_recorded_output_is_in_the_parameter_file_and_nothing_else_changes(harness, way, name):
    config, first = recording(harness, way, name)
    plain = read_params(way.export(name, way.config(name), way.save(way.calibrated(name, way.config(name)))).params)
    files = way.export(name, config, way.save(way.calibrated(name, config)))
    edges, plans = harness.read_file(files.model).edges, way.plans(name)
    for before, entry in zip(plain.layers, read_params(files.params).layers, strict=True):
        assert before.output is None
        assert (entry.input.scale, entry.weight.scale) == (before.input.scale, before.weight.scale)
        if entry.name != first:
            assert entry.output is None
            continue
        grid = plans[first].input_grid
        assert (entry.output.dtype, entry.output.bits, entry.output.axis) == (grid.dtype, grid.bits, None)
        assert grid.qmin <= entry.output.zero_point[0] <= grid.qmax
        assert entry.output.tensor in edges


def test_a_recorded_output_is_quantized_in_the_simulation(harness, way, name):
    config, first = recording(harness, way, name)
    way.edit(config, lambda content: content["layer_strategy"][first].update(range="min_max"))
    plain, model = way.calibrated(name, way.config(name)), way.calibrated(name, config)
    (batch,) = way.batches(name, 1)
    assert 15 < sqnr(harness.run(plain, batch), harness.run(model, batch)) < 100


def test_calibration_of_outputs_runs_in_float_and_merges(harness, way, name):
    config, _ = recording(harness, way, name)
    batches = way.batches(name)
    model = way.quantized(name, config)
    way.switch(model, True)
    for one, other in zip(harness.run(model, batches[0]), harness.run(harness.build(name), batches[0]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    way.switch(model, False)
    texts = [way.params_of(name, config, way.calibrated(name, config, order)) for order in (batches, batches[::-1])]
    assert texts[0] == texts[1]


def test_an_output_that_was_never_calibrated_is_not_exported(harness, way, name):
    config, _ = recording(harness, way, name)
    checkpoint = way.save(way.calibrated(name, way.config(name)))
    with pytest.raises((CalibrationError, CheckpointError)):
        way.export(name, config, checkpoint)
