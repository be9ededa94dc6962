"""What one run of a model shows: its layers, what stays float and why, and which batch normalizations fold."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from dopt_api.errors import ConfigError, ModelError
from dopt_torch.find_layers import find_layers

scripting = pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # deprecated, and yet people have it
weight_norming = pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")  # likewise


class Model(nn.Module):
    """A module from its parts and a forward function."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def names(found):
    return [layer.name for layer in found.layers]


def refused(found):
    return {layer.name: layer.reason for layer in found.not_quantizable}


def conv(**kwargs):
    return nn.Conv2d(3, 3, 3, padding=1, **kwargs)


IMAGE = "x:2,3,8,8"

KINDS = {
    "Conv1D": (nn.Conv1d, "x:2,4,9"),
    "Conv2D": (nn.Conv2d, "x:2,4,9,9"),
    "Conv3D": (nn.Conv3d, "x:2,4,9,9,9"),
    "ConvTranspose1D": (nn.ConvTranspose1d, "x:2,4,9"),
    "ConvTranspose2D": (nn.ConvTranspose2d, "x:2,4,9,9"),
    "ConvTranspose3D": (nn.ConvTranspose3d, "x:2,4,9,9,9"),
}
OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "groups": {"groups": 2},
    "depthwise": {"groups": 4},
    "dilation": {"dilation": 2},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "output padding": {"stride": 2, "output_padding": 1},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "circular without padding": {"padding_mode": "circular"},
    "same": {"padding": "same"},
    "same, uneven": {"padding": "same", "kernel_size": 4},
    "same, reflect": {"padding": "same", "padding_mode": "reflect"},
    "valid": {"padding": "valid"},
}


def usable(label, option):
    if label.startswith("ConvTranspose"):
        return "padding_mode" not in OPTIONS[option] and not isinstance(OPTIONS[option].get("padding"), str)
    reflects = OPTIONS[option].get("padding_mode") == "reflect"
    missing = reflects and label == "Conv3D" and str(torch.__version__) < "1.13"  # torch did not have it
    return option != "output padding" and not missing


class TestKinds:
    @pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # torch says that it copies
    @pytest.mark.parametrize(
        ("label", "option"), [(label, option) for label in KINDS for option in OPTIONS if usable(label, option)]
    )
    def test_every_convolution_is_found(self, label, option):
        kind, shape = KINDS[label]
        layer = kind(4, 4, **{"kernel_size": 3, **OPTIONS[option]})
        found = find_layers(nn.Sequential(layer), shape)
        assert [(info.name, info.op_type) for info in found.layers] == [(f"0/{label}", str(kind))]
        assert not found.not_quantizable
        assert not found.notes
        assert found.layers[0].strategies

    @pytest.mark.parametrize("shape", ["x:4", "x:2,4", "x:2,3,4", "x:2,3,5,4"])
    @pytest.mark.parametrize("bias", [False, True])
    def test_linear_layers_are_found_whatever_their_inputs_dimensions(self, shape, bias):
        found = find_layers(nn.Sequential(nn.Linear(4, 2, bias=bias)), shape)
        assert [(info.name, info.op_type) for info in found.layers] == [("0/Linear", str(nn.Linear))]

    def test_unbatched_convolutions_are_found(self):
        assert names(find_layers(nn.Sequential(conv(), nn.ReLU(), nn.Conv2d(3, 2, 1)), "x:3,8,8")) == [
            "0/Conv2D",
            "2/Conv2D",
        ]

    def test_a_layer_can_be_the_whole_model(self):
        found = find_layers(nn.Linear(4, 2), "x:1,4")
        assert names(found) == ["Linear"]
        assert found.structure.paths == {"Linear": ""}

    def test_bilinear_and_embedding_are_no_layers(self):
        model = Model(lambda s, i: s.both(s.table(i), s.table(i)), table=nn.Embedding(5, 4), both=nn.Bilinear(4, 4, 2))
        found = find_layers(model, "i:2,3:int64")
        assert not found.layers
        assert list(refused(found)) == ["both/bilinear"]


