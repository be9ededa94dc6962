"""Smoothing: float stays float, outliers stop hurting, and the factors go the whole way to the exported graph."""

import copy
import json
import pickle

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from dopt.dopt_torch.opt_main import generate_final_model, set_calibrate_state
from dopt_api.errors import CalibrationError, CheckpointError, ModelError
from dopt_api.formats import convert
from dopt_torch.post_training import post_training
from dopt_torch.rounding import round_weights
from dopt_torch.sensitivity import measure_sensitivity
from dopt_torch.smoothing import smooth

SHAPE = "x:1,6,16"


class Attention(nn.Module):
    """Query, key and value of one tensor with outliers, a projection, and a convolution beside them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.query, self.key, self.value, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.conv = nn.Conv1d(16, 8, 3, padding=1)

    def forward(self, x):
        scores = self.query(x) @ self.key(x).transpose(1, 2) * 0.1
        return self.conv(self.out(scores.softmax(-1) @ self.value(x)).transpose(1, 2))


def batches(count=4, seed=0):
    """Return inputs of which two channels have a hundred times the others' values."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.ones(16).index_fill_(0, torch.tensor([3, 11]), 100.0)
    return [torch.randn(8, 6, 16, generator=generator) * scale for _ in range(count)]


def network():
    """Return a network whose weights for the outliers are small, as training leaves them."""
    net = Attention().eval()
    with torch.no_grad():
        for layer in (net.query, net.key, net.value):
            layer.weight[:, [3, 11]] *= 0.01
    return net


def calibrate(model):
    set_calibrate_state(model, True)
    with torch.no_grad():
        for batch in batches():
            model(batch)
    set_calibrate_state(model, False)
    return model.eval()


def sqnr(model, net):
    with torch.no_grad():
        wanted, found = (torch.cat([one(batch) for batch in batches(seed=9)]) for one in (net, model))
    return float(10 * torch.log10(wanted.square().mean() / (found - wanted).square().mean()))


@pytest.fixture
def net():
    return network()


@pytest.fixture
def plain(make, net):
    return make(net, "Quant_INT8-8", shape=SHAPE, calibrate=False)


@pytest.fixture
def smoothed(plain):
    smooth(plain, batches())
    return calibrate(plain)


def test_outliers_stop_hurting(plain, net):
    without = calibrate(copy.deepcopy(plain))
    names = smooth(plain, batches())
    assert names == ["query/Linear", "key/Linear", "value/Linear", "out/Linear"]
    assert sqnr(calibrate(plain), net) > sqnr(without, net) + 10


def test_float_stays_float_to_the_bit(plain, net):
    smooth(plain, batches())
    layer = plain.query.dopt_quantizer
    x = batches()[0]
    product = nn.functional.linear(layer.smooth_input(x), layer.smooth_weight(plain.query.weight))
    assert torch.equal(product, nn.functional.linear(x, net.query.weight))
    plain.load_state_dict(net.state_dict(), strict=False)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in net.state_dict().items())


def test_layers_of_one_input_share_their_factors_and_others_do_not(plain):
    smooth(plain, batches())
    query, key, value, out = (
        layer.dopt_quantizer.smoothing for layer in (plain.query, plain.key, plain.value, plain.out)
    )
    assert torch.equal(query, key)
    assert torch.equal(query, value)
    assert not torch.equal(query, out)
    assert plain.conv.dopt_quantizer.smoothing.shape == ()


def test_calibration_before_is_forgotten_and_modes_are_kept(plain):
    calibrate(plain)
    plain.train()
    plain.out.eval()
    smooth(plain, batches())
    assert plain.training
    assert not plain.out.training
    assert not plain.query.dopt_quantizer.is_ready()
    assert plain.conv.dopt_quantizer.is_ready()


def test_smoothing_again_replaces_the_factors(plain):
    smooth(plain, batches())
    first = plain.query.dopt_quantizer.smoothing.clone()
    smooth(plain, [batch * torch.linspace(1, 50, 16) for batch in batches()])
    assert not torch.equal(plain.query.dopt_quantizer.smoothing, first)
    smooth(plain, batches())
    assert torch.equal(plain.query.dopt_quantizer.smoothing, first)


def test_the_checkpoint_has_the_factors_and_loads_into_a_plain_model(make, smoothed, net, tmp_path):
    torch.save(smoothed.state_dict(), tmp_path / "quant.pth")
    other = make(net, "Quant_INT8-8", shape=SHAPE, calibrate=False).eval()
    other.load_state_dict(torch.load(tmp_path / "quant.pth"))
    x = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(other(x), smoothed(x))
    unsmoothed = make(net, "Quant_INT8-8", shape=SHAPE, data=batches()).eval()
    smoothed.load_state_dict(unsmoothed.state_dict())
    with torch.no_grad():
        assert torch.equal(smoothed(x), unsmoothed(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same(smoothed, copied):
    x = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(copied(smoothed)(x), smoothed(x))


@pytest.fixture
def exported(smoothed, net, tmp_path):
    torch.save(smoothed.state_dict(), tmp_path / "quant.pth")
    folder = tmp_path / "output"
    folder.mkdir()
    generate_final_model(net, str(tmp_path / "config.json"), str(tmp_path / "quant.pth"), str(folder))
    return folder


def run_onnx(file, x):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})[0]


