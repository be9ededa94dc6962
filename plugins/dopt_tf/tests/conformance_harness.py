"""The TensorFlow backend as the conformance suite sees it: sessions of small graphs, and the backend's kernels."""

from functools import cache, lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tensorflow as tf
from collector import Collector
from graphs import batch_norm, flags, run_pb, session, small_net, weight

import dopt_api
from dopt.dopt_tf.opt_main import float_variables, restore_float_checkpoint
from dopt_api.params import FloatLayer
from dopt_api.quantizer import BatchNorm
from dopt_conformance import Harness, WrittenGraph
from dopt_tf.fake_quantize import learned_fake_quantize, learned_scale, weight_scale
from dopt_tf.layer_kinds import Layout, on_weight
from dopt_tf.statistics import DeviceStatistics

v1 = tf.compat.v1
v1.logging.set_verbosity(v1.logging.ERROR)
F32 = np.float32
CONFIG = v1.ConfigProto(intra_op_parallelism_threads=2)
# rewriting takes longer than running these small graphs; the plugin's own tests run with it
CONFIG.graph_options.rewrite_options.disable_meta_optimizer = True


class Model(v1.Session):
    """A session with what is known of its graph: placeholders, outputs, flags, and what its variables start from."""

    def __init__(self, name):
        graph = tf.Graph()
        with graph.as_default():
            net = NETWORKS[name]()
            variables = v1.global_variables()
        super().__init__(graph=graph, config=CONFIG)
        self.name, self.x, self.outputs = name, net.x, [net.logits]
        self.values = trained_values(variables)
        self.flags, self.steps, self.started = None, {}, False

    def ready(self):
        """Give the float variables their values once, unless a checkpoint has."""
        if not self.started:
            self.started = True
            with self.graph.as_default():
                for variable in float_variables(self.graph):
                    variable.load(self.values[variable.op.name], self)
        return self

    def feeds(self, batch, quantized, training):
        given = {self.x: batch["x"]}
        return given if self.flags is None else given | {self.flags[0]: training, self.flags[1]: int(quantized)}


def trained_values(variables):
    """Return values like those of a trained network, the same for each build."""
    numbers = np.random.default_rng(7)
    values = {}
    for variable in variables:
        shape = variable.shape.as_list()
        if variable.op.name.endswith(("variance", "gamma")):
            value = numbers.uniform(0.5, 2.0, shape)
        elif len(shape) > 1:
            value = numbers.standard_normal(shape) * (2.0 / np.prod(shape[:-1])) ** 0.5
        else:
            value = numbers.standard_normal(shape) * 0.3
        values[variable.op.name] = value.astype(F32)
    return values


def dense_net():
    """Build three dense layers, the second with its weight transposed and the last without a bias."""
    x = v1.placeholder(tf.float32, [None, 10], name="x")
    y = tf.matmul(x, weight("a/kernel", [10, 16]), name="a/MatMul")
    y = tf.nn.relu(tf.nn.bias_add(y, weight("a/bias", [16])))
    y = tf.matmul(y, weight("b/kernel", [12, 16]), transpose_b=True, name="b/MatMul")
    y = tf.tanh(y + weight("b/bias", [12]))
    return SimpleNamespace(x=x, logits=tf.matmul(y, weight("c/kernel", [12, 5]), name="logits"))


def unfused_net():
    """Build transposed convolution after a convolution whose batch normalization is made of products and sums."""
    x = v1.placeholder(tf.float32, [None, 8, 8, 3], name="x")
    y = tf.nn.conv2d(x, weight("a/kernel", [3, 3, 3, 6]), 2, "SAME", name="a/Conv2D")
    y = tf.nn.relu(batch_norm(y, fused=False, scope="a/bn"))
    shape = tf.stack([tf.shape(y)[0], 8, 8, 4])
    y = tf.nn.conv2d_transpose(y, weight("b/kernel", [2, 2, 4, 6]), shape, 2, "SAME", name="b/transposed")
    y = tf.nn.bias_add(y, weight("b/bias", [4]))
    return SimpleNamespace(x=x, logits=tf.identity(tf.nn.relu(y), name="logits"))


