"""The format ``onnx_qdq``: what ONNX Runtime computes is the reference's numbers, and nothing foreign is taken."""

import json

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from quantized_chain import convolve, edit, linear, network, run

from dopt_api.errors import DoptError, ExtensionError, FormatError, OutputError, ParamsError
from dopt_api.formats import convert, format_names, get_format
from dopt_api.formats.writers import FORMATS
from dopt_api.params import QuantParams, render_params
from dopt_api.quantizer import fake_quantize
from dopt_api.strategy import INTEGER_STRATEGIES, STRATEGIES


@given(
    seed=st.integers(0, 2**32 - 1),
    weights=st.sampled_from(["Quant_INT8-8", "Quant_INT8-7", "Quant_INT8-4"]),
    bias=st.booleans(),
)
def test_the_file_computes_what_the_reference_does(tmp_path_factory, seed, weights, bias):
    folder = tmp_path_factory.mktemp("qdq")
    ((weight, biases, scale, zero_point, grid),) = network(folder, [weights], seed, bias)
    (file,) = convert(folder / "quant_params.json", "onnx_qdq", folder)
    x = np.random.default_rng(seed).standard_normal((2, 3, 6, 6)).astype(np.float32)
    wanted = convolve(fake_quantize(x, scale, zero_point, grid), weight, biases)
    np.testing.assert_allclose(run(file, x), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_a_chain_has_integers_inside_and_runs_with_all_optimizations(tmp_path):
    facts = network(tmp_path)
    files = convert(tmp_path / "quant_params.json", "onnx_qdq", tmp_path)
    assert files == [tmp_path / "model.qdq.onnx"]
    graph = onnx.load(str(files[0])).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert kinds["w0/dopt/integers"] == kinds["w1/dopt/integers"] == TensorProto.INT8
    assert kinds["b0/dopt/integers"] == TensorProto.INT32
    assert not {"w0", "w1", "b0", "b1"} & kinds.keys()
    x = np.random.default_rng(1).standard_normal((2, 3, 6, 6)).astype(np.float32)
    wanted = x
    for weight, biases, scale, zero_point, grid in facts:
        wanted = convolve(fake_quantize(wanted, scale, zero_point, grid), weight, biases)
    step = float(facts[1][2])
    assert np.abs(run(files[0], x) - wanted).max() < 40 * step  # a rounding the other way in the second input
    assert np.isfinite(run(files[0], x, optimized=True)).all()


def test_sixteen_bits_and_calls_that_share_an_edge(tmp_path):
    ((weight, biases, scale, zero_point, grid),) = network(tmp_path, ["Quant_INT16-8"])
    model = onnx.load(str(tmp_path / "model.onnx"))
    again = helper.make_node("Conv", ["x0", "w0", "b0"], ["y"], name="again", pads=[1, 1, 1, 1])
    model.graph.node.append(again)
    model.graph.output.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 4, None, None]))
    onnx.save(model, str(tmp_path / "model.onnx"))
    content = json.loads((tmp_path / "quant_params.json").read_text())
    content["layers"][0]["other_calls"] = [["again", "x0"]]
    (tmp_path / "quant_params.json").write_text(json.dumps(content))
    (file,) = convert(tmp_path / "quant_params.json", "onnx_qdq", tmp_path)
    assert [node.op_type for node in onnx.load(str(file)).graph.node].count("QuantizeLinear") == 1
    x = np.random.default_rng(1).standard_normal((1, 3, 6, 6)).astype(np.float32)
    wanted = convolve(fake_quantize(x, scale, zero_point, grid), weight, biases)
    np.testing.assert_allclose(run(file, x), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def padded(folder, amounts, **options):
    """Let a node pad before the first convolution, by amounts that other nodes put together."""
    model = onnx.load(str(folder / "model.onnx"))
    value = options.pop("value", None)
    halves = [
        numpy_helper.from_array(np.asarray(half, np.int64), name) for half, name in zip(amounts, "ab", strict=True)
    ]
    if value is not None:
        halves.append(numpy_helper.from_array(np.float32(value), "v"))
    model.graph.initializer.extend(halves)
    given = ["x0", "amounts", *(["v"] if value is not None else [])]
    nodes = [
        helper.make_node("Concat", ["a", "b"], ["amounts"], axis=0),
        helper.make_node("Pad", given, ["padded"], **options),
    ]
    model.graph.node[0].input[0] = "padded"
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    onnx.save(model, str(folder / "model.onnx"))
    edit(folder, lambda layer: layer["input"].update(tensor="padded"))


@pytest.mark.parametrize("value", [None, 0.0])
def test_a_convolution_takes_over_the_zeros_that_a_node_put_around(tmp_path, value):
    ((weight, biases, scale, zero_point, grid),) = network(tmp_path, ["Quant_INT8-8"])
    padded(tmp_path, [[0, 0, 0, 1], [0, 0, 2, 1]], value=value)
    (file,) = convert(tmp_path / "quant_params.json", "onnx_qdq", tmp_path)
    kinds = [node.op_type for node in onnx.load(str(file)).graph.node]
    assert sorted(kinds) == ["Conv", "DequantizeLinear", "DequantizeLinear", "DequantizeLinear", "QuantizeLinear"]
    x = np.random.default_rng(1).standard_normal((1, 3, 4, 4)).astype(np.float32)
    wide = np.pad(fake_quantize(x, scale, zero_point, grid), ((0, 0), (0, 0), (0, 2), (1, 1)))
    wanted = convolve(wide, weight, biases)
    np.testing.assert_allclose(run(file, x), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("amounts", "options"),
    [
        ([[0, 0, 1, 1], [0, 0, 1, 1]], {"value": 0.5}),
        ([[0, 0, 1, 1], [0, 0, 1, 1]], {"mode": "reflect"}),
        ([[0, 0, -1, 1], [0, 0, 1, 1]], {}),
        ([[1, 0, 1, 1], [0, 0, 1, 1]], {}),
    ],
)
def test_other_padding_stays(tmp_path, amounts, options):
    network(tmp_path, ["Quant_INT8-8"])
    padded(tmp_path, amounts, **options)
    (file,) = convert(tmp_path / "quant_params.json", "onnx_qdq", tmp_path)
    assert "Pad" in [node.op_type for node in onnx.load(str(file)).graph.node]
    x = np.random.default_rng(1).standard_normal((1, 3, 5, 5)).astype(np.float32)
    exact = run(tmp_path / "model.onnx", x)
    assert np.abs(run(file, x) - exact).max() < 0.5 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda layer: layer.update(node="conv9"), "there is no node 'conv9'"),
        (lambda layer: layer["input"].update(tensor="x9"), "there is no input 'x9' of the node 'conv0'"),
        (lambda layer: layer["weight"].update(tensor="w9"), "there is no initializer 'w9'"),
        (lambda layer: layer["weight"].update(axis=1), "does not fit 4 scales"),
        (lambda layer: layer["weight"].update(scale=[0.0033, 0.004, 0.005, 0.006]), "not on the layer's grid"),
        (
            lambda layer: layer["weight"].update(scale=[s * 1.01 for s in layer["weight"]["scale"]]),
            "not on the layer's",
        ),
        (lambda layer: layer["weight"].update(bits=4, dtype="int4"), "not on the layer's grid"),
    ],
)
def test_parameters_of_another_model_are_refused(tmp_path, change, what):
    network(tmp_path)
    edit(tmp_path, change)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ParamsError, match=what) as caught:
        convert(tmp_path / "quant_params.json", "onnx_qdq", tmp_path)
    assert "layer 'layer0'" in caught.value.where
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_cannot_be_written_is_said(tmp_path):
    network(tmp_path, ["Quant_INT4-4"])
    file = tmp_path / "quant_params.json"
    with pytest.raises(FormatError, match="no activations of 4 bits"):
        convert(file, "onnx_qdq", tmp_path)
    with pytest.raises(FormatError, match="Did you mean 'onnx_qdq'"):
        convert(file, "onnx-qdq", tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        convert(file, "onnx_qdq", tmp_path / "nowhere")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x08no model")
    with pytest.raises(DoptError, match=r"cannot be read|not that of the model"):
        convert(file, "onnx_qdq", tmp_path)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(FormatError, match="not beside its parameter file"):
        convert(file, "onnx_qdq", tmp_path)
    (tmp_path / "model.other").write_bytes(b"")
    file.write_text(render_params(QuantParams("model.other", ())))
    with pytest.raises(FormatError, match=r"no way from 'model\.other' to ONNX"):
        convert(file, "onnx_qdq", tmp_path)
    with pytest.raises(FormatError, match="is not an ONNX model"):
        get_format("onnx_qdq")(tmp_path / "model.other", QuantParams("model.other", ()), tmp_path)


def test_the_table_has_every_scale(tmp_path):
    network(tmp_path)
    (file,) = convert(tmp_path / "quant_params.json", "csv", tmp_path)
    rows = file.read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + 2 * (1 + 4 + 4)
    layer = json.loads((tmp_path / "quant_params.json").read_text())["layers"][0]
    assert rows[1].split(",")[3:] == [
        "input",
        "x0",
        "",
        "uint8",
        str(np.float32(layer["input"]["scale"][0])),
        str(layer["input"]["zero_point"][0]),
    ]


def test_a_package_that_is_missing_is_named(monkeypatch):
    assert set(format_names()) >= {"onnx_qdq", "csv"}
    monkeypatch.setitem(FORMATS, "onnx_qdq", "no_such_package.format")
    with pytest.raises(FormatError, match="needs the package 'no_such_package'"):
        get_format("onnx_qdq")


def test_another_distribution_adds_a_format(tmp_path, monkeypatch):
    site = tmp_path / "site"
    info = site / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dopt.formats]\nnames = mine_format:write\nnumber = mine_format:NUMBER\n")
    (site / "mine_format.py").write_text(
        "NUMBER = 3\n"
        "def write(model, params, folder):\n"
        "    (folder / 'names.txt').write_text(model.name + ' ' + ' '.join(one.name for one in params.layers))\n"
    )
    monkeypatch.syspath_prepend(site)
    network(tmp_path)
    found = [name for name in format_names() if name != "litert"]  # which the TensorFlow backend may have added
    assert found == [*FORMATS, "names", "number"]
    (file,) = convert(tmp_path / "quant_params.json", "names", tmp_path)
    assert file.read_text() == "model.onnx layer0 layer1"
    with pytest.raises(ExtensionError, match="'number' is 3"):
        convert(tmp_path / "quant_params.json", "number", tmp_path)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in INTEGER_STRATEGIES])
