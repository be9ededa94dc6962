"""The format ``litert``: what the file holds, what the interpreter computes of it, and what is refused."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tensorflow as tf
from exported import export, record_outputs, rewrite, simulate
from graphs import batch_norm, images, session, sqnr, weight
from interpreting import FASTEST, PLAIN, Run

from dopt_api.errors import FormatError, ParamsError
from dopt_api.formats import convert, format_names
from dopt_api.params import BiasParams, LayerParams, QuantParams, TensorParams, read_params
from dopt_tf.litert import write

v1 = tf.compat.v1
FEEDS = {"x:0": images(32)}


def chain():
    """Build a convolution, a depthwise one, one behind padding, and a dense layer behind pooling."""
    x = v1.placeholder(tf.float32, [None, 12, 12, 3], name="x")
    y = tf.nn.conv2d(x, weight("conv1/kernel", [3, 3, 3, 8]), 1, "SAME", name="conv1")
    y = tf.nn.relu6(batch_norm(y))
    y = tf.nn.depthwise_conv2d(y, weight("depthwise/kernel", [3, 3, 8, 2]), [1, 2, 2, 1], "SAME", name="depthwise")
    y = tf.nn.relu(tf.nn.bias_add(y, weight("depthwise/bias", [16])))
    y = tf.pad(y, [[0, 0], [2, 2], [2, 2], [0, 0]])
    y = tf.nn.conv2d(y, weight("conv2/kernel", [3, 3, 16, 8]), 1, "VALID", name="conv2")
    y = tf.reshape(tf.nn.max_pool2d(y, 2, 2, "VALID"), [-1, 128])
    tf.nn.bias_add(tf.matmul(y, weight("fc/kernel", [128, 4]), name="fc"), weight("fc/bias", [4]), name="logits")


CHAIN = {"depthwise": "Quant_INT8-7", "conv2": "Quant_INT8-4"}


def residual():
    """Build two sums, the first of which the second and a layer read, and a mean before a dense layer."""
    x = v1.placeholder(tf.float32, [None, 12, 12, 3], name="x")
    y = tf.nn.relu(tf.nn.conv2d(x, weight("conv1/kernel", [3, 3, 3, 8]), 2, "SAME", name="conv1"))
    y = y + tf.nn.depthwise_conv2d(y, weight("depthwise/kernel", [3, 3, 8, 1]), [1, 1, 1, 1], "SAME", name="depthwise")
    y = y + tf.nn.conv2d(y, weight("conv2/kernel", [1, 1, 8, 8]), 1, "SAME", name="conv2")
    y = tf.nn.relu6(tf.nn.conv2d(y, weight("conv3/kernel", [1, 1, 8, 8]), 1, "SAME", name="conv3"))
    tf.matmul(tf.reduce_mean(y, [1, 2]), weight("fc/kernel", [8, 4]), name="logits")


def mixed():
    """Build layers without integer kernels of their own, or with float inputs, and one that a float operation reads."""
    x = v1.placeholder(tf.float32, [None, 12, 12, 3], name="x")
    y = tf.nn.conv2d(x, weight("weights/kernel", [3, 3, 3, 8]), 2, "VALID", name="weights_only")
    shape = tf.stack([tf.shape(y)[0], 10, 10, 6])
    y = tf.nn.relu(tf.nn.conv2d_transpose(y, weight("up/kernel", [2, 2, 6, 8]), shape, 2, "SAME", name="up"))
    y = tf.tanh(tf.nn.conv2d(y, weight("conv/kernel", [3, 3, 6, 4]), 2, "SAME", name="conv"))
    y = tf.nn.conv3d(
        tf.reshape(y, [-1, 5, 5, 2, 2]), weight("solid/kernel", [3, 3, 1, 2, 3]), [1] * 5, "VALID", name="solid"
    )
    tf.matmul(tf.reshape(tf.tanh(y), [-1, 54]), weight("fc/kernel", [4, 54]), transpose_b=True, name="logits")


MIXED = {"weights_only": "Quant_FLOAT-8", "logits": "Quant_FLOAT-4"}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Export each of the graphs once; return a function that gives the folder and what the simulation computes."""
    made = {}

    def get(build, strategies=None):
        if build not in made:
            folder = tmp_path_factory.mktemp(build.__name__)
            made[build] = folder, export(build, folder, FEEDS, strategies=strategies)
        return made[build]

    return get