NETWORKS = {"convolutions": small_net, "dense": dense_net, "unfused": unfused_net}

# layer: (operation, weight, its axis of channels, bias, scope of the batch normalization)
LAYERS = {
    "convolutions": {
        "conv1/Conv2D": ("conv1/kernel", 3, None, "bn1"),
        "conv2/depthwise": ("conv2/kernel", 2, "conv2/bias", "bn2"),
        "fc/MatMul": ("fc/kernel", 1, "fc/bias", None),
    },
    "dense": {
        "a/MatMul": ("a/kernel", 1, "a/bias", None),
        "b/MatMul": ("b/kernel", 0, "b/bias", None),
        "logits": ("c/kernel", 1, None, None),
    },
    "unfused": {
        "a/Conv2D": ("a/kernel", 3, None, "a/bn"),
        "b/transposed": ("b/kernel", 2, "b/bias", None),
    },
}


class TfHarness(Harness):
    """Sessions of graphs of ``tf.compat.v1``."""

    backend = "tf"

    # ---- models

    def models(self):
        return tuple(NETWORKS)

    def build(self, name):
        return Model(name)

    def batch(self, name, size, seed):
        shape = {"convolutions": (12, 12, 3), "dense": (10,), "unfused": (8, 8, 3)}[name]
        return {"x": np.random.default_rng(seed).standard_normal((size, *shape)).astype(F32)}

    def float_layers(self, name):
        with self.build(name) as model:
            values = model.values
        return {layer: float_layer(values, *described) for layer, described in LAYERS[name].items()}

    def activations(self, name, batch):
        with self.build(name) as model:
            given = [input_of(model.graph.get_operation_by_name(layer)) for layer in LAYERS[name]]
            return dict(zip(LAYERS[name], model.ready().run(given, model.feeds(batch, False, False)), strict=True))

    def channel_axis(self, name, layer):
        return -1

    # ---- going the way

    def optimize(self, model, config_file):
        with model.graph.as_default():
            model.flags = flags()
        is_train, quant = model.flags
        return dopt_api.optimize(model, config_file, is_train_flag=is_train, quant_flag=quant, backend=self.backend)

    def run(self, model, batch, *, quantized=True, training=False):
        return v1.Session.run(model.ready(), model.outputs, model.feeds(batch, quantized, training))

    def weights(self, model):
        model.ready()
        return {variable.op.name: v1.Session.run(model, variable) for variable in float_variables(model.graph)}

    def save(self, model, folder):
        with model.ready().graph.as_default():
            return Path(v1.train.Saver().save(model, str(folder / "model")))

    def load(self, model, checkpoint):
        model.started = True
        with model.graph.as_default():
            v1.train.Saver().restore(model, str(checkpoint))

    def load_float(self, model, checkpoint):
        model.started = True
        restore_float_checkpoint(model, checkpoint)

    # ---- what was exported

    def output_names(self, name):
        return ("logits",)

    def run_file(self, file, batch, output_names):
        return run_pb(file.parent, output_names, {"x:0": batch["x"]})

    def read_file(self, file):
        graph_def = v1.GraphDef.FromString(file.read_bytes())
        nodes = frozenset(node.name for node in graph_def.node)
        constants = {
            node.name: tf.make_ndarray(node.attr["value"].tensor) for node in graph_def.node if node.op == "Const"
        }
        both = {spelled: value for name, value in constants.items() for spelled in (name, f"{name}:0")}
        return WrittenGraph(nodes, frozenset(f"{name}:0" for name in nodes) | nodes, both)

    # ---- kernels

    def fake_quantize(self, x, scale, zero_point, grid, axis):
        return kernels(x.shape[1:], x.ndim, axis)("y", x, scale, zero_point, grid)

    def fake_quantize_gradients(self, upstream, x, scale, zero_point, grid, axis):
        dx, dscale = kernels(x.shape[1:], x.ndim, axis)("gradients", x, scale, zero_point, grid, upstream)
        return dx, dscale.reshape(np.shape(scale))

    def weight_scale(self, weight, grid, axis):
        with session() as (sess, _):
            return sess.run(weight_scale(tf.constant(weight), grid, axis))

    def collect(self, batches, channel_axis):
        rank = batches[0].ndim if batches else 2
        return DeviceStatistics.to_core(collector(rank, channel_axis)(*batches))

    def learned_scale(self, scale, gain):
        return learned("y", scale, gain)

    def gain_gradient(self, upstream, scale, gain):
        return learned("gradient", scale, gain, upstream)

    # ---- capabilities

    def train_step(self, model, batch, *, quant_loss=False):
        if quant_loss not in model.steps:
            with model.graph.as_default():
                loss = dopt_api.get_quant_loss(model) if quant_loss else tf.reduce_mean(tf.square(model.outputs[0] - 1))
                model.steps[quant_loss] = loss, v1.train.GradientDescentOptimizer(0.01).minimize(loss)
        return float(v1.Session.run(model.ready(), model.steps[quant_loss], model.feeds(batch, True, True))[0])

    def quant_loss(self, model, batch):
        return float(v1.Session.run(model.ready(), dopt_api.get_quant_loss(model), model.feeds(batch, True, False)))


