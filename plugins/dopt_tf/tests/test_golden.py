"""The golden cases of the core, the whole way: the same parameter file to the byte, names aside."""

import numpy as np
import tensorflow as tf
from cases import FILE, cases, named_alike, reference, render
from graphs import session, weight

import dopt_api
from dopt_api.params import read_params

v1 = tf.compat.v1
TO_LAYOUT = {
    "conv": (2, 3, 1, 0),
    "depthwise": (2, 3, 0, 1),
    "transposed": (2, 3, 1, 0),
    "conv3d": (2, 3, 4, 1, 0),
    "linear": (1, 0),
}


def channels_last(batch):
    return np.ascontiguousarray(np.moveaxis(batch, 1, -1))


def build(case):
    x = v1.placeholder(tf.float32, [None, *channels_last(case.batches[0]).shape[1:]], name="x")
    value = np.ascontiguousarray(case.weight.transpose(TO_LAYOUT[case.kind]))
    kernel = weight("kernel", value.shape, initializer=v1.constant_initializer(value))
    channels = case.weight.shape[case.axis]
    if case.kind == "transposed":
        n, height, width = tf.shape(x)[0], x.shape[1] + 1, x.shape[2] + 1
        y = tf.nn.conv2d_transpose(x, kernel, tf.stack([n, height, width, channels]), 1, "VALID")
    elif case.kind == "depthwise":
        y = tf.nn.depthwise_conv2d(x, kernel, [1, 1, 1, 1], "VALID")
    elif case.kind == "conv3d":
        y = tf.nn.conv3d(x, kernel, [1, 1, 1, 1, 1], "VALID")
    elif case.kind == "conv":
        y = tf.nn.conv2d(x, kernel, 1, "VALID")
    else:
        y = tf.matmul(x, kernel)
    y = tf.ensure_shape(y, [*[None] * (y.shape.rank - 1), channels])  # conv2d_transpose does not know it
    if case.bias is not None:
        y = tf.nn.bias_add(y, weight("bias", [channels], initializer=v1.constant_initializer(case.bias)))
    if case.norm is not None:
        parts = [getattr(case.norm, part) for part in ("gamma", "beta", "mean", "variance")]
        given = [weight(f"part{i}", [channels], initializer=v1.constant_initializer(p)) for i, p in enumerate(parts)]
        y = v1.nn.fused_batch_norm(y, *given, epsilon=case.norm.epsilon, is_training=False)[0]
    return x, tf.identity(y, name="y")


def test_the_golden_file_is_reproduced_to_the_byte(tmp_path, config_of):
    layers = []
    for case in cases():
        with session(lambda case=case: build(case)) as (sess, _):
            config = config_of(sess, range=case.range_method)
        with session(lambda case=case: build(case)) as (sess, (x, y)):
            dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)
            sess.run(v1.global_variables_initializer())
            dopt_api.set_calibrate_state(sess, True)
            for batch in case.batches:
                sess.run(y, {x: channels_last(batch)})
            dopt_api.set_calibrate_state(sess, False)
            saved = v1.train.Saver().save(sess, str(tmp_path / "quant"))
        with session(lambda case=case: build(case)) as (sess, _):
            result = dopt_api.export(sess, config, saved, tmp_path, output_names=["y"])
        (found,) = read_params(result.params).layers
        layers.append(named_alike(found, reference(case)))
    assert render(layers) == FILE.read_text(encoding="utf-8")
