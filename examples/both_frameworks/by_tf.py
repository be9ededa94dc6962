"""The network in a TensorFlow session: operations have the names of the layers in PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

from dopt.dopt_tf.opt_main import generate_final_model, optimize_model, set_calibrate_state
from dopt_api.params import read_params
from examples.both_frameworks.network import Array, Quantized, Weights, integers
from examples.fashion_mnist.data import SIZE
from examples.tf_fashion_mnist.network import BATCH, session

__all__ = ["quantize"]


def build(weights: Weights) -> tuple[Any, Any]:
    """Build the network in the default graph, and return its input and its logits."""
    x = tf.placeholder(tf.float32, [None, SIZE, SIZE, 1], name="x")
    y = tf.nn.max_pool2d(tf.nn.relu(_conv(x, "conv1", weights)), 2, 2, "VALID")
    y = tf.nn.max_pool2d(tf.nn.relu(_conv(y, "conv2", weights)), 4, 4, "VALID")
    y = tf.reshape(tf.transpose(y, [0, 3, 1, 2]), [-1, weights["fc.weight"].shape[1]])  # flat as in PyTorch
    y = tf.matmul(y, _variable("fc.weight", weights["fc.weight"].T), name="fc/Linear")
    return x, tf.nn.bias_add(y, _variable("fc.bias", weights["fc.bias"]), name="logits")


def quantize(weights: Weights, calibration: Array, pictures: Array, config_file: Path, folder: Path) -> Quantized:
    """Calibrate and export; arguments as in :mod:`examples.both_frameworks.by_torch`."""
    with session() as opened:
        x, logits_tensor = build(weights)
        optimize_model(opened, config_file, is_train_flag=False, quant_flag=1)
        opened.run(tf.global_variables_initializer())
        set_calibrate_state(opened, True)
        for start in range(0, len(calibration), BATCH):
            opened.run(logits_tensor, {x: calibration[start : start + BATCH, ..., None]})
        set_calibrate_state(opened, False)
        checkpoint = tf.train.Saver().save(opened, str(folder / "quant.ckpt"))
        logits = opened.run(logits_tensor, {x: pictures[..., None]})
    with session() as opened:
        build(weights)
        exported = generate_final_model(opened, config_file, ["logits"], checkpoint, folder)
    params = read_params(exported.params)
    graph = tf.GraphDef.FromString(exported.model.read_bytes())
    values: dict[str, Array] = {
        f"{node.name}:0": tf.make_ndarray(node.attr["value"].tensor) for node in graph.node if node.op == "Const"
    }
    found = {
        layer.name: integers(_channels_first(values[layer.weight.tensor]), layer.weight.scale)
        for layer in params.layers
    }
    return Quantized(params, found, logits)


def _conv(x: Any, name: str, weights: Weights) -> Any:
    kernel = _variable(f"{name}.weight", weights[f"{name}.weight"].transpose(2, 3, 1, 0))
    y = tf.nn.conv2d(x, kernel, 1, "SAME", name=f"{name}/Conv2D")
    return tf.nn.bias_add(y, _variable(f"{name}.bias", weights[f"{name}.bias"]))


def _variable(name: str, value: Array) -> Any:
    initializer = tf.constant_initializer(np.ascontiguousarray(value))
    return tf.get_variable(name.replace(".", "/"), value.shape, initializer=initializer)


def _channels_first(weight: Array) -> Array:
    """Return a weight in PyTorch's layout."""
    return np.transpose(weight, (3, 2, 0, 1) if weight.ndim == 4 else (1, 0))
