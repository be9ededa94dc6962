"""The files: what they compute, and that they appear whole or not at all."""

import json
import pickle
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from networks import batch, calibrate, make_network, write_config
from onnx import helper, numpy_helper

import dopt_api
from dopt_api.errors import CalibrationError, CheckpointError, ConfigError, ModelError, OutputError
from dopt_api.params import read_params
from dopt_numpy.checkpoint import save_checkpoint
from dopt_numpy.network import Conv2D, Dense, Layer, Network, ReLU, Scale


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def run(model, x, **names):
    content = model if isinstance(model, bytes) else Path(model).read_bytes()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # as the graph says
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return session.run([names.get("output", "output")], {names.get("input", "x"): x})[0]


def with_quantized_inputs(result):
    """Return the exported graph with the inputs of quantized layers quantized as the parameter file says."""
    model = onnx.load(str(result.model))
    for number, layer in enumerate(read_params(result.params).layers):
        for node_name, edge in [(layer.node, layer.input.tensor), *layer.other_calls]:
            (at,) = [i for i, node in enumerate(model.graph.node) if node.name == node_name]
            assert model.graph.node[at].input[0] == edge
            scale, zero_point, one, two = (f"{node_name}.{number}.{part}" for part in ("s", "z", "q", "dq"))
            model.graph.initializer.extend(
                [
                    numpy_helper.from_array(np.float32(layer.input.scale[0]), scale),
                    numpy_helper.from_array(np.uint8(layer.input.zero_point[0]), zero_point),
                ]
            )
            model.graph.node[at].input[0] = two
            model.graph.node.insert(at, helper.make_node("DequantizeLinear", [one, scale, zero_point], [two]))
            model.graph.node.insert(at, helper.make_node("QuantizeLinear", [edge, scale, zero_point], [one]))
    return model.SerializeToString()


def test_the_files_compute_what_the_quantized_network_does(config, quantized, checkpoint, out):
    result = dopt_api.export(make_network(), config, checkpoint, out, dynamic_batch=True)
    assert result.model == out / "model.onnx"
    x = batch(16, seed=5)
    np.testing.assert_allclose(run(with_quantized_inputs(result), x), quantized(x), atol=1e-3)
    assert np.abs(run(result.model, x) - quantized(x)).max() > 1e-3  # the graph itself is float


def test_weights_lie_on_their_grid_and_normalizations_are_folded(config, checkpoint, out):
    result = dopt_api.export(make_network(), config, checkpoint, out)
    graph = onnx.load(str(result.model)).graph
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert [node.name for node in graph.node if node.op_type == "BatchNormalization"] == ["after"]
    layers = read_params(result.params).layers
    assert [layer.name for layer in layers][:2] == ["conv/Conv2D", "block.depthwise/Conv2D"]
    for layer in layers:
        weight = weights[layer.weight.tensor]
        scale = np.asarray(layer.weight.scale, np.float32).reshape(-1, *(1,) * (weight.ndim - 1))
        steps = np.rint(weight / scale)
        assert np.abs(steps).max() == 127
        assert (steps * scale == weight).all()
        assert layer.bias is not None
        assert layer.bias.tensor in weights


def test_a_float_layer_is_folded_but_not_quantized(tmp_path, out):
    config = write_config(make_network(), tmp_path / "c.json")
    content = json.loads(config.read_text())
    for name, entry in content["layer_strategy"].items():
        entry["quant_strategy"] = "float" if name != "fc/Dense" else "Quant_INT8-8"
    config.write_text(json.dumps(content))
    quantized = calibrate(dopt_api.optimize(make_network(), config), batch())
    result = dopt_api.export(make_network(), config, save_checkpoint(quantized, tmp_path / "q.npz"), out)
    assert [layer.name for layer in read_params(result.params).layers] == ["fc/Dense"]
    kinds = [node.op_type for node in onnx.load(str(result.model)).graph.node]
    assert kinds.count("BatchNormalization") == 1
    np.testing.assert_allclose(run(result.model, batch(1)), quantized(batch(1)), atol=0.05)


def test_exporting_twice_gives_the_same_bytes_and_leaves_the_model_alone(config, checkpoint, out, tmp_path):
    network, other = make_network(9), tmp_path / "other"
    other.mkdir()
    before = network.state()
    dopt_api.export(network, config, checkpoint, out)
    dopt_api.export(make_network(), config, checkpoint, other)
    for name in ("model.onnx", "quant_params.json"):
        assert (out / name).read_bytes() == (other / name).read_bytes()
    assert all((network.state()[name] == array).all() for name, array in before.items())
    assert sorted(file.name for file in out.iterdir()) == ["model.onnx", "quant_params.json"]


def test_who_never_switches_calibration_off_exports_the_same(config, checkpoint, out, tmp_path):
    pending = dopt_api.optimize(make_network(), config)
    dopt_api.set_calibrate_state(pending, True)
    pending(batch())
    path = save_checkpoint(pending, tmp_path / "pending.npz")
    first = dopt_api.export(make_network(), config, checkpoint, out).params.read_bytes()
    assert dopt_api.export(make_network(), config, path, out).params.read_bytes() == first


