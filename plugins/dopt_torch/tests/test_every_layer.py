"""Every kind of layer with every option it has, the whole way: what is simulated, and what is written."""

import copy
from itertools import pairwise

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

import dopt_api
from dopt_api.params import FloatLayer, fold, quantize_layer, read_params
from dopt_api.quantizer import BatchNorm, Statistics, activation_parameters, fake_quantize
from dopt_api.strategy import STRATEGIES

ACTIVATION = STRATEGIES["Quant_INT8-8"].activation

SIZES = {1: (9,), 2: (9, 8), 3: (6, 5, 7)}
SHARED = {
    "plain": {},
    "no bias": {"bias": False},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
    "dilation": {"dilation": 2},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "many channels out": {"out_channels": 6, "groups": 2},
}
CONVOLUTIONS = {
    "same": {"padding": "same"},
    "same, uneven": {"padding": "same", "kernel_size": 2},
    "same, dilated": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "same, circular": {"padding": "same", "padding_mode": "circular"},
}
TRANSPOSED = {"output padding": {"stride": 2, "output_padding": 1}, "cropped": {"stride": 2, "padding": 1}}


def cases():
    for dims in SIZES:
        for option in {**SHARED, **CONVOLUTIONS}:
            if not (option == "reflect" and dims == 3 and str(torch.__version__) < "1.13"):  # torch did not have it
                yield f"Conv{dims}d", option
        for option in {**SHARED, **TRANSPOSED}:
            yield f"ConvTranspose{dims}d", option


def build(kind, option, *, folded):
    """Return layer, normalization (or the identity) and activation, and inputs."""
    dims = int(kind[-2])
    options = {**SHARED, **CONVOLUTIONS, **TRANSPOSED}[option]
    layer = getattr(nn, kind)(**{"in_channels": 4, "out_channels": 4, "kernel_size": 3, **options})
    norm = nn.Identity()
    if folded:
        norm = getattr(nn, f"BatchNorm{dims}d")(layer.out_channels)
        for tensor, low, high in (
            (norm.weight, -2, 2),
            (norm.bias, -1, 1),
            (norm.running_mean, -1, 1),
            (norm.running_var, 0.2, 3),
        ):
            nn.init.uniform_(tensor, low, high)
    return nn.Sequential(layer, norm, nn.ReLU()).eval(), torch.randn(2, 4, *SIZES[dims]) + 0.3


def shape_of(x):
    return f"x:{','.join(map(str, x.shape))}"


def array(tensor):
    return None if tensor is None else tensor.detach().numpy()


def core_layer(model):
    """Return the first layer as the core sees it, with the normalization after it."""
    layer, norm = model[0], model[1]
    if isinstance(norm, nn.Identity):
        numbers = None
    else:
        numbers = BatchNorm(*map(array, (norm.weight, norm.bias, norm.running_mean, norm.running_var)), norm.eps)
    axis = 1 if type(layer).__name__.startswith("ConvTranspose") else 0
    return FloatLayer(array(layer.weight), array(layer.bias), numbers, axis)


@pytest.fixture
def exported(quantize, tmp_path):
    """Calibrate and export; return the quantized model, the parameter file and the graph."""

    def run(model, shape, *inputs):
        quantized = quantize(model, shape)
        dopt_api.set_calibrate_state(quantized, True)
        with torch.no_grad():
            quantized(*inputs)
        dopt_api.set_calibrate_state(quantized, False)
        torch.save(quantized.state_dict(), tmp_path / "quant.pth")
        result = dopt_api.export(model, tmp_path / "config.json", tmp_path / "quant.pth", tmp_path)
        return quantized, read_params(result.params), onnx.load(str(result.model))

    return run


def simulate(graph, params, *inputs):
    """Run the graph with the inputs of its quantized layers quantized by ONNX's own operators."""
    graph = copy.deepcopy(graph)
    for i, layer in enumerate(params.layers):
        numbers = [(f"scale{i}", np.float32(layer.input.scale[0])), (f"zero{i}", np.uint8(layer.input.zero_point[0]))]
        graph.graph.initializer.extend(numpy_helper.from_array(np.asarray(value), name) for name, value in numbers)
        names = [name for name, _ in numbers]
        for call, edge in [(layer.node, layer.input.tensor), *layer.other_calls]:
            place, node = next((k, n) for k, n in enumerate(graph.graph.node) if n.name == call)
            assert node.input[0] == edge
            node.input[0] = f"{call}:x"
            graph.graph.node.insert(place, helper.make_node("DequantizeLinear", [f"{call}:q", *names], [f"{call}:x"]))
            graph.graph.node.insert(place, helper.make_node("QuantizeLinear", [edge, *names], [f"{call}:q"]))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})[0]


