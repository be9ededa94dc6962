"""From a float model to a quantized one: what changes, what must not, and which models are refused."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import dopt_api
from dopt_api.errors import ModelError
from dopt_torch.quantized_layer import QuantizedLayer, quantized_layers

SMALL = "x:2,3,12,12"
ROWS = "x:4,6"


class Wrapping(nn.Module):
    """A module that hands its input on in whichever way it is told."""

    def __init__(self, call, **parts):
        super().__init__()
        self.call = call
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.call(self, *args)


def image():
    return torch.randn(2, 3, 12, 12)


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def loaded_whole(file):
    """Load a pickled model; torch 1.11 knows no safe mode to switch off."""
    return torch.load(file) if torch.__version__.startswith("1.11") else torch.load(file, weights_only=False)


@torch.no_grad()
def run(model, *inputs):
    return model(*inputs)


# ---- what changes and what does not


def test_a_plan_of_float_layers_only_changes_nothing(small_net, quantize):
    x = image()
    quantized = quantize(small_net, SMALL, strategy="float")
    assert torch.equal(run(quantized, x), run(small_net, x))
    assert [type(m) for m in quantized.modules()] == [type(m) for m in small_net.modules()]
    assert same_state(quantized.state_dict(), small_net.state_dict())


def test_layers_that_stay_float_are_untouched_beside_quantized_ones(small_net, quantize):
    quantized = quantize(small_net, SMALL, only=["conv2/Conv2D"])
    assert [name for name, m in quantized.named_modules() if isinstance(m, QuantizedLayer)] == ["conv2"]
    assert type(quantized.conv1) is nn.Conv2d
    assert type(quantized.fc) is nn.Linear


@pytest.mark.parametrize("training", [False, True])
def test_the_input_model_is_unchanged(small_net, quantize, training):
    small_net.train(training)
    before, classes = state_of(small_net), [type(m) for m in small_net.modules()]
    ids = [id(p) for p in small_net.parameters()]
    quantized = quantize(small_net, SMALL, image())
    quantized.train()(image()).sum().backward()
    assert same_state(small_net.state_dict(), before)
    assert [type(m) for m in small_net.modules()] == classes
    assert [id(p) for p in small_net.parameters()] == ids
    assert all(p.grad is None for p in small_net.parameters())
    assert all(m.training is training for m in small_net.modules())


def test_the_quantized_model_has_the_modes_of_the_input(small_net, quantize):
    small_net.train()
    small_net.bn1.eval()
    quantized = quantize(small_net, SMALL)
    assert quantized.training
    assert not quantized.bn1.training
    assert quantized.conv1.dopt_quantizer.training


def test_quantized_layers_keep_their_class_for_isinstance_and_their_names(small_net, quantize):
    quantized = quantize(small_net, SMALL)
    assert isinstance(quantized, type(small_net))
    assert isinstance(quantized.conv1, nn.Conv2d)
    assert isinstance(quantized.fc, nn.Linear)
    own = [name for name, _ in quantized.named_parameters() if "dopt_quantizer" not in name]
    assert own == [name for name, _ in small_net.named_parameters()]


def test_a_calibrated_model_differs_from_the_float_one_but_little(small_net, quantize):
    x = image()
    quantized = quantize(small_net, SMALL, x)
    exact, found = run(small_net, x), run(quantized, x)
    assert not torch.equal(found, exact)
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_a_float64_model_is_quantized_and_stays_float64(quantize):
    net, x = mlp().double(), torch.randn(4, 6, dtype=torch.float64)
    quantized = quantize(net, ROWS, x)
    found, exact = run(quantized, x), run(net, x)
    assert found.dtype == torch.float64
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)


def test_two_quantized_models_do_not_disturb_each_other(small_net, quantize, tmp_path):
    x, other_x = image(), 10 * image()
    one = quantize(small_net, SMALL, x)
    alone = run(one, x)
    other = quantize(small_net, SMALL, only=["fc/Linear"])
    dopt_api.set_calibrate_state(other, True)
    run(other, other_x)
    assert torch.equal(run(one, x), alone)  # one is not calibrating meanwhile
    dopt_api.set_calibrate_state(other, False)
    other.train()
    torch.optim.SGD(other.parameters(), 0.1).zero_grad()
    other(other_x).square().mean().backward()
    assert torch.equal(run(one, x), alone)
    assert all(p.grad is None for p in one.parameters())
    assert one.fc.dopt_quantizer.input_scale != other.fc.dopt_quantizer.input_scale


# ---- checkpoints


def test_float_keys_are_a_subset_of_the_quantized_ones(small_net, quantize):
    quantized = quantize(small_net, SMALL).state_dict()
    extra = quantized.keys() - small_net.state_dict().keys()
    assert small_net.state_dict().keys() <= quantized.keys()
    assert extra
    assert all("dopt_quantizer" in key for key in extra)


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_float_checkpoint_loads_strictly(small_net, quantize, calibrated):
    x = image()
    quantized = quantize(small_net, SMALL, *([x] if calibrated else []))
    checkpoint = {k: v + 0.25 if v.is_floating_point() else v for k, v in small_net.state_dict().items()}
    quantized.load_state_dict(checkpoint, strict=True)
    for key, value in checkpoint.items():
        assert torch.equal(quantized.state_dict()[key], value), key
    assert bool(quantized.conv1.dopt_quantizer.ready) is calibrated


def test_a_strict_load_still_reports_what_is_missing_and_unexpected(small_net, quantize):
    quantized = quantize(small_net, SMALL)
    checkpoint = small_net.state_dict()
    del checkpoint["fc.weight"]
    with pytest.raises(RuntimeError, match=r"fc\.weight"):
        quantized.load_state_dict(checkpoint)
    checkpoint = quantized.state_dict()
    del checkpoint["fc.dopt_quantizer.input_scale"]
    with pytest.raises(RuntimeError, match=r"fc\.dopt_quantizer\.input_scale"):
        quantized.load_state_dict(checkpoint)
    with pytest.raises(RuntimeError, match="strange"):
        quantized.load_state_dict({**quantized.state_dict(), "strange": torch.zeros(1)})


@pytest.mark.parametrize("trained", [False, True])
def test_a_quantized_checkpoint_in_a_fresh_model_gives_equal_outputs(small_net, quantize, trained):
    x = image()
    quantized = quantize(small_net, SMALL, x)
    if trained:
        optimizer = torch.optim.SGD(quantized.train().parameters(), 0.01)
        quantized(x).square().mean().backward()
        optimizer.step()
        quantized.eval()
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    fresh = quantize(type(small_net)().eval(), SMALL)
    assert not torch.equal(run(fresh, x), run(quantized, x))
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(run(fresh, x), run(quantized, x))
    assert same_state(fresh.state_dict(), quantized.state_dict())


# ---- copies


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return loaded_whole(file)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
def test_a_copy_of_a_whole_model_is_equal_and_independent(duplicate, quantize):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(400, 2)).eval()
    x = image()
    quantized = quantize(net, SMALL, x)
    before = run(quantized, x)
    twin = duplicate(quantized)
    assert torch.equal(run(twin, x), before)
    assert type(twin[0]) is type(quantized[0])
    assert twin[0].dopt_norm[0] is twin, "the copy folds its own batch normalization"
    with torch.no_grad():
        twin[1].running_var.mul_(9)
        twin[3].dopt_quantizer.input_scale.mul_(20)
    assert not torch.equal(run(twin, x), before)
    assert torch.equal(run(quantized, x), before)
    dopt_api.set_calibrate_state(twin, True)
    run(twin, 3 * x)
    dopt_api.set_calibrate_state(twin, False)
    assert twin[0].dopt_quantizer.input_scale > 2 * quantized[0].dopt_quantizer.input_scale


# ---- moving and casting


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.float64), lambda m: m.half(), lambda m: m.double(), lambda m: m.bfloat16()]
)
def test_casting_the_model_leaves_the_quantizers_their_dtypes(small_net, quantize, cast):
    quantized = quantize(small_net, SMALL, image())
    before = {k: v.clone() for k, v in quantized.state_dict().items() if "dopt_quantizer" in k}
    cast(quantized)
    assert quantized.conv1.weight.dtype != torch.float32
    after = {k: v for k, v in quantized.state_dict().items() if "dopt_quantizer" in k}
    assert same_state(after, before)
    assert after["conv1.dopt_quantizer.input_scale"].dtype == torch.float32
    assert isinstance(quantized.conv1.dopt_quantizer.input_gain, nn.Parameter)


def test_a_model_cast_to_double_gives_nearly_the_same_outputs(small_net, quantize):
    x = image()
    quantized = quantize(small_net, SMALL, x)
    before = run(quantized, x)
    after = run(quantized.double(), x.double())
    assert after.dtype == torch.float64
    torch.testing.assert_close(after.float(), before, rtol=0.02, atol=0.02)  # one step of a later layer at most


def test_requires_grad_and_modes_reach_the_quantizers(small_net, quantize):
    quantized = quantize(small_net, SMALL, image())
    quantized.requires_grad_(False)
    assert not any(p.requires_grad for p in quantized.parameters())
    assert not quantized(image()).requires_grad
    quantized.requires_grad_(True)
    assert quantized.conv1.dopt_quantizer.input_gain.requires_grad
    assert quantized.train().conv1.dopt_quantizer.training
    assert not quantized.eval().conv1.dopt_quantizer.training


# ---- refusals


class FullyShardedDataParallel(nn.Module):
    """Stands for torch's class of that name, which needs a process group."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize("wrap", [nn.DataParallel, FullyShardedDataParallel])
