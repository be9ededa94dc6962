"""A trained TF1 checkpoint with its own training graph, as people have them, through the session calls."""

import json
import shutil
from importlib import metadata

import numpy as np
import pytest
import tensorflow as tf
from graphs import run_pb, session, sqnr

import dopt_api
from dopt.dopt_tf.opt_main import (
    generate_config_file,
    generate_final_model,
    optimize_model,
    restore_float_checkpoint,
    set_calibrate_state,
)
from dopt_api.params import read_params
from dopt_api.verify import verify

v1 = tf.compat.v1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the path of a checkpoint of the package, and its training graph."""
    folder = tmp_path_factory.mktemp("musicnn")
    for file in metadata.files("musicnn") or []:
        if "MTT_musicnn/." in str(file):
            shutil.copy(file.locate(), folder / f"model{file.name}")
    graph = v1.MetaGraphDef.FromString((folder / "model.meta").read_bytes()).graph_def
    for node in graph.node:
        node.attr.pop("_output_shapes", None)  # too new TensorFlows misread them
    return str(folder / "model"), graph


def outputs_of(graph):
    return [node.name for node in graph.node if node.op == "Sigmoid" and "gradients" not in node.name]


def test_the_training_graph_itself_lists_its_layers(trained, tmp_path):
    _, graph = trained
    with session(lambda: tf.import_graph_def(graph, name="")) as (sess, _):
        path = generate_config_file(sess, tmp_path / "config.json")
    layers = json.loads(path.read_text())["layer_strategy"]
    assert len(layers) == 10
    assert not any("gradients" in name for name in layers)
    assert {entry["op_type"] for entry in layers.values()} == {"Conv2D", "MatMul"}


def test_the_whole_way(trained, tmp_path):
    checkpoint, graph = trained
    names = outputs_of(graph)
    assert len(names) == 1
    inference = v1.graph_util.extract_sub_graph(graph, names)
    reader = tf.train.load_checkpoint(checkpoint)
    known = reader.get_variable_to_shape_map()

    def build():
        tf.import_graph_def(inference, name="")
        current = tf.compat.v1.get_default_graph()
        for node in inference.node:  # an imported graph has no variables in its collections
            if node.op in ("VariableV2", "VarHandleOp"):
                assert node.name in known
        flag = next(n.name for n in inference.node if n.op.startswith("Placeholder") and n.attr["dtype"].type == 10)
        x = next(n.name for n in inference.node if n.op == "Placeholder" and n.attr["dtype"].type == 1)
        return [current.get_tensor_by_name(f"{name}:0") for name in (x, flag, names[0])]

    def restore(sess):
        for node in inference.node:
            if node.op == "VariableV2":
                variable = sess.graph.get_tensor_by_name(f"{node.name}:0")
                value = v1.placeholder(variable.dtype.base_dtype)
                sess.run(tf.raw_ops.Assign(ref=variable, value=value).op, {value: reader.get_tensor(node.name)})

    x = np.random.default_rng(0).uniform(0, 3, (4, 187, 96)).astype(np.float32)
    with session(build) as (sess, (given, flag, y)):
        config = generate_config_file(sess, tmp_path / "config.json")
        restore(sess)
        wanted = sess.run(y, {given: x, flag: False})
    content = json.loads(config.read_text())
    for entry in content["layer_strategy"].values():
        entry["quant_strategy"] = "Quant_INT8-8"
    config.write_text(json.dumps(content))
    with session(build) as (sess, (given, flag, y)):
        quant = v1.placeholder(tf.int32, [])
        optimize_model(sess, config, flag, quant)
        restore(sess)
        restore_float_checkpoint(sess, checkpoint)
        feeds = {given: x, flag: False, quant: 0}
        np.testing.assert_array_equal(sess.run(y, feeds), wanted)
        feeds[quant] = 1
        set_calibrate_state(sess, True)
        sess.run(y, feeds)
        set_calibrate_state(sess, False)
        assert sqnr(wanted, sess.run(y, feeds)) > 15
        own = {n.name: sess.graph.get_tensor_by_name(f"{n.name}:0") for n in inference.node if n.op == "VariableV2"}
        saver = v1.train.Saver({**own, **{v.op.name: v for v in v1.global_variables()}})
        saved = saver.save(sess, str(tmp_path / "quant"))
    with session(build) as (sess, _):
        result = generate_final_model(sess, config, names, saved, tmp_path)
    assert [layer.name for layer in read_params(result.params).layers] == list(content["layer_strategy"])
    (found,) = run_pb(tmp_path, names, {given.name: x})
    assert sqnr(wanted, found) > 20
    checked = verify(result.params, [{given.name: x}])
    assert all(layer.off is not None and layer.off <= 2 for layer in checked.layers)
    assert checked.sqnr_db > 30
    assert dopt_api.backends()