class TestOrderAndNames:
    def test_layers_come_in_the_order_of_execution(self):
        model = Model(lambda s, x: s.a(s.b(s.c(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
        assert names(find_layers(model, "x:2,4")) == ["c/Linear", "b/Linear", "a/Linear"]

    def test_names_are_module_paths(self):
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ModuleDict({"x": nn.Linear(4, 4)})["x"]))
        found = find_layers(model, "x:2,4")
        assert names(found) == ["0.0/Linear", "0.2/Linear"]
        assert found.structure.paths == {"0.0/Linear": "0.0", "0.2/Linear": "0.2"}

    def test_a_shared_module_is_listed_once_by_its_first_path(self):
        layer = nn.Linear(4, 4)
        found = find_layers(nn.Sequential(layer, nn.ReLU(), layer), "x:2,4")
        assert names(found) == ["0/Linear"]
        assert not found.not_quantizable

    def test_modules_that_are_not_used_are_named_with_the_reason(self):
        model = Model(lambda s, x: s.used(x), head=nn.Linear(4, 2), used=nn.Linear(4, 4))
        found = find_layers(model, "x:2,4")
        assert names(found) == ["used/Linear"]
        assert refused(found) == {"head/Linear": "the run on 'input_shape' did not reach it"}
        assert found.layers[0].reason == ""
        assert found.not_quantizable[0].strategies == ()

    def test_control_flow_on_data_is_no_obstacle(self):
        def forward(self, x):
            while x.abs().sum() > 1:
                x = x / 2
            return self.one(x) if float(x.sum()) > 1e9 or bool((x > 1e9).any()) else self.two(x)

        found = find_layers(Model(forward, one=nn.Linear(4, 4), two=nn.Linear(4, 4)), "x:2,4")
        assert names(found) == ["two/Linear"]
        assert list(refused(found)) == ["one/Linear"]

    def test_results_do_not_depend_on_the_random_state_or_a_second_look(self, small_net):
        first = find_layers(small_net, small_net.input_shape)
        torch.manual_seed(7)
        assert find_layers(small_net, small_net.input_shape) == first


class PadsInForward(nn.Conv2d):
    def forward(self, x):
        x = functional.pad(x, (0, 1, 0, 1))
        x = functional.pad(input=x, pad=(1, 0, 1, 0), mode="constant", value=0.0)
        return functional.conv2d(x, self.weight, self.bias, self.stride)


class PadsByReflection(nn.Conv2d):
    def forward(self, x):
        return super().forward(functional.pad(x, (1, 1, 1, 1), "reflect"))


class PadsOnes(nn.Conv2d):
    def forward(self, x):
        return super().forward(functional.pad(x, (1, 1, 1, 1), value=1.0))


class Scales(nn.Conv2d):
    def forward(self, x):
        return super().forward(x * 2)


class Standardizes(nn.Conv2d):
    def forward(self, x):
        return functional.conv2d(x, self.weight - self.weight.mean(), self.bias)


class ScalesBias(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight, self.bias * 2)


class AddsBiasLater(nn.Linear):
    def forward(self, x):
        return functional.linear(x, self.weight) + self.bias


class ByKeyword(nn.Linear):
    def forward(self, x):
        return functional.linear(input=x, weight=self.weight, bias=self.bias)


class Renamed(nn.Linear):
    pass


class TestSubclasses:
    @pytest.mark.parametrize("kind", [PadsInForward, PadsByReflection])
    def test_padding_in_forward_is_accepted(self, kind):
        found = find_layers(nn.Sequential(kind(3, 4, 3)), IMAGE)
        assert [(info.name, info.op_type) for info in found.layers] == [("0/Conv2D", str(nn.Conv2d))]

    @pytest.mark.parametrize("kind", [ByKeyword, Renamed])
    def test_subclasses_that_compute_the_same_are_accepted(self, kind):
        assert names(find_layers(nn.Sequential(kind(4, 3)), "x:2,4")) == ["0/Linear"]

    @pytest.mark.parametrize(
        ("kind", "reason"),
        [(PadsOnes, "changes the input"), (Scales, "changes the input"), (Standardizes, "other than its 'weight'")],
    )
    def test_convolutions_that_compute_something_else_are_refused(self, kind, reason):
        found = find_layers(nn.Sequential(kind(3, 4, 3), nn.BatchNorm2d(4)), IMAGE)
        assert not found.layers
        assert reason in refused(found)["0/Conv2D"]
        assert not found.structure.norms

    @pytest.mark.parametrize("kind", [ScalesBias, AddsBiasLater])
    def test_linear_layers_with_another_bias_are_refused(self, kind):
        found = find_layers(nn.Sequential(kind(4, 3)), "x:2,4")
        assert "other than its 'bias'" in refused(found)["0/Linear"]

    def test_a_weight_used_by_a_function_elsewhere_is_refused(self):
        model = Model(lambda s, i: functional.linear(s.fc(i), s.fc.weight), fc=nn.Linear(4, 4))
        found = find_layers(model, "x:2,4")
        assert "used by linear in the model's own forward" in refused(found)["fc/Linear"]

    def test_a_weight_tied_to_another_layer_through_its_own_forward(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        found = find_layers(model, "x:2,4")
        assert set(names(found)) | set(refused(found)) == {"0/Linear", "1/Linear"}

    @weight_norming
    def test_a_weight_computed_before_each_use_is_refused_with_the_remedy(self):
        found = find_layers(nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2)), "x:2,4")
        assert names(found) == ["1/Linear"]
        assert "remove_weight_norm" in refused(found)["0/Linear"]

    def test_parametrized_and_spectrally_normalized_weights_are_refused(self):
        from torch.nn.utils import parametrizations

        model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), parametrizations.orthogonal(conv()))
        model = Model(lambda s, x: s.fc(s.conv(x).flatten(1)[:, :4]), fc=model[0], conv=model[1])
        found = find_layers(model, IMAGE)
        assert not found.layers
        assert {"fc/Linear", "conv/Conv2D"} <= set(refused(found))


