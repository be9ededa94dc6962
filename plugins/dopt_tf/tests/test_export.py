"""The written files: what the graph computes, which parts are replaced, and that errors leave nothing behind."""

import re

import numpy as np
import pytest
import tensorflow as tf
from graphs import batch_norm, images, randomize, run_pb, session, small_net, sqnr, weight

import dopt_api
from dopt_api.errors import CalibrationError, CheckpointError, ConfigError, NumbersError, OutputError
from dopt_api.params import read_params
from dopt_tf.checkpoint import float_variables, restore_float_checkpoint

v1 = tf.compat.v1


@pytest.fixture
def made(tmp_path, config_of):
    """Go the whole way with a graph and return float outputs, exported outputs and the layers' parameters."""

    def go(build, feeds, outputs, also=(), **options):
        with session(build) as (sess, _):
            config = config_of(sess, **options)
            randomize(sess)
            path = v1.train.Saver().save(sess, str(tmp_path / "float"))
            wanted = sess.run([f"{name}:0" for name in outputs], feeds)
        with session(build) as (sess, _):
            dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)
            restore_float_checkpoint(sess, path)
            dopt_api.set_calibrate_state(sess, True)
            sess.run([f"{name}:0" for name in (*outputs, *also)], feeds)
            dopt_api.set_calibrate_state(sess, False)
            saved = v1.train.Saver().save(sess, str(tmp_path / "quant"))
        with session(build) as (sess, _):
            result = dopt_api.export(sess, config, saved, tmp_path, output_names=outputs)
        return wanted, run_pb(tmp_path, outputs, feeds), read_params(result.params).layers

    return go


def test_all_float_layers_compute_the_same_with_their_normalization_folded(made):
    x = images()
    wanted, found, layers = made(small_net, {"x:0": x}, ["logits"], only=[])
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    assert layers == ()


def test_layers_of_many_kinds(made):
    def build():
        x = v1.placeholder(tf.float32, [None, 8, 8, 3], name="x")
        y = tf.nn.depthwise_conv2d(x, weight("a", [3, 3, 3, 3]), [1] * 4, "SAME", name="depthwise")
        y = tf.nn.relu(batch_norm(y))
        shape = tf.stack([tf.shape(y)[0], 16, 16, 5])
        y = tf.nn.conv2d_transpose(y, weight("b", [2, 2, 5, 9]), shape, 2, "SAME", name="transposed")
        y = tf.nn.bias_add(y, weight("bias", [5]))
        y = tf.reduce_mean(y, [1, 2])
        y = tf.matmul(y, weight("c", [6, 5]), transpose_b=True, name="matmul")
        tf.transpose(tf.matmul(weight("d", [4, 6]), y, transpose_b=True, name="first"), name="y")

    x = images()[:, :8, :8]
    wanted, found, layers = made(build, {"x:0": x}, ["y"])
    assert sqnr(wanted[0], found[0]) > 30
    assert [(layer.name, layer.weight.axis, len(layer.weight.scale)) for layer in layers] == [
        ("depthwise", 2, 9),
        ("transposed", 2, 5),
        ("matmul", 0, 6),
        ("first", 0, 4),
    ]
    assert layers[1].bias is not None


def test_outputs_in_the_middle_of_what_is_folded_keep_their_meaning(made):
    def build():
        x = v1.placeholder(tf.float32, [None, 12, 12, 3], name="x")
        y = tf.nn.conv2d(x, weight("a", [3, 3, 3, 4]), 1, "SAME", name="conv")
        y = tf.nn.bias_add(y, weight("bias", [4]), name="biased")
        tf.identity(batch_norm(y), name="normed")

    for outputs in (["conv", "normed"], ["biased", "normed"], ["normed"], ["normed", "biased", "conv"]):
        wanted, found, _ = made(build, {"x:0": images()}, outputs)
        for one, other in zip(wanted, found, strict=True):
            assert sqnr(one, other) > 30


def test_a_layer_that_no_output_needs_is_left_out(made):
    def build():
        x = v1.placeholder(tf.float32, [None, 5], name="x")
        tf.matmul(x, weight("a", [5, 2]), name="used")
        tf.matmul(x, weight("b", [5, 2]), name="aside")

    _, _, layers = made(build, {"x:0": np.eye(5)}, ["used"], also=["aside"])
    assert [layer.name for layer in layers] == ["used"]


