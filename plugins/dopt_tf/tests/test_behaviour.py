"""The rules that every backend keeps, on session graphs: flags, calibration, training, loss, what is refused."""

import logging

import numpy as np
import pytest
import tensorflow as tf
from graphs import batch_norm, flags, images, session, small_net, weight

import dopt_api
from dopt_api.errors import CalibrationError, ModelError
from dopt_api.quantizer import (
    Grid,
    Statistics,
    activation_parameters,
    fake_quantize,
    fake_quantize_gradients,
    gain_gradient,
    relative_squared_error,
)
from dopt_tf.checkpoint import restore_float_checkpoint
from dopt_tf.find_layers import quantization_of

v1 = tf.compat.v1
WEIGHT = Grid(8, signed=True, symmetric=True, narrow=True, per_channel=True)


def dense_net():
    x = v1.placeholder(tf.float32, [None, 5], name="x")
    return x, tf.matmul(x, weight("kernel", [5, 3]), name="y")


@pytest.fixture
def quantized(float_checkpoint, config_of):
    """Open sessions of the small network, quantized, with weights like trained ones."""
    path, _ = float_checkpoint(small_net, images(1))

    class Opened:
        def __init__(self, sess, net, **options):
            self.sess, self.net = sess, net
            self.is_train, self.quant = flags()
            dopt_api.optimize(sess, self.config, is_train_flag=self.is_train, quant_flag=self.quant)
            self.quantizers = {name: site.quantizer for name, site in quantization_of(sess.graph).sites.items()}

        def run(self, x, quant=1, train=False, fetch=None):
            feeds = {self.net.x: x, self.quant: quant, self.is_train: train}
            return self.sess.run(self.net.logits if fetch is None else fetch, feeds)

        def calibrate(self, *batches):
            dopt_api.set_calibrate_state(self.sess, True)
            for batch in batches:
                self.run(batch)
            dopt_api.set_calibrate_state(self.sess, False)
            return self

        def scales(self):
            return {n: self.sess.run([q.scale, q.zero_point]) for n, q in self.quantizers.items()}

    def opened(**options):
        with session(small_net) as (sess, _):
            Opened.config = config_of(sess, **options)

        def use(test):
            with session(small_net) as (sess, net):
                result = Opened(sess, net)
                restore_float_checkpoint(sess, path)
                return test(result)

        return use

    return opened


@pytest.mark.parametrize("value", [1, 7])
def test_any_positive_flag_takes_the_quantized_path_and_zero_does_not(quantized, value):
    def test(model):
        wanted = model.run(images(), quant=0)
        found = model.calibrate(images()).run(images(), quant=value)
        assert not np.array_equal(found, wanted)
        np.testing.assert_array_equal(found, model.run(images(), quant=1))
        np.testing.assert_array_equal(model.run(images(), quant=0), wanted)

    quantized()(test)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (False, 1),
        lambda: (tf.constant(False), tf.constant(2)),
        lambda: (np.bool_(False), np.int64(1)),
        lambda: (v1.placeholder_with_default(False, []), tf.constant(1, tf.int64)),
        lambda: (tf.constant(False), tf.constant(True)),
        lambda: tuple(v1.placeholder_with_default(value, None) for value in (False, 1)),
    ],
)
def test_flags_of_every_form(config_of, make):
    with session(dense_net) as (sess, _):
        config = config_of(sess)
    with session(dense_net) as (sess, (x, y)):
        is_train, quant = make()
        dopt_api.optimize(sess, config, is_train_flag=is_train, quant_flag=quant)
        sess.run(v1.global_variables_initializer())
        dopt_api.set_calibrate_state(sess, True)
        wanted = sess.run(y, {x: np.eye(5)})
        dopt_api.set_calibrate_state(sess, False)
        assert not np.array_equal(sess.run(y, {x: np.eye(5) / 3}), wanted / 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (None, 1), "is_train_flag is None"),
        (lambda: (False, None), "quant_flag is None"),
        (lambda: (False, "1"), "quant_flag is '1'"),
        (lambda: (False, v1.placeholder(tf.int32, [2])), "has the shape"),
        (lambda: (False, v1.placeholder(tf.float32, [])), "The quant_flag is"),
    ],
)
def test_flags_that_are_none_are_refused_and_the_graph_is_left(config_of, make, message):
    with session(dense_net) as (sess, _):
        config = config_of(sess)
        is_train, quant = make()
        with pytest.raises(ModelError, match=message):
            dopt_api.optimize(sess, config, is_train_flag=is_train, quant_flag=quant)
        assert quantization_of(sess.graph) is None
        assert sess.graph.get_operation_by_name("y").inputs[0].op.name == "x"


