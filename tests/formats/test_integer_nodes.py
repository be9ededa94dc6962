"""Recorded outputs in the integer form, and which nodes run in integers: what is said is what ONNX Runtime does."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from quantized_chain import convolve, network, run

from dopt_api.errors import ParamsError
from dopt_api.formats import convert
from dopt_api.formats.integer_nodes import integer_nodes, summary
from dopt_api.params import QuantParams, TensorParams, read_params, render_params
from dopt_api.quantizer import Grid, dequantize, quantize


def recorded(folder: Path, *layers: int, edge: str = "", scale: float = 0.75, zero_point: int = 128) -> None:
    """Let layers of a parameter file have an output on a grid."""
    file = folder / "quant_params.json"
    params = read_params(file)
    entries = [
        replace(layer, output=TensorParams(edge or f"x{number + 1}", "uint8", 8, (scale,), (zero_point,), None))
        if number in layers
        else layer
        for number, layer in enumerate(params.layers)
    ]
    file.write_text(render_params(QuantParams(params.model, tuple(entries))))


def residual(folder: Path, rectifier: str = "") -> None:
    """Make of a chain of two convolutions the sum of both: x2 = conv(x1) + x1, and of x1 what a rectifier makes."""
    network(folder)
    model = onnx.load(str(folder / "model.onnx"))
    first, second = model.graph.node
    second.output[0] = "after"
    nodes = [first, second, helper.make_node("Add", ["after", "x1"], ["x2"], name="sum")]
    if rectifier:
        first.output[0] = "before"
        nodes.insert(1, helper.make_node(rectifier, ["before"], ["x1"], name="rectifier"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, str(folder / "model.onnx"))


def fused(file: Path, folder: Path) -> Counter:
    """Return how many nodes of each operator ONNX Runtime makes of a model."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(str(folder / "optimized.onnx")).graph.node)


def said(folder: Path) -> dict[str, tuple[bool, str]]:
    return {kind.node: (kind.integer, kind.reason) for kind in integer_nodes(folder / "quant_params.json")}


