"""Scripts that know nothing but the vendor's import path, each step a process of its own."""

import json
import subprocess
import sys

import pytest

from dopt_api.params import read_params

MODEL = """
import sys
import numpy as np
import tensorflow.compat.v1 as tf
if {disable}:
    tf.disable_v2_behavior()
from dopt.dopt_tf.opt_main import (
    float_variables, generate_config_file, generate_final_model, get_quant_loss, optimize_model, set_calibrate_state,
)


def conv(x, name, channels, training, depthwise=False):
    with tf.variable_scope(name):
        shape = [3, 3, int(x.shape[-1]), 1 if depthwise else channels]
        kernel = tf.get_variable("kernel", shape, initializer=tf.truncated_normal_initializer(stddev=0.25))
        run = tf.nn.depthwise_conv2d if depthwise else tf.nn.conv2d
        x = run(x, kernel, strides=[1, 1, 1, 1], padding="SAME", name="depthwise" if depthwise else "Conv2D")
        size = [int(x.shape[-1])]
        gamma = tf.get_variable("gamma", size, initializer=tf.ones_initializer())
        beta = tf.get_variable("beta", size, initializer=tf.zeros_initializer())
        mean = tf.get_variable("mean", size, initializer=tf.zeros_initializer(), trainable=False)
        var = tf.get_variable("var", size, initializer=tf.ones_initializer(), trainable=False)
        if not training:
            return tf.nn.relu(tf.nn.fused_batch_norm(x, gamma, beta, mean, var, is_training=False)[0])
        y, m, v = tf.nn.fused_batch_norm(x, gamma, beta, is_training=True)
        for moving, value in ((mean, m), (var, v)):
            tf.add_to_collection(tf.GraphKeys.UPDATE_OPS, tf.assign(moving, 0.8 * moving + 0.2 * value))
        return tf.nn.relu(y)


def build_tf_model(training=False):
    tf.set_random_seed(3)
    x = tf.placeholder(tf.float32, [None, 10, 10, 1], name="x")
    y = conv(x, "first", 8, training)
    y = y + conv(y, "second", 8, training, depthwise=True)
    y = tf.reduce_mean(conv(y, "third", 16, training), axis=[1, 2])
    kernel = tf.get_variable("kernel", [16, 3], initializer=tf.truncated_normal_initializer(stddev=0.25))
    bias = tf.get_variable("bias", [3], initializer=tf.zeros_initializer())
    return x, tf.add(tf.matmul(y, kernel, name="fc"), bias, name="logits")


def data(batches, seed=1):
    numbers = np.random.RandomState(seed)
    for _ in range(batches):
        y = numbers.randint(0, 3, 16)
        x = numbers.standard_normal((16, 10, 10, 1)) + y[:, None, None, None]
        yield x.astype(np.float32), y


def loss_of(logits):
    labels = tf.placeholder(tf.int32, [None])
    return labels, tf.losses.sparse_softmax_cross_entropy(labels, logits)
"""

TRAIN_FLOAT = """
with tf.Session() as sess:
    x, logits = build_tf_model(training=True)
    labels, loss = loss_of(logits)
    with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
        step = tf.train.MomentumOptimizer(0.05, 0.9).minimize(loss)
    sess.run(tf.global_variables_initializer())
    for images, classes in data(60):
        sess.run(step, {x: images, labels: classes})
    tf.train.Saver().save(sess, "./float/model.ckpt")
"""

CONFIG = """
with tf.Session() as sess:
    x, logits = build_tf_model()
    generate_config_file(sess, dst_path="./config_gen.json")
    tf.train.Saver().restore(sess, "./float/model.ckpt")
    np.save("wanted.npy", sess.run(logits, {x: next(data(1, seed=9))[0]}))
"""

PREPARE = """
with tf.Session() as sess:
    x, logits = build_tf_model()
    quant_flag = tf.placeholder(tf.int32)
    is_train_flag = tf.placeholder(tf.bool, name="is_train")
    optimize_model(sess, "config_gen.json", is_train_flag, quant_flag)
    saver = tf.train.Saver(float_variables(sess.graph))
"""

CALIBRATE = (
    PREPARE
    + """
    sess.run(tf.global_variables_initializer())
    saver.restore(sess, "./float/model.ckpt")
    set_calibrate_state(sess, True)
    for images, _ in data(4):
        sess.run(logits, {x: images, quant_flag: 1, is_train_flag: False})
    set_calibrate_state(sess, False)
    tf.train.Saver().save(sess, "./quant/model.ckpt")
"""
)