def test_layers_left_float_are_not_touched(quantized):
    def test(model):
        op = model.sess.graph.get_operation_by_name("fc/MatMul")
        assert not op.inputs[0].op.name.startswith("dopt")
        assert list(model.quantizers) == ["conv1/Conv2D"]

    quantized(only=["conv1/Conv2D"])(test)


def test_calibration_does_not_depend_on_batches_and_changes_nothing_else(quantized):
    data = images(12)

    def test(model):
        before = model.sess.run(v1.trainable_variables())
        whole = model.calibrate(data).scales()
        parts = model.calibrate(data[8:], data[:1], data[1:8]).scales()
        assert whole == parts
        for one, other in zip(before, model.sess.run(v1.trainable_variables()), strict=True):
            np.testing.assert_array_equal(one, other)
        assert model.calibrate(data / 3).scales() != whole  # anew, not on top

    quantized()(test)


@pytest.mark.parametrize("method", ["min_max", "moving_average", "mse"])
def test_ranges_are_the_core_s(quantized, method):
    data = images(6)

    def test(model):
        statistics = Statistics()
        statistics.update(data, -1)
        wanted = activation_parameters(statistics, Grid(8), layer="any", method=method)
        assert tuple(model.calibrate(data).scales()["conv1/Conv2D"]) == wanted

    quantized(range=method)(test)


def test_float_steps_collect_nothing_and_layers_without_data_are_named(quantized):
    def test(model):
        dopt_api.set_calibrate_state(model.sess, True)
        model.run(images(), quant=0)
        with pytest.raises(CalibrationError, match=r"'conv1/Conv2D' has seen no data \(and 2 other layers"):
            dopt_api.set_calibrate_state(model.sess, False)
        dopt_api.set_calibrate_state(model.sess, False)  # it is off

    quantized()(test)


def test_nan_in_the_data_is_refused_by_layer(quantized):
    data = images(4)
    data[1, 0, 0, 0] = np.nan

    def test(model):
        with pytest.raises(CalibrationError, match="'conv1/Conv2D' had NaN or infinity in 1 of 4 samples"):
            model.calibrate(data)

    quantized()(test)


def test_without_ranges_the_quantized_path_is_float_and_says_so_once(quantized, caplog):
    def test(model):
        with caplog.at_level(logging.WARNING, logger="dopt"):
            np.testing.assert_array_equal(model.run(images()), model.run(images(), quant=0))
            model.run(images())
        texts = [record.getMessage() for record in caplog.records]
        assert sorted(text.split("'")[1] for text in texts) == ["conv1/Conv2D", "conv2/depthwise", "fc/MatMul"]

    quantized()(test)


def test_training_without_calibration_starts_from_the_first_batch(quantized):
    data = images(6)

    def test(model):
        model.run(data, train=True)
        first = model.scales()
        model.run(10 * data, train=True)
        assert model.scales() == first
        assert model.calibrate(data).scales()["conv1/Conv2D"] == first["conv1/Conv2D"]

    quantized()(test)


