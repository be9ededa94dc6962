"""The building blocks of retraining: each alone, and together in a loop as a user writes it."""

import copy
import math

import pytest
import torch
from padded_network import Net, batches, sqnr
from torch import nn

from dopt_api.errors import CalibrationError
from dopt_torch.fake_quantize import gain_of, learned_scale
from dopt_torch.quantized_layer import quantized_layers
from dopt_torch.retraining import (
    distillation_loss,
    fit_weight_scales,
    freeze_norms,
    parameter_groups,
    reestimate_norms,
)


def test_frozen_norms_stay_and_are_those_of_evaluation(make):
    model = make().train()
    before = model.norm.running_mean.clone()
    handle = freeze_norms(model)
    x = batches()[0]
    found = model.train()(x)
    assert torch.equal(model.norm.running_mean, before)
    assert model.deep.training
    torch.testing.assert_close(found, model.eval()(x))
    copy.deepcopy(model).train()(x)  # the hook is copied along
    handle.remove()
    model.train()(x)
    assert not torch.equal(model.norm.running_mean, before)


def test_the_distillation_loss_is_the_divergence_and_leaves_the_teacher_alone():
    student = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, 0.5], [0.0, 3.0, 0.0]], requires_grad=True)
    p, q = ((logits.detach() / 2).softmax(-1) for logits in (teacher, student))
    wanted = 4 * float((p * (p / q).log()).sum() / 2)
    loss = distillation_loss(student, teacher, 2.0)
    assert math.isclose(float(loss.detach()), wanted, rel_tol=1e-5)
    loss.backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
    three = [logits.detach()[None].expand(5, 2, 3) for logits in (student, teacher)]
    assert math.isclose(float(distillation_loss(*three, 2.0)), wanted, rel_tol=1e-5)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="a positive number was expected"):
            distillation_loss(student, teacher, temperature)


def test_groups_hold_every_parameter_once_and_scales_do_not_decay(make):
    model = make()
    own, scales = parameter_groups(model, 0.1, scale_lr=0.01, weight_decay=0.5)
    assert len(scales["params"]) == 8
    assert {id(one) for group in (own, scales) for one in group["params"]} == {id(one) for one in model.parameters()}
    assert (own["lr"], own["weight_decay"]) == (0.1, 0.5)
    assert (scales["lr"], scales["weight_decay"]) == (0.01, 0.0)
    torch.optim.SGD([own, scales], momentum=0.9)


def test_a_gain_is_the_inverse_of_what_scales_do_with_it():
    ratio = torch.tensor([0.01, 0.3, 0.999, 1.0, 1.5, 40.0])
    torch.testing.assert_close(learned_scale(torch.tensor(2.0), gain_of(ratio)), 2 * ratio)


def test_fitted_scales_lose_less_of_the_weights(make):
    model = make()

    def errors():
        return [
            float(layer.dopt_quantizer.weight_error(layer.weight, None if layer is not model.stem else norm).detach())
            for layer in quantized_layers(model)
        ]

    norm = (model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()).detach()
    before, clipped = errors(), [layer.dopt_quantizer.weight_gain.clone() for layer in quantized_layers(model)]
    fit_weight_scales(model)
    assert all(after < early for after, early in zip(errors(), before, strict=True))
    assert all(
        (layer.dopt_quantizer.weight_gain < early).any()
        for layer, early in zip(quantized_layers(model), clipped, strict=True)
    )


def test_retraining_at_four_bits_comes_nearer_to_float(make):
    model, exact, data = make(strategy="Quant_INT4-4"), Net().eval(), batches(count=8)
    start = sqnr(copy.deepcopy(model).eval(), exact, batches(seed=9))
    fit_weight_scales(model)
    freeze_norms(model)
    optimizer = torch.optim.Adam(parameter_groups(model, 1e-3, scale_lr=1e-3))
    model.train()
    for _ in range(10):
        for x in data:
            with torch.no_grad():
                target = exact(x)
            loss = nn.functional.mse_loss(model(x), target) + distillation_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert sqnr(model.eval(), exact, batches(seed=9)) > start + 3


class TwoNorms(nn.Module):
    """Convolution, norm, convolution, norm; with running statistics that are far off."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.one, self.two = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.first, self.second = nn.BatchNorm2d(6), nn.BatchNorm2d(4)
        self.plain = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x):
        return self.plain(self.second(self.two(torch.relu(self.first(self.one(x))))))


def test_norms_are_given_the_statistics_of_the_data(make):
    net = TwoNorms()
    model = make(net, "Quant_INT8-8")
    model.first.running_mean.fill_(50.0)
    model.second.running_var.fill_(9.0)
    model.train()
    model.two.eval()
    tracked, weight = model.first.num_batches_tracked.clone(), model.one.weight.clone()
    given = []
    handle = model.first.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    far_off = copy.deepcopy(model).eval()
    assert reestimate_norms(model, iter(batches())) == ["first", "second"]
    handle.remove()
    wanted = torch.stack([x.double().mean((0, 2, 3)) for x in given]).mean(0)
    torch.testing.assert_close(model.first.running_mean.double(), wanted, rtol=1e-5, atol=1e-6)
    wanted = torch.stack([x.double().var((0, 2, 3)) for x in given]).mean(0)
    torch.testing.assert_close(model.first.running_var.double(), wanted, rtol=1e-5, atol=1e-6)
    assert model.training
    assert not model.two.training
    assert (model.first.momentum, model.first.num_batches_tracked) == (0.1, tracked)
    assert torch.equal(model.one.weight, weight)
    exact = TwoNorms().train()
    for norm in (exact.first, exact.second):
        norm.momentum = None  # the mean over all batches
    for batch in batches():
        exact(batch)
    before, after = (sqnr(one, exact.eval(), batches(seed=9)) for one in (far_off, model.eval()))
    assert after > max(15, before + 10)  # ranges are still those of the statistics at first


def test_norms_stay_where_there_are_no_batches(make):
    model = make(TwoNorms(), "Quant_INT8-8")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CalibrationError, match="no batches"):
        reestimate_norms(model, [])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
