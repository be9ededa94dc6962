"""A small network as a session graph, and its accuracy; nothing in here knows of quantization.

The twin of ``examples/torch_fashion_mnist/network.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow.compat.v1 as tf

from examples.fashion_mnist.data import CLASSES, SIZE, Pictures

__all__ = ["BATCH", "Network", "Training", "accuracy", "build", "fit", "frozen_accuracy", "session", "training_of"]

BATCH = 64


@dataclass(frozen=True)
class Network:
    """Tensors of the graph.

    Attributes:
        x: Placeholder of the pictures ``[N, 28, 28, 1]``.
        training: Placeholder, a scalar bool: whether batch normalization uses the statistics of the batch.
        logits: ``[N, 10]``.
    """

    x: Any
    training: Any
    logits: Any


@dataclass(frozen=True)
class Training:
    """What a network is trained by.

    Attributes:
        labels: Placeholder of the classes ``[N]``.
        factor: Placeholder, a scalar: the learning rate is this multiple of the first one.
        step: The operation that takes a step.
    """

    labels: Any
    factor: Any
    step: Any


@contextmanager
def session() -> Iterator[Any]:
    """Open a session with a new graph, which is the default one."""
    config = tf.ConfigProto(intra_op_parallelism_threads=2, inter_op_parallelism_threads=1)
    with tf.Graph().as_default(), tf.Session(config=config) as opened:
        tf.set_random_seed(0)
        yield opened


def build() -> Network:
    """Build the network in the default graph: three convolutions with batch normalization, and a linear layer."""
    x = tf.placeholder(tf.float32, [None, SIZE, SIZE, 1], name="x")
    training = tf.placeholder_with_default(False, [], name="training")
    y = tf.nn.max_pool2d(_conv(x, 16, training, "conv1"), 2, 2, "VALID")
    y = tf.nn.max_pool2d(_conv(y, 32, training, "conv2"), 2, 2, "VALID")
    y = tf.reduce_mean(_conv(y, 64, training, "conv3"), [1, 2])
    weight = tf.get_variable("fc/weight", [64, CLASSES])
    bias = tf.get_variable("fc/bias", [CLASSES], initializer=tf.zeros_initializer())
    return Network(x, training, tf.nn.bias_add(tf.matmul(y, weight, name="fc/MatMul"), bias, name="logits"))


def _conv(x: Any, channels: int, training: Any, name: str) -> Any:
    """Convolve, normalize over the batch or by moving averages, and rectify."""
    weight = tf.get_variable(f"{name}/weight", [3, 3, x.shape[-1], channels])
    y = tf.nn.conv2d(x, weight, 1, "SAME", name=f"{name}/Conv2D")
    gamma = tf.get_variable(f"{name}/gamma", [channels], initializer=tf.ones_initializer())
    beta = tf.get_variable(f"{name}/beta", [channels], initializer=tf.zeros_initializer())
    mean = tf.get_variable(f"{name}/mean", [channels], initializer=tf.zeros_initializer(), trainable=False)
    variance = tf.get_variable(f"{name}/variance", [channels], initializer=tf.ones_initializer(), trainable=False)
    batch_mean, batch_variance = tf.nn.moments(y, [0, 1, 2])
    for average, value in ((mean, batch_mean), (variance, batch_variance)):
        tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, tf.assign(average, 0.9 * average + 0.1 * value))
    used_mean = tf.cond(training, lambda: batch_mean, lambda: tf.identity(mean))
    used_variance = tf.cond(training, lambda: batch_variance, lambda: tf.identity(variance))
    return tf.nn.relu(tf.nn.batch_normalization(y, used_mean, used_variance, beta, gamma, 1e-3))


def training_of(net: Network, rate: float, extra_loss: Any = 0.0) -> Training:
    """Add loss, gradients and optimizer to the graph of a network, float or quantized.

    Args:
        net: The network.
        rate: The learning rate to begin with.
        extra_loss: A term of the loss.
    """
    labels, factor = tf.placeholder(tf.int64, [None], name="labels"), tf.placeholder(tf.float32, [], name="factor")
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=net.logits)
    with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
        step = tf.train.MomentumOptimizer(rate * factor, 0.9).minimize(tf.reduce_mean(losses) + extra_loss)
    return Training(labels, factor, step)


def fit(
    opened: Any,
    net: Network,
    training: Training,
    pictures: Pictures,
    epochs: int,
    flags: Mapping[Any, Any] | None = None,
) -> None:
    """Train, with a learning rate that falls along a cosine.

    Args:
        opened: A session of the network whose variables have their values.
        net: The network.
        training: Its steps.
        pictures: To train with.
        epochs: How many times.
        flags: What else is fed.
    """
    steps, done = epochs * (len(pictures) // BATCH), 0
    for epoch in range(epochs):
        for batch in pictures.batches(BATCH, seed=epoch):
            feeds = {net.x: batch.x[..., None], net.training: True, training.labels: batch.labels, **(flags or {})}
            opened.run(training.step, {**feeds, training.factor: 0.5 + 0.5 * np.cos(np.pi * done / steps)})
            done += 1


def accuracy(opened: Any, net: Network, pictures: Pictures, flags: Mapping[Any, Any] | None = None) -> float:
    """Return the share of pictures whose class a network finds, with these further values fed."""
    right = 0
    parts = list(pictures.batches(len(pictures) // 10))
    for part in parts:
        found = opened.run(net.logits, {net.x: part.x[..., None], **(flags or {})}).argmax(1)
        right += int((found == part.labels).sum())
    return right / sum(len(part) for part in parts)


def frozen_accuracy(file: Path, pictures: Pictures) -> float:
    """Return the same for a frozen graph."""
    with session() as opened:
        graph = tf.GraphDef.FromString(file.read_bytes())
        x, logits = tf.import_graph_def(graph, return_elements=["x:0", "logits:0"], name="")
        return accuracy(opened, Network(x, None, logits), pictures)