def assert_simulated(quantized, params, graph, *inputs):
    with torch.no_grad():
        wanted = quantized(*inputs).numpy()
    np.testing.assert_allclose(simulate(graph, params, *inputs), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch says that it copies
@pytest.mark.parametrize(("kind", "option"), list(cases()))
def test_a_quantized_layer_computes_with_the_core_s_integers(quantize, kind, option):
    model, x = build(kind, option, folded=False)
    quantized = quantize(model, shape_of(x), x)
    statistics = Statistics()
    statistics.update(x.numpy(), 1)
    scale, zero_point = activation_parameters(statistics, ACTIVATION, layer="0")
    assert array(quantized[0].dopt_quantizer.input_scale) == scale
    with torch.no_grad():
        weight = quantize_layer(core_layer(model), quantized[0].dopt_quantizer.plan, scale, zero_point).weight
        reference = copy.deepcopy(model)
        reference[0].weight.copy_(torch.from_numpy(weight))
        given = 1.5 * x  # beyond the range, too
        wanted = reference(torch.from_numpy(fake_quantize(given.numpy(), scale, zero_point, ACTIVATION)))
        assert torch.equal(quantized(given), wanted)
        assert not torch.equal(quantized(given), model(given))


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch says that it copies
@pytest.mark.parametrize(("kind", "option"), list(cases()))
def test_a_layer_with_its_normalization_is_written_as_the_core_folds_it(exported, kind, option):
    model, x = build(kind, option, folded=True)
    quantized, params, graph = exported(model, shape_of(x), x)
    (layer,) = params.layers
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    scale, zero_point = np.float32(layer.input.scale[0]), layer.input.zero_point[0]
    wanted = quantize_layer(core_layer(model), quantized[0].dopt_quantizer.plan, scale, zero_point)
    np.testing.assert_array_equal(values[layer.weight.tensor], wanted.weight)
    np.testing.assert_array_equal(values[layer.bias.tensor], fold(core_layer(model))[1])
    np.testing.assert_array_equal(np.float32(layer.weight.scale), wanted.weight_scale)
    assert layer.name == f"0/{kind[:-1]}D"
    assert "BatchNormalization" not in {node.op_type for node in graph.graph.node}
    assert_simulated(quantized, params, graph, x)


# ---- inputs and weights that are out of the ordinary


class Tied(nn.Module):
    """A table whose weight is that of the last layer, as in language models."""

    def __init__(self):
        super().__init__()
        self.table, self.mid, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(torch.relu(self.mid(self.table(ids))))


class Twins(nn.Sequential):
    """Two layers that share their weight and not their bias."""

    def __init__(self):
        super().__init__(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self[2].weight = self[0].weight


def image(*channels):
    return [nn.Conv2d(one, other, 3) for one, other in pairwise(channels)]


def zeroed(*sizes):
    layer = nn.Linear(*sizes)
    nn.init.zeros_(layer.weight)
    return layer


UNUSUAL = {
    "unbatched image": (lambda: nn.Sequential(*image(3, 4, 2)), "x:3,8,8", lambda: torch.randn(3, 8, 8)),
    "vector": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), "x:4", lambda: torch.randn(4)),
    "tokens": (
        lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)),
        "x:2,3,4",
        lambda: torch.randn(2, 3, 4),
    ),
    "four dimensions": (lambda: nn.Sequential(nn.Linear(4, 5)), "x:2,3,2,4", lambda: torch.randn(2, 3, 2, 4)),
    "a layer for a model": (lambda: nn.Linear(4, 5), "x:2,4", lambda: torch.randn(2, 4)),
    "an input called weight": (lambda: nn.Linear(4, 5), "weight:2,4", lambda: torch.randn(2, 4)),
    "an input called bias": (lambda: nn.Linear(4, 5), "bias:2,4", lambda: torch.randn(2, 4)),
    "an input called like an edge": (lambda: nn.Linear(4, 5), "/input:2,4", lambda: torch.randn(2, 4)),
    "tied to a table": (Tied, "ids:2,5:int64", lambda: torch.randint(0, 11, (2, 5))),
    "tied to a layer": (Twins, "x:2,6", lambda: torch.randn(2, 6)),
    "a transformer layer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
        "x:2,5,8",
        lambda: torch.randn(2, 5, 8),
    ),
    "one sign only": (
        lambda: nn.Sequential(nn.ReLU(), nn.Linear(4, 5)),
        "x:2,4",
        lambda: -torch.rand(2, 4) - 1,
    ),
    "a weight of zeros": (
        lambda: nn.Sequential(nn.Linear(4, 5), zeroed(5, 3)),
        "x:2,4",
        lambda: torch.randn(2, 4),
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_written_computes_what_was_simulated(exported, name):
    make, shape, draw = UNUSUAL[name]
    model, x = make().eval(), draw()
    quantized, params, graph = exported(model, shape, x)
    assert len(params.layers) == sum(hasattr(layer, "dopt_quantizer") for layer in quantized.modules()) > 0
    assert graph.graph.input[0].name == shape.split(":")[0]
    assert_simulated(quantized, params, graph, x)


def test_the_table_that_a_layer_s_weight_is_tied_to_stays_float(exported):
    model, ids = Tied().eval(), torch.arange(10).view(2, 5)
    _, params, graph = exported(model, "ids:2,5:int64", ids)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    (gather,) = [node for node in graph.graph.node if node.op_type == "Gather"]
    np.testing.assert_array_equal(values[gather.input[0]], array(model.table.weight))
    head = next(layer for layer in params.layers if layer.name == "head/Linear")
    assert head.weight.tensor != gather.input[0]