def test_weights_alone_are_stored_as_integers_and_computed_as_they_were(tmp_path, strategy, transposed):
    layer = linear(tmp_path, strategy, transposed)
    (file,) = convert(tmp_path / "quant_params.json", "onnx_qdq", tmp_path)
    content = onnx.load(str(file)).graph
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in content.initializer}
    wanted = layer.integers if transposed or layer.plan.strategy.weight.group else layer.integers.T
    assert stored["w/dopt/integers"].reshape(wanted.shape).tolist() == wanted.tolist()
    assert stored["w/dopt/integers"].dtype == (np.int8 if layer.plan.strategy.weight.symmetric else np.uint8)
    assert "QuantizeLinear" not in {node.op_type for node in content.node}
    assert stored["b"].tobytes() == layer.bias.tobytes()
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    for optimized in (False, True):
        np.testing.assert_allclose(run(file, x, optimized), x @ layer.weight.T + layer.bias, rtol=1e-4, atol=1e-4)


def test_groups_that_are_not_those_of_the_model_are_refused(tmp_path):
    linear(tmp_path, "Quant_FLOAT-4A-G32", True)
    for change in (
        lambda layer: layer["weight"].update(group=24),
        lambda layer: layer["weight"].update(group=64),
        lambda layer: layer["weight"]["zero_point"].__setitem__(0, 3 + layer["weight"]["zero_point"][0]),
    ):
        text = (tmp_path / "quant_params.json").read_text()
        edit(tmp_path, change)
        with pytest.raises(ParamsError, match=r"does not fit 12 scales|not on the layer's grid"):
            convert(tmp_path / "quant_params.json", "onnx_qdq", tmp_path)
        (tmp_path / "quant_params.json").write_text(text)
