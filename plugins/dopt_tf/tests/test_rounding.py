"""Rounding by what the outputs lose: nearer to float, exported as chosen, and nothing else changed."""

from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from graphs import batch_norm, flags, images, randomize, session, small_net, sqnr, weight

from dopt.dopt_tf.opt_main import generate_final_model, optimize_model, set_calibrate_state
from dopt_api.errors import CalibrationError, ModelError
from dopt_api.params import read_params
from dopt_api.quantizer import learned_scale
from dopt_api.quantizer.short_sums import overflowing, partners
from dopt_tf.optimize import quantized
from dopt_tf.post_training import post_training
from dopt_tf.quantizer import SCOPE
from dopt_tf.rounding import _roundings, round_weights
from dopt_tf.running import Runner

v1 = tf.compat.v1


@pytest.fixture
def calibrated(config_of):
    """Return a function that quantizes a graph with values, calibrates it, and returns what a test needs."""

    def make(sess, built, strategy="Quant_INT8-4", calibrate=True):
        is_train, quant = flags()
        config = config_of(sess, strategy)
        optimize_model(sess, config, is_train, quant)
        randomize(sess)
        feeds = [{built.x: images(seed=seed)} for seed in range(4)]

        def run(flag, seed=9):
            return sess.run(built.logits, {built.x: images(seed=seed), is_train: False, quant: flag})

        if calibrate:
            set_calibrate_state(sess, True)
            for feed in feeds:
                sess.run(built.logits, {**feed, is_train: False, quant: 1})
            set_calibrate_state(sess, False)
        return SimpleNamespace(sess=sess, feeds=feeds, run=run, config=config)

    return make


@pytest.mark.parametrize("resource", [True, False])
@pytest.mark.parametrize(("strategy", "gain"), [("Quant_INT8-4", 3.0), ("Quant_INT8-8", 0.5)])
def test_the_outputs_come_nearer_to_float_on_other_data(calibrated, resource, strategy, gain):
    with session(lambda: small_net(resource=resource)) as (sess, built):
        made = calibrated(sess, built, strategy)
        exact, before = made.run(0), made.run(1)
        report = round_weights(sess, made.feeds, positions=64)
        assert [layer.name for layer in report] == ["conv1/Conv2D", "conv2/depthwise", "fc/MatMul"]
        assert all(layer.reason == "" and 0 < layer.rounded <= layer.nearest < 1 for layer in report)
        assert sqnr(exact, made.run(1)) > sqnr(exact, before) + gain


@pytest.mark.parametrize("short_sums", [True, False])
def test_short_sums_overflow_in_no_channel(calibrated, short_sums):
    with session(small_net) as (sess, built):
        made = calibrated(sess, built, "Quant_INT8-8", calibrate=False)
        variables = {variable.op.name: variable for variable in v1.global_variables()}
        for name in ("conv1/kernel", "fc/kernel"):  # neighbours of one sign
            variables[name].load(np.abs(sess.run(variables[name])) + 0.1, sess)
        post_training(sess, made.feeds, short_sums=short_sums)
        over = {}
        for name, layer in (("conv1/kernel", "conv1/Conv2D"), ("fc/kernel", "fc/MatMul")):
            weight, gain = sess.run([variables[name], variables[f"{SCOPE}/{layer}/weight_gain"]])
            *window, inputs, outputs = weight.shape
            rows = weight.reshape(-1, outputs).T
            integers = np.rint(rows / learned_scale(np.abs(rows).max(1) / 127, gain)[:, None])
            pairs = partners(1, outputs, inputs, int(np.prod(window)), channels_last=True)
            over[layer] = overflowing(integers, pairs).mean()
        assert over == {"conv1/Conv2D": 0.0, "fc/MatMul": 0.0} if short_sums else min(over.values()) > 0.5


def test_the_mean_of_the_outputs_is_that_of_float(calibrated):
    with session(small_net) as (sess, built):
        made = calibrated(sess, built)
        exact = np.concatenate([made.run(0, seed) for seed in range(4)])
        round_weights(sess, made.feeds, positions=144)
        found = np.concatenate([made.run(1, seed) for seed in range(4)])
        assert (np.abs((found - exact).mean(0)) < 0.5 * (found - exact).std(0)).all()


def test_exporting_gives_weights_that_were_on_their_grid(calibrated, tmp_path):
    with session(small_net) as (sess, built):
        made = calibrated(sess, built)
        round_weights(sess, made.feeds, positions=32)
        wanted = made.run(1)
        kernel = sess.run({variable.op.name: variable for variable in v1.global_variables()})["fc/kernel"]
        path = v1.train.Saver().save(sess, str(tmp_path / "rounded"))
    with session(small_net) as (sess, _):
        result = generate_final_model(sess, made.config, ["logits"], path, tmp_path)
    entry = {layer.name: layer for layer in read_params(result.params).layers}["fc/MatMul"]
    steps = kernel / np.float32(entry.weight.scale)
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
    assert np.isfinite(wanted).all()


def convolution(kind, layout, padding, strides, dilations):
    shape = [None, 4, 9, 8] if layout == "NCHW" else [None, 9, 8, 4]
    x = v1.placeholder(tf.float32, shape, name="x")
    if kind == "MatMul":
        flat = tf.reshape(x, [-1, 4])
        return x, tf.matmul(flat, weight("kernel", [6, 4]), transpose_b=True, name="layer")
    options = {"padding": padding, "data_format": layout, "dilations": dilations, "name": "layer"}
    if kind == "depthwise":
        return x, tf.nn.depthwise_conv2d(
            x, weight("kernel", [3, 2, 4, 2]), [1, *strides, 1], padding, dilations=dilations, name="layer"
        )
    inputs = 2 if kind == "grouped" else 4
    options["strides"] = strides
    return x, tf.nn.conv2d(x, weight("kernel", [3, 2, inputs, 6]), **options)


