"""Graphs as people have them: what is listed, what is refused and why, what is folded."""

import json

import numpy as np
import pytest
import tensorflow as tf
from graphs import batch_norm, session, weight

import dopt_api
from dopt_api import facade
from dopt_tf.find_layers import find_layers

v1 = tf.compat.v1


def found(build):
    with session(build) as (sess, _):
        return find_layers(sess, None)


def names(result):
    return [layer.name for layer in result.layers]


def reasons(result):
    return {layer.name: layer.reason for layer in result.not_quantizable}


def image(channels=3, size=8):
    return v1.placeholder(tf.float32, [None, size, size, channels], name="x")


def conv(x, out=4, name="c", **options):
    return tf.nn.conv2d(x, weight(f"{name}/w", [3, 3, int(x.shape[-1]), out]), 1, "SAME", name=name, **options)


@pytest.mark.parametrize("resource", [True, False])
def test_every_kind_of_layer_is_listed_in_the_order_of_the_graph(resource):
    def build():
        x = image()
        y = tf.nn.conv2d(x, weight("a", [3, 3, 3, 4], resource=resource), 1, "SAME", name="one")
        y = tf.nn.depthwise_conv2d(y, weight("b", [3, 3, 4, 2], resource=resource), [1] * 4, "SAME", name="two")
        w = weight("c", [2, 2, 5, 8], resource=resource)
        y = tf.nn.conv2d_transpose(y, w, [2, 9, 9, 5], 1, "VALID", name="three")
        z = tf.nn.conv3d(
            y[..., tf.newaxis], weight("d", [1, 1, 1, 1, 3], resource=resource), [1] * 5, "SAME", name="four"
        )
        tf.matmul(tf.reduce_mean(z, [1, 2, 3]), weight("e", [3, 7], resource=resource), name="five")

    result = found(build)
    assert names(result) == ["one", "two", "three", "four", "five"]
    kinds = ["Conv2D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "Conv3D", "MatMul"]
    assert [layer.op_type for layer in result.layers] == kinds


def test_weights_by_every_way_from_variables():
    def build():
        x = v1.placeholder(tf.float32, [None, 4])
        tf.matmul(x, tf.identity(weight("a", [4, 2])), name="same")
        tf.matmul(x, tf.reshape(weight("b", [8]), [4, 2]), name="shaped")
        tf.matmul(x, tf.cast(weight("c", [4, 2], dtype=tf.float64), tf.float32), name="made_single")
        with v1.variable_scope("p", partitioner=v1.fixed_size_partitioner(2)):
            parts = v1.get_variable("d", [4, 2])
        tf.matmul(x, tf.convert_to_tensor(parts), name="partitioned")
        tf.matmul(x, weight("e", [2, 4]), transpose_b=True, name="transposed")
        tf.matmul(weight("f", [2, 4]), x, transpose_b=True, name="first")
        shared = weight("g", [4, 4])
        tf.matmul(tf.matmul(x, shared, name="shared1"), shared, name="shared2")
        tf.nn.conv1d(x[..., tf.newaxis], weight("h", [3, 1, 2]), 1, "SAME", name="conv1d")
        tf.matmul(x, tf.constant(np.ones((4, 2), np.float32)), name="constant")

    listed = names(found(build))
    wanted = ["same", "shaped", "made_single", "partitioned", "transposed", "first", "shared1", "shared2", "constant"]
    assert [name for name in listed if "conv1d" not in name] == wanted
    assert any("conv1d" in name for name in listed)


def test_what_cannot_be_quantized_is_listed_with_the_reason():
    def build():
        x = v1.placeholder(tf.float32, [None, 4])
        direction = weight("v", [4, 2])
        tf.matmul(x, direction / tf.norm(direction), name="normed")
        tf.matmul(x, x, transpose_b=True, name="product")
        tf.matmul(x[tf.newaxis], weight("b", [1, 4, 2]), name="batched")
        tf.matmul(tf.cast(x, tf.int32), tf.cast(weight("i", [4, 2]), tf.int32), name="integers")
        tf.matmul(x, weight("w", [4, 2]), name="fine")

    result = found(build)
    assert names(result) == ["fine"]
    told = reasons(result)
    assert "computed at run time" in told["normed"]
    assert "two activations" in told["product"]
    assert "batched" in told["batched"]
    assert "int32" in told["integers"]


def test_layers_in_branches_and_loops_are_refused(control_flow):
    def build():
        x = v1.placeholder(tf.float32, [2, 4], name="x")
        w = weight("w", [4, 4])
        choice = v1.placeholder(tf.bool, [], name="choice")
        y = tf.cond(choice, lambda: tf.matmul(x, w, name="inner"), lambda: x)
        y = tf.while_loop(lambda y: tf.reduce_sum(y) < 9, lambda y: [tf.matmul(y, w, name="again")], [y])
        tf.matmul(y[0] if isinstance(y, (list, tuple)) else y, w, name="outside")

    result = found(build)
    assert names(result) == ["outside"]
    told = reasons(result)
    assert len(told) == 2, told
    assert all("inside the function" in r or "branch" in r or "loop" in r for r in told.values())


def test_training_parts_of_the_graph_change_nothing():
    def build(training=False):
        x = image()
        y = tf.nn.relu(batch_norm(conv(x)))
        logits = tf.matmul(tf.reduce_mean(y, [1, 2]), weight("fc", [4, 2]), name="fc")
        if training:
            v1.summary.histogram("h", y)
            v1.train.AdamOptimizer().minimize(tf.reduce_sum(tf.square(logits)))
            v1.train.Saver()

    plain, trained = found(build), found(lambda: build(True))
    assert plain.layers == trained.layers
    assert not trained.not_quantizable
    assert plain.structure.layers == trained.structure.layers
    assert plain.structure.layers["c"].norm.node == "bn/FusedBatchNormV3"


@pytest.mark.parametrize("form", ["bias_add", "add", "add_row"])
def test_biases_of_every_form(form):
    def build():
        y, b = conv(image()), weight("b", [4])
        _ = tf.nn.bias_add(y, b) if form == "bias_add" else y + (b if form == "add" else tf.reshape(b, [4]))

    assert (found(build).structure.layers["c"].bias is None) == (form == "add_row")


def test_sums_that_are_no_bias():
    def build():
        x = image(4)
        y = conv(x)
        _ = y + tf.reduce_mean(x, [1, 2, 3])[:1]
        z = conv(x, name="d")
        _ = z + weight("map", [8, 8, 4])

    layers = found(build).structure.layers
    assert layers["c"].bias is None
    assert layers["d"].bias is None


def test_batch_norm_of_an_output_that_is_used_elsewhere_stays_and_is_noted():
    def build():
        y = conv(image())
        _ = batch_norm(y) + y

    result = found(build)
    assert result.structure.layers["c"].norm is None
    assert "FusedBatchNormV3" in result.notes[0]


def test_batch_norm_in_training_mode_stays_and_is_noted():
    result = found(lambda: batch_norm(conv(image()), True))
    assert result.structure.layers["c"].norm is None
    assert "statistics of the batch" in result.notes[0]


def test_a_default_decides_where_nothing_else_does(control_flow):
    def build():
        training = v1.placeholder_with_default(False, [], name="training")
        y = conv(image())
        y = tf.cond(training, lambda: tf.nn.dropout(y, rate=0.5), lambda: tf.identity(y))
        batch_norm(y)

    result = found(build)
    assert result.structure.graph.values == {"training": False}
    assert result.structure.layers["c"].norm is not None


def test_a_strategy_file_may_name_input_shapes_for_other_frameworks(tmp_path):
    with session(lambda: conv(image())) as (sess, _):
        file = dopt_api.generate_config(sess, "x:1,8,8,3", tmp_path / "c.json")
        assert json.loads(file.read_text())["input_shape"] == "x:1,8,8,3"
        assert list(facade.check(sess, file).model_layers.structure.layers) == ["c"]
