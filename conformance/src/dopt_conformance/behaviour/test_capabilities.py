"""What a backend may claim: retraining, the quantization loss, open batch sizes, session graphs, several processes."""

import numpy as np
import pytest

from dopt_api.params import fold, read_params
from dopt_api.quantizer import channel_maximum, fake_quantize, scale_zero_point
from dopt_conformance.way import BATCH, sqnr

pytestmark = pytest.mark.since("1.0")


def assert_identical(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def trained(harness, way, name, config, steps=5, **options):
    model = way.calibrated(name, config)
    batch = harness.batch(name, 2 * BATCH, 100)
    return model, [harness.train_step(model, batch, **options) for _ in range(steps)]


@pytest.mark.capability("retraining")
def test_training_descends_and_moves_weights_and_scales(harness, way, name):
    config = way.config(name)
    before = harness.weights(harness.build(name))
    scales = read_params(way.export(name, config, way.save(way.calibrated(name, config))).params)
    model, losses = trained(harness, way, name, config)
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    after = harness.weights(model)
    assert any((after[key] != value).any() for key, value in before.items())
    learned = read_params(way.export(name, config, way.save(model)).params)
    for one, other in zip(scales.layers, learned.layers, strict=True):
        assert one.input.scale != other.input.scale, f"the scale of the input of {one.name!r} did not follow"
        assert one.input.zero_point == other.input.zero_point
        assert one.weight.scale != other.weight.scale, f"the scales of the weight of {one.name!r} did not follow"


@pytest.mark.capability("retraining")
def test_what_was_trained_is_what_is_exported(harness, way, name):
    config = way.config(name)
    model, _ = trained(harness, way, name, config, 1)  # further steps may leave the calibrated ranges
    (batch,) = way.batches(name, 1)
    simulated = harness.run(model, batch)
    files = way.export(name, config, way.save(model))
    assert sqnr(simulated, harness.run_file(files.model, batch, harness.output_names(name))) > 20
    other = way.quantized(name, config)
    harness.load(other, way.save(model))
    assert_identical(harness.run(other, batch), simulated)


@pytest.mark.capability("retraining")
def test_inference_moves_nothing(harness, way, name):
    config = way.config(name)
    model, _ = trained(harness, way, name, config, 1)
    before = way.params_of(name, config, model)
    for batch in way.batches(name):
        harness.run(model, batch)
    assert way.params_of(name, config, model) == before


@pytest.mark.capability("retraining")
def test_without_calibration_scales_start_from_the_first_batch_of_training(harness, way, name):
    config = way.config(name)
    (batch,) = way.batches(name, 1)
    first = next(iter(harness.float_layers(name)))
    model = way.quantized(name, config)
    harness.run(model, batch, training=True)
    (key,) = batch
    harness.run(model, {key: 5 * batch[key]}, training=True)  # the second says nothing any more
    found = {layer.name: layer for layer in read_params(way.export(name, config, way.save(model)).params).layers}
    calibrated = read_params(way.export(name, config, way.save(way.calibrated(name, config, [batch]))).params)
    assert found[first].input == calibrated.layers[0].input


def relative_error(weight, scale, grid):
    data = weight.astype(np.float64)
    rounded = np.clip(np.rint(data / scale), grid.qmin, grid.qmax) * scale
    return float(np.square(rounded - data).sum() / np.square(data).sum())


@pytest.mark.capability("quant_loss")
def test_the_quantization_loss_is_positive_and_small(harness, way, name):
    model = way.calibrated(name, way.config(name))
    loss = harness.quant_loss(model, way.batches(name)[0])
    assert 0 < loss < 0.01  # the relative squared error of 8 bits


@pytest.mark.capability("quant_loss")
def test_the_quantization_loss_of_a_float_model_is_zero(harness, way, name):
    model = way.quantized(name, way.float_config(name))
    assert harness.quant_loss(model, way.batches(name)[0]) == 0


@pytest.mark.capability("quant_loss")
def test_the_quantization_loss_is_the_mean_over_layers(harness, way, name):
    """In inference it is that of the weights alone, each relative to its size."""
    wanted = []
    for layer, plan in way.plans(name).items():
        floating = harness.float_layers(name)[layer]
        weight, _ = fold(floating)
        extreme = channel_maximum(weight, floating.axis)
        scale, _ = scale_zero_point(-extreme, extreme, plan.strategy.weight)
        shaped = scale.reshape([-1 if axis == floating.axis else 1 for axis in range(weight.ndim)])
        wanted.append(relative_error(weight, shaped, plan.strategy.weight))
    loss = harness.quant_loss(way.calibrated(name, way.config(name)), way.batches(name)[0])
    assert loss == pytest.approx(np.mean(wanted), rel=1e-4)


@pytest.mark.capability("quant_loss")
def test_descending_the_quantization_loss_moves_scales(harness, way, name):
    config = way.config(name)
    before = read_params(way.export(name, config, way.save(way.calibrated(name, config))).params)
    model, losses = trained(harness, way, name, config, 3, quant_loss=True)
    assert all(np.isfinite(losses))
    assert all(loss > 0 for loss in losses)
    after = read_params(way.export(name, config, way.save(model)).params)
    assert any(one.weight.scale != other.weight.scale for one, other in zip(before.layers, after.layers, strict=True))


@pytest.mark.capability("quant_loss")
def test_learned_scales_are_exported(harness, way, name):
    first = next(iter(harness.float_layers(name)))
    config = way.config(name, [first])
    model, _ = trained(harness, way, name, config, 30, quant_loss=True)
    files = way.export(name, config, way.save(model))
    (entry,) = read_params(files.params).layers
    grid = way.plans(name)[first].strategy.activation
    # this loss moves scales and hardly anything else; on data that the learned grid of the input has, weights alone
    # make a difference, and the graph has them rounded
    batch = {
        key: fake_quantize(data, np.float32(entry.input.scale[0]), entry.input.zero_point[0], grid)
        if data.dtype.kind == "f"
        else data
        for key, data in way.batches(name, 1)[0].items()
    }
    assert sqnr(harness.run(model, batch), harness.run_file(files.model, batch, harness.output_names(name))) > 110


@pytest.mark.capability("dynamic_batch")
def test_a_graph_with_an_open_batch_size_takes_any(harness, deployed, way):
    files = way.export(deployed.name, deployed.config, deployed.checkpoint, dynamic_batch=True)
    names = harness.output_names(deployed.name)
    for size in (1, BATCH + 3):
        batch = harness.batch(deployed.name, size, 7)
        exact = harness.run(harness.build(deployed.name), batch)
        found = harness.run_file(files.model, batch, names)
        assert [one.shape for one in found] == [one.shape for one in exact]
        assert sqnr(exact, found) > 20


@pytest.mark.capability("session_graph")
def test_flag_zero_is_the_untouched_graph_to_the_bit(harness, way, name):
    (batch,) = way.batches(name, 1)
    exact = harness.run(harness.build(name), batch)
    model = way.quantized(name, way.config(name))
    assert_identical(harness.run(model, batch, quantized=False), exact)
    way.switch(model, True)
    assert_identical(harness.run(model, batch, quantized=False), exact)
    harness.run(model, batch)
    way.switch(model, False)
    assert_identical(harness.run(model, batch, quantized=False), exact)
    assert any((one != other).any() for one, other in zip(harness.run(model, batch), exact, strict=True))


@pytest.mark.capability("session_graph")
def test_steps_on_the_float_path_are_not_calibrated_on(harness, way, name):
    config, batches = way.config(name), way.batches(name)
    (key,) = batches[0]
    model = way.quantized(name, config)
    way.switch(model, True)
    for batch in batches:
        harness.run(model, batch)
        harness.run(model, {key: 10 * batch[key]}, quantized=False)
    way.switch(model, False)
    assert way.params_of(name, config, model) == way.params_of(name, config, way.calibrated(name, config, batches))


@pytest.mark.capability("distributed_calibration")
def test_several_processes_calibrate_as_one(harness, way, main):
    config = way.config(main)
    batches = way.batches(main, 4)
    alone = way.params_of(main, config, way.calibrated(main, config, batches))
    checkpoint = harness.calibrate_in_processes(main, config, [batches[:1], batches[1:]], way.new_folder())
    assert way.export(main, config, checkpoint).params.read_text(encoding="utf-8") == alone