@pytest.fixture
def exported(exports, tmp_path):
    """Copy the files of an export into a folder of the test; return the simulation."""

    def get(build, strategies=None):
        folder, simulated = exports(build, strategies)
        for name in ("model.pb", "quant_params.json"):
            shutil.copy(folder / name, tmp_path / name)
        return simulated[0]

    return get


@pytest.fixture
def written(tmp_path):
    """Write the format from the files in the test's folder; return the model's bytes."""

    def get():
        write(tmp_path / "model.pb", read_params(tmp_path / "quant_params.json"), tmp_path)
        return (tmp_path / "model.tflite").read_bytes()

    return get


@pytest.fixture
def by_hand(tmp_path):
    """Write a graph without variables, and parameters that nobody calibrated."""

    def make(build, *layers):
        with session(build) as (sess, _):
            (tmp_path / "model.pb").write_bytes(sess.graph_def.SerializeToString())
        rewrite(tmp_path, QuantParams("model.pb", layers))

    return make


def run(content, kernels=PLAIN):
    return Run(content, {"x": FEEDS["x:0"]}, kernels)


def assert_grid(run, number, part):
    scales, zero_points = run.grid(number)
    shift = 128 if part.dtype.startswith("u") else 0
    np.testing.assert_array_equal(scales, np.asarray(part.scale, np.float32))
    np.testing.assert_array_equal(zero_points, np.asarray(part.zero_point) - shift)


def integers_of(folder, layer):
    """Return a layer's integers as the exported graph has them, output channels first."""
    with session() as (sess, _):
        tf.import_graph_def(v1.GraphDef.FromString((folder / "model.pb").read_bytes()), name="")
        values = sess.run(layer.weight.tensor)
        bias = sess.run(layer.bias.tensor) if layer.bias else np.zeros(len(layer.weight.scale))
    scale = np.asarray(layer.weight.scale, np.float64)
    rows = np.moveaxis(values, layer.weight.axis, -1) / scale
    bias_scale = scale if layer.bias is None else np.asarray(layer.bias.scale)
    return np.rint(np.moveaxis(rows, -1, 0)), np.rint(bias / bias_scale)


def test_a_chain_runs_in_integers_with_the_scales_and_integers_of_the_parameter_file(
    exported, written, tmp_path, caplog
):
    exported(chain, CHAIN)
    params = record_outputs(tmp_path, FEEDS)
    found = run(written())
    layers = found.integer_layers()
    assert not caplog.records
    assert len(layers) == len(params.layers) == 4
    codes = [
        (found.model.name_of(one), found.model.model.operatorCodes[one.opcodeIndex].version)
        for one in found.model.operators
        if found.model.name_of(one) == "QUANTIZE"
    ]
    assert codes == [("QUANTIZE", 1), ("QUANTIZE", 2), ("QUANTIZE", 2)]  # from float, and from other integers
    assert not found.model.model.metadata
    for operator, layer in zip(layers, params.layers, strict=True):
        source, kernel, bias = operator.inputs
        assert_grid(found, source, layer.input)
        assert_grid(found, kernel, layer.weight)
        assert_grid(found, operator.outputs[0], layer.output)
        np.testing.assert_array_equal(found.grid(bias)[0], np.float32(layer.input.scale[0]) * found.grid(kernel)[0])
        integers, biases = integers_of(tmp_path, layer)
        rows = np.moveaxis(found[kernel], 3, 0) if layer.name == "depthwise" else found[kernel]
        np.testing.assert_array_equal(rows.reshape(integers.shape), integers)
        np.testing.assert_array_equal(found[bias], biases)
    assert found.kinds == [
        *("QUANTIZE", "CONV_2D", "DEPTHWISE_CONV_2D", "QUANTIZE", "PAD", "CONV_2D", "QUANTIZE"),
        *("MAX_POOL_2D", "RESHAPE", "RESHAPE", "CONV_2D", "RESHAPE", "DEQUANTIZE"),
    ]