def test_a_wrapped_model_is_refused_with_the_fix(wrap, config_of):
    net = mlp()
    config = config_of(net, ROWS)
    with pytest.raises(ModelError, match=f"wrapped by {wrap.__name__}.*Fix: Pass 'model.module'"):
        dopt_api.optimize(wrap(net), config)


def test_distributed_data_parallel_is_refused_with_the_fix(config_of, tmp_path):
    net = mlp()
    config = config_of(net, ROWS)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        with pytest.raises(ModelError, match=r"wrapped by DistributedDataParallel.*Fix: Pass 'model\.module'"):
            dopt_api.optimize(wrapped, config)
    finally:
        torch.distributed.destroy_process_group()


def test_a_quantized_model_is_refused_with_the_fix(quantize, config_of):
    net = mlp()
    quantized = quantize(net, ROWS)
    with pytest.raises(ModelError, match=r"already quantized.*Fix: Build the float model anew"):
        dopt_api.optimize(quantized, config_of(net, ROWS))
    with pytest.raises(ModelError, match="already quantized"):  # inside another module too
        dopt_api.optimize(nn.Sequential(quantized), config_of(net, ROWS))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch 2.13 deprecates TorchScript
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_scripted_model_is_refused_with_the_fix(config_of):
    net = mlp()
    config = config_of(net, ROWS)
    with pytest.raises(ModelError, match=r"TorchScript.*Fix: Pass the module that was scripted"):
        dopt_api.optimize(torch.jit.script(net), config)