PRODUCTS = {
    "matmul": lambda s, x: torch.matmul(x, x),
    "the operator": lambda s, x: x @ x,
    "einsum": lambda s, x: torch.einsum("bij,bjk->bik", x, x),
    "bmm": lambda s, x: torch.bmm(x, x),
    "baddbmm": lambda s, x: torch.baddbmm(x, x, x),
    "mm": lambda s, x: x[0].mm(x[0]),
    "addmm": lambda s, x: torch.addmm(x[0], x[0], x[0]),
    "tensordot": lambda s, x: torch.tensordot(x[0], x[0], dims=1),
    "linalg_multi_dot": lambda s, x: torch.linalg.multi_dot([x[0], x[0]]),
    "mv": lambda s, x: torch.mv(x[0], x[0, 0]),
    "dot": lambda s, x: torch.dot(x[0, 0], x[0, 0]),
}
FUNCTIONS = {
    "linear": lambda s, x: functional.linear(x, s.weight),
    "conv1d": lambda s, x: functional.conv1d(x, s.weight[..., None]),
    "conv2d": lambda s, x: functional.conv2d(x, s.weight[..., None, None][:, :2]),
    "conv_transpose1d": lambda s, x: functional.conv_transpose1d(x, s.weight[..., None]),
}
RECURRENT = {
    "LSTM": lambda: nn.LSTM(4, 5),
    "GRU": lambda: nn.GRU(4, 5, batch_first=True, bidirectional=True),
    "RNN": lambda: nn.RNN(4, 5),
    "LSTMCell": lambda: nn.LSTMCell(4, 5),
    "GRUCell": lambda: nn.GRUCell(4, 5),
    "RNNCell": lambda: nn.RNNCell(4, 5),
}