@cache
def collector(rank, axis):
    """Return what collects statistics of data of a rank, whatever their shape: a graph for each shape takes long."""
    sess = v1.Session(graph=tf.Graph(), config=CONFIG)
    with sess.graph.as_default():
        return Collector(sess, [None] * rank, axis)


def input_of(operation):
    """Return the activation that a layer takes."""
    return operation.inputs[2 if operation.type == "Conv2DBackpropInput" else 0]


def float_layer(values, kernel, axis, bias, norm):
    array = values[kernel]
    if kernel == "conv2/kernel":  # channels and multiplier of a depthwise kernel are one axis
        array = array.reshape(*array.shape[:2], -1)
    folded = None
    if norm is not None:
        gamma, beta, mean, variance = (
            values[f"{norm}/{part}"] for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        folded = BatchNorm(gamma, beta, mean, variance, 1e-3)
    return FloatLayer(array, None if bias is None else values[bias], folded, axis)


@lru_cache(maxsize=256)
def kernels(inner, rank, axis):
    """Return the kernel for data whose shape is known but for the number of samples, as layers have it."""
    graph = tf.Graph()
    with graph.as_default():
        shape = [] if rank == 0 else [None, *inner]
        x, dy = v1.placeholder(tf.float32, shape), v1.placeholder(tf.float32, shape)
        scale = v1.placeholder(tf.float32, [] if axis is None else [None])
        low, high = v1.placeholder(tf.float32, []), v1.placeholder(tf.float32, [])
        step = scale if axis is None else on_weight(scale, rank, Layout(0, 1, axis, 0, 0))
        y = learned_fake_quantize(x, step, low, high)
        fetches = {"y": y, "gradients": tf.gradients(y, [x, scale], dy)}
    sess = v1.Session(graph=graph)

    def run(fetch, data, scales, zero_point, grid, upstream=None):
        zero = int(np.max(zero_point, initial=0)) if axis is not None else int(zero_point)
        given = {x: data, scale: scales, low: grid.qmin - zero, high: grid.qmax - zero}
        return sess.run(fetches[fetch], given if upstream is None else given | {dy: upstream})

    return run


@lru_cache(maxsize=1)
def learned_kernels():
    graph = tf.Graph()
    with graph.as_default():
        scale, gain, dy = (v1.placeholder(tf.float32, None) for _ in range(3))
        y = learned_scale(scale, gain)
        fetches = {"y": y, "gradient": tf.gradients(y, gain, dy)[0]}
    sess = v1.Session(graph=graph)
    return lambda fetch, *given: sess.run(fetches[fetch], dict(zip((scale, gain, dy), given, strict=False)))


def learned(fetch, scale, gain, *upstream):
    return learned_kernels()(fetch, scale, gain, *upstream)