def test_a_layer_at_several_places_has_one_entry(tmp_path, out):
    shared = Conv2D(3, 3, 1, rng=np.random.default_rng(0))
    network = Network({"a": shared, "relu": ReLU(), "b": shared})
    config = write_config(network, tmp_path / "c.json", "x:1,3,8,8")
    quantized = calibrate(dopt_api.optimize(network, config), batch())
    result = dopt_api.export(network, config, save_checkpoint(quantized, tmp_path / "q.npz"), out, dynamic_batch=True)
    (layer,) = read_params(result.params).layers
    assert (layer.node, layer.other_calls) == ("a", (("b", "relu.output"),))
    np.testing.assert_allclose(run(with_quantized_inputs(result), batch()), quantized(batch()), atol=1e-3)


def test_factors_of_rows_are_written_for_rows(tmp_path, out):
    network = Network({"fc": Dense(4, 3), "scale": Scale(3)})
    network.layers["scale"].factor.value[...] = [1, 2, 3]
    config = write_config(network, tmp_path / "c.json", "x:1,4")
    x = np.ones((1, 4), np.float32)
    quantized = calibrate(dopt_api.optimize(network, config), x)
    result = dopt_api.export(network, config, save_checkpoint(quantized, tmp_path / "q.npz"), out)
    np.testing.assert_allclose(run(result.model, x), quantized(x), rtol=1e-5, atol=1e-5)


def test_the_batch_stays_open_only_if_asked(config, checkpoint, out):
    closed = onnx.load(str(dopt_api.export(make_network(), config, checkpoint, out).model)).graph
    assert [d.dim_value for d in closed.input[0].type.tensor_type.shape.dim] == [1, 3, 8, 8]
    assert [d.dim_value for d in closed.output[0].type.tensor_type.shape.dim] == [1, 5]
    result = dopt_api.export(make_network(), config, checkpoint, out, output_names=["logits"], dynamic_batch=True)
    assert run(result.model, batch(7), output="logits").shape == (7, 5)


@pytest.mark.parametrize("names", [["a", "b"], [], "output", [""], ["x"], ["conv.output"], ["fc.weight"]])
def test_output_names_that_do_not_fit_are_refused(config, checkpoint, out, names):
    with pytest.raises(ConfigError):
        dopt_api.export(make_network(), config, checkpoint, out, output_names=names)
    assert not list(out.iterdir())


def test_the_uncalibrated_is_refused(config, out, tmp_path):
    path = save_checkpoint(dopt_api.optimize(make_network(), config), tmp_path / "q.npz")
    with pytest.raises(CalibrationError, match="conv/Conv2D' and 4 other"):
        dopt_api.export(make_network(), config, path, out)
    assert not list(out.iterdir())


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("kind", ["missing", "folder", "garbage", "cut", "pickle", "object", "float", "other", "shape"])
def test_a_checkpoint_that_will_not_do_is_refused(config, checkpoint, quantized, out, tmp_path, kind):
    path, ran = tmp_path / "bad.npz", tmp_path / "ran"
    state = quantized.state()
    if kind == "folder":
        path.mkdir()
    elif kind == "garbage":
        path.write_bytes(b"garbage")
    elif kind == "cut":
        path.write_bytes(checkpoint.read_bytes()[:-200])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Touch(ran)))
    elif kind == "object":
        np.savez(path, **{**state, "fc.bias": np.array([Touch(ran)], object)})
    elif kind == "float":
        save_checkpoint(make_network(), path)
    elif kind == "other":
        np.savez(path, **{name: array for name, array in state.items() if not name.startswith("fc.dopt_")})
    elif kind == "shape":
        np.savez(path, **{**state, "fc.bias": np.zeros(2, np.float32)})
    with pytest.raises(CheckpointError) as caught:
        dopt_api.export(make_network(), config, path, out)
    assert "bad.npz" in str(caught.value)
    assert not ran.exists()
    assert not list(out.iterdir())


class Unknown(Layer):
    def forward(self, x, training=False):
        return x, lambda dy: dy


def test_a_layer_without_counterpart_is_told_and_nothing_is_written(tmp_path, out):
    network = Network({"fc": Dense(4, 3), "odd": Unknown()})
    config = write_config(network, tmp_path / "c.json", "x:1,4")
    quantized = calibrate(dopt_api.optimize(network, config), np.ones((1, 4), np.float32))
    with pytest.raises(ModelError, match="'odd'"):
        dopt_api.export(network, config, save_checkpoint(quantized, tmp_path / "q.npz"), out)
    assert not list(out.iterdir())


def test_a_missing_folder_is_told(config, checkpoint, tmp_path):
    with pytest.raises(OutputError):
        dopt_api.export(make_network(), config, checkpoint, tmp_path / "nowhere")


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = save_checkpoint(make_network(), tmp_path / "kept.npz")
    before = path.read_bytes()
    monkeypatch.setattr(np, "savez", lambda file, **_: (file.write(b"half"), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(make_network(1), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["kept.npz"]