class TestWhatStaysFloat:
    @pytest.mark.parametrize("name", PRODUCTS)
    def test_products_of_activations(self, name):
        found = find_layers(nn.Sequential(nn.Linear(4, 4), Model(PRODUCTS[name])), "x:2,4,4")
        assert names(found) == ["0/Linear"]
        name = "matmul" if name == "the operator" else name
        assert not found.notes
        assert refused(found) == {f"1/{name}": "a product of two activations is not quantized in this version"}

    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_functional_layers(self, name):
        model = nn.Sequential(Model(FUNCTIONS[name], weight=nn.Parameter(torch.randn(4, 4))))
        found = find_layers(model, "x:2,4,4" if name != "conv2d" else "x:1,2,4,4")
        assert not found.layers
        assert list(refused(found)) == [f"0/{name}"]
        assert "called as a function" in refused(found)[f"0/{name}"]

    def test_functions_of_the_model_itself_and_of_another_kind_of_layer(self):
        found = find_layers(Model(lambda s, x: x @ x.t()), "x:2,4")
        assert list(refused(found)) == ["matmul"]

        class Odd(nn.Conv1d):
            def forward(self, x):
                return functional.linear(super().forward(x), torch.ones(2, 4))

        found = find_layers(nn.Sequential(Odd(3, 3, 1)), "x:2,3,4")
        assert names(found) == ["0/Conv1D"]
        assert list(refused(found)) == ["0/linear"]

    def test_repeated_calls_have_names_of_their_own(self):
        model = nn.Sequential(Model(lambda s, x: x @ x @ x @ x))
        assert list(refused(find_layers(model, "x:3,3"))) == ["0/matmul", "0/matmul_1", "0/matmul_2"]

    @pytest.mark.parametrize("kind", RECURRENT)
    def test_recurrent_layers(self, kind):
        layer = RECURRENT[kind]()
        found = find_layers(Model(lambda s, x: s.rnn(x), rnn=layer), "x:2,4" if kind.endswith("Cell") else "x:3,2,4")
        assert refused(found) == {f"rnn/{kind}": "recurrent layers are not quantized in this version"}
        assert found.not_quantizable[0].op_type == str(type(layer))
        assert not found.notes

    def test_the_parts_of_attention(self):
        model = Model(lambda s, x: s.att(x, x, x)[0], att=nn.MultiheadAttention(4, 2))
        found = find_layers(model, "x:3,2,4")
        assert not found.notes
        assert not found.layers
        assert any(name.startswith("att.out_proj/") for name in refused(found))
        assert any(name.startswith("att/") for name in refused(found))

    def test_a_transformer_keeps_its_attention_float(self):
        layer = nn.TransformerEncoderLayer(4, 2, 8).train()
        found = find_layers(nn.Sequential(layer), "x:3,2,4")
        assert not found.notes
        assert not any("self_attn" in name for name in names(found))
        listed = {*names(found), *refused(found)}
        assert {"0.linear1/Linear", "0.linear2/Linear"} <= listed
        assert any("0.self_attn" in name for name in listed)

    @pytest.mark.skipif(not hasattr(functional, "scaled_dot_product_attention"), reason="torch before 2.0")
    def test_fused_attention(self):
        model = nn.Sequential(Model(lambda s, x: functional.scaled_dot_product_attention(x, x, x)))
        found = find_layers(model, "x:1,2,3,4")
        name = "0/scaled_dot_product_attention"
        assert refused(found) == {name: "fused attention computes its products inside one call"}

    @scripting
    def test_scripted_parts_are_sealed(self):
        model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4))), nn.Linear(4, 2))
        found = find_layers(model, "x:2,4")
        assert names(found) == ["0/Linear", "2/Linear"]
        assert refused(found) == {"1/ScriptModule": "the layers of TorchScript are sealed"}
        assert not found.notes


