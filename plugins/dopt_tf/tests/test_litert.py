"""The format ``litert``: what the file holds, what the interpreter computes of it, and what is refused."""

import logging
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf
from exported import export, record_outputs, rewrite, simulate
from graphs import batch_norm, images, run_pb, session, small_net, sqnr, weight
from interpreting import FASTEST, REFERENCE, Run

from dopt_api.errors import FormatError, ParamsError
from dopt_api.formats import convert, format_names
from dopt_api.params import read_params
from dopt_tf.litert import write
from dopt_tf.litert.flatbuffer import schema

v1 = tf.compat.v1
FEEDS = {"x:0": images(32)}


def chain():
    """Build a convolution, a depthwise one, one behind padding, and a dense layer behind pooling, one after the other."""
    x = v1.placeholder(tf.float32, [None, 12, 12, 3], name="x")
    y = tf.nn.conv2d(x, weight("conv1/kernel", [3, 3, 3, 8]), 1, "SAME", name="conv1")
    y = tf.nn.relu6(batch_norm(y))
    y = tf.nn.depthwise_conv2d(y, weight("depthwise/kernel", [3, 3, 8, 2]), [1, 2, 2, 1], "SAME", name="depthwise")
    y = tf.nn.relu(tf.nn.bias_add(y, weight("depthwise/bias", [16])))
    y = tf.pad(y, [[0, 0], [1, 1], [1, 1], [0, 0]])
    y = tf.nn.conv2d(y, weight("conv2/kernel", [3, 3, 16, 8]), 1, "VALID", name="conv2")
    y = tf.reshape(tf.nn.max_pool2d(y, 2, 2, "VALID"), [-1, 72])
    tf.nn.bias_add(tf.matmul(y, weight("fc/kernel", [72, 4]), name="fc"), weight("fc/bias", [4]), name="logits")


def residual():
    """Build two sums, the first of which the second and a layer read, and a mean before a dense layer."""
    x = v1.placeholder(tf.float32, [None, 12, 12, 3], name="x")
    y = tf.nn.relu(tf.nn.conv2d(x, weight("conv1", [3, 3, 3, 8]), 2, "SAME", name="conv1"))
    y = y + tf.nn.depthwise_conv2d(y, weight("depthwise", [3, 3, 8, 1]), [1, 1, 1, 1], "SAME", name="depthwise")
    y = y + tf.nn.conv2d(y, weight("conv2", [1, 1, 8, 8]), 1, "SAME", name="conv2")
    y = tf.nn.relu6(tf.nn.conv2d(y, weight("conv3", [1, 1, 8, 8]), 1, "SAME", name="conv3"))
    tf.matmul(tf.reduce_mean(y, [1, 2]), weight("fc", [8, 4]), name="logits")


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Export each of the graphs once; return a function that gives the folder and what the simulation computes."""
    made = {}

    def get(build, strategy="Quant_INT8-8", **options):
        key = (build, strategy, str(options))
        if key not in made:
            folder = tmp_path_factory.mktemp(build.__name__)
            made[key] = folder, export(build, folder, FEEDS, strategy=strategy, **options)
        return made[key]

    return get


@pytest.fixture
def exported(exports, tmp_path):
    """Copy the files of an export into a folder of the test; return the simulation."""

    def get(build, *args, **options):
        folder, simulated = exports(build, *args, **options)
        for name in ("model.pb", "quant_params.json"):
            shutil.copy(folder / name, tmp_path / name)
        return simulated

    return get


@pytest.fixture
def written(tmp_path):
    """Write the format from the files in the test's folder; return the model's bytes."""

    def get():
        write(tmp_path / "model.pb", read_params(tmp_path / "quant_params.json"), tmp_path)
        return (tmp_path / "model.tflite").read_bytes()

    return get


def run(content, kernels=REFERENCE):
    return Run(content, {"x": FEEDS["x:0"]}, kernels)


def assert_grid(run, number, part):
    scales, zero_points = run.grid(number)
    shift = 128 if part.dtype.startswith("u") else 0
    np.testing.assert_array_equal(scales, np.asarray(part.scale, np.float32))
    np.testing.assert_array_equal(zero_points, np.asarray(part.zero_point) - shift)


def integers_of(folder, layer):
    """Return a layer's integers as the exported graph has them, output channels first."""
    with session() as (sess, _):
        tf.import_graph_def(v1.GraphDef.FromString((folder / "model.pb").read_bytes()), name="")
        values = sess.run(layer.weight.tensor)
        bias = sess.run(layer.bias.tensor) if layer.bias else np.zeros(len(layer.weight.scale))
    scale = np.asarray(layer.weight.scale, np.float64)
    rows = np.moveaxis(values, layer.weight.axis, -1) / scale
    bias_scale = scale * layer.input.scale[0] if layer.bias is None else np.asarray(layer.bias.scale)
    return np.rint(np.moveaxis(rows, -1, 0)), np.rint(bias / bias_scale)


