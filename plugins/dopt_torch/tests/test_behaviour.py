"""The rules that every backend keeps, on the torch backend: identity, checkpoints, calibration, training, loss."""

import copy
import logging
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import dopt_api
from dopt_api.errors import CalibrationError, ModelError
from dopt_api.params import FloatLayer, fold, quantize_layer
from dopt_api.quantizer import (
    BatchNorm,
    Grid,
    Statistics,
    activation_parameters,
    fake_quantize,
    fake_quantize_gradients,
    gain_gradient,
    learned_scale,
    relative_squared_error,
)
from dopt_api.strategy import STRATEGIES

ACTIVATION, WEIGHT = STRATEGIES["Quant_INT8-8"].activation, STRATEGIES["Quant_INT8-8"].weight


def batch(n=8):
    return torch.randn(n, 3, 12, 12)


def inputs_of(model, name, x):
    """Return what the layer called ``name`` is given when the model runs on ``x``."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(x)
    hook.remove()
    return seen[0]


# ---- what stays as it is


def test_with_every_layer_float_the_output_is_equal_to_the_bit(small_net, quantize, caplog):
    with caplog.at_level(logging.WARNING, "dopt"):
        quantized = quantize(small_net, small_net.input_shape, strategy="float")
    assert "nothing will be quantized" in caplog.text
    x = batch()
    assert torch.equal(quantized(x), small_net(x))
    assert [type(m) for m in quantized.modules()] == [type(m) for m in small_net.modules()]
    assert float(dopt_api.get_quant_loss(quantized)) == 0.0


def test_the_float_model_is_unchanged_and_layers_keep_their_class(small_net, quantize):
    before = copy.deepcopy(small_net.state_dict())
    quantized = quantize(small_net, small_net.input_shape, batch())
    assert type(small_net.conv1) is nn.Conv2d
    assert isinstance(quantized.conv1, nn.Conv2d)
    assert all(torch.equal(value, before[key]) for key, value in small_net.state_dict().items())


def test_a_float_checkpoint_loads_strictly_at_any_time(small_net, quantize):
    quantized = quantize(small_net, small_net.input_shape)
    state = small_net.state_dict()
    assert state.keys() < quantized.state_dict().keys()
    quantized.load_state_dict(state, strict=True)
    x = batch()
    dopt_api.set_calibrate_state(quantized, True)
    quantized(x)
    quantized.load_state_dict(state, strict=True)
    dopt_api.set_calibrate_state(quantized, False)
    wanted = quantized(x)
    quantized.load_state_dict(state, strict=True)
    assert torch.equal(quantized(x), wanted)


def test_a_quantized_checkpoint_brings_everything_to_a_fresh_model(small_net, quantize):
    x = batch()
    trained = quantize(small_net, small_net.input_shape, x).train()
    trained(x).sum().backward()
    fresh = quantize(small_net, small_net.input_shape)
    fresh.load_state_dict(trained.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(x), trained.eval()(x))


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("state", ["new", "calibrating", "calibrated", "trained"])
def test_copies_and_pickles_are_equal_and_independent(small_net, quantize, make, state):
    x = batch()
    quantized = quantize(small_net, small_net.input_shape, *([x] if state in ("calibrated", "trained") else []))
    if state == "calibrating":
        dopt_api.set_calibrate_state(quantized, True)
        quantized(x)
    if state == "trained":
        (quantized.train()(x).sum() + dopt_api.get_quant_loss(quantized)).backward()
        quantized.eval()
    copied = make(quantized)
    assert torch.equal(copied(x), quantized(x))
    with torch.no_grad():
        copied.conv1.dopt_quantizer.input_scale.mul_(3)
        copied.bn1.running_var.mul_(3)
    assert not torch.equal(copied.conv1.dopt_quantizer.input_scale, quantized.conv1.dopt_quantizer.input_scale)
    assert copied.conv1.dopt_norm[0]._modules["bn1"] is copied.bn1


def test_two_models_in_one_process_do_not_disturb_each_other(small_net, quantize):
    x = batch()
    one, other = quantize(small_net, small_net.input_shape, x), quantize(small_net, small_net.input_shape, 5 * x)
    wanted = one(x)
    other.train()(x).sum().backward()
    dopt_api.set_calibrate_state(other, True)
    assert torch.equal(one(x), wanted)
    assert one.conv1.weight.grad is None


@pytest.mark.parametrize("cast", ["half", "double", "bfloat16"])
def test_casting_the_model_casts_no_scale(small_net, quantize, cast):
    quantized = quantize(small_net, small_net.input_shape, batch())
    before = {k: v.clone() for k, v in quantized.state_dict().items() if "dopt_quantizer" in k}
    getattr(quantized, cast)()
    after = {k: v for k, v in quantized.state_dict().items() if "dopt_quantizer" in k}
    assert all(after[key].dtype == value.dtype and torch.equal(after[key], value) for key, value in before.items())
    assert quantized.conv1.weight.dtype != torch.float32


def test_float64_models_work(small_net, quantize):
    x = batch()
    single = quantize(small_net, small_net.input_shape, x)
    double = quantize(copy.deepcopy(small_net).double(), small_net.input_shape, x.double())
    assert double(x.double()).dtype == torch.float64
    torch.testing.assert_close(double(x.double()).float(), single(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (nn.DataParallel, "DataParallel"),
        (type("FullyShardedDataParallel", (nn.Sequential,), {}), "FullyShardedDataParallel"),
        (type("DistributedDataParallel", (nn.Sequential,), {}), "DistributedDataParallel"),
    ],
)
def test_wrapped_models_are_refused_with_the_remedy(small_net, tmp_path, wrap, name):
    with pytest.raises(ModelError, match=f"wrapped by {name}") as caught:
        dopt_api.generate_config(wrap(small_net), small_net.input_shape, tmp_path / "c.json")
    assert "model.module" in caught.value.fix


def test_a_quantized_model_is_not_quantized_again(small_net, quantize, tmp_path):
    quantized = quantize(small_net, small_net.input_shape)
    for call in (
        lambda: dopt_api.optimize(quantized, tmp_path / "config.json"),
        lambda: dopt_api.export(quantized, tmp_path / "config.json", tmp_path / "x", tmp_path),
    ):
        with pytest.raises(ModelError, match="already quantized"):
            call()


@pytest.mark.parametrize("call", [lambda m: dopt_api.set_calibrate_state(m, True), dopt_api.get_quant_loss])
def test_a_float_model_where_a_quantized_one_is_needed_is_refused(small_net, call):
    with pytest.raises(ModelError, match="SmallNet is not a quantized model") as caught:
        call(small_net)
    assert "optimize_model" in caught.value.fix


def test_an_error_in_a_layer_leaves_its_weight_in_sight(small_net, quantize):
    quantized = quantize(small_net, small_net.input_shape, batch())
    with pytest.raises(RuntimeError):
        quantized.fc(torch.randn(2, 99))
    assert isinstance(quantized.fc.weight, nn.Parameter)


def test_transformer_layers_use_their_quantized_parts_in_inference(quantize):
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    x = torch.randn(2, 5, 8)
    quantized = quantize(model, "x:2,5,8", x)
    with torch.no_grad():
        fine = quantized(x)
        quantized[0].linear1.dopt_quantizer.input_scale.mul_(20)
        assert not torch.equal(quantized(x), fine)


# ---- calibration


def test_calibration_runs_in_float_to_the_bit_and_changes_nothing(small_net, quantize):
    quantized = quantize(small_net, small_net.input_shape).train()  # a script that forgot eval()
    before = {k: v.clone() for k, v in quantized.state_dict().items() if "dopt_quantizer" not in k}
    dopt_api.set_calibrate_state(quantized, True)
    x = batch()
    assert torch.equal(quantized(x), small_net(x))
    assert all(torch.equal(quantized.state_dict()[key], value) for key, value in before.items())
    dopt_api.set_calibrate_state(quantized, False)
    assert quantized.training
    assert quantized.bn2.training


def test_scales_are_those_of_the_core_to_the_bit(small_net, quantize):
    x = batch()
    quantized = quantize(small_net, small_net.input_shape, x, range="mse")
    for name, axis in (("conv1", 1), ("conv2", 1), ("fc", -1)):
        statistics = Statistics()
        statistics.update(inputs_of(small_net, name, x).numpy(), axis)
        scale, zero_point = activation_parameters(statistics, ACTIVATION, layer=name, method="mse")
        quantizer = quantized.get_submodule(name).dopt_quantizer
        assert quantizer.input_scale.detach().numpy() == scale
        assert int(quantizer.input_zero_point) == zero_point


@pytest.mark.parametrize("method", ["min_max", "moving_average", "mse"])
def test_order_and_size_of_batches_do_not_change_a_bit(small_net, quantize, method):
    x = 10 ** torch.linspace(-2, 1, 12).view(-1, 1, 1, 1) * batch(12)

    def parts(*batches):
        state = quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), "x:1,3,12,12", *batches, range=method).state_dict()
        return {key: value for key, value in state.items() if "input" in key or "statistics" in key}

    whole = parts(x)
    for other in (parts(*x.flip(0).split(1)), parts(x[7:], x[:0], x[:7])):
        assert all(torch.equal(value, whole[key]) for key, value in other.items())


def test_the_range_method_of_the_strategy_file_is_used(small_net, quantize):
    x = batch()
    scales = {
        quantize(small_net, small_net.input_shape, x, x / 3, range=m).conv1.dopt_quantizer.input_scale.item()
        for m in ("min_max", "moving_average", "mse")
    }
    assert len(scales) == 3


def test_switching_on_anew_starts_anew_and_switching_twice_does_nothing(small_net, quantize):
    x = batch()
    quantized = quantize(small_net, small_net.input_shape, 10 * x)
    dopt_api.set_calibrate_state(quantized, True)
    quantized(x)
    dopt_api.set_calibrate_state(quantized, True)
    dopt_api.set_calibrate_state(quantized, False)
    dopt_api.set_calibrate_state(quantized, False)
    once = quantize(small_net, small_net.input_shape, x)
    assert torch.equal(quantized.conv1.dopt_quantizer.input_scale, once.conv1.dopt_quantizer.input_scale)


def test_a_layer_without_data_is_named_and_the_others_are_calibrated(quantize):
    class Skipping(nn.Sequential):
        def forward(self, x, skip=False):
            return self[0](x) if skip else self[1](self[0](x))

    quantized = quantize(Skipping(nn.Linear(4, 4), nn.Linear(4, 4)), "x:1,4")
    dopt_api.set_calibrate_state(quantized, True)
    quantized(torch.randn(3, 4), skip=True)
    with pytest.raises(CalibrationError, match="Layer '1/Linear' has seen no data"):
        dopt_api.set_calibrate_state(quantized, False)
    assert quantized[0].dopt_quantizer.is_ready()
    assert not quantized[1].dopt_quantizer.is_ready()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_data_that_are_not_finite_name_the_layer(small_net, quantize, value):
    quantized = quantize(small_net, small_net.input_shape)
    dopt_api.set_calibrate_state(quantized, True)
    x = batch()
    x[2, 1, 5, 5] = value
    quantized(x)
    with pytest.raises(CalibrationError, match="'conv1/Conv2D' had NaN or infinity in 1 of 8 samples"):
        dopt_api.set_calibrate_state(quantized, False)


def test_before_calibration_the_model_runs_in_float_and_says_so_once(small_net, quantize, caplog):
    quantized = quantize(small_net, small_net.input_shape)
    x = batch()
    with caplog.at_level(logging.WARNING, "dopt"):
        assert torch.equal(quantized(x), small_net(x))
        quantized(x)
    assert caplog.text.count("'conv1/Conv2D' has no input range yet") == 1


# ---- what is quantized


def array(tensor):
    return tensor.detach().numpy()


def test_what_the_quantizer_sees_is_the_folded_weight_of_the_core(small_net, quantize):
    quantized = quantize(small_net, small_net.input_shape, batch())
    layer, norm = quantized.conv1, quantized.bn1
    core_norm = BatchNorm(*map(array, (norm.weight, norm.bias, norm.running_mean, norm.running_var)), norm.eps)
    source = FloatLayer(array(layer.weight), None, core_norm, 0)
    wanted = quantize_layer(source, layer.dopt_quantizer.plan, np.float32(1), 0)
    factor = torch.from_numpy(core_norm.factor)
    used = layer.dopt_quantizer.quantize_weight(layer.weight, factor).detach()
    on_grid = (used * factor.view(-1, 1, 1, 1)).numpy() / wanted.weight_scale.reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(np.rint(on_grid), wanted.integers)
    np.testing.assert_allclose(on_grid, wanted.integers, atol=1e-3)


def test_inputs_are_quantized_as_by_the_core_to_the_bit(small_net, quantize):
    x = batch()
    quantizer = quantize(small_net, small_net.input_shape, x).conv1.dopt_quantizer
    scale, zero_point = array(quantizer.input_scale), int(quantizer.input_zero_point)
    found = quantizer.quantize_input(3 * x).detach().numpy()
    np.testing.assert_array_equal(found, fake_quantize(3 * x.numpy(), scale, zero_point, ACTIVATION))


@pytest.mark.parametrize("gamma", [0.0, -1.5, 1e-20])
def test_unusual_normalizations_are_harmless(quantize, gamma):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with torch.no_grad():
        model[1].weight[1] = gamma
    x = batch()
    quantized = quantize(model, "x:1,3,12,12", x)
    wanted, found = model(x), quantized(x)
    assert torch.isfinite(found).all()
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_synchronized_normalization_converted_afterwards_is_still_folded(small_net, quantize):
    quantized = quantize(small_net, small_net.input_shape, batch())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(quantized)
    layer = converted.conv1
    assert layer.dopt_norm[0]._modules["bn1"] is converted.bn1
    assert isinstance(converted.bn1, nn.SyncBatchNorm)


# ---- training


def test_scales_start_from_the_first_batch_as_calibration_would_find_them(small_net, quantize):
    x = batch()
    first = quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), "x:1,3,12,12").train()
    first(x)
    calibrated = quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), "x:1,3,12,12", x)
    assert torch.equal(first[0].dopt_quantizer.input_scale, calibrated[0].dopt_quantizer.input_scale)


def test_training_learns_weights_and_scales(small_net, quantize):
    x, y = torch.randn(64, 3, 12, 12), torch.arange(64) % 4
    x += y.view(-1, 1, 1, 1)
    quantized = quantize(small_net, small_net.input_shape, x).train()
    before = copy.deepcopy(quantized.state_dict())
    optimizer = torch.optim.SGD(quantized.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(quantized(x), y)
        optimizer.zero_grad()
        (loss + 0.05 * dopt_api.get_quant_loss(quantized)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    after = quantized.state_dict()
    for key in ("conv1.weight", "conv1.dopt_quantizer.weight_gain", "conv2.dopt_quantizer.input_gain"):
        assert not torch.equal(before[key], after[key]), key


def test_gradients_are_those_of_the_core(quantize):
    x = torch.randn(6, 5, requires_grad=True)
    model = nn.Sequential(nn.Linear(5, 3, bias=False))
    quantized = quantize(model, "x:1,5", x.detach() / 2)[0].train()  # half of the range: some inputs are clipped
    quantizer = quantized.dopt_quantizer
    with torch.no_grad():
        quantizer.weight_gain.fill_(-0.4)  # and some weights
    upstream = torch.randn(6, 3)
    quantized(x).backward(upstream)
    weight, zeros = array(quantized.weight), np.zeros(3, np.int32)
    derived = (np.abs(weight).max(1) / np.float32(127)).astype(np.float32)
    weight_scale = learned_scale(derived, array(quantizer.weight_gain))
    scale, zero = array(quantizer.input_scale), quantizer.input_zero_point
    used_weight = fake_quantize(weight, weight_scale, zeros, WEIGHT, axis=0)
    used_x = fake_quantize(array(x), scale, int(zero), ACTIVATION)
    dx, dw = upstream.numpy() @ used_weight, upstream.numpy().T @ used_x
    wanted_x, of_scale = fake_quantize_gradients(dx, array(x), scale, int(zero), ACTIVATION)
    wanted_w, of_scales = fake_quantize_gradients(dw, weight, weight_scale, zeros, WEIGHT, axis=0)
    assert (wanted_x == 0).any()
    assert (wanted_w == 0).any()
    np.testing.assert_allclose(x.grad.numpy(), wanted_x, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(quantized.weight.grad.numpy(), wanted_w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(quantizer.input_gain.grad.numpy(), gain_gradient(of_scale, scale, 0.0), rtol=1e-3)
    wanted = gain_gradient(of_scales, derived, array(quantizer.weight_gain))
    np.testing.assert_allclose(quantizer.weight_gain.grad.numpy(), wanted, rtol=1e-3, atol=1e-5)


def test_a_range_far_too_small_recovers_in_training(quantize):
    x, y = torch.randn(64, 6), torch.arange(64) % 3
    x[range(64), y] += 4
    quantized = quantize(nn.Sequential(nn.Linear(6, 3)), "x:1,6", x / 50).train()
    optimizer = torch.optim.SGD(quantized.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(200):
        loss = nn.functional.cross_entropy(quantized(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert quantized[0].dopt_quantizer.input_gain > 0.1


def test_learned_weight_scales_follow_the_running_statistics(small_net, quantize):
    quantized = quantize(small_net, small_net.input_shape, batch()).train()
    quantized(batch())
    layer = quantized.conv1
    with torch.no_grad():
        layer.dopt_quantizer.weight_gain.fill_(-0.25)
        factor = torch.full((8,), 0.5)
        one = layer.dopt_quantizer.quantize_weight(layer.weight, factor)
        other = layer.dopt_quantizer.quantize_weight(layer.weight, 8 * factor)
    assert torch.equal(one, other)  # a power of two changes no bit of the mantissas


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_adam_trains_the_quantized_model_as_well_as_the_float_one(quantize, rate):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 3))

    x = torch.randn(256, 6)
    y = torch.sin(x @ torch.randn(6, 3))
    losses = []
    for model in (net(), quantize(net(), "x:1,6", x)):
        optimizer = torch.optim.Adam(model.train().parameters(), rate)
        for _ in range(100):
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] < 1.1 * losses[0] + 0.002  # the targets have a mean square of about 0.5
    for layer in (model[0], model[2], model[4]):
        assert (layer.dopt_quantizer.learned_weight_scale(layer.weight) > 0).all()
        assert layer.dopt_quantizer.weight_gain.abs().max() > rate


def test_gradients_scale_with_the_loss(quantize, small_net):
    x, grads = batch(), []
    for factor in (1.0, 65536.0):
        quantized = quantize(copy.deepcopy(small_net), small_net.input_shape, 3 * x).train()
        (quantized(x).square().mean() * factor).backward()
        grads.append([p.grad / factor for name, p in quantized.named_parameters() if name.endswith("gain")])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-7)
    assert all(one.abs().max() > 0 for one in grads[0])


def test_opposed_gradients_of_a_scale_are_summed(quantize):
    x = torch.randn(8, 5)
    quantized = quantize(nn.Sequential(nn.Linear(5, 3)), "x:1,5", x / 20).train()
    gain = quantized[0].dopt_quantizer.input_gain

    def gradient(task, quantization):
        quantized.zero_grad()
        (task * quantized(x).sum() * 1e3 - quantization * dopt_api.get_quant_loss(quantized) * 1e3).backward()
        return gain.grad.item()

    parts = gradient(1, 0), gradient(0, 1)
    assert gradient(1, 1) == pytest.approx(sum(parts), rel=1e-3)
    assert min(map(abs, parts)) > 1


def test_weight_decay_draws_gains_to_the_calibrated_scale(quantize):
    quantized = quantize(nn.Sequential(nn.Linear(5, 3)), "x:1,5", torch.randn(8, 5)).train()
    quantizer = quantized[0].dopt_quantizer
    with torch.no_grad():
        quantizer.input_gain.fill_(-2.0)
        quantizer.weight_gain.fill_(3.0)
    optimizer = torch.optim.SGD([quantizer.input_gain, quantizer.weight_gain], 1.0, weight_decay=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        (0.0 * quantized(torch.randn(4, 5)).sum()).backward()
        optimizer.step()
    assert abs(quantizer.input_gain.item()) < 1e-4
    assert quantizer.weight_gain.abs().max() < 1e-4


def test_the_quantization_loss_is_the_mean_relative_squared_error(quantize):
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)).eval()
    x = torch.randn(10, 6)
    quantized = quantize(model, "x:1,6", x)
    zeros = np.zeros(4, np.int32)

    def weight_error(layer):
        weight, _ = fold(FloatLayer(array(layer.weight), None, None, 0))
        scale = np.abs(weight).max(1) / np.float32(127)
        return relative_squared_error(weight, scale.astype(np.float32), zeros, WEIGHT, axis=0)

    errors = [weight_error(layer) for layer in model]
    assert dopt_api.get_quant_loss(quantized).item() == pytest.approx(np.mean(errors), rel=1e-3)
    quantized.train()(x)
    first = fake_quantize(x.numpy(), *parameters(quantized[0]), ACTIVATION)
    second = first @ used(quantized[0]).T + array(model[0].bias)
    given = [
        relative_squared_error(x.numpy(), *parameters(quantized[0]), ACTIVATION),
        relative_squared_error(second, *parameters(quantized[1]), ACTIVATION),
    ]
    loss = dopt_api.get_quant_loss(quantized)
    assert loss.item() == pytest.approx(np.mean(errors) + np.mean(given), rel=1e-2)
    loss.backward()
    assert quantized[0].weight.grad.abs().sum() > 0
    assert quantized[1].dopt_quantizer.input_gain.grad != 0


def parameters(layer):
    return array(layer.dopt_quantizer.input_scale), int(layer.dopt_quantizer.input_zero_point)


def used(layer):
    scale = (np.abs(array(layer.weight)).max(1) / np.float32(127)).astype(np.float32)
    return fake_quantize(array(layer.weight), scale, np.zeros(len(scale), np.int32), WEIGHT, axis=0)


@pytest.mark.filterwarnings("ignore::UserWarning")  # older versions remark on autocast without an accelerator
def test_training_under_autocast_keeps_scales_in_single_precision(small_net, quantize):
    x = batch()
    quantized = quantize(small_net, small_net.input_shape, x).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = quantized(x).float().square().mean()
    loss.backward()
    assert quantized.conv2.dopt_quantizer.input_gain.grad.dtype == torch.float32
    assert torch.isfinite(quantized.conv2.dopt_quantizer.input_gain.grad)
    assert quantized.conv1.weight.grad.abs().sum() > 0


def test_frozen_scales_stay_and_layers_with_frozen_weights_work(small_net, quantize):
    quantized = quantize(small_net, small_net.input_shape, batch()).train()
    for name, parameter in quantized.named_parameters():
        parameter.requires_grad_("dopt_quantizer" not in name and "conv1" not in name)
    quantized(batch()).sum().backward()
    assert quantized.conv2.dopt_quantizer.input_gain.grad is None
    assert quantized.conv2.weight.grad is not None


def test_channels_last_inputs_give_the_same_result(small_net, quantize):
    x = batch()
    quantized = quantize(small_net, small_net.input_shape, x)
    torch.testing.assert_close(quantized(x.to(memory_format=torch.channels_last)), quantized(x), rtol=1e-4, atol=1e-5)


def test_evaluation_between_steps_leaves_the_state(small_net, quantize):
    x = batch()
    quantized = quantize(small_net, small_net.input_shape, x).train()
    quantized(x).sum().backward()
    before = {key: value.clone() for key, value in quantized.state_dict().items()}
    with torch.no_grad():
        quantized.eval()(x)
    assert all(torch.equal(value, before[key]) for key, value in quantized.state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_gives_the_scales_and_values_of_the_cpu(small_net, quantize):
    x = batch()
    on_cpu = quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), "x:1,3,12,12", x)
    on_gpu = quantize(nn.Sequential(nn.Conv2d(3, 4, 3)).cuda(), "x:1,3,12,12", x.cuda())
    one, other = on_cpu[0].dopt_quantizer, on_gpu[0].dopt_quantizer
    assert torch.equal(other.input_scale.cpu(), one.input_scale)
    assert torch.equal(other.quantize_input(x.cuda()).cpu(), one.quantize_input(x))
    on_gpu.train()(x.cuda()).sum().backward()
    assert other.input_gain.grad.is_cuda


def test_the_grid_is_that_of_the_strategy():
    assert Grid(8) == ACTIVATION
    assert (WEIGHT.qmin, WEIGHT.qmax) == (-127, 127)
