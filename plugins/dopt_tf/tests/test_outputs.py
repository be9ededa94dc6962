"""Recorded outputs of layers: calibrated, simulated, learned and exported; and refused where nothing reads them."""

import json

import numpy as np
import pytest
import tensorflow as tf
from graphs import batch_norm, session, weight

import dopt_api
from dopt_api.errors import CalibrationError, ModelError
from dopt_api.params import read_params

v1 = tf.compat.v1
X = np.random.default_rng(0).standard_normal((4, 6, 6, 3)).astype("f")


def net(training=False, end="out"):
    """Build a residual block: a normalized and rectified output, a plain one, and one that the graph ends with."""
    x = v1.placeholder(tf.float32, [None, 6, 6, 3], name="x")
    y = tf.nn.conv2d(x, weight("stem", [3, 3, 3, 4]), 1, "SAME", name="stem_conv")
    y = tf.nn.relu6(batch_norm(y, training), name="rectified")
    z = tf.nn.bias_add(tf.nn.conv2d(y, weight("body", [1, 1, 4, 4]), 1, "SAME", name="body_conv"), weight("b", [4]))
    head = tf.matmul(tf.reduce_mean(y + z, [1, 2], name="pooled"), weight("head", [4, 5]), name="head_product")
    return x, tf.identity(head, name=end) if end else head, y, z


LAYERS = ("stem_conv", "body_conv", "head_product")


def configured(tmp_path, outputs=LAYERS, **options):
    with session(lambda: net(**options)) as (sess, _):
        file = dopt_api.generate_config(sess, None, tmp_path / "config.json")
    content = json.loads(file.read_text())
    for name, entry in content["layer_strategy"].items():
        entry["quant_strategy"] = "Quant_INT8-8"
        if name in outputs:
            entry["output"] = True
    file.write_text(json.dumps(content))
    return file


def exported(tmp_path, file, saved):
    with session(net) as (sess, _):
        result = dopt_api.export(sess, file, saved, tmp_path, output_names=["out"])
    return {layer.name: layer for layer in read_params(result.params).layers}


def test_outputs_are_recorded_simulated_and_exported(tmp_path):
    file = configured(tmp_path)
    with session(net) as (sess, (x, out, y, z)):
        quant = v1.placeholder_with_default(1, [])
        dopt_api.optimize(sess, file, is_train_flag=False, quant_flag=quant)
        sess.run(v1.global_variables_initializer())
        exact = sess.run([out, y, z], {x: X, quant: 0})
        dopt_api.set_calibrate_state(sess, True)
        np.testing.assert_array_equal(sess.run(out, {x: X}), exact[0])
        dopt_api.set_calibrate_state(sess, False)
        simulated = sess.run(out, {x: X})
        saved = v1.train.Saver().save(sess, str(tmp_path / "quant"))
    layers = exported(tmp_path, file, saved)
    for name, values in zip(("head_product", "stem_conv", "body_conv"), exact, strict=True):
        low, high = min(float(values.min()), 0.0), float(values.max())
        assert layers[name].output.scale[0] == pytest.approx((high - low) / 255, rel=1e-5)
    assert [layers[name].output.tensor for name in LAYERS] == ["rectified:0", "BiasAdd:0", "head_product:0"]
    assert layers["stem_conv"].output.zero_point == (0,)
    steps = simulated / layers["head_product"].output.scale[0]
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)


def test_a_conditional_normalization_is_seen_through_and_scales_are_learned(tmp_path):
    def build():
        training = v1.placeholder_with_default(False, [], name="training")
        return training, *net(training)

    file = configured(tmp_path)
    with session(build) as (sess, (training, x, out, *_)):
        dopt_api.optimize(sess, file, is_train_flag=training, quant_flag=1)
        step = v1.train.GradientDescentOptimizer(0.05).minimize(tf.reduce_sum(tf.square(out)))
        sess.run(v1.global_variables_initializer())
        sess.run(step, {x: X, training: True})
        gains = [v for v in v1.trainable_variables() if v.op.name.endswith("output_gain")]
        assert len(gains) == 3
        assert all(value != 0.0 for value in sess.run(gains))
        saved = v1.train.Saver().save(sess, str(tmp_path / "quant"))
    assert all(layer.output is not None for layer in exported(tmp_path, file, saved).values())


def test_an_output_that_nothing_reads_is_refused_with_the_remedy(tmp_path):
    file = configured(tmp_path, ("head_product",), end="")
    with (
        session(lambda: net(end="")) as (sess, _),
        pytest.raises(
            ModelError, match=r"'head_product' cannot be recorded: nothing in the graph reads it.*tf.identity"
        ),
    ):
        dopt_api.optimize(sess, file, is_train_flag=False, quant_flag=1)


def test_a_checkpoint_without_the_output_is_refused(tmp_path):
    file = configured(tmp_path, ())
    with session(net) as (sess, (x, out, *_)):
        dopt_api.optimize(sess, file, is_train_flag=False, quant_flag=1)
        sess.run(v1.global_variables_initializer())
        dopt_api.set_calibrate_state(sess, True)
        sess.run(out, {x: X})
        dopt_api.set_calibrate_state(sess, False)
        saved = v1.train.Saver().save(sess, str(tmp_path / "quant"))
    file = configured(tmp_path, ("body_conv",))
    with pytest.raises(CalibrationError, match="body_conv"):
        exported(tmp_path, file, saved)


def test_an_output_that_is_not_finite_is_named(tmp_path):
    file = configured(tmp_path, ("body_conv",))
    with session(net) as (sess, (x, out, *_)):
        dopt_api.optimize(sess, file, is_train_flag=False, quant_flag=1)
        sess.run(v1.global_variables_initializer())
        bias = next(variable for variable in v1.global_variables() if variable.op.name == "b")
        sess.run(bias.initializer, {bias.initializer.inputs[1]: np.full(4, np.nan, "f")})
        dopt_api.set_calibrate_state(sess, True)
        sess.run(out, {x: X})
        with pytest.raises(CalibrationError, match="The output of layer 'body_conv' had NaN"):
            dopt_api.set_calibrate_state(sess, False)