def test_a_chain_runs_in_integers_with_the_scales_and_integers_of_the_parameter_file(exported, written, tmp_path):
    exported(chain)
    params = record_outputs(tmp_path, FEEDS)
    found = run(written())
    layers = found.integer_layers()
    assert found.kinds.count("DEQUANTIZE") == 1
    assert found.kinds[-1] == "DEQUANTIZE"
    assert len(layers) == len(params.layers) == 4
    for operator, layer in zip(layers, params.layers, strict=True):
        source, kernel, bias = operator.inputs
        assert_grid(found, source, layer.input)
        assert_grid(found, kernel, layer.weight)
        assert_grid(found, operator.outputs[0], layer.output)
        np.testing.assert_array_equal(found.grid(bias)[0], np.float32(layer.input.scale[0]) * found.grid(kernel)[0])
        integers, biases = integers_of(tmp_path, layer)
        values = found[kernel]
        rows = np.moveaxis(values, 3, 0) if layer.name == "depthwise" else values
        np.testing.assert_array_equal(rows.reshape(integers.shape), integers)
        np.testing.assert_array_equal(found[bias], biases)


@pytest.mark.parametrize("strategy", ["Quant_INT8-8", "Quant_INT8-7", "Quant_INT8-4"])
def test_each_layer_is_within_a_step_of_exact_sums(exported, written, tmp_path, strategy):
    exported(chain, strategy)
    record_outputs(tmp_path, FEEDS)
    content = written()
    found = run(content)
    for operator in found.integer_layers():
        off = found.steps_off(operator)
        assert off.max() <= 1
        assert (off == 0).mean() > 0.9  # the kernels round twice, to int32 and from there
    (wanted,) = simulate(tmp_path, ["logits"], FEEDS)
    assert sqnr(wanted, found.outputs[0]) > 35
    assert sqnr(wanted, run(content, FASTEST).outputs[0]) > 35


def test_without_recorded_outputs_layers_that_alone_are_read_by_layers_run_in_integers(
    exported, written, tmp_path, caplog
):
    (simulated,) = exported(chain)
    np.testing.assert_allclose(simulate(tmp_path, ["logits"], FEEDS)[0], simulated, rtol=1e-3, atol=1e-3)
    with caplog.at_level(logging.WARNING, "dopt"):
        content = written()
    assert re.findall("layer '(.*)' runs in float.*: (.*)[.]", caplog.text) == [
        ("fc", "no grid is known for its output")
    ]
    found = run(content)
    assert len(found.integer_layers()) == 3
    assert sqnr(simulated, found.outputs[0]) > 35
    params = read_params(tmp_path / "quant_params.json").layers
    for operator, reader in zip(found.integer_layers()[:1], params[1:2], strict=True):
        assert_grid(found, operator.outputs[0], reader.input)


def test_sums_and_means_between_layers_run_in_integers_where_all_grids_are_known(exported, written, tmp_path):
    exported(residual)
    record_outputs(tmp_path, FEEDS)
    found = run(written())
    assert found.kinds.count("DEQUANTIZE") == 1
    assert found.kinds.count("QUANTIZE") == 1
    assert len(found.integer_layers()) == 5
    (wanted,) = simulate(tmp_path, ["logits"], FEEDS)
    assert sqnr(wanted, found.outputs[0]) > 30
