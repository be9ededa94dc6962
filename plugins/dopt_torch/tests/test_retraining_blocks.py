"""The building blocks of retraining: each alone, and together in a loop as a user writes it."""

import copy
import math

import pytest
import torch
from padded_network import Net, batches, sqnr
from torch import nn

from dopt_torch.fake_quantize import gain_of, learned_scale
from dopt_torch.quantized_layer import quantized_layers
from dopt_torch.retraining import distillation_loss, fit_weight_scales, freeze_norms, parameter_groups


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
