"""Models that were once exported wrongly, or that once broke: each is compared from end to end."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

import dopt_api
from dopt_api.errors import ConfigError, ModelError
from dopt_api.params import read_params


class Model(nn.Module):
    """A module from its parts and a forward function."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.function(self, *args)


def conv(*args, **kwargs):
    return nn.Conv2d(*(args or (3, 3, 3)), **kwargs)


def moved(model):
    """Give batch normalizations statistics unlike those of a fresh one."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.2, 3)
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.uniform_(norm.bias, -1, 1)
    return model.eval()


@pytest.fixture
def whole_way(quantize, tmp_path):
    """Go from a model to its files; return the greatest difference to the quantized model, and the parameters."""

    def go(model, shape, *inputs, **options):
        quantized = quantize(model, shape, **options)
        dopt_api.set_calibrate_state(quantized, True)
        with torch.no_grad():
            quantized(*inputs)
        dopt_api.set_calibrate_state(quantized, False)
        torch.save(quantized.state_dict(), tmp_path / "quant.pth")
        result = dopt_api.export(model, tmp_path / "config.json", tmp_path / "quant.pth", tmp_path)
        params = read_params(result.params)
        graph = onnx.load(str(result.model))
        with torch.no_grad():
            wanted = quantized.eval()(*inputs).numpy()
        found = simulate(graph, params, inputs)
        return np.abs(found - wanted).max() / np.abs(wanted).max(), params

    return go


def simulate(graph, params, inputs):
    """Run the graph with the inputs of its quantized layers quantized."""
    for i, layer in enumerate(params.layers):
        scale, zero = (f"scale{i}", np.float32(layer.input.scale[0])), (f"zero{i}", np.uint8(layer.input.zero_point[0]))
        graph.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in (scale, zero))
        for node, edge in [(layer.node, layer.input.tensor), *layer.other_calls]:
            place = next(k for k, n in enumerate(graph.graph.node) if n.name == node)
            graph.graph.node[place].input[0] = f"{node}:x"
            names = [scale[0], zero[0]]
            graph.graph.node.insert(
                place, onnx.helper.make_node("DequantizeLinear", [f"{node}:q", *names], [f"{node}:x"])
            )
            graph.graph.node.insert(place, onnx.helper.make_node("QuantizeLinear", [edge, *names], [f"{node}:q"]))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, {n: t.float().numpy() for n, t in zip(names, inputs, strict=True)})[0]


def aliased():
    parts = {"conv": conv(bias=False), "bn": nn.BatchNorm2d(3)}
    return Model(lambda s, x: s.block(x), **parts, block=nn.Sequential(*parts.values(), nn.ReLU()))


class Standardized(nn.Conv2d):
    def forward(self, x):
        return functional.conv2d(x, self.weight / self.weight.std(), self.bias)


class BiasAddedLater(nn.Conv2d):
    def forward(self, x):
        return functional.conv2d(x, self.weight) + self.bias.view(1, -1, 1, 1)


class BiasScaled(nn.Conv2d):
    def forward(self, x):
        return functional.conv2d(x, self.weight, self.bias * 0.01)


class BiasIgnored(nn.Conv2d):
    def forward(self, x):
        return functional.conv2d(x, self.weight, None)


def equal_biases():
    layers = [conv(), nn.ReLU(), conv(), nn.ReLU(), conv()]
    for layer in layers[::2]:
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


SAME = {
    "a batch normalization registered twice": aliased,
    "a standardized weight before batch normalization": lambda: nn.Sequential(
        Standardized(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), conv()
    ),
    "a bias added by the forward itself": lambda: nn.Sequential(BiasAddedLater(3, 3, 3), conv()),
    "a bias that the forward scales": lambda: nn.Sequential(BiasScaled(3, 3, 3), nn.BatchNorm2d(3), conv()),
    "a bias that the forward ignores": lambda: nn.Sequential(BiasIgnored(3, 3, 3), nn.BatchNorm2d(3), conv()),
    "a bias that the forward does not know": lambda: nn.Sequential(
        BiasIgnored(3, 3, 3, bias=False), nn.BatchNorm2d(3), conv()
    ),
    "a weight that a function uses too": lambda: Model(
        lambda s, x: s.last(s.bn(s.conv(x)) + functional.conv2d(x, s.conv.weight)),
        conv=conv(bias=False),
        bn=nn.BatchNorm2d(3),
        last=conv(),
    ),
    "a weight that is used through a view": lambda: Model(
        lambda s, x: s.last(s.fc(x).reshape(2, -1)) + x.reshape(2, -1)[:, :3] @ s.last.weight[:, :3].t(),
        fc=nn.Linear(8, 8),
        last=nn.Linear(192, 3),
    ),
    "layers with equal biases": equal_biases,
    "parameters given to a layer": lambda: Model(
        lambda s, x: s.conv(x) + s.fc(s.token).view(1, 3, 1, 1),
        conv=conv(),
        fc=nn.Linear(4, 3),
        token=nn.Parameter(torch.randn(1, 4)),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_what_is_exported_computes_what_was_simulated(whole_way, name):
    difference, params = whole_way(moved(SAME[name]()), "x:2,3,8,8", torch.randn(2, 3, 8, 8))
    assert difference < 1e-5
    assert params.layers


def hidden_use(y):
    return y.mean((2, 3), keepdim=True).sigmoid()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # and yet people have it
def test_a_use_that_cannot_be_seen_is_found_by_computing(whole_way):
    hidden = torch.jit.script(hidden_use)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) * hidden(y)

    with pytest.raises(ModelError, match="Folding batch normalization changes what the model computes"):
        whole_way(moved(Model(forward, conv=conv(), bn=nn.BatchNorm2d(3))), "x:2,3,8,8", torch.randn(2, 3, 8, 8))


class Cache(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.grid = conv(3, 3, 3, padding=1), None

    def forward(self, x):
        y = self.conv(x)
        if self.grid is None:
            self.grid = torch.ones_like(y)
        return y + self.grid


def test_a_model_that_keeps_tensors_between_calls_is_not_touched(config_of):
    model = Cache()
    config = config_of(model, "x:1,3,8,8")
    assert model.grid is None
    assert type(model(torch.randn(1, 3, 8, 8))) is torch.Tensor
    dopt_api.optimize(model, config)(torch.randn(1, 3, 8, 8))


def test_an_empty_first_training_batch_is_let_through(quantize):
    quantized = quantize(nn.Sequential(nn.Linear(4, 3)), "x:1,4").train()
    assert quantized(torch.randn(0, 4)).shape == (0, 3)
    quantized(torch.randn(5, 4))
    assert quantized[0].dopt_quantizer.is_ready()


@pytest.mark.parametrize(("name", "tolerance"), [("float64", 1e-5), ("float16", 5e-3)])
def test_a_floating_type_named_in_the_input_shape(whole_way, name, tolerance):
    dtype = getattr(torch, name)
    if name == "float16" and str(torch.__version__) < "2":
        pytest.skip("torch 1.11 has no half-precision convolution on CPUs")
    model = nn.Sequential(conv()).to(dtype).eval()
    difference, _ = whole_way(model, f"x:2,3,8,8:{name}", torch.randn(2, 3, 8, 8).to(dtype))
    assert difference < tolerance


def test_a_model_whose_only_child_is_called_module(whole_way):
    assert whole_way(Model(lambda s, x: s.module(x), module=conv()), "x:2,3,8,8", torch.randn(2, 3, 8, 8))[0] < 1e-5


def test_pruning_a_quantized_layer_works(quantize):
    from torch.nn.utils import prune

    x = torch.randn(2, 3, 8, 8)
    quantized = quantize(nn.Sequential(conv()), "x:1,3,8,8", x)
    prune.l1_unstructured(quantized[0], "weight", 0.5)
    assert quantized(x).shape == (2, 3, 6, 6)
    assert (quantized[0].weight == 0).float().mean() > 0.4


def test_threads_may_share_a_model(quantize):
    from concurrent.futures import ThreadPoolExecutor

    x = torch.randn(2, 3, 8, 8)
    quantized = quantize(nn.Sequential(conv(), nn.ReLU(), conv()), "x:1,3,8,8", x).eval()
    with torch.no_grad():
        wanted = quantized(x)

    def run(_):
        with torch.no_grad():
            return quantized(x)

    with ThreadPoolExecutor(4) as threads:
        assert all(torch.equal(result, wanted) for result in threads.map(run, range(40)))
    assert isinstance(quantized[0].weight, nn.Parameter)


def test_a_norm_fused_by_hand_after_optimizing(quantize):
    x = torch.randn(2, 3, 8, 8)
    quantized = quantize(nn.Sequential(conv(), nn.BatchNorm2d(3)).eval(), "x:1,3,8,8", x)
    quantized[1] = nn.Identity()
    assert quantized(x).shape == (2, 3, 6, 6)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")  # torch calls them experimental
def test_lazy_layers_are_refused_with_the_remedy(tmp_path):
    with pytest.raises(ModelError, match="has no weights yet") as caught:
        dopt_api.generate_config(nn.Sequential(nn.LazyConv2d(4, 3)), "x:1,3,8,8", tmp_path / "c.json")
    assert "Run the model once" in caught.value.fix


def test_an_input_named_like_a_weight(whole_way):
    assert whole_way(nn.Linear(4, 3), "weight:2,4", torch.randn(2, 4))[0] < 1e-5


@pytest.mark.parametrize("names", [["x"], ["a", "b"], ["a", "a"], []])
def test_output_names_that_do_not_fit_are_refused(small_net, quantize, tmp_path, names):
    quantized = quantize(small_net, small_net.input_shape, torch.randn(4, 3, 12, 12))
    torch.save(quantized.state_dict(), tmp_path / "quant.pth")
    with pytest.raises(ConfigError, match="output names"):
        dopt_api.export(small_net, tmp_path / "config.json", tmp_path / "quant.pth", tmp_path, output_names=names)


def test_an_average_of_models_can_be_kept_by_copying_state(quantize):
    x = torch.randn(4, 3, 8, 8)
    quantized = quantize(nn.Sequential(conv()), "x:1,3,8,8").train()
    average = copy.deepcopy(quantized)
    quantized(x).sum().backward()
    assert list(average.state_dict()) == list(quantized.state_dict())
    with torch.no_grad():
        average(x)
        for one, other in zip(average.state_dict().values(), quantized.state_dict().values(), strict=True):
            one.copy_(other)
        assert torch.equal(average.eval()(x), quantized.eval()(x))


def test_a_float_checkpoint_loaded_after_a_dry_run_brings_its_own_weight_scales(quantize):
    x = torch.randn(4, 3, 8, 8)
    model = nn.Sequential(conv())
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained[0].weight.mul_(10)
    quantized = quantize(model, "x:1,3,8,8", x).train()
    quantized(x)
    quantized.load_state_dict(trained.state_dict())
    with torch.no_grad():
        wanted, found = trained(x), quantized.eval()(x)
    assert (found - wanted).norm() / wanted.norm() < 0.05


def test_modes_set_while_calibrating_are_kept_and_do_not_matter_to_it(quantize, small_net):
    quantized = quantize(small_net.train(), small_net.input_shape)
    before = quantized.bn1.running_mean.clone()
    dopt_api.set_calibrate_state(quantized, True)
    quantized.train()
    quantized(torch.randn(4, 3, 12, 12))
    assert quantized.bn1.training
    quantized.eval()
    dopt_api.set_calibrate_state(quantized, False)
    assert not quantized.training
    assert torch.equal(quantized.bn1.running_mean, before)


@pytest.mark.parametrize("mode", ["False", None, 2])
def test_a_mode_that_is_no_truth_value_is_refused(quantize, small_net, mode):
    quantized = quantize(small_net, small_net.input_shape)
    with pytest.raises(ModelError, match="calibration mode"):
        dopt_api.set_calibrate_state(quantized, mode)


def test_what_is_not_folded_is_said(tmp_path):
    model = nn.Sequential(nn.BatchNorm2d(3), conv())
    path = dopt_api.generate_config(model, "x:2,3,8,8", tmp_path / "c.json")
    assert "not folded, since no layer alone feeds it: '0'" in path.read_text()


def test_extra_state_of_modules_stays_in_the_checkpoint(whole_way):
    class Versioned(nn.ReLU):
        def get_extra_state(self):
            return torch.tensor([3])

        def set_extra_state(self, state):
            assert int(state) == 3

    assert whole_way(nn.Sequential(conv(), Versioned()), "x:2,3,8,8", torch.randn(2, 3, 8, 8))[0] < 1e-5
