"""Small graphs for the tests, and what is done with them."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tensorflow as tf

v1 = tf.compat.v1


@contextmanager
def session(build=None):
    """Open a session of a new graph; yield it with what ``build`` returned, and the graph as default."""
    config = v1.ConfigProto(intra_op_parallelism_threads=2, inter_op_parallelism_threads=2)
    with tf.Graph().as_default(), v1.Session(config=config) as sess:
        v1.set_random_seed(1)
        yield sess, None if build is None else build()


def weight(name, shape, *, resource=True, **options):
    return v1.get_variable(name, shape, use_resource=resource, **options)


def batch_norm(y, training=False, *, fused=True, resource=True, axis=-1, scope="bn"):
    """Normalize as ``tf.compat.v1.layers`` does; ``training`` may be a tensor."""
    channels = y.shape[axis]
    with v1.variable_scope(scope, use_resource=resource):
        gamma = weight("gamma", [channels], resource=resource, initializer=v1.ones_initializer())
        beta = weight("beta", [channels], resource=resource, initializer=v1.zeros_initializer())
        mean = weight("moving_mean", [channels], resource=resource, trainable=False, initializer=v1.zeros_initializer())
        var = weight(
            "moving_variance", [channels], resource=resource, trainable=False, initializer=v1.ones_initializer()
        )
        layout = "NHWC" if axis == -1 else "NCHW"

        def of_batch():
            result, *_ = v1.nn.fused_batch_norm(y, gamma, beta, is_training=True, data_format=layout)
            return result

        def of_past():
            given = {"is_training": False, "data_format": layout}
            return v1.nn.fused_batch_norm(y, gamma, beta, mean, var, **given)[0]

        if fused and isinstance(training, bool):
            return of_batch() if training else of_past()
        if fused:
            return tf.cond(training, of_batch, of_past)
        if training is False:
            return tf.nn.batch_normalization(y, mean, var, beta, gamma, 1e-3)
        now = tf.nn.moments(y, list(range(y.shape.rank - 1)))
        used_mean = tf.cond(training, lambda: now[0], lambda: tf.identity(mean))
        used_var = tf.cond(training, lambda: now[1], lambda: tf.identity(var))
        return tf.nn.batch_normalization(y, used_mean, used_var, beta, gamma, 1e-3)


def small_net(training=False, *, fused=True, resource=True):
    """Build convolutions with batch normalization, a depthwise one, a residual sum, and a dense layer."""
    x = v1.placeholder(tf.float32, [None, 12, 12, 3], name="x")
    options = {"training": training, "fused": fused, "resource": resource}
    y = tf.nn.conv2d(x, weight("conv1/kernel", [3, 3, 3, 8], resource=resource), 1, "SAME", name="conv1/Conv2D")
    y = tf.nn.relu(batch_norm(y, scope="bn1", **options))
    kernel = weight("conv2/kernel", [3, 3, 8, 1], resource=resource)
    z = tf.nn.depthwise_conv2d(y, kernel, [1, 1, 1, 1], "SAME", name="conv2/depthwise")
    z = tf.nn.bias_add(z, weight("conv2/bias", [8], resource=resource))
    y = y + tf.nn.relu(batch_norm(z, scope="bn2", **options))
    pooled = tf.reduce_mean(y, [1, 2])
    logits = tf.matmul(pooled, weight("fc/kernel", [8, 4], resource=resource), name="fc/MatMul")
    logits = tf.nn.bias_add(logits, weight("fc/bias", [4], resource=resource), name="logits")
    return SimpleNamespace(x=x, logits=logits, training=training)


SMALL_LAYERS = ["conv1/Conv2D", "conv2/depthwise", "fc/MatMul"]


def randomize(sess, seed=0):
    """Give every variable of the model a value like that of a trained one."""
    numbers = np.random.default_rng(seed)
    sess.run(v1.global_variables_initializer())
    for variable in v1.global_variables():
        name, shape = variable.op.name, variable.shape.as_list()
        if name.startswith("dopt_quantizer") or not shape:
            continue
        if name.endswith(("variance", "gamma")):
            value = numbers.uniform(0.5, 2.0, shape)
        else:
            fan_in = int(np.prod(shape[:-1])) if len(shape) > 1 else 10
            value = numbers.standard_normal(shape) * (2.0 / fan_in) ** 0.5
        variable.load(value.astype(variable.dtype.as_numpy_dtype), sess)


def images(n=8, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 12, 12, 3)).astype(np.float32)


def flags():
    """Return the placeholders of ``is_train_flag`` and ``quant_flag``."""
    return v1.placeholder(tf.bool, [], name="is_train_flag"), v1.placeholder(tf.int32, [], name="quant_flag")


def sqnr(wanted, found):
    """Return the ratio of signal to error in dB."""
    return 10 * np.log10((wanted**2).sum() / ((found - wanted) ** 2).sum())


def run_pb(folder, outputs, feeds):
    """Run ``model.pb`` in a new session."""
    graph_def = v1.GraphDef.FromString((Path(folder) / "model.pb").read_bytes())
    with session() as (sess, _):
        tf.import_graph_def(graph_def, name="")
        return sess.run([f"{name}:0" for name in outputs], feeds)