def test_a_model_that_cannot_be_copied_is_refused_with_the_reason(config_of):
    net = mlp()
    net.cache = net[0].weight * 2  # the result of a computation, which deepcopy refuses
    config = config_of(net, ROWS)
    with pytest.raises(ModelError, match=r"cannot be copied: RuntimeError: .*Fix: Remove tensors"):
        dopt_api.optimize(net, config)


# ---- calls of a layer


def test_a_layer_called_twice_is_quantized_in_both_calls(quantize):
    net = Wrapping(lambda s, x: s.fc(torch.relu(s.fc(x))), fc=nn.Linear(6, 6))
    x = torch.randn(4, 6)
    quantized = quantize(net, ROWS, x)
    assert int(quantized.fc.dopt_quantizer.statistics.parts["samples"]) == 8
    seen = []
    quantizer = quantized.fc.dopt_quantizer
    plain = quantizer.quantize_input
    quantizer.quantize_input = lambda x: seen.append(x) or plain(x)
    run(quantized, x)
    assert len(seen) == 2


def test_a_module_registered_under_two_names_is_quantized_once(quantize):
    shared = nn.Linear(6, 6)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    x = torch.randn(4, 6)
    quantized = quantize(net, ROWS, x)
    assert quantized[0] is quantized[2]
    assert len(quantized_layers(quantized)) == 1
    assert not torch.equal(run(quantized, x), run(net, x))


