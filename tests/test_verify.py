"""``verify`` and ``dopt verify``: what quantization does, layer by layer, and the hazard of 16-bit sums."""

import json
import math

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from quantized_chain import convolve, edit, linear, network, run

import dopt_api.verify as verify_module
from dopt_api.cli.group import dopt
from dopt_api.errors import FormatError
from dopt_api.formats import convert
from dopt_api.params import read_params
from dopt_api.quantizer import fake_quantize
from dopt_api.verify import verify


def call(*arguments):
    return CliRunner().invoke(dopt, ["verify", *map(str, arguments)])


def test_the_figures_are_those_of_the_reference(tmp_path):
    ((weight, biases, scale, zero_point, grid),) = network(tmp_path, ["Quant_INT8-8"])
    x = 8 * np.random.default_rng(1).standard_normal((4, 3, 6, 6)).astype(np.float32)
    found = verify(tmp_path / "quant_params.json", [{"x0": x[:2]}, {"x0": x[2:]}])
    exact, given = convolve(x, weight, biases), convolve(fake_quantize(x, scale, zero_point, grid), weight, biases)
    sqnr = 10 * math.log10(np.square(exact).sum() / np.square(given - exact).sum())
    (layer,) = found.layers
    assert layer.name == "layer0"
    assert math.isclose(layer.sqnr_db, sqnr, rel_tol=1e-3)
    assert found.sqnr_db == layer.sqnr_db  # the layer's output is the network's
    cosine = (exact * given).sum() / math.sqrt(np.square(exact).sum() * np.square(given).sum())
    assert math.isclose(layer.cosine, cosine, rel_tol=1e-5)
    assert math.isclose(found.cosine, cosine, rel_tol=1e-5)
    low, high = ((end - zero_point) * scale for end in (-0.5, 255.5))
    assert math.isclose(layer.clipped, float(np.mean((x < low) | (x > high))), abs_tol=1e-3)
    assert 0.05 < np.mean(x < low) < 0.95 > np.mean(x > high) > 0.05
    (file,) = convert(tmp_path / "quant_params.json", "onnx_qdq", tmp_path)
    plain, fast = run(file, x), run(file, x, optimized=True)
    for figure, one, other in ((found.optimized_db, exact, fast), (found.kernels_db, plain, fast)):
        noise = np.square(one.astype(np.float64) - other).sum()
        wanted = 10 * math.log10(np.square(one.astype(np.float64)).sum() / noise) if noise else math.inf
        assert math.isclose(figure, wanted, rel_tol=1e-3)
    assert sum(found.kernels.values()) == 1


@pytest.mark.parametrize(
    ("strategy", "weights", "share"),
    [
        ("Quant_INT8-8", [100, 28, 0, 0, 0], 0.0),
        ("Quant_INT8-8", [100, 29, 0, 0, 0], 1.0),
        ("Quant_INT8-8", [-100, -29, 0, 0, 0], 1.0),
        ("Quant_INT8-8", [127, -127, 127, 0, 127], 0.0),
        ("Quant_INT8-7", [63, 63, 63, 63, 63], 0.0),
        ("Quant_INT16-8", [127, 127, 127, 127, 127], 0.0),
    ],
)
def test_the_hazard_is_told_from_the_weights(tmp_path, strategy, weights, share):
    network(tmp_path, [strategy])
    model = onnx.load(str(tmp_path / "model.onnx"))
    steps = np.float32(read_params(tmp_path / "quant_params.json").layers[0].weight.scale)
    integers = np.zeros((4, 27), np.float32)
    kernel_order = np.arange(27).reshape(3, 9).T.reshape(-1)  # tap after tap, in each channel after channel
    integers[:, kernel_order[:5]] = weights
    (tensor,) = (one for one in model.graph.initializer if one.name == "w0")
    tensor.CopyFrom(numpy_helper.from_array((integers * steps[:, None]).reshape(4, 3, 3, 3), "w0"))
    onnx.save(model, str(tmp_path / "model.onnx"))
    x = np.zeros((1, 3, 6, 6), np.float32)
    assert verify(tmp_path / "quant_params.json", [{"x0": x}]).layers[0].hazard == share


def fixed_batch(folder, size):
    """Write the network with a batch size of its own."""
    network(folder)
    model = onnx.load(str(folder / "model.onnx"))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = size
    onnx.save(model, str(folder / "model.onnx"))
    return folder / "quant_params.json"


