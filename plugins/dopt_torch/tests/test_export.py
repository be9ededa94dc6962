"""The exported files: what is in them, that they agree with one another, and that failures leave nothing behind."""

import errno
import importlib.util
import json
import os
import stat
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import dopt_api
from dopt_api import params
from dopt_api.errors import CalibrationError, ConfigError, ModelError, NumbersError, OutputError
from dopt_api.quantizer import Grid, fake_quantize

SCHEMA = Path(params.__file__).with_name("quant_params.schema.json")


class Exported:
    """An exported model with its parameter file, opened."""

    def __init__(self, result):
        self.result = result
        self.onnx = onnx.load(str(result.model))
        onnx.checker.check_model(self.onnx, full_check=True)
        jsonschema.validate(json.loads(result.params.read_text()), json.loads(SCHEMA.read_text()))
        self.params = params.read_params(result.params)
        self.nodes = {node.name: node for node in self.onnx.graph.node}
        self.values = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.onnx.graph.initializer}

    def run(self, *inputs, model=None):
        options = onnxruntime.SessionOptions()
        # as written: integer kernels that a runtime may put in the place of quantize nodes are not what is tested here
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        graph = (model or self.onnx).SerializeToString()
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_inputs()]
        return session.run(None, {name: array.numpy() for name, array in zip(names, inputs, strict=True)})

    def with_quantized_inputs(self):
        """Return the graph with a QuantizeLinear/DequantizeLinear pair on each input edge of the parameter file."""
        model = onnx.ModelProto()
        model.CopyFrom(self.onnx)
        nodes = {node.name: node for node in model.graph.node}
        pairs = []
        for i, layer in enumerate(self.params.layers):
            for node, edge in [(layer.node, layer.input.tensor), *layer.other_calls]:
                scale, zero = f"scale{i}", f"zero{i}"
                quantized, back = f"{node}_q", f"{node}_dq"
                pairs.append(onnx.helper.make_node("QuantizeLinear", [edge, scale, zero], [quantized]))
                pairs.append(onnx.helper.make_node("DequantizeLinear", [quantized, scale, zero], [back]))
                nodes[node].input[0] = back
            model.graph.initializer.append(numpy_helper.from_array(np.float32(layer.input.scale[0]), f"scale{i}"))
            model.graph.initializer.append(numpy_helper.from_array(np.uint8(layer.input.zero_point[0]), f"zero{i}"))
        kept = [*pairs, *model.graph.node]
        order, known = [], {v.name for v in model.graph.input} | {t.name for t in model.graph.initializer} | {""}
        while kept:
            ready = [node for node in kept if known.issuperset(node.input)]
            assert ready
            order += ready
            known.update(name for node in ready for name in node.output)
            kept = [node for node in kept if node not in ready]
        del model.graph.node[:]
        model.graph.node.extend(order)
        return model


@pytest.fixture
def export(quantize, tmp_path):
    """Calibrate a model on batches, export it, and open what was written."""

    def run(model, input_shape, *batches, prepare=lambda quantized: None, folder="out", **options):
        quantized = quantize(model, input_shape, *batches)
        prepare(quantized)
        torch.save(quantized.state_dict(), tmp_path / "quant.pth")
        (tmp_path / folder).mkdir(exist_ok=True)
        result = dopt_api.export(model, tmp_path / "config.json", tmp_path / "quant.pth", tmp_path / folder, **options)
        return Exported(result), quantized

    return run


def assert_simulates(exported, quantized, *inputs, steps=1e-4):
    """The graph with quantized inputs computes what the quantized model computes, to float rounding."""
    with torch.no_grad():
        wanted = quantized.eval()(*inputs)
    found = exported.run(*inputs, model=exported.with_quantized_inputs())[0]
    np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=steps * float(wanted.abs().max()) + 1e-6)


