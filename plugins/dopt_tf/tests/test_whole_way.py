"""From a float graph to the deployed files, as a user goes, for every form of batch normalization and variable."""

import json

import numpy as np
import pytest
import tensorflow as tf
from graphs import SMALL_LAYERS, flags, images, run_pb, session, small_net, sqnr

import dopt_api
from dopt.dopt_tf.opt_main import (
    generate_final_model,
    get_quant_loss,
    optimize_model,
    restore_float_checkpoint,
    set_calibrate_state,
)
from dopt_api.params import read_params

v1 = tf.compat.v1


def build(training, fused=True, resource=True):
    flag = v1.placeholder(tf.bool, [], name="training") if training == "placeholder" else False
    return small_net(flag, fused=fused, resource=resource)


CASES = [
    (training, fused, resource)
    for training in ("constant", "placeholder")
    for fused in (True, False)
    for resource in (True, False)
]


@pytest.mark.parametrize(("training", "fused", "resource"), CASES)
def test_the_whole_way(control_flow, float_checkpoint, config_of, tmp_path, training, fused, resource):
    if control_flow == "functions" and training == "placeholder" and not resource:
        pytest.skip("TensorFlow itself cannot assign reference variables in conditionals of functions")
    x = images()

    def net():
        return build(training, fused, resource)

    path, (wanted,) = float_checkpoint(net, x)
    with session(net) as (sess, _):
        config = config_of(sess)
    assert list(json.loads(config.read_text())["layer_strategy"]) == SMALL_LAYERS
    with session(net) as (sess, built):
        is_train, quant = flags()
        optimize_model(sess, config, is_train, quant)
        restore_float_checkpoint(sess, path)
        feeds = {built.x: x, is_train: False, quant: 0}
        if tf.is_tensor(built.training):
            feeds[built.training] = False
        np.testing.assert_array_equal(sess.run(built.logits, feeds), wanted)
        feeds[quant] = 1
        set_calibrate_state(sess, True)
        np.testing.assert_array_equal(sess.run(built.logits, feeds), wanted)
        pending = v1.train.Saver().save(sess, str(tmp_path / "pending" / "model"))
        set_calibrate_state(sess, False)
        simulated = sess.run(built.logits, feeds)
        assert 25 < sqnr(wanted, simulated) < 70
        quantized = v1.train.Saver().save(sess, str(tmp_path / "quant" / "model"))
        feeds[quant] = 0
        np.testing.assert_array_equal(sess.run(built.logits, feeds), wanted)
    texts = []
    for checkpoint in (quantized, pending):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        with session(net) as (sess, _):
            before = sess.graph.as_graph_def()
            result = generate_final_model(sess, config, ["logits"], checkpoint, out)
            assert sess.graph.as_graph_def() == before
        assert sorted(file.name for file in out.iterdir()) == ["model.pb", "quant_params.json"]
        texts.append(result.params.read_text())
    assert texts[0] == texts[1]
    (deployed,) = run_pb(tmp_path / "out", ["logits"], {"x:0": x})
    assert sqnr(wanted, deployed) > 25  # weights on their grid, activations float
    assert_files_fit(tmp_path / "out")


def assert_files_fit(out):
    """Check the graph and the parameter file against one another."""
    graph_def = v1.GraphDef.FromString((out / "model.pb").read_bytes())
    kinds = {node.op for node in graph_def.node}
    assert not kinds & {"VarHandleOp", "VariableV2", "Switch", "Merge", "If", "StatelessIf", "FusedBatchNormV3"}
    assert not any("dopt" in node.name for node in graph_def.node)
    assert [node.name for node in graph_def.node if node.op == "Placeholder"] == ["x"]
    constants = {n.name: tf.make_ndarray(n.attr["value"].tensor) for n in graph_def.node if n.op == "Const"}
    for layer in read_params(out / "quant_params.json").layers:
        stored = constants[layer.weight.tensor.removesuffix(":0")]
        scale = np.float32(layer.weight.scale)
        shape = [-1 if axis == layer.weight.axis else 1 for axis in range(stored.ndim)]
        integers = stored / scale.reshape(shape)
        np.testing.assert_allclose(integers, np.rint(integers), atol=1e-4)
        assert np.abs(integers).max() <= 127.001
        edge = layer.input.tensor.removesuffix(":0")
        assert any(node.name == edge for node in graph_def.node)
        assert len(layer.bias.scale) == stored.shape[layer.weight.axis]