def test_the_float_checkpoint_loads_at_any_time(quantized, float_checkpoint):
    def test(model):
        wanted = model.run(images(), quant=0)
        simulated = model.calibrate(images()).run(images())
        model.sess.run(
            model.sess.graph.get_tensor_by_name("fc/kernel:0").op.name
            and [variable.initializer for variable in v1.trainable_variables() if "dopt" not in variable.name]
        )
        path, _ = float_checkpoint(small_net, images(1))
        restore_float_checkpoint(model.sess, path)
        np.testing.assert_array_equal(model.run(images(), quant=0), wanted)
        np.testing.assert_array_equal(model.run(images()), simulated)

    quantized()(test)


def one_layer(config_of, x, *, optimizer=None, loss_weight=0.0):
    """Return gradients of a quantized dense layer, and everything they are made of."""
    with session(dense_net) as (sess, _):
        config = config_of(sess)
    upstream = np.random.default_rng(5).standard_normal((len(x), 3)).astype(np.float32)
    with session(dense_net) as (sess, (given, y)):
        is_train, quant = flags()
        dopt_api.optimize(sess, config, is_train_flag=is_train, quant_flag=quant)
        (site,) = quantization_of(sess.graph).sites.values()
        kernel = v1.trainable_variables()[0]
        leaves = [given, kernel, site.quantizer.gain, site.quantizer.weight_gain]
        gradients = tf.gradients(y, leaves, tf.constant(upstream))
        loss = dopt_api.get_quant_loss(sess)
        assert dopt_api.get_quant_loss(sess) is loss
        sess.run(v1.global_variables_initializer())
        dopt_api.set_calibrate_state(sess, True)
        sess.run(y, {given: x / 2, is_train: False, quant: 1})  # half of the range: some inputs are clipped
        dopt_api.set_calibrate_state(sess, False)
        site.quantizer.weight_gain.load(np.full(3, -0.4, np.float32), sess)
        feeds = {given: x, is_train: True, quant: 1}
        found = sess.run({"y": y, "gradients": gradients, "loss": loss}, feeds)
        off = sess.run([gradients[2], gradients[3], loss], {**feeds, is_train: False})
        assert sess.run(loss, {**feeds, quant: 0}) == 0
        values = sess.run([kernel, site.quantizer.scale, site.quantizer.zero_point])
    return upstream, found, off, values


def test_values_gradients_and_loss_are_those_of_the_core(config_of):
    x = np.random.default_rng(4).standard_normal((6, 5)).astype(np.float32)
    upstream, found, off, (kernel, scale, zero) = one_layer(config_of, x)
    derived = (np.abs(kernel).max(0) / np.float32(127)).astype(np.float32)
    weight_scale = (derived / np.float32(1.4)).astype(np.float32)
    zeros = np.zeros(3, np.int32)
    used_x = fake_quantize(x, scale, zero, Grid(8))
    used_w = fake_quantize(kernel, weight_scale, zeros, WEIGHT, axis=1)
    np.testing.assert_allclose(found["y"], used_x @ used_w, rtol=1e-4, atol=1e-4)
    wanted_x, of_scale = fake_quantize_gradients(upstream @ used_w.T, x, scale, zero, Grid(8))
    wanted_w, of_scales = fake_quantize_gradients(used_x.T @ upstream, kernel, weight_scale, zeros, WEIGHT, axis=1)
    assert (wanted_x == 0).any()
    assert (wanted_w == 0).any()
    dx, dw, dgain, dgains = found["gradients"]
    np.testing.assert_allclose(dx, wanted_x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dw, wanted_w, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dgain, gain_gradient(of_scale, scale, 0.0), rtol=1e-3)
    np.testing.assert_allclose(dgains, gain_gradient(of_scales, derived, -0.4), rtol=1e-3, atol=1e-4)
    weight_error = relative_squared_error(kernel, weight_scale, zeros, WEIGHT, axis=1)
    input_error = relative_squared_error(x, scale, zero, Grid(8))
    assert found["loss"] == pytest.approx(weight_error + input_error, rel=1e-3)
    assert np.all(off[0] == 0)
    assert np.all(off[1] == 0)
    assert off[2] == pytest.approx(weight_error, rel=1e-3)