def test_each_layer_is_within_a_step_of_exact_sums(exported, written, tmp_path):
    exported(chain, CHAIN)
    record_outputs(tmp_path, FEEDS)
    content = written()
    found = run(content)
    for operator in found.integer_layers():
        off = found.steps_off(operator)
        assert off.max() <= 1
        assert (off == 0).mean() > 0.9  # the kernels round twice, and where sums are small often at a tie
    (wanted,) = simulate(tmp_path, ["logits"], FEEDS)
    assert sqnr(wanted, found.outputs[0]) > 30
    assert sqnr(wanted, run(content, FASTEST).outputs[0]) > 30


def test_without_recorded_outputs_layers_that_only_layers_read_run_in_integers(exported, written, tmp_path, caplog):
    simulated = exported(chain, CHAIN)
    np.testing.assert_allclose(simulate(tmp_path, ["logits"], FEEDS)[0], simulated, rtol=1e-3, atol=1e-3)
    found = run(written())
    assert "1 of 4 quantized layers run in float, with integer weights, as no grid is known for the output: fc" in (
        caplog.text
    )
    layers = found.integer_layers()
    assert len(layers) == 3
    for operator, reader in zip(layers, read_params(tmp_path / "quant_params.json").layers[1:], strict=True):
        assert_grid(found, operator.outputs[0], reader.input)
    assert sqnr(simulated, found.outputs[0]) > 30


def test_sums_and_means_between_layers_run_in_integers_where_all_grids_are_known(exported, written, tmp_path):
    exported(residual)
    record_outputs(tmp_path, FEEDS)
    found = run(written())
    assert found.kinds == [
        *("QUANTIZE", "CONV_2D", "DEPTHWISE_CONV_2D", "ADD", "CONV_2D", "ADD", "CONV_2D", "MEAN"),
        *("RESHAPE", "CONV_2D", "RESHAPE", "DEQUANTIZE"),
    ]
    (wanted,) = simulate(tmp_path, ["logits"], FEEDS)
    assert sqnr(wanted, found.outputs[0]) > 25


def test_what_a_float_operation_reads_too_stays_float(exported, written, tmp_path):
    simulated = exported(residual)
    record_outputs(tmp_path, FEEDS, of=["conv1", "conv3"])
    found = run(written())
    layers = found.integer_layers()
    assert len(layers) == 2
    assert found.kinds.count("ADD") == 2
    assert sqnr(simulated, found.outputs[0]) > 25


def test_layers_without_integer_kernels_have_integer_weights_all_the_same(exported, written, tmp_path, caplog):
    simulated = exported(mixed, MIXED)
    found = run(written())
    assert re.findall("as (.*): (.*)", caplog.text) == [
        ("Conv2DBackpropInput is kept float", "up"),
        ("no grid is known for the output", "conv"),
        ("Conv3D is kept float", "solid"),
    ]
    assert not found.integer_layers()
    layers = read_params(tmp_path / "quant_params.json").layers
    stored = [
        operator.inputs[0]
        for operator, kind in zip(found.model.operators, found.kinds, strict=True)
        if kind == "DEQUANTIZE" and found.model.constant(operator.inputs[0]) is not None
    ]
    assert len(stored) == len(layers) == 5
    for number, layer in zip(stored, layers, strict=True):
        assert_grid(found, number, layer.weight)
    assert sqnr(simulated, found.outputs[0]) > 60
    record_outputs(tmp_path, FEEDS, of=["up", "conv", "solid"])
    (wanted,) = simulate(tmp_path, ["logits"], FEEDS)
    found = run(written())
    assert len(found.integer_layers()) == 1
    for kind in ("TRANSPOSE_CONV", "CONV_3D"):
        operator = found.model.operators[found.kinds.index(kind)]
        (reader,) = [one for one in found.model.operators if operator.outputs[0] in one.inputs]
        assert found.model.name_of(reader) == "QUANTIZE"
    assert sqnr(wanted, found.outputs[0]) > 30


