"""Batch normalization in a quantized model: the folded weight is on the grid, the parameter stays as it was."""

import numpy as np
import pytest
import torch
from torch import nn

from dopt_api.params import FloatLayer, quantize_layer
from dopt_api.quantizer import BatchNorm, Grid, fake_quantize, fold_batch_norm
from dopt_torch.quantized_layer import norm_factor, norm_of, quantized_layers

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def trained(norm):
    """Give a batch normalization statistics and parameters unlike those of a fresh one, gamma of either sign."""
    nn.init.uniform_(norm.running_mean, -1, 1)
    nn.init.uniform_(norm.running_var, 0.2, 3)
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 1)
        with torch.no_grad():
            norm.weight[::2] *= -1
    return norm


def core_norm(norm):
    gamma, beta = (None if p is None else p.detach().numpy() for p in (norm.weight, norm.bias))
    return BatchNorm(gamma, beta, norm.running_mean.numpy(), norm.running_var.numpy(), norm.eps)


def core_layer(layer, norm, plan):
    """Return the layer as the core folds and quantizes it, without a bias, for which its scale could be raised."""
    axis = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0
    weight = layer.weight.detach().numpy()
    if norm is not None:
        weight, _ = fold_batch_norm(weight, None, core_norm(norm), axis=axis)
    return quantize_layer(FloatLayer(weight, None, None, axis), plan, np.float32(0.01), 0)


def _over(factor, shape, axis):
    """Repeat a factor of each output channel over a weight."""
    if axis == 0:
        return factor.reshape(-1, *(1,) * (len(shape) - 1))
    groups = factor.size // shape[1]
    rows = np.repeat(factor.reshape(groups, shape[1]), shape[0] // groups, axis=0)
    return rows.reshape(*rows.shape, *(1,) * (len(shape) - 2))


def images(*shape):
    return torch.randn(*(shape or (2, 4, 9, 9)))


CASES = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), 1),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), 2),
    "conv2d without bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), 2),
    "grouped conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), 2),
    "depthwise conv2d": (lambda: nn.Conv2d(4, 4, 3, groups=4), 2),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), 3),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), 1),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3), 2),
    "grouped conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), 2),
    "depthwise conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), 2),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(4, 6, 2), 3),
    "linear": (lambda: nn.Linear(4, 6), 0),
}


def built(case, quantize, **norm_options):
    """Return layer, norm and the quantized layer of a case, and an input."""
    make, dims = CASES[case]
    layer = make()
    channels = getattr(layer, "out_channels", None) or layer.out_features
    norm = trained(NORMS[dims or 1](channels, **norm_options))
    shape = (3, 4, *(6,) * dims)
    net = nn.Sequential(layer, norm).eval()
    quantized = quantize(net, "x:" + ",".join(map(str, shape)))
    return layer, norm, quantized[0], torch.randn(shape)


def assert_on_the_cores_grid(layer, norm, quantized):
    quantizer, factor = quantized.dopt_quantizer, norm_factor(quantized)
    with torch.no_grad():
        used = quantizer.quantize_weight(quantized.weight, factor).numpy()
    core = core_layer(layer, norm, quantizer.plan)
    axis = core.axis
    over = _over(core_norm(norm).factor, used.shape, axis)
    nonzero = np.broadcast_to(over != 0, used.shape)
    np.testing.assert_allclose((used * over)[nonzero], core.weight[nonzero], rtol=1e-6, atol=0)
    step = core.weight_scale.reshape([-1 if i == axis else 1 for i in range(used.ndim)])
    integers = np.rint(used.astype(np.float64) * over / step).astype(np.int32)
    assert np.array_equal(integers[nonzero], core.integers[nonzero])
    assert np.abs(integers).max() == 127
    return used


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_the_weight_in_use_times_the_factor_is_the_cores_quantized_folded_weight(case, affine, quantize):
    layer, norm, quantized, _ = built(case, quantize, affine=affine)
    assert norm_of(quantized) is not None
    assert_on_the_cores_grid(layer, norm, quantized)


@pytest.mark.parametrize("case", CASES)
def test_a_layer_without_normalization_uses_the_cores_quantized_weight(case, quantize):
    layer = CASES[case][0]()
    shape = "x:" + ",".join(map(str, (3, 4, *(6,) * CASES[case][1])))
    quantized = quantize(nn.Sequential(layer), shape)[0]
    with torch.no_grad():
        used = quantized.dopt_quantizer.quantize_weight(quantized.weight, None)
    core = core_layer(layer, None, quantized.dopt_quantizer.plan)
    assert torch.equal(used, torch.from_numpy(core.weight))


@pytest.mark.parametrize("gamma", [0.0, -1.5, 1e-6, -1e-12])
@pytest.mark.parametrize("case", ["conv2d", "linear", "conv_transpose2d"])
def test_zero_negative_and_tiny_gammas_are_handled(case, gamma, quantize):
    layer, norm, quantized, _x = built(case, quantize)
    for n in (norm, norm_of(quantized)):
        with torch.no_grad():
            n.weight[1] = gamma
    used = assert_on_the_cores_grid(layer, norm, quantized)
    assert np.isfinite(used).all()
    channel = used[:, 1] if case == "conv_transpose2d" else used[1]
    own = layer.weight.detach().numpy()
    own = own[:, 1] if case == "conv_transpose2d" else own[1]
    np.testing.assert_allclose(channel, own, atol=np.abs(own).max() / 200)  # close to the weight, whatever gamma


