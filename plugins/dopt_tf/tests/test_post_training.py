"""Post-training in one call: what its parts give, with a time budget, from any iterable, and nothing left half done."""

import numpy as np
import pytest
import tensorflow as tf
from graphs import SMALL_LAYERS, flags, images, randomize, session, small_net, sqnr

from dopt.dopt_tf.opt_main import optimize_model, set_calibrate_state
from dopt_api.errors import CalibrationError, ModelError
from dopt_tf.post_training import post_training
from dopt_tf.rounding import round_weights

v1 = tf.compat.v1


def quantized(sess, config):
    is_train, quant = flags()
    optimize_model(sess, config, is_train, quant)
    randomize(sess)
    return is_train, quant


def values(sess):
    return sess.run({variable.op.name: variable for variable in v1.global_variables()})


def test_it_is_calibration_and_then_rounding(config_of):
    with session(small_net) as (sess, built):
        is_train, quant = quantized(sess, config_of(sess, "Quant_INT8-4"))
        feeds = [{built.x: images(seed=seed)} for seed in range(4)]
        exact = sess.run(built.logits, {built.x: images(seed=9), is_train: False, quant: 0})
        seen = []

        def shown(work):
            for one in work:
                seen.append(one)
                yield one

        report = post_training(sess, (feed for feed in feeds), samples=16, progress=shown)
        assert len(seen) == 4 + 3
        assert all(layer.reason == "" for layer in report)
        one_call = values(sess)
        found = sess.run(built.logits, {built.x: images(seed=9), is_train: False, quant: 1})
        assert sqnr(exact, found) > 10
    with session(small_net) as (sess, built):
        is_train, quant = quantized(sess, config_of(sess, "Quant_INT8-4"))
        set_calibrate_state(sess, True)
        # TensorFlow fuses by what is fetched, so that the same must be fetched here
        layers = [sess.graph.get_operation_by_name(name) for name in SMALL_LAYERS]
        for seed in range(4):
            sess.run(layers, {built.x: images(seed=seed), is_train: False, quant: 1})
        set_calibrate_state(sess, False)
        round_weights(sess, [{built.x: images(seed=seed)} for seed in range(2)])
        for name, value in values(sess).items():
            np.testing.assert_array_equal(value, one_call[name], err_msg=name)


def test_no_time_leaves_a_calibrated_graph(config_of):
    with session(small_net) as (sess, built):
        quantized(sess, config_of(sess))
        report = post_training(sess, [{built.x: images()}], seconds=0.0)
        assert {layer.reason for layer in report} == {"no time was left for it"}
        assert all(value == 1 for name, value in values(sess).items() if name.endswith("/ready"))


def test_mistakes_leave_calibration_off(config_of):
    with session(small_net) as (sess, built):
        with pytest.raises(ModelError, match="not a quantized one"):
            post_training(sess, [{built.x: images()}])
        is_train, quant = quantized(sess, config_of(sess))
        with pytest.raises(CalibrationError):
            post_training(sess, [])
        with pytest.raises(ValueError, match="shape"):
            post_training(sess, [{built.x: images()}, {built.x: np.zeros((2, 5))}])
        exact, again = (sess.run(built.logits, {built.x: images(), is_train: False, quant: flag}) for flag in (0, 1))
        post_training(sess, [{built.x: images()}])
        assert sqnr(exact, sess.run(built.logits, {built.x: images(), is_train: False, quant: 1})) > 20
        assert np.isfinite(again).all()
