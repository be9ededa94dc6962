"""Frozen graphs as ONNX: the same floats, exact integer sums, names and layouts; what does not fit is refused."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import tensorflow as tf
from graphs import images, randomize, run_pb, session, small_net, sqnr, weight

import dopt_api
from dopt_api.errors import FormatError, ParamsError
from dopt_api.formats import convert
from dopt_api.params import read_params
from dopt_api.report import write_report
from dopt_api.verify import verify
from dopt_tf.checkpoint import restore_float_checkpoint
from dopt_tf.onnx_graph import to_onnx

v1 = tf.compat.v1


@pytest.fixture
def exported(tmp_path, config_of):
    """Export a graph with random weights, calibrated on the feeds, and return the folder."""

    def go(build, feeds, outputs, **options):
        with session(build) as (sess, _):
            config = config_of(sess, **options)
            randomize(sess)
            path = v1.train.Saver().save(sess, str(tmp_path / "float"))
        with session(build) as (sess, _):
            dopt_api.optimize(sess, config, is_train_flag=False, quant_flag=1)
            restore_float_checkpoint(sess, path)
            dopt_api.set_calibrate_state(sess, True)
            sess.run([f"{name}:0" for name in outputs], feeds)
            dopt_api.set_calibrate_state(sess, False)
            saved = v1.train.Saver().save(sess, str(tmp_path / "quant"))
        folder = tmp_path / "export"
        folder.mkdir(exist_ok=True)
        with session(build) as (sess, _):
            dopt_api.export(sess, config, saved, folder, output_names=outputs)
        return folder

    return go


def run(file, feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    made = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
    return dict(zip([one.name for one in made.get_outputs()], made.run(None, feeds), strict=True))


def as_onnx(folder):
    file = folder / "model.onnx"
    return file, to_onnx(folder / "model.pb", read_params(folder / "quant_params.json"), file)


def test_a_network_goes_the_whole_way(exported, tmp_path):
    x = images() / 10
    folder = exported(small_net, {"x:0": x}, ["logits"])
    file, params = as_onnx(folder)
    content = onnx.load(str(file))
    onnx.checker.check_model(content)
    nodes = {node.name: node for node in content.graph.node}
    kinds = {layer.name: nodes[layer.node].op_type for layer in params.layers}
    assert kinds == {"conv1/Conv2D": "Conv", "conv2/depthwise": "Conv", "fc/MatMul": "Gemm"}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in content.graph.initializer}
    wanted = [(8, 3, 3, 3), (8, 1, 3, 3), (4, 8)]
    for layer, shape in zip(params.layers, wanted, strict=True):
        assert (shapes[layer.weight.tensor], layer.weight.axis) == (shape, 0)
        assert list(nodes[layer.node].input) == [layer.input.tensor, layer.weight.tensor, layer.bias.tensor]
    assert [value.name for value in content.graph.input] == ["x:0"]
    assert sum(node.op_type == "Transpose" for node in content.graph.node) == 1
    (deployed,) = run_pb(folder, ["logits"], {"x:0": x})
    np.testing.assert_allclose(run(file, {"x:0": x})["logits:0"], deployed, rtol=1e-4, atol=1e-5)

    (integer,) = convert(folder / "quant_params.json", "onnx_qdq", tmp_path)
    assert sqnr(deployed, run(integer, {"x:0": x})["logits:0"]) > 25
    found = verify(folder / "quant_params.json", [{"x:0": x}])
    assert [layer.name for layer in found.layers] == ["conv1/Conv2D", "conv2/depthwise", "fc/MatMul"]
    assert all(layer.off is not None and layer.off <= 1 for layer in found.layers)
    assert found.kernels["QGemm"] == 1
    assert found.sqnr_db > 25
    assert verify(folder / "quant_params.json").layers[0].clipped < 0.01  # made up within the range of the input
    page = write_report(folder).read_text(encoding="utf-8")
    assert "quantized weights" in page
    assert 'data-bins="[]"' not in page


def many_kinds():
    x = v1.placeholder(tf.float32, [None, None, None, 3], name="x")
    y = tf.nn.conv2d(x, weight("e", [3, 3, 3, 3]), 1, "SAME", name="conv")
    y = tf.nn.bias_add(y, weight("e_bias", [3]))
    y = tf.nn.depthwise_conv2d(tf.nn.relu6(y), weight("a", [3, 3, 3, 3]), [1, 2, 2, 1], "SAME", name="depthwise")
    y = tf.nn.bias_add(y, weight("a_bias", [9]))
    shape = tf.stack([tf.shape(y)[0], 12, 12, 5])
    y = tf.nn.conv2d_transpose(tf.nn.relu(y), weight("b", [2, 2, 5, 9]), shape, 3, "SAME", name="transposed")
    y = tf.nn.bias_add(y, weight("bias", [5]))
    y = tf.identity(tf.reduce_mean(y, [1, 2]), name="features")
    y = tf.matmul(y, weight("c", [6, 5]), transpose_b=True, name="matmul")
    tf.transpose(tf.matmul(weight("d", [4, 6]), y, transpose_b=True, name="first"), name="y")


def test_layers_of_many_kinds_compute_the_same(exported):
    x = images()[:, :8, :8]
    folder = exported(many_kinds, {"x:0": x}, ["y", "features"])
    file, params = as_onnx(folder)
    deployed = run_pb(folder, ["y", "features"], {"x:0": x})
    found = run(file, {"x:0": x})
    for name, wanted in zip(("y:0", "features:0"), deployed, strict=True):
        np.testing.assert_allclose(found[name], wanted, rtol=1e-3, atol=1e-4)
    assert [(layer.name, layer.weight.axis, len(layer.weight.scale)) for layer in params.layers] == [
        ("conv", 0, 3),
        ("depthwise", 0, 9),
        ("transposed", 1, 5),
        ("matmul", 1, 6),
        ("first", 1, 4),
    ]
    verified = verify(folder / "quant_params.json", [{"x:0": x}])
    assert verified.kernels["QLinearConv"] == 2  # relu6 goes into the grid of what reads it
    checks = {layer.name: layer for layer in verified.layers}
    assert checks.pop("transposed").off is None
    assert checks.pop("depthwise").off is None  # the sizes of its data are open
    assert all(layer.off is not None and layer.off <= 1 for layer in checks.values())


def test_equal_conversions_are_equal_bytes_in_other_processes_too(exported):
    folder = exported(many_kinds, {"x:0": images()[:, :8, :8]}, ["y"])
    file, first = as_onnx(folder)
    content = file.read_bytes()
    assert as_onnx(folder)[1] == first
    assert file.read_bytes() == content
    code = (
        "import sys, pathlib, dopt_api.params as params, dopt_tf.onnx_graph as graph\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "found = params.read_params(folder / 'quant_params.json')\n"
        "graph.to_onnx(folder / 'model.pb', found, folder / 'model.onnx')\n"
    )
    file.unlink()
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env={**os.environ, "PYTHONHASHSEED": "3"})
    assert file.read_bytes() == content


def test_recorded_outputs_are_quantized_where_they_were_recorded(exported, tmp_path):
    x = images()
    folder = exported(small_net, {"x:0": x}, ["logits"], only=["conv1/Conv2D", "conv2/depthwise"], output=True)
    given = read_params(folder / "quant_params.json").layers
    file, params = as_onnx(folder)
    edges = {edge: node for node in onnx.load(str(file)).graph.node for edge in node.output}
    made = [edges[layer.output.tensor] for layer in params.layers]
    assert [node.op_type for node in made] == ["Relu", "Relu"]
    assert [layer.output.scale for layer in params.layers] == [layer.output.scale for layer in given]
    verified = verify(folder / "quant_params.json", [{"x:0": x}])
    assert verified.kernels["QLinearConv"] == 2  # the residual sum reads both
    assert verified.sqnr_db > 25


@pytest.mark.parametrize("strategy", ["Quant_INT16-8", "Quant_FLOAT-8"])
def test_other_strategies(exported, tmp_path, strategy):
    x = images()
    folder = exported(small_net, {"x:0": x}, ["logits"], strategy=strategy)
    (deployed,) = run_pb(folder, ["logits"], {"x:0": x})
    (integer,) = convert(folder / "quant_params.json", "onnx_qdq", tmp_path)
    assert sqnr(deployed, run(integer, {"x:0": x})["logits:0"]) > 40


def test_encodings_come_with_the_graph_that_they_speak_of(exported, tmp_path):
    folder = exported(small_net, {"x:0": images()}, ["logits"])
    (tmp_path / "aimet").mkdir()
    made = convert(folder / "quant_params.json", "aimet_encodings", tmp_path / "aimet")
    assert [file.name for file in made] == ["model.encodings", "model.onnx"]
    graph = onnx.load(str(made[1])).graph
    edges = {name for node in graph.node for name in node.input}
    entries = json.loads(made[0].read_text())["encodings"]
    assert len(entries) == 6
    assert {entry["name"] for entry in entries} <= edges
    assert [file.name for file in convert(folder / "quant_params.json", "safetensors", folder)] == ["model.safetensors"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def changed(request, kept, tmp_path):
    """Return a function that changes the exported files of the small network and returns the parameter file."""
    if not list(kept.iterdir()):
        made = request.getfixturevalue("exported")(small_net, {"x:0": images()}, ["logits"])
        shutil.copytree(made, kept, dirs_exist_ok=True)
    folder = shutil.copytree(kept, tmp_path / "changed")

    def change(params=None, graph=None):
        file, model = folder / "quant_params.json", folder / "model.pb"
        content, nodes = json.loads(file.read_text()), v1.GraphDef.FromString(model.read_bytes())
        if params is not None:
            params(content["layers"])
        if graph is not None:
            model.write_bytes(graph(nodes))
        file.write_text(json.dumps(content))
        return file

    return change


def without(name):
    def graph(content):
        kept = [node for node in content.node if node.name != name]
        return v1.GraphDef(versions=content.versions, node=kept).SerializeToString()

    return graph


def with_values(content):
    (node,) = [node for node in content.node if node.name == "conv1/Conv2D/weight"]
    values = tf.make_ndarray(node.attr["value"].tensor) * np.float32(1.003)
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(values))
    return content.SerializeToString()


def of_float64(content):
    for node in content.node:
        if node.name == "conv1/Conv2D":
            node.attr["T"].type = tf.float64.as_datatype_enum
    return content.SerializeToString()


def unknown_operation(content):
    content.node.add(name="strange", op="Betainc", input=["logits"] * 3).attr["T"].type = 1
    return content.SerializeToString()


@pytest.mark.parametrize(
    ("params", "graph", "error", "message"),
    [
        (None, lambda _: b"no graph", FormatError, "'model.pb' cannot be read"),
        (None, lambda _: b"", FormatError, "'model.pb' cannot be read: it has no nodes"),
        (None, without("conv1/Conv2D"), ParamsError, "no Conv2D 'conv1/Conv2D'"),
        (None, with_values, ParamsError, "'conv1/Conv2D/weight:0' are not on the layer's grid.*layer 'conv1/Conv2D'"),
        (None, of_float64, FormatError, "'conv1/Conv2D' computes in float64"),
        (None, unknown_operation, FormatError, "ONNX has no Betainc"),
        (None, without("Relu"), FormatError, "cannot be converted"),
        (None, without("conv1/Conv2D/weight"), ParamsError, "no weight 'conv1/Conv2D/weight:0'"),
        (lambda layers: layers[0].update(node="fc/MatMul"), None, ParamsError, "no Conv2D 'fc/MatMul'"),
        (lambda layers: layers[1]["weight"].update(tensor="a:0"), None, ParamsError, "no weight 'a:0'.*conv2/depth"),
        (lambda layers: layers[1]["input"].update(tensor="a:0"), None, ParamsError, "no input 'a:0'.*conv2/depth"),
        (lambda layers: layers[2]["bias"].update(tensor="a:0"), None, ParamsError, "no bias 'a:0'.*fc/MatMul"),
        (lambda layers: layers[2]["weight"].update(axis=0), None, ParamsError, "does not fit 4 scales.*fc/MatMul"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changed, tmp_path, params, graph, error, message):
    file = changed(params, graph)
    (tmp_path / "made").mkdir()
    with pytest.raises(error) as caught:
        convert(file, "onnx_qdq", tmp_path / "made")
    assert re.search(message, str(caught.value)), str(caught.value)
    assert not list((tmp_path / "made").iterdir())