def test_groups_of_a_transposed_convolution_share_scales_but_not_factors(quantize):
    layer, norm, quantized, _ = built("grouped conv_transpose2d", quantize)
    with torch.no_grad():
        for n in (norm, norm_of(quantized)):
            n.weight[:3] = 0.01  # first group
            n.weight[3:] = -3.0  # second group
    assert quantized.dopt_quantizer.weight_gain.shape == (3,)
    assert_on_the_cores_grid(layer, norm, quantized)


def test_the_factor_is_the_cores_to_the_bit(quantize):
    _, norm, quantized, _ = built("conv2d", quantize)
    assert np.array_equal(norm_factor(quantized).numpy(), core_norm(norm).factor)


def test_the_factor_follows_the_running_statistics(quantize):
    _, _, quantized, _ = built("conv2d", quantize)
    before = norm_factor(quantized).clone()
    norm_of(quantized).running_var.mul_(4)
    torch.testing.assert_close(norm_factor(quantized), before / 2, rtol=1e-4, atol=0)


def test_converting_to_sync_batch_norm_keeps_the_folding(quantize):
    net = nn.Sequential(nn.Conv2d(4, 6, 3), trained(nn.BatchNorm2d(6))).eval()
    x = images()
    quantized = quantize(net, "x:2,4,9,9", x)
    with torch.no_grad():
        before = quantized(x)
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(quantized)
        assert isinstance(norm_of(converted[0]), nn.SyncBatchNorm)
        factor = norm_factor(converted[0])
        assert np.array_equal(factor.numpy(), core_norm(net[1]).factor)
        used = converted[0].dopt_quantizer.quantize_weight(converted[0].weight, factor)
        unfolded = converted[0].dopt_quantizer.quantize_weight(converted[0].weight, None)
        assert not torch.equal(used, unfolded)
        plain = quantize(net, "x:2,4,9,9", x)
        assert torch.equal(plain(x), before)
        assert torch.equal(used, plain[0].dopt_quantizer.quantize_weight(plain[0].weight, norm_factor(plain[0])))


def test_a_normalization_that_was_fused_away_is_not_folded(quantize):
    net = nn.Sequential(nn.Conv2d(4, 6, 3), trained(nn.BatchNorm2d(6))).eval()
    quantized = quantize(net, "x:2,4,9,9", images())
    quantized[1] = nn.Identity()
    assert norm_of(quantized[0]) is None
    assert norm_factor(quantized[0]) is None


def reference(net, quantized, x):
    """Compute the small net by hand: folded weights and biases, quantized by the core, and nothing else quantized."""
    functional = torch.nn.functional

    def parts(layer, norm, module, given):
        quantizer = module.dopt_quantizer
        scale, zero_point = np.float32(quantizer.input_scale.item()), quantizer.input_zero_point.item()
        core = quantize_layer(
            FloatLayer(
                layer.weight.detach().numpy(),
                None if layer.bias is None else layer.bias.detach().numpy(),
                None if norm is None else core_norm(norm),
                0,
            ),
            quantizer.plan,
            scale,
            zero_point,
        )
        data = fake_quantize(given.numpy(), scale, zero_point, Grid(8))
        return torch.from_numpy(data), torch.from_numpy(core.weight), torch.from_numpy(core.bias)

    given, weight, bias = parts(net.conv1, net.bn1, quantized.conv1, x)
    y = torch.relu(functional.conv2d(given, weight, bias, padding=1))
    given, weight, bias = parts(net.conv2, net.bn2, quantized.conv2, y)
    y = y + torch.relu(functional.conv2d(given, weight, bias, padding=1, groups=8))
    given, weight, bias = parts(net.fc, None, quantized.fc, y.mean((2, 3)))
    return functional.linear(given, weight, bias)


def test_evaluation_equals_the_network_of_folded_weights_that_the_core_quantized(small_net, quantize):
    x = torch.randn(2, 3, 12, 12)
    quantized = quantize(small_net, "x:2,3,12,12", x)
    with torch.no_grad():
        found, wanted, exact = quantized(x), reference(small_net, quantized, x), small_net(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=5e-4)  # a tie that falls the other way is one step
    assert (found - exact).abs().max() > 5 * (found - wanted).abs().max()


def test_the_checkpoint_has_the_weights_unfolded_and_unquantized(small_net, quantize):
    quantized = quantize(small_net, "x:2,3,12,12", torch.randn(2, 3, 12, 12))
    with torch.no_grad():
        quantized(torch.randn(2, 3, 12, 12))
    stored = quantized.state_dict()
    for key, value in small_net.state_dict().items():
        assert torch.equal(stored[key], value), key


def test_gains_multiply_the_scales_of_the_folded_weight(quantize):
    layer, norm, quantized, _x = built("conv2d", quantize)
    quantizer, factor = quantized.dopt_quantizer, norm_factor(quantized)
    with torch.no_grad():
        quantizer.weight_gain.fill_(-1.0)
    core = core_layer(layer, norm, quantizer.plan)
    folded = quantized.weight * factor.view(-1, 1, 1, 1)
    np.testing.assert_array_equal(quantizer.learned_weight_scale(folded).detach().numpy(), core.weight_scale / 2)


def test_only_the_norm_that_alone_follows_a_layer_is_folded(quantize):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), trained(nn.BatchNorm2d(4))

        def forward(self, x):
            y = self.conv(x)
            return self.norm(y) + y

    quantized = quantize(Twice().eval(), "x:2,4,9,9", images())
    (layer,) = quantized_layers(quantized)
    assert norm_of(layer) is None
