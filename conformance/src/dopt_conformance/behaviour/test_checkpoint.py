"""Checkpoints: the float model's keys stay, and everything a quantizer knows comes along."""

import numpy as np
import pytest

from dopt_api.errors import CalibrationError, CheckpointError, DoptError

pytestmark = pytest.mark.since("1.0")


def assert_identical(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_float_model_s_keys_and_values_stay(harness, way, name):
    wanted = harness.weights(harness.build(name))
    found = harness.weights(way.quantized(name, way.config(name)))
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_a_float_checkpoint_loads_into_a_calibrated_model(harness, way, name):
    model = way.calibrated(name, way.config(name))
    (batch,) = way.batches(name, 1)
    before = harness.run(model, batch)
    harness.load_float(model, way.save(harness.build(name)))
    assert_identical(harness.run(model, batch), before)


def test_a_checkpoint_brings_everything_to_another_model(harness, way, deployed):
    other = way.quantized(deployed.name, deployed.config)
    harness.load(other, deployed.checkpoint)
    assert_identical(harness.run(other, deployed.batches[0]), deployed.simulated)
    text = way.params_of(deployed.name, deployed.config, other)
    assert text == deployed.files.params.read_text(encoding="utf-8")


def test_a_calibration_that_was_never_switched_off_exports_the_same(harness, way, deployed):
    model = way.quantized(deployed.name, deployed.config)
    way.switch(model, True)
    for batch in deployed.batches:
        harness.run(model, batch)
    text = way.params_of(deployed.name, deployed.config, model)
    assert text == deployed.files.params.read_text(encoding="utf-8")


def test_what_was_never_calibrated_is_not_exported(harness, way, main):
    config = way.config(main)
    folder = way.new_folder()
    with pytest.raises(CalibrationError) as caught:
        way.export(main, config, way.save(way.quantized(main, config)), folder)
    assert any(layer in str(caught.value) for layer in harness.float_layers(main))
    assert list(folder.iterdir()) == []


def test_a_checkpoint_of_the_float_model_is_not_exported_as_quantized(harness, way, main):
    folder = way.new_folder()
    with pytest.raises(DoptError):
        way.export(main, way.config(main), way.save(harness.build(main)), folder)
    assert list(folder.iterdir()) == []


def test_a_missing_checkpoint_is_named(way, main):
    folder = way.new_folder()
    with pytest.raises(CheckpointError, match="nowhere"):
        way.export(main, way.config(main), way.folder / "nowhere", folder)
    assert list(folder.iterdir()) == []


def test_a_damaged_checkpoint_is_refused(way, main):
    config = way.config(main)
    checkpoint = way.save(way.calibrated(main, config))
    for file in checkpoint.parent.iterdir():
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    folder = way.new_folder()
    with pytest.raises(CheckpointError):
        way.export(main, config, checkpoint, folder)
    assert list(folder.iterdir()) == []