@pytest.mark.parametrize("train", [True, False])
def test_gains_move_only_where_the_flag_says(config_of, train):
    with session(dense_net) as (sess, _):
        config = config_of(sess)
    x = np.random.default_rng(4).standard_normal((32, 5)).astype(np.float32)
    with session(dense_net) as (sess, (given, y)):
        is_train, quant = flags()
        dopt_api.optimize(sess, config, is_train_flag=is_train, quant_flag=quant)
        (site,) = quantization_of(sess.graph).sites.values()
        loss = tf.reduce_mean(tf.square(y - tf.constant(np.tanh(x[:, :3]))))
        step = v1.train.AdamOptimizer(1e-2).minimize(loss)
        sess.run(v1.global_variables_initializer())
        dopt_api.set_calibrate_state(sess, True)
        sess.run(y, {given: x, is_train: False, quant: 1})
        dopt_api.set_calibrate_state(sess, False)
        feeds = {given: x, is_train: train, quant: 1}
        first = sess.run(loss, feeds)
        for _ in range(100):
            sess.run(step, feeds)
        assert sess.run(loss, feeds) < 0.5 * first
        gains = sess.run([site.quantizer.gain, site.quantizer.weight_gain])
        assert (np.abs(gains[0]) > 0) == train
        assert (np.abs(gains[1]).max() > 0) == train


# ---- what is refused


def test_a_second_call_a_late_call_and_a_finalized_graph_are_refused(config_of):
    with session(dense_net) as (sess, _):
        config = config_of(sess)
    with session(dense_net) as (sess, _):
        dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)
        with pytest.raises(ModelError, match="already quantized"):
            dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)
        with pytest.raises(ModelError, match="already quantized"):
            dopt_api.generate_config(sess)
    for build in (lambda y: tf.gradients(y, v1.trainable_variables()), v1.train.AdamOptimizer().minimize):
        with session(dense_net) as (sess, (_, y)):
            build(tf.reduce_sum(y))
            with pytest.raises(ModelError, match="Gradients were already built") as caught:
                dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)
            assert "before the optimizer" in caught.value.fix
    with session(dense_net) as (sess, _):
        sess.graph.finalize()
        with pytest.raises(ModelError, match="finalized"):
            dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)


@pytest.mark.filterwarnings("ignore")
def test_a_session_that_has_run_is_refused(config_of):
    with session(dense_net) as (sess, _):
        config = config_of(sess)
    with session(dense_net) as (sess, _):
        sess.run(v1.global_variables_initializer())
        with pytest.raises(ModelError, match="has already run this graph"):
            dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)


def test_calls_for_a_float_graph_are_refused():
    with session(dense_net) as (sess, _):
        for call in (lambda: dopt_api.set_calibrate_state(sess, True), lambda: dopt_api.get_quant_loss(sess)):
            with pytest.raises(ModelError, match="not a quantized one"):
                call()
        with pytest.raises(ModelError, match="calibration mode"):
            dopt_api.set_calibrate_state(sess, "on")


def test_another_session_of_the_graph_takes_over_a_checkpoint(config_of, tmp_path):
    def net():
        x = v1.placeholder(tf.float32, [None, 6, 6, 3], name="x")
        return x, batch_norm(tf.nn.conv2d(x, weight("w", [3, 3, 3, 4]), 1, "SAME", name="y"))

    with session(net) as (sess, _):
        config = config_of(sess)
    data = np.random.default_rng(0).standard_normal((4, 6, 6, 3))
    with session(net) as (sess, (x, y)):
        dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)
        sess.run(v1.global_variables_initializer())
        dopt_api.set_calibrate_state(sess, True)
        sess.run(y, {x: data})
        dopt_api.set_calibrate_state(sess, False)
        wanted = sess.run(y, {x: data})
        saver = v1.train.Saver()
        path = saver.save(sess, str(tmp_path / "model"))
        with v1.Session(graph=sess.graph) as other:
            saver.restore(other, path)
            np.testing.assert_array_equal(other.run(y, {x: data}), wanted)