def test_a_batch_is_cut_for_a_model_with_a_batch_size_of_its_own(tmp_path):
    x = np.random.default_rng(2).standard_normal((6, 3, 5, 5)).astype(np.float32)
    network(tmp_path)
    wanted = verify(tmp_path / "quant_params.json", [{"x0": x[:2]}, {"x0": x[2:4]}, {"x0": x[4:]}])
    found = verify(fixed_batch(tmp_path, 2), [{"x0": x}])
    assert (found.sqnr_db, found.layers[1].clipped) == (wanted.sqnr_db, wanted.layers[1].clipped)


@pytest.mark.parametrize(
    ("feed", "what"),
    [
        ({}, "no array for 'x0'"),
        ({"x0": np.zeros((3, 3, 5, 5))}, r"the shape \[3, 3, 5, 5\]"),
        ({"x0": np.zeros((2, 4, 5, 5))}, r"the shape \[2, 4, 5, 5\]"),
        ({"x0": np.zeros((2, 3, 5))}, r"the shape \[2, 3, 5\]"),
    ],
)
def test_data_of_another_shape_are_told_with_the_shape_that_fits(tmp_path, feed, what):
    with pytest.raises(FormatError, match=what) as found:
        verify(fixed_batch(tmp_path, 2), [feed])
    assert "2x3xanyxany" in str(found.value)
    assert "--dynamic-batch" in str(found.value)


def test_a_reference_shows_what_the_weights_lose_as_well(tmp_path):
    network(tmp_path)
    x = np.random.default_rng(3).standard_normal((2, 3, 6, 6)).astype(np.float32)
    feeds = [{"x0": x}]
    assert verify(tmp_path / "quant_params.json", feeds).reference_db is None
    model = onnx.load(str(tmp_path / "model.onnx"))
    for tensor in model.graph.initializer:
        if tensor.name.startswith("w"):
            values = numpy_helper.to_array(tensor) * np.float32(1.1)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, str(tmp_path / "float.onnx"))
    found = verify(tmp_path / "quant_params.json", feeds, reference=tmp_path / "float.onnx")
    (integer,) = convert(tmp_path / "quant_params.json", "onnx_qdq", tmp_path)
    wanted, given = run(tmp_path / "float.onnx", x).astype(np.float64), run(integer, x, optimized=True)
    noise = np.square(given - wanted).sum()
    assert math.isclose(found.reference_db, 10 * math.log10(np.square(wanted).sum() / noise), rel_tol=1e-3)
    assert found.reference_db < found.optimized_db
    np.savez(tmp_path / "x.npz", x0=x)
    arguments = (tmp_path, "--data", tmp_path / "x.npz", "--reference", tmp_path / "float.onnx")
    assert f"{found.reference_db:.2f} dB" in call(*arguments).output
    assert call(*arguments, "--min-sqnr", found.reference_db + 1).exit_code == 1


def test_data_are_made_up_where_that_can_be_done(tmp_path):
    network(tmp_path)
    file = tmp_path / "quant_params.json"
    with pytest.raises(FormatError, match="Data for the input 'x0' cannot be made up"):
        verify(file)  # height and width are open
    model = onnx.load(str(tmp_path / "model.onnx"))
    for place in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[place].dim_value = 6
    onnx.save(model, str(tmp_path / "model.onnx"))
    assert verify(file, seed=1) == verify(file, seed=1) != verify(file, seed=2)


def test_data_that_do_not_fit_are_refused(tmp_path):
    network(tmp_path)
    with pytest.raises(FormatError, match=r"an array of the shape"):
        verify(tmp_path / "quant_params.json", [{"x0": np.zeros((1, 5, 6, 6), np.float32)}])