def dying():
    """Build a convolution one channel of which has a great bias and hardly any weights."""
    x = v1.placeholder(tf.float32, [None, 12, 12, 3], name="x")
    y = tf.nn.conv2d(x, tf.constant(DYING, name="weight"), 1, "SAME", name="conv")
    tf.nn.relu6(tf.nn.bias_add(y, tf.constant([0.5, -4.0], name="bias")), name="logits")


SCALES = [0.01, 4.0 / 2147483000 / 2**-6]
DYING = np.full([3, 3, 3, 2], -127, np.float32) * np.array(SCALES, np.float32)
DYING_LAYER = LayerParams(
    name="conv",
    node="conv",
    op_type="Conv2D",
    strategy="Quant_INT8-8",
    input=TensorParams("x:0", "uint8", 8, (2.0**-6,), (128,), None),
    weight=TensorParams("weight:0", "int8", 8, tuple(map(float, np.float32(SCALES))), (0, 0), 3),
    bias=BiasParams("bias:0", "int32", tuple(map(float, np.float32(SCALES) * np.float32(2**-6)))),
    output=TensorParams("logits:0", "uint8", 8, (6.0 / 255,), (0,), None),
)


def test_a_bias_that_fills_its_integers_leaves_room_for_the_sums(by_hand, written, tmp_path):
    by_hand(dying, DYING_LAYER)
    (wanted,) = simulate(tmp_path, ["logits"], FEEDS)
    for kernels in (PLAIN, FASTEST):
        found = run(written(), kernels)
        assert np.abs(wanted - found.outputs[0]).max() < 6.1 / 255
    assert abs(int(found[found.integer_layers()[0].inputs[2]][1])) <= 2**31 - 1 - 255 * 127 * 27


def with_input(layer, **changes):
    return replace(layer, input=replace(layer.input, **changes))


def with_weight(layer, **changes):
    return replace(layer, weight=replace(layer.weight, **changes))


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        (replace(DYING_LAYER, node="other"), ParamsError, "no node 'other'"),
        (with_input(DYING_LAYER, tensor="bias:0"), ParamsError, "does not read 'bias:0'"),
        (with_weight(DYING_LAYER, tensor="kernel:0"), ParamsError, "no constant 'kernel:0'"),
        (with_weight(DYING_LAYER, scale=(0.011, SCALES[1])), ParamsError, "'weight:0' are not on the layer's grid"),
        (with_weight(DYING_LAYER, scale=(0.01,), zero_point=(0,)), ParamsError, "not on the layer's grid"),
        (replace(DYING_LAYER, output=replace(DYING_LAYER.output, tensor="y:0")), ParamsError, "no output 'y:0'"),
        (with_input(replace(DYING_LAYER, strategy="Quant_INT16-8"), dtype="uint16", bits=16), FormatError, "INT16-8"),
        (with_input(replace(DYING_LAYER, strategy="Quant_INT4-4"), dtype="uint4", bits=4), FormatError, "INT4-4"),
        (with_weight(replace(DYING_LAYER, strategy="G32"), group=32), FormatError, "'G32'.*layer 'conv'.*no groups"),
        (with_weight(DYING_LAYER, dtype="uint8", zero_point=(3, 3)), FormatError, "symmetric weights"),
    ],
)
def test_parameters_of_another_model_and_other_strategies_are_refused(by_hand, tmp_path, layer, error, message):
    by_hand(dying, layer)
    with pytest.raises(error) as caught:
        write(tmp_path / "model.pb", read_params(tmp_path / "quant_params.json"), tmp_path)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert not (tmp_path / "model.tflite").exists()


def strange():
    x = v1.placeholder(tf.float32, [None, 12, 12, 3], name="x")
    tf.strings.as_string(tf.nn.conv2d(x, tf.constant(DYING, name="weight"), 1, "SAME", name="conv"), name="logits")


def scaled():
    x = v1.placeholder(tf.float32, [None, 12, 12, 3], name="x")
    y = tf.nn.conv2d(x, tf.constant(DYING, name="weight"), 1, "SAME", name="conv")
    tf.multiply(tf.nn.bias_add(y, tf.constant([0.5, -4.0], name="bias")), 0.3, name="logits")


