"""Graphs that few programs have, the whole way: data formats, dtypes, and weights that are not simply a variable."""

import json

import numpy as np
import pytest
import tensorflow as tf
from graphs import batch_norm, flags, images, randomize, run_pb, session, sqnr, weight

import dopt_api
from dopt.dopt_tf.opt_main import restore_float_checkpoint
from dopt_api.params import read_params

v1 = tf.compat.v1


def go(build, config_of, folder, feeds, fetches):
    """Calibrate and export; return the float outputs, those of the written graph, and the layers' parameters."""
    folder.mkdir(exist_ok=True)
    with session(build) as (sess, _):
        config = config_of(sess)
        randomize(sess)
        path = v1.train.Saver().save(sess, str(folder / "float"))
        wanted = sess.run([f"{name}:0" for name in fetches], feeds)
    with session(build) as (sess, _):
        dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)
        restore_float_checkpoint(sess, path)
        dopt_api.set_calibrate_state(sess, True)
        sess.run([f"{name}:0" for name in fetches], feeds)
        dopt_api.set_calibrate_state(sess, False)
        saved = v1.train.Saver().save(sess, str(folder / "quant"))
    with session(build) as (sess, _):
        result = dopt_api.export(sess, config, saved, folder, output_names=fetches)
    return wanted, run_pb(folder, fetches, feeds), read_params(result.params).layers


def test_weights_by_every_way_from_variables(config_of, tmp_path):
    def build():
        x = v1.placeholder(tf.float32, [None, 4], name="x")
        shared = weight("shared", [4, 4])
        y = tf.matmul(tf.nn.relu(tf.matmul(x, shared, name="shared1")), shared, name="shared2")
        y = tf.nn.relu(tf.matmul(y, tf.reshape(weight("b", [24]), [4, 6]), name="shaped"))
        y = tf.matmul(y, tf.cast(weight("c", [6, 4], dtype=tf.float64), tf.float32), name="made_single")
        with v1.variable_scope("p", partitioner=v1.fixed_size_partitioner(2)):
            parts = v1.get_variable("d", [4, 5])
        y = tf.nn.relu(tf.matmul(y, tf.convert_to_tensor(parts), name="partitioned"))
        y = tf.matmul(y, tf.transpose(weight("e", [3, 5])), name="turned")
        y = tf.nn.conv1d(y[..., tf.newaxis], weight("f", [3, 1, 2]), 1, "SAME", name="conv1d")
        tf.identity(y, name="y")

    x = images().reshape(-1, 4)[:64]
    wanted, found, layers = go(build, config_of, tmp_path, {"x:0": x}, ["y"])
    assert [layer.name for layer in layers][:6] == [
        "shared1",
        "shared2",
        "shaped",
        "made_single",
        "partitioned",
        "turned",
    ]
    assert len(layers) == 7
    assert sqnr(wanted[0], found[0]) > 30


def test_half_precision(config_of, tmp_path):
    def build():
        x = v1.placeholder(tf.float16, [None, 12, 12, 3], name="x")
        y = tf.nn.conv2d(x, weight("a", [3, 3, 3, 4], dtype=tf.float16), 1, "SAME", name="conv")
        y = tf.nn.relu(tf.nn.bias_add(y, weight("bias", [4], dtype=tf.float16)))
        y = tf.reduce_mean(y, [1, 2])
        tf.matmul(y, tf.cast(weight("b", [4, 3]), tf.float16), name="y")

    wanted, found, layers = go(build, config_of, tmp_path, {"x:0": images().astype(np.float16)}, ["y"])
    assert [found[0].dtype, *(layer.weight.dtype for layer in layers)] == [np.float16, "int8", "int8"]
    assert sqnr(wanted[0].astype(np.float32), found[0].astype(np.float32)) > 30


def of_format(layout):
    """Return a program of a data format."""

    def build():
        channels = {"NHWC": -1, "NCHW": 1}[layout]
        shape = [None, 8, 8, 3] if layout == "NHWC" else [None, 3, 8, 8]
        x = v1.placeholder(tf.float32, shape, name="x")
        options = {"strides": 1, "padding": "SAME", "data_format": layout}
        y = tf.nn.conv2d(x, weight("a", [3, 3, 3, 4]), name="conv", **options)
        y = tf.nn.relu(batch_norm(tf.nn.bias_add(y, weight("bias", [4]), layout), axis=channels))
        y = tf.nn.depthwise_conv2d(y, weight("b", [3, 3, 4, 2]), [1] * 4, "SAME", data_format=layout, name="depthwise")
        tf.nn.bias_add(y, weight("other_bias", [8]), layout, name="y")

    return build