def test_the_graph_is_float_and_folded_and_named_like_the_strategy_file(export, small_net, tmp_path):
    exported, _ = export(small_net, small_net.input_shape, torch.randn(16, 3, 12, 12))
    kinds = [node.op_type for node in exported.onnx.graph.node]
    assert not {"BatchNormalization", "QuantizeLinear", "DequantizeLinear", "LeakyRelu", "Identity"} & set(kinds)
    assert [value.name for value in exported.onnx.graph.input] == ["x"]
    assert [value.name for value in exported.onnx.graph.output] == ["output"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model.onnx", "quant_params.json"]
    chosen = json.loads((tmp_path / "config.json").read_text())["layer_strategy"]
    assert [layer.name for layer in exported.params.layers] == list(chosen)


def test_every_name_in_the_parameter_file_exists_in_the_graph(export, small_net):
    exported, _ = export(small_net, small_net.input_shape, torch.randn(16, 3, 12, 12))
    for layer in exported.params.layers:
        node = exported.nodes[layer.node]
        assert list(node.input) == [layer.input.tensor, layer.weight.tensor, layer.bias.tensor]
    assert [layer.input.tensor for layer in exported.params.layers] == ["x", "/conv2/input", "/fc/input"]


def test_exported_weights_are_integers_times_their_scale_to_the_bit(export, small_net):
    exported, _ = export(small_net, small_net.input_shape, torch.randn(16, 3, 12, 12))
    for layer in exported.params.layers:
        weight, scale = exported.values[layer.weight.tensor], np.float32(layer.weight.scale)
        rows = np.moveaxis(weight, layer.weight.axis, 0).reshape(len(scale), -1)
        integers = np.rint(rows.astype(np.float64) / scale[:, None])
        assert np.abs(integers).max() <= 127
        np.testing.assert_array_equal(integers.astype(np.float32) * scale[:, None], rows)
        assert np.float32(layer.bias.scale).tolist() == (np.float32(layer.input.scale[0]) * scale).tolist()


def test_the_files_simulate_the_quantized_model(export, small_net):
    x = torch.randn(16, 3, 12, 12)
    exported, quantized = export(small_net, small_net.input_shape, x)
    assert_simulates(exported, quantized, x[:2])
    with torch.no_grad():
        wanted = small_net(x[:2]).numpy()
    noise = exported.run(x[:2])[0] - wanted
    assert 10 * np.log10((wanted**2).sum() / (noise**2).sum()) > 35


def test_the_files_simulate_a_trained_model_whose_running_statistics_have_moved(export, small_net):
    def train(quantized):
        quantized.train()
        optimizer = torch.optim.SGD(quantized.parameters(), 0.05)
        for _ in range(5):
            loss = quantized(3 * torch.randn(8, 3, 12, 12) + 1).square().mean() + dopt_api.get_quant_loss(quantized)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    x = torch.randn(8, 3, 12, 12)
    exported, quantized = export(small_net, small_net.input_shape, x, prepare=train)
    assert_simulates(exported, quantized, x[:2], steps=2e-3)  # a product near a tie may fall to either side


def test_a_state_saved_while_still_calibrating_exports_the_same_bytes(export, small_net, quantize, config_of, tmp_path):
    x = torch.randn(16, 3, 12, 12)
    exported, _ = export(small_net, small_net.input_shape, x)
    left_on = dopt_api.optimize(small_net, tmp_path / "config.json")
    dopt_api.set_calibrate_state(left_on, True)
    left_on(x)
    torch.save(left_on.state_dict(), tmp_path / "on.pth")
    (tmp_path / "second").mkdir()
    result = dopt_api.export(small_net, tmp_path / "config.json", tmp_path / "on.pth", tmp_path / "second")
    assert result.params.read_bytes() == exported.result.params.read_bytes()
    assert result.model.read_bytes() == exported.result.model.read_bytes()


class Branches(nn.Module):
    """Two inputs, three outputs, every dimension of convolution, a linear layer on three dimensions, one shared."""

    def __init__(self):
        super().__init__()
        self.c1 = nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")
        self.c3 = nn.Conv3d(2, 3, 2, bias=False)
        self.t1 = nn.ConvTranspose1d(4, 6, 2, stride=2, groups=2)
        self.tokens = nn.Linear(6, 6)
        self.twin = nn.Linear(6, 6)
        self.twin.load_state_dict(self.tokens.state_dict())

    def forward(self, a, b):
        y = self.t1(self.c1(a)).permute(0, 2, 1)
        y = self.tokens(torch.relu(self.tokens(y)))
        return {"tokens": y, "rest": [self.twin(y.mean(1)), self.c3(b)]}


def test_every_kind_of_layer_and_shared_and_equal_layers_are_told_apart(quantize, tmp_path):
    model = Branches().eval()
    shape = "a:2,4,5;b:2,2,3,3,3"
    inputs = (torch.randn(2, 4, 5), torch.randn(2, 2, 3, 3, 3))
    quantized = quantize(model, shape)
    dopt_api.set_calibrate_state(quantized, True)
    quantized(*inputs)
    dopt_api.set_calibrate_state(quantized, False)
    torch.save(quantized.state_dict(), tmp_path / "quant.pth")
    exported = Exported(dopt_api.export(model, tmp_path / "config.json", tmp_path / "quant.pth", tmp_path))
    assert [v.name for v in exported.onnx.graph.input] == ["a", "b"]
    assert [v.name for v in exported.onnx.graph.output] == ["output_0", "output_1", "output_2"]
    layers = {layer.name: layer for layer in exported.params.layers}
    assert layers["tokens/Linear"].other_calls == (("/tokens/MatMul_1", "/tokens/input_1"),)
    assert layers["tokens/Linear"].weight.axis == 1  # a matrix product takes the transposed weight
    assert layers["twin/Linear"].weight.tensor == "twin.weight"
    assert layers["twin/Linear"].node == "/twin/Gemm"
    assert layers["t1/ConvTranspose1D"].weight.axis == 1
    assert len(layers["t1/ConvTranspose1D"].bias.scale) == 6
    assert layers["c3/Conv3D"].bias is None
    with torch.no_grad():
        wanted = quantized(*inputs)
    found = exported.run(*inputs, model=exported.with_quantized_inputs())
    for one, other in zip(found, [wanted["tokens"], *wanted["rest"]], strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=0, atol=1e-5)


def test_dynamic_batch_and_names_of_outputs(export, small_net):
    exported, _ = export(
        small_net, small_net.input_shape, torch.randn(8, 3, 12, 12), dynamic_batch=True, output_names=["scores"]
    )
    assert exported.onnx.graph.output[0].name == "scores"
    x = torch.randn(5, 3, 12, 12)
    assert exported.run(x)[0].shape == (5, 4)


def test_the_batch_is_fixed_otherwise(export, small_net):
    exported, _ = export(small_net, small_net.input_shape, torch.randn(8, 3, 12, 12))
    assert [d.dim_value for d in exported.onnx.graph.input[0].type.tensor_type.shape.dim] == [2, 3, 12, 12]


def test_layers_left_float_are_folded_but_not_on_a_grid(quantize, small_net, tmp_path):
    quantized = quantize(small_net, small_net.input_shape, torch.randn(8, 3, 12, 12), only=["conv2/Conv2D"])
    torch.save(quantized.state_dict(), tmp_path / "quant.pth")
    exported = Exported(dopt_api.export(small_net, tmp_path / "config.json", tmp_path / "quant.pth", tmp_path))
    assert [layer.name for layer in exported.params.layers] == ["conv2/Conv2D"]
    assert "BatchNormalization" not in {node.op_type for node in exported.onnx.graph.node}
    factor = small_net.bn1.weight / torch.sqrt(small_net.bn1.running_var + small_net.bn1.eps)
    folded = (small_net.conv1.weight * factor.view(-1, 1, 1, 1)).detach().numpy()
    np.testing.assert_allclose(exported.values["conv1.weight"], folded, rtol=1e-6)


def test_the_model_given_is_unchanged_and_may_be_in_training_mode_and_float64(export, small_net):
    model = small_net.double().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exported, _ = export(model, small_net.input_shape, torch.randn(8, 3, 12, 12, dtype=torch.float64))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert exported.run(torch.randn(2, 3, 12, 12))[0].dtype == np.float32


def test_the_golden_parameter_file_is_reproduced_to_the_byte(tmp_path):
    path = Path(__file__).parent / "golden" / "network.py"
    spec = importlib.util.spec_from_file_location("golden_network", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.export(tmp_path).read_bytes() == path.with_name("quant_params.json").read_bytes()


def test_a_scale_learned_or_calibrated_reaches_the_file_as_it_is(export, small_net):
    exported, quantized = export(small_net, small_net.input_shape, torch.randn(8, 3, 12, 12))
    for layer in exported.params.layers:
        quantizer = quantized.get_submodule(layer.name.split("/")[0]).dopt_quantizer
        assert np.float32(layer.input.scale[0]) == quantizer.input_scale.detach().numpy()
        assert layer.input.zero_point == (int(quantizer.input_zero_point),)


def test_input_quantization_in_the_file_is_that_of_the_core(export, small_net):
    x = torch.randn(8, 3, 12, 12)
    exported, quantized = export(small_net, small_net.input_shape, x)
    first = exported.params.layers[0].input
    seen = []
    hook = quantized.conv1.dopt_quantizer
    with torch.no_grad():
        seen = hook.quantize_input(x).numpy()
    np.testing.assert_array_equal(seen, fake_quantize(x.numpy(), first.scale[0], first.zero_point[0], Grid(8)))


def nothing_in(folder):
    return list(folder.iterdir()) == []


def test_exporting_what_was_neither_calibrated_nor_trained_is_refused(export, small_net, tmp_path):
    with pytest.raises(CalibrationError, match="'conv1/Conv2D' and 2 other layers were neither") as caught:
        export(small_net, small_net.input_shape)
    assert "set_calibrate_state" in caught.value.fix
    assert nothing_in(tmp_path / "out")


def test_calibration_data_with_nan_is_refused_by_layer_at_the_latest_at_export(quantize, small_net, tmp_path):
    quantized = quantize(small_net, small_net.input_shape)
    dopt_api.set_calibrate_state(quantized, True)
    x = torch.randn(4, 3, 12, 12)
    x[1, 0, 0, 0] = float("nan")
    quantized(x)
    torch.save(quantized.state_dict(), tmp_path / "quant.pth")
    (tmp_path / "out").mkdir()
    with pytest.raises(CalibrationError, match="'conv1/Conv2D' had NaN or infinity in 1 of 4 samples"):
        dopt_api.export(small_net, tmp_path / "config.json", tmp_path / "quant.pth", tmp_path / "out")
    assert nothing_in(tmp_path / "out")


@pytest.mark.parametrize("tensor", ["fc.weight", "bn1.running_var", "conv2.bias"])
def test_weights_with_nan_are_refused_by_layer(export, small_net, tmp_path, tensor):
    def spoil(quantized):
        quantized.state_dict()[tensor].view(-1)[0] = float("nan")

    with pytest.raises(NumbersError, match=r"of layer '(fc/Linear|conv1/Conv2D|conv2/Conv2D)' has NaN"):
        export(small_net, small_net.input_shape, torch.randn(4, 3, 12, 12), prepare=spoil)
    assert nothing_in(tmp_path / "out")


def test_a_missing_output_directory_is_named_with_the_command_that_makes_it(export, small_net, tmp_path):
    export(small_net, small_net.input_shape, torch.randn(4, 3, 12, 12))
    with pytest.raises(OutputError, match="does not exist") as caught:
        dopt_api.export(small_net, tmp_path / "config.json", tmp_path / "quant.pth", tmp_path / "absent")
    assert "os.makedirs" in caught.value.fix
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("which", ["model.onnx", "quant_params.json"])
def test_a_disk_that_is_full_leaves_nothing(export, small_net, tmp_path, monkeypatch, which):
    export(small_net, small_net.input_shape, torch.randn(4, 3, 12, 12))
    (tmp_path / "full").mkdir()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if which == "model.onnx":
        monkeypatch.setattr(onnx, "save_model", full)
    else:
        monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left"):
        dopt_api.export(small_net, tmp_path / "config.json", tmp_path / "quant.pth", tmp_path / "full")
    monkeypatch.undo()
    assert nothing_in(tmp_path / "full")


def test_earlier_results_survive_a_failing_export(export, small_net, tmp_path):
    exported, _ = export(small_net, small_net.input_shape, torch.randn(4, 3, 12, 12))
    before = [exported.result.model.read_bytes(), exported.result.params.read_bytes()]
    with pytest.raises(CalibrationError):
        export(small_net, small_net.input_shape)
    assert [exported.result.model.read_bytes(), exported.result.params.read_bytes()] == before


def test_a_model_that_does_not_run_on_its_shapes_is_refused_at_export(export, small_net, tmp_path):
    with pytest.raises(ModelError, match="cannot be written as ONNX") as caught:
        export(small_net, "x:2,5,12,12", torch.randn(4, 3, 12, 12))
    assert "x:[2, 5, 12, 12]" in caught.value.where
    assert nothing_in(tmp_path / "out")


def test_another_model_than_the_strategy_file_was_written_for_is_refused(export, small_net, tmp_path):
    export(small_net, small_net.input_shape, torch.randn(4, 3, 12, 12))
    other = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ConfigError, match="no layer 'conv1/Conv2D'"):
        dopt_api.export(other, tmp_path / "config.json", tmp_path / "quant.pth", tmp_path)


@pytest.mark.parametrize("name", ["with space", "ünï 目录", "link"])
def test_any_path_a_user_has(export, small_net, tmp_path, name, monkeypatch):
    export(small_net, small_net.input_shape, torch.randn(4, 3, 12, 12))
    folder = tmp_path / name
    if name == "link":
        (tmp_path / "real").mkdir()
        folder.symlink_to(tmp_path / "real")
    else:
        folder.mkdir()
    for file in ("config.json", "quant.pth"):
        (folder / file).write_bytes((tmp_path / file).read_bytes())
    monkeypatch.chdir(folder)
    result = dopt_api.export(small_net, "config.json", "quant.pth", ".")
    assert result.model.is_file()
    result = dopt_api.export(small_net, str(folder / "config.json"), str(folder / "quant.pth"), str(folder))
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.onnx", "quant.pth", "quant_params.json"]
    assert result.params.parent == folder


def test_files_have_the_usual_permissions(export, small_net):
    exported, _ = export(small_net, small_net.input_shape, torch.randn(4, 3, 12, 12))
    mask = os.umask(0)
    os.umask(mask)
    for file in (exported.result.model, exported.result.params):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


def test_operations_of_other_functions_that_look_like_marks_stay(export):
    class Activated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.slope = nn.Parameter(torch.randn(1, 4, 1, 1))

        def forward(self, x):
            return nn.functional.leaky_relu(self.conv(x)) * nn.functional.leaky_relu(self.slope)

    x = torch.randn(2, 3, 4, 4)
    exported, quantized = export(Activated().eval(), "x:2,3,4,4", x)
    assert_simulates(exported, quantized, x)


class Pooled(nn.Module):
    """A layer that is run and whose result nobody takes, as the pooler of many transformers."""

    def __init__(self):
        super().__init__()
        self.body, self.pooler = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        y = self.body(x)
        self.pooler(y)
        return y


def test_a_layer_that_no_output_depends_on_is_said_and_left_out(quantize, config_of, tmp_path, caplog):
    net = Pooled().eval()
    model = quantize(net, "x:1,4", torch.randn(8, 4))
    torch.save(model.state_dict(), tmp_path / "quant.pth")
    result = dopt_api.export(net, config_of(net, "x:1,4"), tmp_path / "quant.pth", tmp_path)
    assert [layer.name for layer in params.read_params(result.params).layers] == ["body/Linear"]
    assert "'pooler/Linear' is not in the exported files: no output of the model depends on it" in caplog.text