def test_a_factor_behind_a_layer_stays_outside_its_weight(by_hand, written, tmp_path):
    by_hand(scaled, replace(DYING_LAYER, output=replace(DYING_LAYER.output, tensor="BiasAdd:0")))
    found = run(written())
    assert len(found.integer_layers()) == 1
    np.testing.assert_allclose(found.outputs[0], simulate(tmp_path, ["logits"], FEEDS)[0], atol=0.3 * 6.1 / 255)


def twice():
    x = v1.placeholder(tf.float32, [None, 12, 12, 3], name="x")
    y = tf.nn.conv2d(x, tf.constant(DYING, name="weight"), 1, "SAME", name="conv")
    tf.identity(y, name="features")
    tf.nn.conv2d(y, tf.constant(DYING[:, :, :2], name="weight2"), 1, "SAME", name="logits")


def test_what_is_an_output_of_the_model_too_stays_float(by_hand, written, tmp_path):
    first = replace(DYING_LAYER, bias=None, output=None)
    second = with_weight(with_input(first, tensor="conv:0"), tensor="weight2:0")
    by_hand(twice, first, replace(second, name="logits", node="logits"))
    found = run(written())
    assert not found.integer_layers()
    for wanted, output in zip(simulate(tmp_path, ["features", "logits"], FEEDS), found.outputs, strict=True):
        assert sqnr(wanted, output) > 60


def pooled():
    dying()
    tf.nn.max_pool2d(v1.get_default_graph().get_tensor_by_name("logits:0"), 2, 2, "VALID", name="pooled")


def test_what_moves_numbers_behind_the_last_layer_runs_in_integers(by_hand, written, tmp_path):
    by_hand(pooled, DYING_LAYER)
    found = run(written())
    assert found.kinds == ["QUANTIZE", "CONV_2D", "MAX_POOL_2D", "DEQUANTIZE"]
    codes = {
        kind: found.model.model.operatorCodes[one.opcodeIndex].version
        for kind, one in zip(found.kinds, found.model.operators, strict=True)
    }
    assert codes == {"QUANTIZE": 1, "CONV_2D": 3, "MAX_POOL_2D": 2, "DEQUANTIZE": 2}
    assert np.abs(simulate(tmp_path, ["pooled"], FEEDS)[0] - found.outputs[0]).max() < 6.1 / 255


@pytest.mark.parametrize("content", [b"not a graph", b"", v1.GraphDef().SerializeToString()])
def test_files_without_a_graph_are_refused(by_hand, tmp_path, content):
    by_hand(dying, DYING_LAYER)
    (tmp_path / "model.pb").write_bytes(content)
    with pytest.raises(FormatError, match=r"'model.pb' .*frozen graph"):
        write(tmp_path / "model.pb", read_params(tmp_path / "quant_params.json"), tmp_path)


def test_operations_that_the_converter_does_not_have_are_named(by_hand, tmp_path):
    by_hand(strange, replace(DYING_LAYER, bias=None, output=None))
    with pytest.raises(FormatError, match=r"converter refuses the model 'model.pb'.*AsString"):
        write(tmp_path / "model.pb", read_params(tmp_path / "quant_params.json"), tmp_path)


def test_models_in_onnx_are_refused(tmp_path):
    with pytest.raises(FormatError, match=r"not available for ONNX.*TensorFlow backend"):
        write(tmp_path / "model.onnx", QuantParams("model.onnx", ()), tmp_path)


def test_the_format_is_found_by_its_name_and_written_the_same_each_time(by_hand, tmp_path):
    by_hand(dying, DYING_LAYER)
    assert "litert" in format_names()
    (tmp_path / "deploy").mkdir()
    (file,) = convert(tmp_path / "quant_params.json", "litert", tmp_path / "deploy")
    assert file == tmp_path / "deploy" / "model.tflite"
    first = file.read_bytes()
    convert(tmp_path / "quant_params.json", "litert", tmp_path / "deploy")
    assert file.read_bytes() == first