def test_the_graph_multiplies_once_for_layers_of_one_input(exported, smoothed, net):
    graph = onnx.load(str(exported / "model.onnx")).graph
    assert sum(node.op_type == "Mul" and node.input[1].endswith(".smoothing") for node in graph.node) == 2
    layers = json.loads((exported / "quant_params.json").read_text())["layers"]
    inputs = {layer["name"]: layer["input"]["tensor"] for layer in layers}
    assert inputs["query/Linear"] == inputs["key/Linear"] == inputs["value/Linear"]
    weight = next(tensor for tensor in graph.initializer if tensor.name == "query.weight")
    layer = smoothed.query.dopt_quantizer
    values = layer.quantize_weight(smoothed.query.weight, None).detach().numpy()
    written = onnx.numpy_helper.to_array(weight)
    assert np.array_equal(written if written.shape == values.shape else written.T, values) or np.array_equal(
        written.T, values
    )
    x = batches(1)[0][:1]
    with torch.no_grad():
        assert np.allclose(run_onnx(exported / "model.onnx", x), net(x).numpy(), atol=0.05)


def test_the_integer_form_computes_what_the_quantized_model_does(exported, smoothed, tmp_path):
    (file,) = convert(exported / "quant_params.json", "onnx_qdq", tmp_path / "output")
    x = batches(1)[0][:1]
    with torch.no_grad():
        wanted = smoothed(x).numpy()
    error = run_onnx(file, x) - wanted
    assert 10 * np.log10((wanted**2).sum() / (error**2).sum()) > 35


def test_rounding_sensitivity_and_training_go_on_from_there(smoothed, net):
    before = sqnr(smoothed, net)
    choices = measure_sensitivity(smoothed, batches(1), ["Quant_INT8-8", "Quant_INT8-4"])
    assert all(choice.damage < 0.02 for choice in choices if choice.strategy == "Quant_INT8-8")
    rounded = copy.deepcopy(smoothed)
    report = round_weights(rounded, batches(2))
    assert {layer.reason for layer in report if "Linear" in layer.name} == {""}
    assert sqnr(rounded.eval(), net) > before - 0.5
    smoothed.train()
    smoothed(batches(1)[0]).square().mean().backward()
    gradient = smoothed.query.weight.grad
    assert torch.isfinite(gradient).all()
    float_net = copy.deepcopy(net)
    float_net(batches(1)[0]).square().mean().backward()
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), float_net.query.weight.grad.flatten(), 0) > 0.9


def test_post_training_smooths_on_request(make, net):
    model = make(net, "Quant_INT8-8", shape=SHAPE, calibrate=False)
    post_training(model, iter(batches()), smoothing=0.75)
    assert model.query.dopt_quantizer.smoothing.shape == (16,)
    assert sqnr(model.eval(), net) > 25


def test_convolutions_are_smoothed_when_asked_for(make, net):
    with torch.no_grad():
        net.out.weight[2] *= 50
        net.conv.weight[:, 2] *= 0.02
    plain = make(net, "Quant_INT8-8", shape=SHAPE, calibrate=False)
    assert smooth(plain, batches(), layers=["conv/Conv1D"]) == ["conv/Conv1D"]
    assert plain.query.dopt_quantizer.smoothing.shape == ()
    x = torch.randn(2, 16, 6)
    layer = plain.conv.dopt_quantizer
    found = nn.functional.conv1d(layer.smooth_input(x), layer.smooth_weight(plain.conv.weight))
    assert torch.equal(found, nn.functional.conv1d(x, net.conv.weight))
    unbatched = layer.smooth_input(x[0])
    assert torch.equal(unbatched, layer.smooth_input(x)[0])


def test_what_is_refused(plain, net):
    with pytest.raises(ModelError, match="not a quantized model"):
        smooth(net, batches())
    with pytest.raises(ModelError, match=r"No quantized layer is called 'query/Linea'.*'query/Linear'"):
        smooth(plain, batches(), layers=["query/Linea"])
    with pytest.raises(CalibrationError, match="no batches"):
        smooth(plain, [])
    with pytest.raises(ValueError, match="strength"):
        smooth(plain, batches(), strength=2.0)
    bad = batches()
    bad[1][0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"query/Linear.*NaN"):
        smooth(plain, bad)
    assert plain.query.dopt_quantizer.smoothing.shape == ()


def test_convolutions_with_groups_are_refused(make):
    model = make(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), "Quant_INT8-8", shape="x:1,4,9", calibrate=False)
    with pytest.raises(ModelError, match="has groups"):
        smooth(model, [torch.randn(1, 4, 9)], layers=["0/Conv1D"])
    assert smooth(model, [torch.randn(1, 4, 9)]) == []


def test_a_checkpoint_whose_factors_do_not_fit_is_refused(make, smoothed, net, tmp_path):
    state = smoothed.state_dict()
    state["query.dopt_quantizer.smoothing"] = torch.ones(5)
    torch.save(state, tmp_path / "quant.pth")
    with pytest.raises(CheckpointError, match="does not fit"):
        generate_final_model(net, str(tmp_path / "config.json"), str(tmp_path / "quant.pth"), str(tmp_path))


class Scaled(nn.Module):
    """Two layers that read one tensor times a constant of the user's own."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)
        self.register_buffer("factor", torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def forward(self, x):
        return self.one(x * self.factor) + self.two(x * self.factor)


def test_multiplications_of_the_users_own_stay_what_they_are(make, tmp_path):
    net = Scaled().eval()
    model = make(net, "Quant_INT8-8", shape="x:1,4", data=[torch.randn(8, 4)])
    torch.save(model.state_dict(), tmp_path / "quant.pth")
    generate_final_model(net, str(tmp_path / "config.json"), str(tmp_path / "quant.pth"), str(tmp_path))
    graph = onnx.load(str(tmp_path / "model.onnx")).graph
    assert not [tensor.name for tensor in graph.initializer if "smoothing" in tensor.name]