class Doubling(nn.Linear):
    """A subclass whose own forward does more and takes more."""

    def forward(self, x, extra=0.0, *, offset=0.0):
        return 2 * super().forward(x) + extra + offset


def test_a_subclass_keeps_its_own_forward_and_arguments(quantize):
    net = Wrapping(lambda s, x: s.fc(x, 3.0, offset=4.0), fc=Doubling(6, 3))
    x = torch.randn(4, 6)
    quantized = quantize(net, ROWS, x)
    assert isinstance(quantized.fc, Doubling)
    assert isinstance(quantized.fc, QuantizedLayer)
    torch.testing.assert_close(run(quantized, x), run(net, x), rtol=0.05, atol=0.1)
    assert torch.allclose(quantized.fc(x, 5.0), quantized.fc(x) + 5.0)


def test_output_size_reaches_a_transposed_convolution(quantize):
    up = nn.ConvTranspose2d(3, 3, 3, stride=2, padding=1)
    net = Wrapping(lambda s, x: s.up(x, output_size=[24, 24]), up=up)
    x = image()
    quantized = quantize(net, SMALL, x)
    found = run(quantized, x)
    assert found.shape == (2, 3, 24, 24)
    assert not torch.equal(found, run(net, x))
    torch.testing.assert_close(found, run(net, x), rtol=0.1, atol=0.1)


def test_the_input_may_be_given_by_keyword(quantize):
    net = Wrapping(lambda s, x: s.conv(input=x), conv=nn.Conv2d(3, 3, 3))
    x = image()
    quantized = quantize(net, SMALL, x)
    assert torch.equal(quantized.conv(input=x), quantized.conv(x))
    assert not torch.equal(run(quantized, x), run(net, x))


def test_forward_hooks_of_the_user_still_run(quantize):
    net, calls = mlp(), []
    x = torch.randn(4, 6)
    net[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    quantized = quantize(net, ROWS, x)
    quantized[2].register_forward_hook(lambda module, args, output: calls.append(module) or output * 0)
    assert torch.equal(run(quantized, x), torch.zeros(4, 3))
    assert calls == [quantized[2]]
    wanted = x + 1  # the layer sees, and calibration saw, what the pre-hook makes of it
    assert float(quantized[0].dopt_quantizer.statistics.parts["maximum"]) == float(wanted.max())


def test_after_an_exception_in_a_layer_its_weight_is_the_parameter_again(quantize):
    net = mlp()
    x = torch.randn(4, 6)
    quantized = quantize(net, ROWS, x)
    with pytest.raises(RuntimeError):
        quantized[0](torch.randn(4, 5))
    assert quantized[0].weight is quantized[0]._parameters["weight"]
    assert "weight" not in quantized[0].__dict__
    assert torch.equal(quantized[0].weight, net[0].weight)
    run(quantized, x)
    assert quantized[0].weight is quantized[0]._parameters["weight"]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.filterwarnings("ignore:.*nested.tensor:UserWarning")  # torch.nn.TransformerEncoder about its own prototype
def test_transformer_layers_run_through_their_quantized_linears_in_evaluation(quantize, stacked):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = (nn.TransformerEncoder(layer, 1) if stacked else layer).eval()
    x = torch.randn(2, 5, 8)
    quantized = quantize(net, "src:2,5,8", x)
    fine, exact = run(quantized, x), run(net, x)
    torch.testing.assert_close(fine, exact, rtol=0.1, atol=0.1)
    linears = quantized_layers(quantized)
    assert len(linears) == 2
    with torch.no_grad():
        for linear in linears:
            linear.dopt_quantizer.input_scale.fill_(100.0)  # so coarse that every input becomes 0
    coarse = run(quantized, x)
    assert (coarse - fine).abs().max() > 0.1