def test_channels_first_gives_the_constants_and_parameters_of_channels_last(config_of, tmp_path):
    """The layers' inputs are fed, since processors compute channels-last only in some versions of TensorFlow."""
    found = {}
    inputs = {"conv": images()[:, :8, :8], "depthwise": np.abs(images(seed=1))[:, :8, :8, :1] * np.ones(4, np.float32)}
    for layout in ("NHWC", "NCHW"):
        build, folder = of_format(layout), tmp_path / layout
        folder.mkdir()
        with session(build) as (sess, _):
            config = config_of(sess)
            randomize(sess)
            path = v1.train.Saver().save(sess, str(folder / "float"))
        with session(build) as (sess, _):
            given = {name: sess.graph.get_operation_by_name(name).inputs[0] for name in inputs}
            dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)
            restore_float_checkpoint(sess, path)
            dopt_api.set_calibrate_state(sess, True)
            for name, data in inputs.items():
                arranged = data if layout == "NHWC" else np.ascontiguousarray(data.transpose(0, 3, 1, 2))
                sess.run(sess.graph.get_operation_by_name(name).inputs[0], {given[name]: arranged})
            dopt_api.set_calibrate_state(sess, False)
            saved = v1.train.Saver().save(sess, str(folder / "quant"))
        with session(build) as (sess, _):
            result = dopt_api.export(sess, config, saved, folder, output_names=["y"])
        graph_def = v1.GraphDef.FromString((folder / "model.pb").read_bytes())
        formats = [node.attr["data_format"].s.decode() for node in graph_def.node if "data_format" in node.attr]
        assert set(formats) == {layout}
        constants = {n.name: tf.make_ndarray(n.attr["value"].tensor) for n in graph_def.node if n.op == "Const"}
        layers = read_params(result.params).layers
        taken = [constants[part.tensor.removesuffix(":0")] for layer in layers for part in (layer.weight, layer.bias)]
        found[layout] = taken, json.loads(result.params.read_text())["layers"]
    for one, other in zip(found["NHWC"][0], found["NCHW"][0], strict=True):
        np.testing.assert_array_equal(one.reshape(-1), other.reshape(-1))
    assert found["NHWC"][1] == found["NCHW"][1]


def test_a_layer_whose_input_has_no_known_shape(config_of, tmp_path):
    def build():
        x = v1.placeholder(tf.float32, None, name="x")
        y = tf.nn.conv2d(x, weight("a", [3, 3, 3, 4]), 1, "SAME", name="conv")
        tf.nn.bias_add(y, weight("bias", [4]), name="y")

    wanted, found, layers = go(build, config_of, tmp_path, {"x:0": images()}, ["y"])
    assert sqnr(wanted[0], found[0]) > 30
    assert layers[0].bias is not None


@pytest.mark.parametrize("kind", ["MonitoredSession", "SingularMonitoredSession", "MonitoredTrainingSession"])
def test_sessions_that_a_framework_of_training_makes(kind, config_of, tmp_path):
    def build():
        x = v1.placeholder(tf.float32, [None, 4], name="x")
        y = tf.matmul(x, weight("w", [4, 2]), name="fc")
        v1.train.get_or_create_global_step()
        return x, tf.identity(y, name="y")

    with session(build) as (sess, _):
        config = config_of(sess)
        randomize(sess)
        path = v1.train.Saver().save(sess, str(tmp_path / "float"))
    x_data = images().reshape(-1, 4)[:32]
    with tf.Graph().as_default():
        x, y = build()
        is_train, quant = flags()
        with v1.Session() as building:
            dopt_api.optimize(building, config, is_train_flag=is_train, quant_flag=quant)
        saver = v1.train.Saver()
        feeds = {x: x_data, is_train: False, quant: 1}
        with getattr(v1.train, kind)() as sess:
            restore_float_checkpoint(sess, path)
            dopt_api.set_calibrate_state(sess, True)
            wanted = sess.run(y, feeds)
            dopt_api.set_calibrate_state(sess, False)
            simulated = sess.run(y, feeds)
            raw = sess.raw_session() if hasattr(sess, "raw_session") else sess._tf_sess()
            saved = saver.save(raw, str(tmp_path / "quant"))
    assert 30 < sqnr(wanted, simulated) < 80
    with session(build) as (sess, _):
        result = dopt_api.export(sess, config, saved, tmp_path, output_names=["y"])
    (deployed,) = run_pb(tmp_path, ["y"], {"x:0": x_data})
    assert sqnr(wanted, deployed) > 30
    assert len(read_params(result.params).layers) == 1
