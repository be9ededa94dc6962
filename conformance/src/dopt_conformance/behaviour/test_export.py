"""What is exported: a graph and a parameter file that fit one another, both or neither."""

import json
from importlib import resources

import jsonschema
import numpy as np
import pytest

import dopt_api
from dopt_api.errors import ConfigError, DoptError
from dopt_api.params import fold, quantize_layer
from dopt_conformance.way import sqnr

pytestmark = pytest.mark.since("1.0")


def channels_first(array, axis):
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)


def stored_weight(deployed, layer):
    """Return a layer's weight in the exported graph, its channels first."""
    entry = deployed.layers[layer].weight
    constant = deployed.graph.constants[entry.tensor]
    if constant.shape[entry.axis] != len(entry.scale):  # channels and multiplier of a depthwise weight
        constant = constant.reshape(*constant.shape[: entry.axis], -1)
    return channels_first(constant, entry.axis)


def test_the_parameter_file_follows_the_schema(deployed):
    schema = json.loads(resources.files("dopt_api.params").joinpath("quant_params.schema.json").read_text("utf-8"))
    content = json.loads(deployed.files.params.read_text(encoding="utf-8"))
    jsonschema.validate(content, schema)
    assert content["model"] == deployed.files.model.name


def test_its_layers_are_those_of_the_strategy_file_each_once(deployed):
    listed = json.loads(deployed.config.read_text(encoding="utf-8"))["layer_strategy"]
    assert [layer.name for layer in deployed.params.layers] == list(listed)
    for layer in deployed.params.layers:
        assert layer.op_type == listed[layer.name]["op_type"]
        assert layer.strategy == listed[layer.name]["quant_strategy"]


def test_what_it_names_stands_in_the_graph(deployed):
    for layer in deployed.params.layers:
        assert layer.node in deployed.graph.nodes, layer.name
        assert layer.input.tensor in deployed.graph.edges, layer.name
        assert layer.weight.tensor in deployed.graph.constants, layer.name
        if layer.bias is not None:
            assert layer.bias.tensor in deployed.graph.constants, layer.name
    names = [layer.node for layer in deployed.params.layers]
    assert len(set(names)) == len(names)


def test_weights_are_on_their_grid(deployed, way):
    for layer, plan in way.plans(deployed.name).items():
        weight = stored_weight(deployed, layer)
        scale = np.float32(deployed.layers[layer].weight.scale)[:, np.newaxis]
        integers = np.rint(weight / scale)
        np.testing.assert_array_equal(weight, integers.astype(np.float32) * scale, err_msg=layer)
        assert integers.min() >= plan.strategy.weight.qmin
        assert integers.max() <= plan.strategy.weight.qmax


def test_weights_and_biases_are_those_of_the_core(harness, deployed, way):
    floats = harness.float_layers(deployed.name)
    for layer, plan in way.plans(deployed.name).items():
        entry = deployed.layers[layer]
        scale, zero_point = np.float32(entry.input.scale[0]), entry.input.zero_point[0]
        wanted = quantize_layer(floats[layer], plan, scale, zero_point)
        np.testing.assert_array_equal(
            stored_weight(deployed, layer), channels_first(wanted.weight, wanted.axis), err_msg=layer
        )
        if wanted.bias is not None:
            bias = deployed.graph.constants[entry.bias.tensor]
            np.testing.assert_array_equal(bias.ravel(), wanted.bias.ravel(), err_msg=layer)


def test_batch_normalization_is_folded(harness, deployed):
    for layer, floating in harness.float_layers(deployed.name).items():
        weight, bias = fold(floating)
        error = stored_weight(deployed, layer) - channels_first(weight, floating.axis)
        step = np.float32(deployed.layers[layer].weight.scale)[:, np.newaxis]
        assert (np.abs(error) <= 0.501 * step).all(), layer
        assert (bias is None) == (deployed.layers[layer].bias is None), layer


def test_the_graph_by_itself_agrees_with_the_model(deployed):
    found = deployed.outputs()
    assert [one.shape for one in found] == [one.shape for one in deployed.exact]
    # activations are float in the graph and 8 bits wide in the simulation
    assert sqnr(deployed.exact, found) > 25
    assert sqnr(deployed.exact, deployed.simulated) > 20
    assert sqnr(deployed.simulated, found) > 20


def test_equal_models_give_equal_bytes(deployed, way):
    again = way.export(deployed.name, deployed.config, deployed.checkpoint)
    assert again.model.read_bytes() == deployed.files.model.read_bytes()
    assert again.params.read_bytes() == deployed.files.params.read_bytes()


def test_only_the_two_files_are_written(deployed, way):
    folder = way.new_folder()
    files = way.export(deployed.name, deployed.config, deployed.checkpoint, folder)
    assert sorted(folder.iterdir()) == sorted([files.model, files.params])


def test_an_earlier_export_is_replaced(deployed, way):
    folder = way.new_folder()
    (folder / deployed.files.params.name).write_text("old")
    files = way.export(deployed.name, deployed.config, deployed.checkpoint, folder)
    assert files.params.read_bytes() == deployed.files.params.read_bytes()


def test_a_missing_folder_is_named_and_not_made(deployed, way):
    missing = way.folder / "missing folder"
    with pytest.raises(DoptError, match="missing folder"):
        way.export(deployed.name, deployed.config, deployed.checkpoint, missing)
    assert not missing.exists()


def test_wrong_output_names_are_refused(harness, way, main):
    names = harness.output_names(main) or ("y",)
    config = way.config(main)
    checkpoint, folder = way.save(way.calibrated(main, config)), way.new_folder()
    with pytest.raises(DoptError):
        way.export(main, config, checkpoint, folder, output_names=[*names, "one too many"])
    assert list(folder.iterdir()) == []


def test_a_file_that_was_edited_since_is_refused(harness, way, main):
    """The checkpoint is of another plan: one layer more is to be quantized than it knows of."""
    first = next(iter(harness.float_layers(main)))
    checkpoint = way.save(way.calibrated(main, way.config(main, only=[first])))
    folder = way.new_folder()
    with pytest.raises(DoptError):
        way.export(main, way.config(main), checkpoint, folder)
    assert list(folder.iterdir()) == []


def test_an_unknown_layer_is_refused(way, main):
    config = way.config(main)
    checkpoint, folder = way.save(way.calibrated(main, config)), way.new_folder()

    def rename(content):
        layers = content["layer_strategy"]
        layers["no such layer"] = layers.pop(next(iter(layers)))

    with pytest.raises(ConfigError, match="no such layer"):
        way.export(main, way.edit(config, rename), checkpoint, folder)
    assert list(folder.iterdir()) == []


def test_the_float_model_stays_as_it_is(harness, deployed, way):
    model = harness.build(deployed.name)
    dopt_api.export(
        model,
        deployed.config,
        deployed.checkpoint,
        way.new_folder(),
        output_names=harness.output_names(deployed.name),
        backend=harness.backend,
    )
    for one, other in zip(harness.run(model, deployed.batches[0]), deployed.exact, strict=True):
        np.testing.assert_array_equal(one, other)