def test_the_command_shows_the_worst_first_and_fails_below_a_bound(tmp_path):
    network(tmp_path)
    np.savez(tmp_path / "x.npz", x0=np.random.default_rng(1).standard_normal((2, 3, 6, 6)).astype(np.float32))
    result = call(tmp_path, "--data", tmp_path / "x.npz")
    assert result.exit_code == 0, result.output
    assert result.output.index("layer") < result.output.index("outputs against float")
    assert "hazard: on processors" in result.output
    content = json.loads(call(tmp_path, "--data", tmp_path / "x.npz", "--json").output)
    assert [layer["name"] for layer in content["layers"]] == ["layer0", "layer1"]
    np.savez(tmp_path / "zeros.npz", x0=np.zeros((1, 3, 6, 6), np.float32))
    assert call(tmp_path, "--data", tmp_path / "x.npz", "--picture", tmp_path / "layers.svg").exit_code == 0
    assert "<svg" in (tmp_path / "layers.svg").read_text()
    result = call(tmp_path, "--data", tmp_path / "x.npz", "--picture", tmp_path / "layers.doc")
    assert result.exit_code == 1
    assert "cannot be written as '.doc'" in result.output
    nothing = call(tmp_path, "--data", tmp_path / "zeros.npz", "--json").output
    assert "Infinity" not in nothing
    assert json.loads(nothing)["kernels_db"] is None
    assert call(tmp_path, "--data", tmp_path / "x.npz", "--min-sqnr", content["optimized_db"] - 1).exit_code == 0
    result = call(tmp_path, "--data", tmp_path / "x.npz", "--min-sqnr", content["sqnr_db"] + 50)
    assert result.exit_code == 1
    assert "less than --min-sqnr" in result.output
    (tmp_path / "x.npz").write_bytes(b"no zip")
    result = call(tmp_path, "--data", tmp_path / "x.npz")
    assert result.exit_code == 1
    assert "cannot be read as .npz" in result.output
    edit(tmp_path, lambda layer: layer.update(node="conv9"))
    assert "there is no node 'conv9'" in call(tmp_path).output


def test_the_form_as_it_stands_is_held_against_exact_integer_sums(tmp_path):
    network(tmp_path, ["Quant_INT8-8", "Quant_INT8-4"])
    x = np.random.default_rng(1).standard_normal((2, 3, 6, 6)).astype(np.float32)
    layers = verify(tmp_path / "quant_params.json", [{"x0": x}]).layers
    assert [layer.off for layer in layers] == [0, 0]
    np.savez(tmp_path / "batch.npz", x0=x)
    heading, row, *_ = call(tmp_path, "--data", tmp_path / "batch.npz").output.splitlines()
    assert (heading.split()[-1], row.split()[-1]) == ("off", "0")


def test_a_matrix_product_is_held_against_exact_integer_sums(tmp_path, monkeypatch):
    network(tmp_path, ["Quant_INT8-8"])
    model = onnx.load(str(tmp_path / "model.onnx"))
    weight = numpy_helper.to_array(model.graph.initializer[0]).reshape(4, 27)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w0"))
    node = onnx.helper.make_node("Gemm", ["x0", "w0", "b0"], ["x1"], name="conv0", transB=1)
    model.graph.node[0].CopyFrom(node)
    for end, size in ((model.graph.input[0], 27), (model.graph.output[0], 4)):
        end.CopyFrom(onnx.helper.make_tensor_value_info(end.name, onnx.TensorProto.FLOAT, [None, size]))
    onnx.save(model, str(tmp_path / "model.onnx"))
    x = np.random.default_rng(1).standard_normal((2, 27)).astype(np.float32)
    (layer,) = verify(tmp_path / "quant_params.json", [{"x0": x}]).layers
    assert layer.off == 0
    sums = verify_module._sums

    def wrong(*arguments):
        found = sums(*arguments)
        found[0, 2] += 3
        return found

    monkeypatch.setattr(verify_module, "_sums", wrong)
    assert verify(tmp_path / "quant_params.json", [{"x0": x}]).layers[0].off == 3


def test_every_kernel_that_multiplies_is_counted():
    kinds = ["QLinearConv", "Conv", "FusedConv", "QGemm", "FusedMatMul", "MatMulIntegerToFloat", "MatMulInteger", "Mul"]
    nodes = [onnx.helper.make_node(kind, ["x"], ["y"]) for kind in [*kinds, "Conv"]]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], []))
    assert verify_module._multiplying(model) == {**dict.fromkeys(kinds[:-1], 1), "Conv": 2}


def test_kernels_that_quantize_float_inputs_are_named(tmp_path):
    linear(tmp_path, "Quant_FLOAT-8", transposed=False)
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    found = verify(tmp_path / "quant_params.json", [{"x": x}])
    (layer,) = found.layers
    assert (layer.clipped, layer.hazard, layer.off) == (0.0, 0.0, None)
    assert found.sqnr_db > 100
    assert sum(found.kernels.values()) == 1
    shown = call(tmp_path, "--data", tmp_path / "data.npz").output
    approximate = "MatMulNBits" in found.kernels  # versions of ONNX Runtime differ
    assert ("quantizes float inputs" in shown) == approximate
    assert (found.kernels_db < 60) == approximate
