"""Calibration: what it sees, what it leaves alone, and the scales that come of it."""

import logging

import numpy as np
import pytest
import torch
from torch import nn

import dopt_api
from dopt_api.errors import CalibrationError, ModelError
from dopt_api.quantizer import Grid, Statistics, activation_parameters
from dopt_torch.quantized_layer import quantized_layers

SMALL = "x:2,3,12,12"


class Branches(nn.Module):
    """Two branches of which the second is run only when told so."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)
        self.both = True

    def forward(self, x):
        return self.first(x) + self.second(torch.log(x)) if self.both else self.first(x)


def images(n=2):
    return torch.randn(n, 3, 12, 12)


def calibrate(model, *batches):
    dopt_api.set_calibrate_state(model, True)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    dopt_api.set_calibrate_state(model, False)


def quantizer_state(model):
    return {key: value.clone() for key, value in model.state_dict().items() if "dopt_quantizer" in key}


def float_state(model):
    return {key: value.clone() for key, value in model.state_dict().items() if "dopt_quantizer" not in key}


def scales(model):
    return {
        name: (module.dopt_quantizer.input_scale.item(), module.dopt_quantizer.input_zero_point.item())
        for name, module in model.named_modules()
        if "dopt_quantizer" in module._modules
    }


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype, key
        assert torch.equal(value, other[key]), key


def recorded_inputs(net, *batches):
    """Run a float model and return what each of its layers was given."""
    inputs = {}
    hooks = [
        module.register_forward_hook(lambda _, args, __, name=name: inputs.setdefault(name, []).append(args[0]))
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            net(batch)
    for hook in hooks:
        hook.remove()
    return inputs


def from_core(inputs, method="min_max", bits=8):
    """Return scale and zero point as the core finds them."""
    statistics = Statistics()
    for batch in inputs:
        statistics.update(batch.numpy(), -1 if batch.dim() == 2 else 1)
    scale, zero_point = activation_parameters(statistics, Grid(bits), layer="any", method=method)
    return float(scale), zero_point


# ---- what a calibration pass does to the model


@pytest.mark.parametrize("training", [False, True])
def test_outputs_while_calibrating_equal_those_of_the_float_model(small_net, quantize, training):
    x = images()
    quantized = quantize(small_net, SMALL).train(training)
    dopt_api.set_calibrate_state(quantized, True)
    with torch.no_grad():
        assert torch.equal(quantized(x), small_net.eval()(x))


def test_a_calibrated_model_gives_float_outputs_while_it_is_calibrated_again(small_net, quantize):
    x = images()
    quantized = quantize(small_net, SMALL, x)
    dopt_api.set_calibrate_state(quantized, True)
    with torch.no_grad():
        assert torch.equal(quantized(x), small_net(x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_calibration_changes_no_float_parameter_or_buffer(small_net, quantize, training, grad):
    quantized = quantize(small_net, SMALL).train(training)
    before = float_state(quantized)
    dopt_api.set_calibrate_state(quantized, True)
    with torch.set_grad_enabled(grad):
        quantized(images())
        quantized(images())
    dopt_api.set_calibrate_state(quantized, False)
    assert_same(float_state(quantized), before)
    assert int(quantized.bn1.num_batches_tracked) == 0


def test_the_mode_of_each_module_is_as_before_after_every_pass(small_net, quantize):
    quantized = quantize(small_net, SMALL).train()
    quantized.bn1.eval()
    quantized.fc.eval()
    before = {name: module.training for name, module in quantized.named_modules()}
    dopt_api.set_calibrate_state(quantized, True)
    during = []
    quantized.bn2.register_forward_hook(lambda module, *_: during.append(module.training))
    quantized(images())
    assert {name: module.training for name, module in quantized.named_modules()} == before
    assert during == [False]
    dopt_api.set_calibrate_state(quantized, False)
    assert {name: module.training for name, module in quantized.named_modules()} == before


def test_the_modes_come_back_after_a_pass_that_failed(small_net, quantize):
    quantized = quantize(small_net, SMALL).train()
    quantized.bn1.eval()
    dopt_api.set_calibrate_state(quantized, True)
    quantized(images())
    with pytest.raises(RuntimeError):
        quantized(torch.randn(2, 5, 12, 12))
    dopt_api.set_calibrate_state(quantized, False)
    assert quantized.training
    assert quantized.fc.training
    assert not quantized.bn1.training


def test_dropout_is_off_while_calibrating(quantize):
    net = nn.Sequential(nn.Dropout(0.9), nn.Linear(6, 3))
    x = torch.rand(4, 6) + 1
    quantized = quantize(net, "x:4,6").train()
    calibrate(quantized, x)
    assert scales(quantized) == {"1": from_core([x])}


# ---- switching


def test_switching_on_twice_and_off_twice_does_nothing(small_net, quantize):
    x = images()
    quantized = quantize(small_net, SMALL)
    dopt_api.set_calibrate_state(quantized, False)  # never was on
    assert not quantized.conv1.dopt_quantizer.ready
    dopt_api.set_calibrate_state(quantized, True)
    with torch.no_grad():
        quantized(x)
        dopt_api.set_calibrate_state(quantized, True)
        quantized(x + 5)
    dopt_api.set_calibrate_state(quantized, False)
    assert int(quantized.conv1.dopt_quantizer.statistics.parts["samples"]) == 4, "the second 'on' forgets nothing"
    state = quantizer_state(quantized)
    dopt_api.set_calibrate_state(quantized, False)
    assert_same(quantizer_state(quantized), state)


def test_switching_on_again_starts_anew(small_net, quantize):
    x = images()
    wanted = quantizer_state(quantize(small_net, SMALL, x))
    quantized = quantize(small_net, SMALL, 100 * images())
    assert scales(quantized)["conv1"][0] > 10 * float(wanted["conv1.dopt_quantizer.input_scale"])
    calibrate(quantized, x)
    assert_same(quantizer_state(quantized), wanted)


def test_switching_leaves_no_hooks_behind(small_net, quantize):
    quantized = quantize(small_net, SMALL)
    for _ in range(3):
        calibrate(quantized, images())
    assert not quantized._forward_pre_hooks
    assert not quantized._forward_hooks


@pytest.mark.parametrize("mode", [True, False])
def test_a_model_that_is_not_quantized_is_refused(small_net, mode):
    with pytest.raises(ModelError, match=r"not a quantized model.*Fix: Call optimize_model first"):
        dopt_api.set_calibrate_state(small_net, mode)


def test_a_mode_that_is_neither_on_nor_off_is_refused(small_net, quantize):
    with pytest.raises(ModelError, match="'on'"):
        dopt_api.set_calibrate_state(quantize(small_net, SMALL), "on")


# ---- the scales


@pytest.mark.parametrize("method", [None, "min_max", "moving_average", "mse"])
def test_scales_are_the_cores_from_the_same_inputs(small_net, quantize, method):
    batches = [images(3) * 2, images(1), images(2) - 1]
    quantized = quantize(small_net, SMALL, *batches, **({"range": method} if method else {}))
    inputs = recorded_inputs(small_net, *batches)
    wanted = {name: from_core(given, method or "min_max") for name, given in inputs.items()}
    assert len(wanted) == 3
    assert scales(quantized) == wanted


def test_the_three_range_methods_give_three_ranges(small_net, quantize):
    batches = [images(3) * 2, images(1), images(2) - 1]
    found = {m: scales(quantize(small_net, SMALL, *batches, range=m)) for m in ("min_max", "moving_average", "mse")}
    for layer in ("conv1", "conv2", "fc"):
        assert found["moving_average"][layer][0] < found["min_max"][layer][0]
    assert len({str(s) for s in found.values()}) == 3


def test_the_order_and_size_of_batches_do_not_matter(small_net, quantize):
    """The images are given to the layer itself: what layers further on see may differ with the kernels in use."""
    data = images(12) * torch.logspace(-3, 3, 12).view(-1, 1, 1, 1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    wanted = quantizer_state(quantize(net, SMALL, data, range="moving_average"))
    for split in (data.split(1), data.split(5), data.flip(0).split(4), data[torch.randperm(12)].split([1, 7, 4])):
        assert_same(quantizer_state(quantize(net, SMALL, *split, range="moving_average")), wanted)


@pytest.mark.parametrize("range_method", ["min_max", "mse"])
def test_statistics_saved_while_the_mode_is_on_give_the_same_scales_later(small_net, quantize, range_method):
    x = images()
    finished = quantize(small_net, SMALL, x, range=range_method)
    left_on = quantize(small_net, SMALL, range=range_method)
    dopt_api.set_calibrate_state(left_on, True)
    with torch.no_grad():
        left_on(x)
    fresh = quantize(small_net, SMALL, range=range_method)
    fresh.load_state_dict(left_on.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), finished(x))
    assert scales(fresh) == scales(finished)


def test_inputs_of_float64_are_observed_as_float32(small_net, quantize):
    x = images()
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    wanted = quantizer_state(quantize(net, SMALL, x))
    assert_same(quantizer_state(quantize(net.double(), SMALL, x.double())), wanted)


@pytest.mark.parametrize("method", ["min_max", "moving_average", "mse"])
def test_the_memory_layout_does_not_matter(quantize, method):
    x = torch.randn(2, 3, 64, 64)
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    wanted = quantizer_state(quantize(net, "x:2,3,64,64", x, range=method))
    for layout in (
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([x, -x], -1)[..., 0],
    ):
        assert not layout.is_contiguous()
        assert_same(quantizer_state(quantize(net, "x:2,3,64,64", layout, range=method)), wanted)


def test_an_input_without_batch_axis_is_one_sample(quantize):
    x = images(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    wanted = quantizer_state(quantize(net, SMALL, x))
    assert_same(quantizer_state(quantize(net, SMALL, x[0])), wanted)


def test_an_empty_batch_is_no_data(small_net, quantize):
    x = images()
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    wanted = quantizer_state(quantize(net, SMALL, x))
    assert_same(quantizer_state(quantize(net, SMALL, x[:0], x, x[:0])), wanted)
    with pytest.raises(CalibrationError, match="'0/Conv2D' has seen no data"):
        quantize(net, SMALL, x[:0])


# ---- failures


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_sample_that_is_not_finite_is_an_error_that_names_the_layer(quantize, bad):
    x = torch.rand(4, 6) + 0.5
    x[2, 3] = bad
    quantized = quantize(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), "x:4,6")
    with pytest.raises(CalibrationError, match=r"'0/Linear' had NaN or infinity in 1 of 4 samples"):
        calibrate(quantized, x)
    assert not quantized[0].dopt_quantizer.ready


def test_a_layer_that_fails_leaves_the_others_calibrated(quantize):
    quantized = quantize(Branches(), "x:4,6")
    x = torch.rand(4, 6) + 0.5
    x[1, 2] = 0.0  # of which the second branch takes the logarithm
    with pytest.raises(CalibrationError, match=r"'second/Linear' had NaN or infinity") as caught:
        calibrate(quantized, x)
    assert "other layers" not in str(caught.value)
    assert quantized.first.dopt_quantizer.ready
    assert scales(quantized)["first"] == from_core([x])
    assert not quantized.second.dopt_quantizer.ready
    x[1, 2] = 1.0
    calibrate(quantized, x)  # and again, with better data
    assert quantized.second.dopt_quantizer.ready


def test_a_layer_that_no_pass_reached_is_an_error_that_names_it(quantize):
    quantized = quantize(Branches(), "x:4,6")
    quantized.both = False
    x = torch.rand(4, 6)
    with pytest.raises(CalibrationError, match=r"Layer 'second/Linear' has seen no data"):
        calibrate(quantized, x)
    assert scales(quantized)["first"] == from_core([x])
    assert not quantized._forward_hooks, "the mode is off in spite of the error"
    assert not quantized.second.dopt_quantizer.calibrating


def test_the_error_counts_the_other_layers_that_failed(small_net, quantize):
    with pytest.raises(CalibrationError, match=r"'conv1/Conv2D' has seen no data \(and 2 other layers"):
        calibrate(quantize(small_net, SMALL))


def test_replicas_of_data_parallel_are_refused_while_calibrating(quantize):
    """Replicas, as DataParallel makes on several devices, are thrown away with what they have seen."""
    quantized = quantize(nn.Sequential(nn.Linear(6, 3)), "x:4,6")
    dopt_api.set_calibrate_state(quantized, True)
    quantized[0].__dict__["_is_replica"] = True
    with pytest.raises(CalibrationError, match=r"DataParallel.*layer '0/Linear'.*wrapped\.module"):
        quantized(torch.rand(4, 6))


# ---- without calibration


def test_an_uncalibrated_model_runs_in_float_and_warns_once_for_each_layer(small_net, quantize, caplog):
    x = images()
    quantized = quantize(small_net, SMALL)
    with caplog.at_level(logging.WARNING, "dopt"), torch.no_grad():
        first, second = quantized(x), quantized(x)
        assert torch.equal(first, small_net(x))
    assert torch.equal(first, second)
    warnings = [r.getMessage() for r in caplog.records if "no input range" in r.getMessage()]
    assert len(warnings) == 3
    for name in ("conv1/Conv2D", "conv2/Conv2D", "fc/Linear"):
        assert sum(repr(name) in message for message in warnings) == 1


def test_a_calibrated_model_does_not_warn(small_net, quantize, caplog):
    quantized = quantize(small_net, SMALL, images())
    with caplog.at_level(logging.WARNING, "dopt"), torch.no_grad():
        quantized(images())
    assert not caplog.records


def test_data_beyond_the_calibrated_range_are_clipped(quantize):
    net = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.ones_(net[0].weight)
    quantized = quantize(net, "x:4,1", torch.tensor([[-1.0], [3.0]]))
    with torch.no_grad():
        found = quantized(torch.tensor([[-50.0], [-0.5], [2.0], [50.0]])).flatten().numpy()
    np.testing.assert_allclose(found, [-1.0, -0.5, 2.0, 3.0], atol=4 / 255)


def test_every_quantized_layer_has_taken_part(small_net, quantize):
    quantized = quantize(small_net, SMALL, images(), images(3))
    assert [int(layer.dopt_quantizer.statistics.parts["samples"]) for layer in quantized_layers(quantized)] == [5] * 3