@pytest.mark.parametrize(("training", "fused", "resource"), [("placeholder", True, True), ("constant", False, False)])
def test_retraining_and_export(control_flow, float_checkpoint, config_of, tmp_path, training, fused, resource):
    def net():
        return build(training, fused, resource)

    x = images(32)
    labels = (x[:, :6].mean((1, 2, 3)) > 0).astype(np.int32) + 2 * (x[:, :, :6].mean((1, 2, 3)) > 0)
    x += np.float32(0.5) * labels[:, None, None, None]
    path, _ = float_checkpoint(net, x)
    with session(net) as (sess, _):
        config = config_of(sess)
    with session(net) as (sess, built):
        is_train, quant = flags()
        optimize_model(sess, config, is_train, quant)
        y = tf.constant(labels)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=built.logits))
        total = loss + 0.05 * get_quant_loss(sess)
        step = v1.train.MomentumOptimizer(0.05, 0.9).minimize(total)
        sess.run(v1.global_variables_initializer())
        restore_float_checkpoint(sess, path)
        feeds = {built.x: x, is_train: True, quant: 1}
        if tf.is_tensor(built.training):
            feeds[built.training] = False  # the moving averages are not updated in this graph
        losses = [sess.run([loss, step], feeds)[0] for _ in range(40)]
        assert losses[-1] < 0.6 * losses[0]
        feeds[is_train] = False
        simulated, final = sess.run([built.logits, loss], feeds)
        assert final < 0.6 * losses[0]
        gains = [v for v in v1.trainable_variables() if v.op.name.endswith("gain")]
        assert len(gains) == 6
        assert all(np.abs(value).max() > 1e-5 for value in sess.run(gains))
        trained = v1.train.Saver().save(sess, str(tmp_path / "trained"))
    with session(net) as (sess, _):
        dopt_api.export(sess, config, trained, tmp_path, output_names=["logits"])
    (deployed,) = run_pb(tmp_path, ["logits"], {"x:0": x})
    assert sqnr(simulated, deployed) > 25
    read_params(tmp_path / "quant_params.json")


def test_monitored_training_session(float_checkpoint, config_of, tmp_path):
    path, _ = float_checkpoint(small_net, images(1))
    with session(small_net) as (sess, _):
        config = config_of(sess)
    with tf.Graph().as_default():
        net = small_net()
        is_train, quant = flags()
        with v1.Session() as building:
            optimize_model(building, config, is_train, quant)
        counter = v1.train.get_or_create_global_step()
        step = v1.train.AdamOptimizer(1e-3).minimize(tf.reduce_sum(tf.square(net.logits)), counter)
        hooks = [v1.train.StopAtStepHook(last_step=3)]
        folder = str(tmp_path / "run")
        with v1.train.MonitoredTrainingSession(checkpoint_dir=folder, hooks=hooks, log_step_count_steps=None) as sess:
            restore_float_checkpoint(sess, path)
            set_calibrate_state(sess, True)
            sess._tf_sess().run(net.logits, {net.x: images(), is_train: False, quant: 1})
            set_calibrate_state(sess, False)
            while not sess.should_stop():
                sess.run(step, {net.x: images(), is_train: True, quant: 1})
        latest = tf.train.latest_checkpoint(folder)
    with session(small_net) as (sess, _):
        result = generate_final_model(sess, config, ["logits"], latest, tmp_path)
    assert len(read_params(result.params).layers) == 3