@pytest.mark.parametrize(
    ("kind", "padding", "strides", "dilations"),
    [
        ("plain", "SAME", (1, 1), (1, 1)),
        ("plain", "SAME", (2, 3), (1, 1)),
        ("plain", "VALID", (1, 1), (2, 1)),
        ("plain", [[0, 0], [1, 2], [0, 1], [0, 0]], (2, 1), (1, 1)),
        ("depthwise", "SAME", (2, 2), (1, 1)),
        ("depthwise", "VALID", (1, 1), (2, 2)),
        ("MatMul", "", (1, 1), (1, 1)),
    ],
)
def test_patches_times_weight_are_the_layers_outputs(config_of, kind, padding, strides, dilations):
    with session(lambda: convolution(kind, "NHWC", padding, strides, dilations)) as (sess, (x, _)):
        is_train, quant = flags()
        optimize_model(sess, config_of(sess), is_train, quant)
        randomize(sess)
        data = np.random.default_rng(0).standard_normal((3, 9, 8, 4)).astype(np.float32)
        set_calibrate_state(sess, True)
        (site,) = quantized(sess).sites
        op = sess.graph.get_operation_by_name(site)
        made = sess.run(op.outputs[0], {x: data, is_train: False, quant: 1})
        set_calibrate_state(sess, False)
        (rounding,) = _roundings(Runner(sess), 7, 5)
        assert rounding.reason == ""
        given = sess.run(rounding.site.given, {x: data})
        kernel = sess.run(rounding.weight)
        patches = rounding.sampler.patches(given, kernel.shape)
        rows = rounding.rows(kernel)
        np.testing.assert_array_equal(rounding.sampler.back(rows, kernel.shape), kernel)
        found = np.einsum("ngk,gok->ngo", patches, rows).reshape(len(patches), -1)
        if kind == "MatMul":
            np.testing.assert_allclose(found, made, rtol=1e-4, atol=1e-5)
            return
        generator = np.random.default_rng(5)
        top, left = (generator.integers(0, size, (len(made), len(patches) // len(made))) for size in made.shape[1:3])
        wanted = made[np.arange(len(made))[:, None], top, left].reshape(len(patches), -1)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def odd_net():
    """Build layers that cannot be rounded."""
    x = v1.placeholder(tf.float32, [None, 12, 12, 3], name="x")
    y = tf.nn.conv2d_transpose(x, weight("up/kernel", [2, 2, 4, 3]), [8, 12, 12, 4], 1, "SAME", name="up")
    pooled = tf.reduce_mean(batch_norm(y), [1, 2])
    shared = weight("shared/kernel", [4, 4])
    pooled = tf.matmul(tf.nn.relu(tf.matmul(pooled, shared, name="one")), shared, name="other")
    turned = tf.matmul(weight("turned/kernel", [4, 4]), pooled, transpose_b=True, name="turned")
    doubled = tf.transpose(weight("doubled/kernel", [4, 4]))
    return SimpleNamespace(x=x, logits=tf.matmul(tf.transpose(turned), doubled, name="doubled"))


def test_what_is_left_alone_is_listed_with_the_reason(calibrated):
    with session(odd_net) as (sess, built):
        made = calibrated(sess, built)
        (shared,) = [variable for variable in v1.global_variables() if variable.op.name == "shared/kernel"]
        before = sess.run(shared)
        report = {layer.name: layer.reason for layer in round_weights(sess, made.feeds)}
        np.testing.assert_array_equal(sess.run(shared), before)
    assert "Conv2DBackpropInput is not rounded" in report["up"]
    assert "another layer's too" in report["one"]
    assert "another layer's too" in report["other"]
    assert "transposed or second" in report["turned"]
    assert report.get("doubled", "not just what a variable holds") == "its weight is not just what a variable holds"


def test_no_time_rounds_nothing_and_says_so(calibrated):
    with session(small_net) as (sess, built):
        made = calibrated(sess, built)
        before = made.run(1)
        report = round_weights(sess, made.feeds, seconds=0.0)
        np.testing.assert_array_equal(made.run(1), before)
    assert {layer.reason for layer in report} == {"no time was left for it"}


def test_equal_calls_give_equal_weights_and_a_failure_leaves_them_as_they_were(calibrated):
    def stop_at_the_third(layers):
        for number, layer in enumerate(layers):
            if number == 2:
                raise KeyboardInterrupt
            yield layer

    results = []
    for _ in range(2):
        with session(small_net) as (sess, built):
            made = calibrated(sess, built)
            before = sess.run(v1.global_variables())
            with pytest.raises(KeyboardInterrupt):
                round_weights(sess, made.feeds, progress=stop_at_the_third)
            for one, other in zip(sess.run(v1.global_variables()), before, strict=True):
                np.testing.assert_array_equal(one, other)
            operations = len(sess.graph.get_operations())
            round_weights(sess, made.feeds, positions=16)
            assert len(sess.graph.get_operations()) == operations
            results.append(sess.run(v1.global_variables()))
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_mistakes_are_answered(calibrated):
    with session(small_net) as (sess, built), pytest.raises(ModelError, match="not a quantized one"):
        round_weights(sess, [{built.x: images()}])
    with session(small_net) as (sess, built):
        made = calibrated(sess, built, calibrate=False)
        with pytest.raises(CalibrationError, match="There are no feeds"):
            round_weights(sess, [])
        with pytest.raises(CalibrationError, match="conv1/Conv2D"):
            round_weights(sess, made.feeds)