X = np.random.default_rng(1).uniform(-1, 1, (2, 3, 8, 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("layers", "rectifier", "convolutions"), [((), "", 0), ((0,), "", 1), ((0, 1), "", 2), ((0, 1), "Relu", 2)]
)
def test_what_is_said_is_what_runs(tmp_path, layers, rectifier, convolutions):
    residual(tmp_path, rectifier)
    for layer in layers:
        edge = "after" if layer else "x1"
        recorded(tmp_path, layer, edge=edge, zero_point=0 if rectifier and not layer else 128)
    (file,) = convert(tmp_path / "quant_params.json", "onnx_qdq", tmp_path)
    kinds = integer_nodes(tmp_path / "quant_params.json")
    assert sum(kind.integer for kind in kinds if kind.op_type == "Conv") == convolutions
    assert fused(file, tmp_path)["QLinearConv"] == convolutions
    assert summary(kinds) == f"{convolutions} of 2 nodes that multiply run in integers"


def test_reasons_name_the_reader_and_the_remedy(tmp_path):
    residual(tmp_path)
    found = said(tmp_path)
    assert found["conv0"][1].startswith("its output goes to Add 'sum', where no layer records it: set \"output\": true")
    assert found["conv1"][1].startswith("its output goes to Add 'sum'")
    assert "comes from Conv 'conv1'" in found["sum"][1]
    recorded(tmp_path, 0)
    assert said(tmp_path)["conv0"] == (True, "")


def test_a_rectifier_that_its_grid_does_not_imply_keeps_the_layer_in_float(tmp_path):
    residual(tmp_path, "Relu")
    recorded(tmp_path, 0, zero_point=9)
    assert "Relu 'rectifier' behind it does not follow" in said(tmp_path)["conv0"][1]
    (file,) = convert(tmp_path / "quant_params.json", "onnx_qdq", tmp_path)
    assert fused(file, tmp_path)["QLinearConv"] == 0


def test_float_layers_and_weights_alone_say_so(tmp_path):
    network(tmp_path)
    file = tmp_path / "quant_params.json"
    params = read_params(file)
    file.write_text(render_params(QuantParams(params.model, params.layers[:1])))
    assert "left float by the file" in said(tmp_path)["conv1"][1]
    alone = replace(
        params.layers[0],
        strategy="Quant_FLOAT-8",
        input=TensorParams("x0", "float32", 32, (), (), None),
        bias=None,
    )
    file.write_text(render_params(QuantParams(params.model, (alone,))))
    assert said(tmp_path)["conv0"][1] == "its strategy Quant_FLOAT-8 quantizes weights alone"


def test_the_output_of_the_network_is_what_was_quantized(tmp_path):
    facts = network(tmp_path, ["Quant_INT8-8"])
    assert "is the network's output 'x1'" in said(tmp_path)["conv0"][1]
    recorded(tmp_path, 0)
    (file,) = convert(tmp_path / "quant_params.json", "onnx_qdq", tmp_path)
    assert said(tmp_path)["conv0"] == (True, "")
    assert fused(file, tmp_path)["QLinearConv"] == 1
    weight, bias, scale, zero_point, grid = facts[0]
    x = dequantize(quantize(X, scale, zero_point, grid), scale, zero_point)
    y = convolve(x, weight, bias).astype(np.float32)
    wanted = dequantize(quantize(y, np.float32(0.75), 128, Grid(8)), np.float32(0.75), 128)
    assert [output.name for output in onnx.load(str(file)).graph.output] == ["x1"]
    assert np.mean(np.abs(run(file, X) - wanted) > 0.01) < 1e-3


def test_equal_grids_are_one_pair_and_others_follow_one_another(tmp_path):
    network(tmp_path)
    grid = read_params(tmp_path / "quant_params.json").layers[1].input
    recorded(tmp_path, 0, scale=grid.scale[0], zero_point=grid.zero_point[0])
    (file,) = convert(tmp_path / "quant_params.json", "onnx_qdq", tmp_path)
    assert Counter(node.op_type for node in onnx.load(str(file)).graph.node)["QuantizeLinear"] == 2
    recorded(tmp_path, 0, scale=grid.scale[0] * 2)
    (file,) = convert(tmp_path / "quant_params.json", "onnx_qdq", tmp_path)
    nodes = onnx.load(str(file)).graph.node
    readers = [node for node in nodes if "x1" in node.input]
    assert [node.op_type for node in readers] == ["QuantizeLinear"]
    assert sum(node.op_type == "QuantizeLinear" for node in nodes) == 3
    assert np.isfinite(run(file, X)).all()


def test_an_output_of_another_model_is_refused(tmp_path):
    network(tmp_path)
    recorded(tmp_path, 0, edge="nowhere")
    with pytest.raises(ParamsError, match="there is no edge 'nowhere'"):
        convert(tmp_path / "quant_params.json", "onnx_qdq", tmp_path)


def test_other_formats_have_the_output(tmp_path):
    network(tmp_path, ["Quant_INT8-8"])
    recorded(tmp_path, 0)
    (table,) = convert(tmp_path / "quant_params.json", "csv", tmp_path)
    assert "layer0,Conv,Quant_INT8-8,output,x1,,uint8,0.75,128" in table.read_text().splitlines()
    (encodings,) = convert(tmp_path / "quant_params.json", "aimet_encodings", tmp_path)
    assert '"name": "x1"' in encodings.read_text()


def test_pooling_of_quantized_data_is_told_from_pooling_of_floats(tmp_path):
    network(tmp_path)
    model = onnx.load(str(tmp_path / "model.onnx"))
    first, second = model.graph.node
    first.output[0] = "before"
    pool = helper.make_node("GlobalAveragePool", ["before"], ["x1"], name="pool")
    del model.graph.node[:]
    model.graph.node.extend([first, pool, second])
    onnx.save(model, str(tmp_path / "model.onnx"))
    assert said(tmp_path)["pool"][0] is False
    recorded(tmp_path, 0, edge="before")
    assert said(tmp_path) == {"conv0": (True, ""), "pool": (True, ""), "conv1": said(tmp_path)["conv1"]}
    (file,) = convert(tmp_path / "quant_params.json", "onnx_qdq", tmp_path)
    assert fused(file, tmp_path)["QLinearGlobalAveragePool"] == 1


@pytest.mark.parametrize("passing", [True, False])
def test_quantization_passes_what_changes_no_number(tmp_path, passing):
    network(tmp_path)
    model = onnx.load(str(tmp_path / "model.onnx"))
    first, second = model.graph.node
    first.output[0] = "before"
    options = {"perm": [0, 1, 3, 2]} if passing else {}
    between = helper.make_node("Transpose" if passing else "Sin", ["before"], ["x1"], name="between", **options)
    del model.graph.node[:]
    model.graph.node.extend([first, between, second])
    onnx.save(model, str(tmp_path / "model.onnx"))
    assert said(tmp_path)["conv0"][0] is passing
    (file,) = convert(tmp_path / "quant_params.json", "onnx_qdq", tmp_path)
    assert fused(file, tmp_path)["QLinearConv"] == int(passing)