@pytest.fixture
def ready(tmp_path, config_of, float_checkpoint):
    """Return a function that exports the small network, with parts replaced, into an empty folder."""
    path, _ = float_checkpoint(small_net, images(1))
    with session(small_net) as (sess, _):
        config = config_of(sess)
    with session(small_net) as (sess, net):
        dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)
        restore_float_checkpoint(sess, path)
        empty = v1.train.Saver().save(sess, str(tmp_path / "empty"))
        dopt_api.set_calibrate_state(sess, True)
        sess.run(net.logits, {net.x: images()})
        dopt_api.set_calibrate_state(sess, False)
        good = v1.train.Saver().save(sess, str(tmp_path / "good"))
        plain = v1.train.Saver(float_variables(sess.graph)).save(sess, str(tmp_path / "plain"))
        v1.global_variables("conv2/kernel")[0].load(np.full([3, 3, 8, 1], np.nan, np.float32), sess)
        broken = v1.train.Saver().save(sess, str(tmp_path / "broken"))
    (tmp_path / "out").mkdir()
    paths = {"empty": empty, "good": good, "plain": plain, "broken": broken}

    def export(build=small_net, checkpoint="good", folder="out", outputs=("logits",), **options):
        with session(build) as (sess, _):
            where = paths.get(checkpoint, str(tmp_path / checkpoint))
            return dopt_api.export(sess, config, where, tmp_path / folder, output_names=outputs, **options)

    return export


def other_net():
    net = small_net()
    tf.matmul(net.logits, weight("more", [4, 2]), name="more")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"outputs": ["logit"]}, ConfigError, "no output 'logit'.*Did you mean 'logits'"),
        ({"outputs": "logits"}, ConfigError, "a list of the names"),
        ({"outputs": []}, ConfigError, "a list of the names.*'logits'"),
        ({"outputs": None}, ConfigError, "a list of the names"),
        ({"outputs": ["logits", "logits:0"]}, ConfigError, "repeat"),
        ({"folder": "missing"}, OutputError, "does not exist"),
        ({"dynamic_batch": True}, ConfigError, "None"),
        ({"checkpoint": "nowhere"}, CheckpointError, "'.*nowhere' does not exist.*good"),
        ({"checkpoint": "out"}, CheckpointError, "is a directory"),
        ({"checkpoint": "plain"}, CheckpointError, "float model"),
        ({"checkpoint": "empty"}, CalibrationError, "'conv1/Conv2D' and 2 other layers were neither"),
        ({"checkpoint": "broken"}, NumbersError, "weight of layer 'conv2/depthwise' has NaN"),
        ({"build": other_net}, ConfigError, "layer 'more_1' is not in the file"),
    ],
)
def test_errors_say_what_and_leave_nothing(ready, tmp_path, options, error, message):
    with pytest.raises(error) as caught:
        ready(**options)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert not list((tmp_path / "out").iterdir())


def test_damaged_checkpoints_are_refused(ready, tmp_path):
    for name in ("good.index", "good.data-00000-of-00001"):
        file = tmp_path / name
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(CheckpointError):
            ready()
        file.write_bytes(content)
    ready()


def test_equal_exports_are_equal_bytes(ready, tmp_path):
    ready()
    first = [(file.name, file.read_bytes()) for file in sorted((tmp_path / "out").iterdir())]
    ready(outputs=["logits:0"])
    assert first == [(file.name, file.read_bytes()) for file in sorted((tmp_path / "out").iterdir())]


def test_float_variables_are_those_of_the_float_graph(config_of):
    with session(small_net) as (sess, _):
        config = config_of(sess)
        wanted = {variable.op.name for variable in v1.global_variables()}
    with session(small_net) as (sess, net):
        dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)
        assert {variable.op.name for variable in float_variables(sess.graph)} == wanted
        v1.train.AdamOptimizer().minimize(tf.reduce_sum(net.logits))
        extra = {variable.op.name for variable in float_variables(sess.graph)} - wanted
        assert extra
        assert not any("dopt" in name for name in extra)


def test_a_float_checkpoint_without_the_optimizer_loads_and_one_without_a_weight_does_not(config_of, float_checkpoint):
    path, _ = float_checkpoint(small_net, images(1))
    with session(small_net) as (sess, _):
        config = config_of(sess)
    with session(small_net) as (sess, net):
        dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)
        v1.train.AdamOptimizer().minimize(tf.reduce_sum(net.logits), v1.train.get_or_create_global_step())
        restore_float_checkpoint(sess, path)
    with session(other_net) as (sess, _):
        with pytest.raises(CheckpointError, match="no variable 'more'"):
            restore_float_checkpoint(sess, path)
        with pytest.raises(CheckpointError, match="does not exist"):
            restore_float_checkpoint(sess, "nowhere/model")