class Returns(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.fc, self.pack = nn.Linear(4, 4), pack

    def forward(self, x):
        return self.pack(self.fc(x))


class TestInputsAndOutputs:
    @pytest.mark.parametrize(
        ("pack", "count"),
        [
            (lambda y: y, 1),
            (lambda y: (y, y + 1), 2),
            (lambda y: [y, y + 1, y + 2], 3),
            (lambda y: {"a": y, "b": [y + 1, {"c": y + 2}]}, 3),
            (lambda y: (y, None, 3), 1),
            (lambda y: None, 0),
        ],
    )
    def test_outputs_are_counted_wherever_they_are(self, pack, count):
        assert find_layers(Returns(pack), "x:2,4").structure.outputs == count

    def test_layers_called_with_keywords(self):
        model = Model(lambda s, x: s.inner(x=s.fc(input=x)), fc=nn.Linear(4, 4), inner=Renaming())
        found = find_layers(model, "x:2,4")
        assert not found.notes
        assert names(found) == ["fc/Linear", "inner.fc/Linear"]

    def test_integer_and_boolean_inputs(self):
        def forward(self, tokens, mask):
            assert tokens.dtype == torch.int64
            assert mask.dtype == torch.bool
            assert mask.all()
            assert not tokens.any()
            return self.fc(self.table(tokens) * mask[..., None])

        model = Model(forward, table=nn.Embedding(5, 4), fc=nn.Linear(4, 2))
        found = find_layers(model, "tokens:2,3:int64;mask:2,3:bool")
        assert names(found) == ["fc/Linear"]
        assert not found.notes

    def test_inputs_have_the_model_s_floating_type(self):
        seen = []

        def forward(self, x):
            seen.append(x.dtype)
            return self.fc(x)

        assert names(find_layers(Model(forward, fc=nn.Linear(4, 2).double()), "x:2,4")) == ["fc/Linear"]
        assert seen == [torch.float64]

    def test_several_inputs(self):
        model = Model(lambda s, a, b: s.fc(a) + s.conv(b).mean((2, 3)), fc=nn.Linear(4, 3), conv=conv())
        assert names(find_layers(model, "a:2,4;b:2,3,8,8")) == ["fc/Linear", "conv/Conv2D"]

    def test_there_must_be_an_input_shape(self):
        with pytest.raises(ConfigError, match="no input shape"):
            find_layers(nn.Linear(4, 2), None)


class Renaming(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, *, x):
        return self.fc(x)


class Counts(nn.Module):
    """Changes its buffer and makes random numbers as it runs; may raise."""

    def __init__(self, *, raises):
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()
        self.raises = raises
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        y = self.drop(self.norm(self.fc(x)))
        if self.raises:
            raise ValueError("not today\nnor tomorrow")
        return y


class Uncopyable(Counts):
    def __deepcopy__(self, memo):
        raise TypeError("no copies")


class TestTheModelIsLeftAlone:
    @pytest.mark.parametrize("raises", [False, True])
    def test_parameters_buffers_modes_and_hooks(self, raises):
        model = Counts(raises=raises)
        model.fc.eval()
        model.drop.eval()
        state = copy.deepcopy(model.state_dict())
        modes = {name: module.training for name, module in model.named_modules()}
        attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
        parameters = dict(model.named_parameters())
        found = find_layers(model, "x:2,4")
        assert bool(found.notes) == raises
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(
            parameters[name] is value and type(value) is nn.Parameter for name, value in model.named_parameters()
        )
        assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks

    @pytest.mark.parametrize("raises", [False, True])
    def test_a_model_that_cannot_be_copied_gets_its_modes_and_hooks_back(self, raises):
        model = Uncopyable(raises=raises)
        model.fc.eval()
        statistics = model.norm.running_mean.clone()
        find_layers(model, "x:2,4")
        assert [m.training for m in (model, model.fc, model.norm, model.drop)] == [True, False, True, True]
        assert torch.equal(model.norm.running_mean, statistics)
        assert all(type(value) is nn.Parameter for value in model.parameters())
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks

    @pytest.mark.parametrize("raises", [False, True])
    def test_the_random_state(self, raises):
        model = Counts(raises=raises)
        state = torch.get_rng_state()
        find_layers(model, "x:2,4")
        assert torch.equal(torch.get_rng_state(), state)

    def test_the_random_state_even_if_the_model_draws_numbers(self):
        model = Model(lambda s, x: s.fc(x + torch.randn(2, 4)), fc=nn.Linear(4, 4))
        state = torch.get_rng_state()
        assert names(find_layers(model, "x:2,4")) == ["fc/Linear"]
        assert torch.equal(torch.get_rng_state(), state)

    def test_hooks_of_the_user_stay_and_gradients_may_be_there(self):
        model = nn.Sequential(nn.Linear(4, 4))
        handle = model[0].register_forward_hook(lambda *_: None)
        model(torch.randn(2, 4)).sum().backward()
        gradient = model[0].weight.grad.clone()
        assert names(find_layers(model, "x:2,4")) == ["0/Linear"]
        assert len(model[0]._forward_hooks) == 1
        assert torch.equal(model[0].weight.grad, gradient)
        handle.remove()

    def test_gradient_mode_is_as_before(self):
        find_layers(Counts(raises=True), "x:2,4")
        assert torch.is_grad_enabled()

    def test_no_warning_is_given(self, small_net):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            find_layers(small_net, small_net.input_shape)
        assert not caught


class TestModelsThatDoNotRun:
    def test_layers_come_in_the_order_of_definition_with_a_note(self):
        model = Model(lambda s, x: s.a(s.bn(s.b(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4), bn=nn.BatchNorm1d(4))
        found = find_layers(model, "x:2,5")
        assert names(found) == ["a/Linear", "b/Linear"]
        assert found.structure.norms == {}
        assert found.structure.outputs is None
        assert found.structure.paths == {"a/Linear": "a", "b/Linear": "b"}
        assert len(found.notes) == 1
        assert "does not run on input_shape 'x:2,5' (RuntimeError: " in found.notes[0]

    def test_the_note_has_the_first_line_of_what_was_raised(self):
        note = find_layers(Counts(raises=True), "x:2,4").notes[0]
        assert "ValueError: not today)" in note

    @scripting
    def test_what_cannot_be_used_is_refused_with_the_remedy(self, quantize):
        linear = nn.Linear(4, 2)
        wrong = {
            "wrapped by DataParallel": (nn.DataParallel(linear), "model.module"),
            "TorchScript": (torch.jit.script(linear), "the module that was scripted"),
            "already quantized": (quantize(nn.Sequential(linear), "x:1,4"), "float model anew"),
        }
        for message, (model, fix) in wrong.items():
            with pytest.raises(ModelError, match=message) as caught:
                find_layers(model, "x:1,4")
            assert fix in caught.value.fix
            assert caught.value.where == "the model itself" or message == "already quantized"

    def test_a_wrapper_inside_the_model_is_named(self):
        with pytest.raises(ModelError) as caught:
            find_layers(nn.Sequential(nn.DataParallel(nn.Linear(4, 2))), "x:1,4")
        assert caught.value.where == "module '0'"


def norms_of(model, shape=IMAGE):
    found = find_layers(model, shape)
    assert found.structure.outputs is not None, found.notes
    return found.structure.norms


class OwnForward(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class OwnChecks(nn.BatchNorm2d):
    def _check_input_dim(self, _):
        pass


def conv_bn(forward, **kwargs):
    return Model(forward, conv=conv(), bn=nn.BatchNorm2d(3, **kwargs))


FOLDED = {
    "directly after": lambda s, x: s.bn(s.conv(x)),
    "the sum uses the normalized output": lambda s, x: s.bn(s.conv(x)) + x,
    "the shape is asked for": lambda s, x: s.bn(y) if (y := s.conv(x)).shape[1] == 3 and y.dim() == 4 else None,
    "the size is asked for": lambda s, x: s.bn(s.conv(x)).view(x.size(0), -1),
    "activated in place after": lambda s, x: functional.relu(s.bn(s.conv(x)), inplace=True),
    "the input is used elsewhere": lambda s, x: s.bn(s.conv(x)) + x.mean(),
    "called with keywords": lambda s, x: s.bn(input=s.conv(input=x)),
}
NOT_FOLDED = {
    "used twice": lambda s, x: s.bn(y := s.conv(x)) + y,
    "returned too": lambda s, x: (s.bn(y := s.conv(x)), y),
    "returned in a dictionary": lambda s, x: {"out": s.bn(y := s.conv(x)), "raw": [y]},
    "modified in place in between": lambda s, x: s.bn(s.conv(x).relu_()),
    "modified in between": lambda s, x: s.bn(s.conv(x) * 1),
    "modified in place, result dropped": lambda s, x: [y := s.conv(x), y.add_(1), s.bn(y)][-1],
    "changed through a view": lambda s, x: [y := s.conv(x), y[0].zero_(), s.bn(y)][-1],
    "copied in between": lambda s, x: s.bn(s.conv(x).clone()),
    "normalization called twice": lambda s, x: s.bn(s.bn(s.conv(x))),
    "normalization used elsewhere": lambda s, x: s.bn(s.conv(x)) + s.bn(x),
    "layer called twice": lambda s, x: s.bn(s.conv(s.conv(x))),
    "layer used elsewhere": lambda s, x: s.bn(s.conv(x)) + s.conv(x),
    "normalized before": lambda s, x: s.conv(s.bn(x)),
    "values read": lambda s, x: s.bn(y) if float((y := s.conv(x)).sum()) < 1e9 else None,
    "used through detach": lambda s, x: s.bn(y := s.conv(x)) + y.detach(),
    "used through data": lambda s, x: s.bn(y := s.conv(x)) + y.data,
    "used through a transposition": lambda s, x: s.bn(y := s.conv(x)) + y.mT.mT,
    "iterated over": lambda s, x: s.bn(y := s.conv(x)) + sum(y),
    "normalized by the function": lambda s, x: functional.batch_norm(
        s.conv(x), s.bn.running_mean, s.bn.running_var, s.bn.weight, s.bn.bias
    ),
}


class TestFolding:
    @pytest.mark.parametrize("name", FOLDED)
    def test_pairs(self, name):
        found = find_layers(conv_bn(FOLDED[name]), IMAGE)
        assert found.structure.norms == {"conv": "bn"}
        assert found.notes == ()

    @pytest.mark.parametrize("name", NOT_FOLDED)
    def test_no_pairs(self, name):
        assert norms_of(conv_bn(NOT_FOLDED[name])) == {}

    def test_normalizations_that_do_not_fold_are_noted(self):
        found = find_layers(conv_bn(NOT_FOLDED["used twice"]), IMAGE)
        assert found.notes == ("Batch normalization that is not folded, since no layer alone feeds it: 'bn'.",)

    @pytest.mark.parametrize("label", KINDS)
    def test_every_convolution_pairs(self, label):
        kind, shape = KINDS[label]
        norm = getattr(nn, f"BatchNorm{label[-2]}d")
        assert norms_of(nn.Sequential(kind(4, 6, 3, groups=2), norm(6), nn.ReLU(inplace=True)), shape) == {"0": "1"}

    def test_linear_pairs_where_channels_are_on_the_axis_of_the_normalization(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        assert norms_of(model, "x:2,4") == {"0": "1"}
        assert norms_of(model, "x:2,4,4") == {}

    def test_an_unbatched_convolution_does_not_pair(self):
        model = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(6))
        assert find_layers(model, "x:3,6").structure.norms == {}

    def test_a_normalization_with_a_forward_of_its_own_does_not(self):
        assert norms_of(nn.Sequential(conv(), OwnForward(3))) == {}
        assert norms_of(nn.Sequential(conv(), OwnChecks(3))) == {"0": "1"}

    @pytest.mark.parametrize(
        ("options", "pairs"),
        [({"track_running_stats": False}, {}), ({"affine": False}, {"conv": "bn"}), ({"eps": 0.1}, {"conv": "bn"})],
    )
    def test_the_normalization_s_options(self, options, pairs):
        assert norms_of(conv_bn(FOLDED["directly after"], **options)) == pairs

    def test_other_normalizations_do_not(self):
        assert norms_of(nn.Sequential(conv(), nn.InstanceNorm2d(3, affine=True, track_running_stats=True))) == {}
        assert norms_of(nn.Sequential(conv(), nn.GroupNorm(1, 3))) == {}

    def test_names_are_paths_and_several_pairs_are_found(self, small_net):
        nested = nn.Sequential(small_net)
        assert norms_of(nested, small_net.input_shape) == {"0.conv1": "0.bn1", "0.conv2": "0.bn2"}

    def test_identity_and_dropout_in_between_are_seen_through_or_not_but_never_wrongly(self):
        assert norms_of(nn.Sequential(conv(), nn.Identity(), nn.BatchNorm2d(3))) == {"0": "2"}
        assert norms_of(nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(3))) == {}
        assert norms_of(nn.Sequential(conv(), nn.MaxPool2d(2), nn.BatchNorm2d(3))) == {}

    def test_a_user_s_hook_that_changes_the_output_prevents_it(self):
        model = conv_bn(FOLDED["directly after"])
        model.conv.register_forward_hook(lambda _module, _args, output: output * 2)
        assert norms_of(model) == {}

    @weight_norming
    def test_a_layer_that_cannot_be_quantized_does_not_pair(self):
        assert norms_of(nn.Sequential(nn.utils.weight_norm(conv()), nn.BatchNorm2d(3))) == {}


def test_token_numbers_given_as_floats_are_answered_with_how_to_declare_them():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    (note,) = find_layers(model, "ids:1,6").notes
    assert "declared as 'ids:1,128:int64'" in note
    assert not find_layers(model, "ids:1,6:int64").notes
    (note,) = find_layers(nn.Sequential(nn.Linear(4, 2)), "x:1,5").notes
    assert "int64" not in note
