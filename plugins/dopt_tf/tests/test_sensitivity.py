"""Sensitivity in a session graph: the damage of each layer alone, what it costs, and nothing changed by measuring."""

import json

import numpy as np
import pytest
import tensorflow as tf
from graphs import SMALL_LAYERS, flags, images, randomize, session, small_net

from dopt.dopt_tf.opt_main import optimize_model, set_calibrate_state
from dopt_api import config as strategy_file
from dopt_api.errors import CalibrationError, ModelError
from dopt_tf.sensitivity import measure_sensitivity

v1 = tf.compat.v1
STRATEGIES = ["Quant_INT8-8", "Quant_INT8-4", "Quant_FLOAT-4", "Quant_FLOAT-4-G32"]


def calibrated(sess, built, config, calibrate=True):
    is_train, quant = flags()
    optimize_model(sess, config, is_train, quant)
    randomize(sess)
    if calibrate:
        set_calibrate_state(sess, True)
        sess.run(built.logits, {built.x: images(), is_train: False, quant: 1})
        set_calibrate_state(sess, False)
    return is_train, quant


@pytest.mark.parametrize("strategy", ["Quant_INT8-8", "Quant_INT8-4", "Quant_FLOAT-4"])
def test_damage_is_what_each_layer_alone_does(config_of, strategy):
    with session(small_net) as (sess, built):
        calibrated(sess, built, config_of(sess))
        choices = measure_sensitivity(sess, built.logits, [{built.x: images()}], [strategy])
        damage = {one.layer: one.damage for one in choices if one.strategy == strategy}
    assert list(damage) == SMALL_LAYERS
    for layer in SMALL_LAYERS:
        with session(small_net) as (sess, built):
            is_train, quant = calibrated(sess, built, config_of(sess, strategy, only=[layer]))
            exact, found = (
                sess.run(built.logits, {built.x: images(), is_train: False, quant: flag}) for flag in (0, 1)
            )
        wanted = np.square(found - exact).sum() / np.square(exact).sum()
        assert damage[layer] == pytest.approx(wanted, rel=2e-2), layer
        assert damage[layer] > 0


def test_choices_have_costs_and_make_a_strategy_file(config_of):
    with session(small_net) as (sess, built):
        config = config_of(sess)
        calibrated(sess, built, config)
        before = sess.run(v1.global_variables())
        operations = len(sess.graph.get_operations())
        feeds = [{built.x: images(seed=seed)} for seed in range(2)]
        size = measure_sensitivity(sess, [built.logits], feeds, STRATEGIES)
        work = measure_sensitivity(sess, [built.logits], feeds, STRATEGIES, cost="bit_operations")
        assert len(sess.graph.get_operations()) == operations
        for one, other in zip(sess.run(v1.global_variables()), before, strict=True):
            np.testing.assert_array_equal(one, other)
    names = {layer: [one.strategy for one in size if one.layer == layer] for layer in SMALL_LAYERS}
    assert set(map(tuple, names.values())) == {(*STRATEGIES[:3], "float")}  # no layer has groups in TensorFlow
    costs = {(one.layer, one.strategy): one.cost for one in size}
    assert costs["conv1/Conv2D", "Quant_INT8-4"] == 4 * 3 * 3 * 3 * 8
    assert costs["fc/MatMul", "float"] == 32 * 8 * 4
    products = {(one.layer, one.strategy): one.cost for one in work}
    assert products["conv1/Conv2D", "Quant_INT8-4"] == 4 * 8 * 144 * 216
    assert products["conv2/depthwise", "Quant_INT8-8"] == 64 * 144 * 72
    assert products["fc/MatMul", "Quant_FLOAT-4"] == 4 * 32 * 32
    assert [one.damage for one in size] == [one.damage for one in work]
    damage = {one.layer: one.damage for one in size if one.strategy == "Quant_INT8-4"}
    least = min(damage, key=damage.__getitem__)
    strategy_file.assign(config, {layer: f"Quant_INT8-{4 if layer == least else 8}" for layer in SMALL_LAYERS})
    chosen = {entry["quant_strategy"] for entry in json.loads(config.read_text())["layer_strategy"].values()}
    assert chosen == {"Quant_INT8-8", "Quant_INT8-4"}


def test_mistakes_are_answered(config_of):
    with session(small_net) as (sess, built), pytest.raises(ModelError, match="not a quantized one"):
        measure_sensitivity(sess, built.logits, [{built.x: images()}])
    with session(small_net) as (sess, built):
        calibrated(sess, built, config_of(sess), calibrate=False)
        with pytest.raises(CalibrationError, match="There are no feeds"):
            measure_sensitivity(sess, built.logits, [])
        with pytest.raises(CalibrationError, match="conv1/Conv2D"):
            measure_sensitivity(sess, built.logits, [{built.x: images()}])
        with pytest.raises(KeyError):
            measure_sensitivity(sess, built.logits, [{built.x: images()}], ["Quant_INT9-9"])