RETRAIN = (
    PREPARE
    + """
    labels, loss = loss_of(logits)
    total_loss = loss + 0.05 * get_quant_loss(sess)
    step = tf.train.AdamOptimizer(1e-3).minimize(total_loss)
    sess.run(tf.global_variables_initializer())
    saver.restore(sess, "./float/model.ckpt")
    losses = []
    for images, classes in data(60):
        feeds = {x: images, labels: classes, quant_flag: 1, is_train_flag: True}
        losses.append(sess.run([loss, step], feeds)[0])
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10]), losses
    images = next(data(1, seed=9))[0]
    np.save("wanted.npy", sess.run(logits, {x: images, quant_flag: 0, is_train_flag: False}))
    tf.train.Saver().save(sess, "./quant/model.ckpt")
"""
)

EXPORT = """
with tf.Session() as sess:
    build_tf_model()
    generate_final_model(
        sess,
        config_file="config_gen.json",
        output_name_list=["logits"],
        ckpt_file="./quant/model.ckpt",
        output_dir="./",
    )
"""

DEPLOYED = """
import numpy as np
import tensorflow.compat.v1 as tf
graph_def = tf.GraphDef.FromString(open("model.pb", "rb").read())
with tf.Session(graph=tf.Graph()) as sess:
    with sess.graph.as_default():
        tf.import_graph_def(graph_def, name="")
    numbers = np.random.RandomState(9)
    y = numbers.randint(0, 3, 16)
    x = (numbers.standard_normal((16, 10, 10, 1)) + y[:, None, None, None]).astype(np.float32)
    found = sess.run("logits:0", {"x:0": x})
wanted = np.load("wanted.npy")
print(10 * np.log10((wanted**2).sum() / ((found - wanted) ** 2).sum()))
assert not any("dopt" in name for name in __import__("sys").modules)
"""

LAYERS = ["first/Conv2D", "second/depthwise", "third/Conv2D", "fc"]


def run(code, folder):
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module", params=[True, False], ids=["disable_v2_behavior", "v2 behavior"])
def trained(request, tmp_path_factory):
    """A folder with a float checkpoint and a strategy file in which every layer is quantized, and its model's code."""
    model = MODEL.format(disable=request.param)
    if not request.param:
        model = model.replace("\n\ndef conv(", "\ntf.disable_eager_execution()\n\n\ndef conv(", 1)
    folder = tmp_path_factory.mktemp("project")
    for script in (TRAIN_FLOAT, CONFIG):
        done = run(model + script, folder)
        assert done.returncode == 0, done.stderr
    path = folder / "config_gen.json"
    text = path.read_text()
    assert text.count('"float"') == len(LAYERS)
    path.write_text(text.replace('"float"', '"Quant_INT8-8"'))
    return model, folder


@pytest.fixture
def project(trained, tmp_path):
    """A copy of that folder."""
    import shutil

    model, folder = trained
    shutil.copytree(folder, tmp_path / "project")
    return model, tmp_path / "project"


def test_the_strategy_file_has_the_layout_of_the_contract(trained):
    content = json.loads((trained[1] / "config_gen.json").read_text())
    assert content["quant_strategy_for op 'Conv2D'"][0] == "Quant_INT8-8"
    assert content["quant_strategy_for op 'MatMul'"][0] == "Quant_INT8-8"
    assert "input_shape" not in content
    assert list(content["layer_strategy"]) == LAYERS
    assert content["layer_strategy"]["fc"] == {"op_type": "MatMul", "quant_strategy": "Quant_INT8-8"}


@pytest.mark.parametrize("script", [CALIBRATE, RETRAIN], ids=["calibration", "retraining"])
def test_a_vendor_style_script_runs_through_to_a_graph_that_agrees(project, script):
    model, folder = project
    for step in (model + script, model + EXPORT, DEPLOYED):
        done = run(step, folder)
        assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) >= 25  # dB
    assert [layer.name for layer in read_params(folder / "quant_params.json").layers] == LAYERS


def remove_checkpoint(folder):
    for file in (folder / "quant").iterdir():
        file.unlink()


def float_for_quantized(folder):
    remove_checkpoint(folder)
    for file in (folder / "float").iterdir():
        (folder / "quant" / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config_gen.json").unlink(), "cannot be read: No such file"),
        (lambda folder: edit(folder, "Quant_INT8-8", "Quant_INT8-9"), "Did you mean 'Quant_INT8-8'?"),
        (lambda folder: edit(folder, "third/Conv2D", "fourth/Conv2D"), "The model has no layer 'fourth/Conv2D'"),
        (remove_checkpoint, "quant/model.ckpt"),
        (float_for_quantized, "quant/model.ckpt"),
    ],
    ids=["no file", "strategy", "layer", "no checkpoint", "float checkpoint"],
)
def test_a_mistake_ends_the_export_with_one_sentence_and_no_file(project, spoil, message):
    model, folder = project
    done = run(model + CALIBRATE, folder)
    assert done.returncode == 0, done.stderr
    spoil(folder)
    done = run(model + EXPORT, folder)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1] + done.stderr[-600:]
    assert not (folder / "model.pb").exists()
    assert not (folder / "quant_params.json").exists()


def edit(folder, old, new):
    path = folder / "config_gen.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
