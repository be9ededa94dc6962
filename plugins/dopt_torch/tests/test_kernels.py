"""The torch kernels against the NumPy reference, to the bit."""

from unittest import mock

import numpy as np
import pytest
import torch
from dopt_strategies import data, grids, scales
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import dopt_torch.blocks
from dopt_api import quantizer as core
from dopt_api.quantizer import SMALLEST_SCALE, BatchNorm, Grid
from dopt_api.strategy import STRATEGIES
from dopt_api.types import LayerPlan
from dopt_torch.blocks import blocks, dense
from dopt_torch.fake_quantize import (
    LearnedScale,
    LearnedWeightScale,
    fake_quantize,
    fake_quantize_weight,
    learned_scale,
    weight_scale,
)
from dopt_torch.layer_kinds import kind_of, on_weight
from dopt_torch.quantized_layer import norm_factor, quantize_in_place
from dopt_torch.quantizer import LayerQuantizer

F32 = np.float32
LAYOUTS = ["contiguous", "reversed", "every second", "expanded", "channels last"]
SYMMETRIC = Grid(8, signed=True, symmetric=True, narrow=True, per_channel=True)


def laid_out(array, layout):
    """Return a tensor of the shape of ``array`` with other strides (expanded: other values, too)."""
    x = torch.from_numpy(np.array(array))
    if layout == "reversed":
        axes = tuple(reversed(range(x.dim())))
        return x.permute(axes).contiguous().permute(axes)
    if layout == "every second":
        wide = torch.full([2 * size for size in x.shape], float("nan"))
        return wide[(slice(None, None, 2),) * x.dim()].copy_(x)
    if layout == "expanded" and x.dim() and x.numel():
        return x[:1].expand_as(x)
    if layout == "channels last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
layouts = st.sampled_from(LAYOUTS)
simple_scales = st.floats(2.0**-30, 2.0**30, width=32)


def elements(scale, *, infinite=True):
    """Return numbers of every size, and many at and next to the ties of a grid."""
    with np.errstate(over="ignore"):
        halves = st.integers(-600, 600).map(lambda k: float(np.clip(F32(k / 2) * F32(scale), -3e38, 3e38)))
    beside = st.tuples(halves, st.sampled_from([-1, 1])).map(lambda t: float(np.nextafter(F32(t[0]), F32(t[1] * 9e37))))
    any_size = st.floats(width=32, allow_nan=False, allow_infinity=infinite)
    return st.one_of(halves, beside, any_size) if infinite else st.one_of(halves, beside)


@st.composite
def quantized_tensors(draw, scale_strategy=scales, *, infinite=True):
    """Draw tensor, scale, zero point and grid."""
    grid = draw(grids())
    scale = F32(draw(st.one_of(scale_strategy, st.sampled_from([0.25, 1.0]))))
    zero = 0 if grid.symmetric else draw(st.integers(grid.qmin, grid.qmax))
    array = draw(hnp.arrays(F32, draw(shapes), elements=elements(scale, infinite=infinite)))
    return laid_out(array, draw(layouts)), scale, zero, grid


def ends(grid, zero=0):
    return grid.qmin - zero, grid.qmax - zero


def equal(found, wanted):
    """Compare values; only the sign of zero is free."""
    assert found.shape == wanted.shape
    assert np.array_equal(found.detach().numpy(), wanted)


class TestFakeQuantize:
    @given(quantized_tensors())
    def test_is_the_core_s(self, drawn):
        x, scale, zero, grid = drawn
        found = fake_quantize(x, torch.tensor(scale), *ends(grid, zero))
        assert found.dtype == torch.float32
        equal(found, core.fake_quantize(x.numpy(), scale, zero, grid))

    @given(quantized_tensors())
    def test_leaves_its_input_alone(self, drawn):
        x, scale, zero, grid = drawn
        before = x.clone()
        fake_quantize(x, torch.tensor(scale), *ends(grid, zero))
        assert torch.equal(x, before)

    @pytest.mark.parametrize("block", [1, 7, 64])
    @given(quantized_tensors())
    def test_does_not_depend_on_the_block(self, block, drawn):
        x, scale, zero, grid = drawn
        with mock.patch.object(dopt_torch.blocks, "BLOCK", block):
            found = fake_quantize(x, torch.tensor(scale), *ends(grid, zero))
        equal(found, core.fake_quantize(x.numpy(), scale, zero, grid))

    def test_a_tensor_of_several_blocks_of_the_usual_size(self):
        x = torch.randn(3, 5, 200, 200).contiguous(memory_format=torch.channels_last) * 100
        assert x.numel() > 2 * dopt_torch.blocks.BLOCK
        found = fake_quantize(x, torch.tensor(0.7), -5, 250)
        equal(found, core.fake_quantize(x.numpy(), 0.7, 5, Grid(8)))
        assert found.stride() == x.stride()

    @pytest.mark.parametrize("scale", [SMALLEST_SCALE, 1.0, 2.0**100])
    def test_infinities_and_huge_quotients_saturate(self, scale):
        x = torch.tensor([float("inf"), float("-inf"), 3e38, -3e38])
        found = fake_quantize(x, torch.tensor(scale), -3, 4)
        equal(found[:2], np.array([4 * scale, -3 * scale], F32))
        equal(found, core.fake_quantize(x.numpy(), scale, 3, Grid(3)))

    def test_ties_go_to_the_even_integer(self):
        found = fake_quantize(torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5]), torch.tensor(1.0), -8, 7)
        assert found.tolist() == [-2, 0, 0, 2, 2]

    @given(st.floats(2.0**-126, 2.0**60, width=32), st.floats(-1e6, 1e6, width=32))
    def test_learned_scales_are_the_core_s(self, scale, gain):
        found = learned_scale(torch.tensor(scale), torch.tensor(gain))
        equal(found, core.learned_scale(scale, gain))
        assert found > 0

    @pytest.mark.parametrize("gain", [-3.0, -1e-3, 0.0, 1e-3, 5.0])
    def test_the_gradient_of_a_gain_is_the_core_s(self, gain):
        leaf = torch.tensor(gain, requires_grad=True)
        learned_scale(torch.tensor(0.25), leaf).backward(torch.tensor(3.0))
        assert leaf.grad.item() == pytest.approx(float(core.gain_gradient(3.0, 0.25, gain)), rel=1e-6)


class TestBlocks:
    @given(st.data(), shapes, layouts, st.integers(1, 9))
    def test_cover_every_element_once(self, draw, shape, layout, block):
        x = dense(laid_out(np.zeros(shape, F32), layout))
        y = torch.empty_like(x)
        with mock.patch.object(dopt_torch.blocks, "BLOCK", block):
            pieces = list(blocks(x, y))
        assert all(one.dim() == 1 and one.shape == other.shape and one.numel() <= block for one, other in pieces)
        assert sum(one.numel() for one, _ in pieces) == x.numel()
        for one, other in pieces:
            one.add_(1)
            other.copy_(one)
        assert (x == 1).all()
        assert (y == 1).all()

    @given(shapes, st.sampled_from(["contiguous", "reversed", "channels last"]))
    def test_dense_tensors_are_not_copied(self, shape, layout):
        x = laid_out(np.zeros(shape, F32), layout)
        assert dense(x) is x

    @pytest.mark.parametrize("layout", ["every second", "expanded"])
    def test_what_is_not_dense_is_copied(self, layout):
        x = laid_out(np.arange(24, dtype=F32).reshape(2, 3, 4), layout)
        copied = dense(x)
        assert copied.is_contiguous()
        assert torch.equal(copied, x)


def learned(x, scale, zero, grid, probe):
    """Return leaf tensors and the results of the autograd function."""
    leaf = x.detach().requires_grad_()
    step = torch.tensor(scale, requires_grad=True)
    return leaf, step, *LearnedScale.apply(leaf, step, *ends(grid, zero), probe)


def upstream_of(x, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=tuple(x.shape)).astype(F32))


def scale_tolerance(dy, y, x, scale):
    """Bound the error of summing in float32."""
    x64, y64 = x.detach().double(), y.detach().double()
    near = x64.clamp(-70000 * float(scale), 70000 * float(scale))
    size = float((dy.double() * y64).abs().sum() + (dy.double() * near).abs().sum())
    return (1e-5 * size + 1e-40) / float(scale)  # products may be subnormal


class TestLearnedScale:
    @given(quantized_tensors())
    def test_values_and_the_gradient_of_the_input_are_the_core_s(self, drawn):
        x, scale, zero, grid = drawn
        leaf, _, y, _ = learned(x, scale, zero, grid, ())
        equal(y, core.fake_quantize(x.numpy(), scale, zero, grid))
        dy = upstream_of(x)
        y.backward(dy)
        wanted, _ = core.fake_quantize_gradients(dy.numpy(), x.numpy(), scale, zero, grid)
        equal(leaf.grad, wanted)

    @pytest.mark.parametrize("block", [3, 2**18])
    @given(quantized_tensors(simple_scales, infinite=False))
    def test_the_gradient_of_the_scale_is_the_core_s_up_to_summation(self, block, drawn):
        x, scale, zero, grid = drawn
        dy = upstream_of(x)
        with mock.patch.object(dopt_torch.blocks, "BLOCK", block):
            leaf, step, y, _ = learned(x, scale, zero, grid, ())
            y.backward(dy)
        wanted_x, wanted = core.fake_quantize_gradients(dy.numpy(), x.numpy(), scale, zero, grid)
        equal(leaf.grad, wanted_x)
        assert step.grad.shape == ()
        assert abs(float(step.grad) - float(wanted)) <= scale_tolerance(dy, y, x, scale)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dy_layout", LAYOUTS)
    def test_upstream_gradients_of_any_layout(self, layout, dy_layout):
        rng = np.random.default_rng(1)
        x = laid_out(rng.normal(size=(2, 3, 4, 5)).astype(F32) * 100, layout)
        dy = laid_out(rng.normal(size=(2, 3, 4, 5)).astype(F32), dy_layout)
        leaf, step, y, _ = learned(x, 0.5, 100, Grid(8), ())
        y.backward(dy)
        wanted_x, wanted = core.fake_quantize_gradients(dy.numpy(), x.numpy(), 0.5, 100, Grid(8))
        equal(leaf.grad, wanted_x)
        assert float(step.grad) == pytest.approx(float(wanted), rel=1e-4)

    def test_gradients_pass_just_up_to_half_a_step_beyond_the_grid(self):
        low, high = F32(-3.5), F32(4.5)
        x = torch.tensor([low, np.nextafter(low, F32(-9)), high, np.nextafter(high, F32(9))])
        leaf, _, y, _ = learned(x, 1.0, 3, Grid(3), ())
        y.sum().backward()
        assert leaf.grad.tolist() == [1, 0, 1, 0]

    def test_a_retained_graph_gives_the_same_gradients_again(self):
        x = torch.randn(4, 5) * 10
        leaf, step, y, _ = learned(x, 0.1, 10, Grid(8), (slice(None),))
        first = torch.autograd.grad(y.square().sum(), (leaf, step), retain_graph=True)
        second = torch.autograd.grad(y.square().sum(), (leaf, step))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        assert float(first[1]) != 0

    def test_upstream_gradients_are_not_written_to(self):
        _, _, y, _ = learned(torch.randn(4, 5), 0.1, 10, Grid(8), ())
        dy = torch.randn(4, 5)
        before = dy.clone()
        y.backward(dy)
        assert torch.equal(dy, before)

    def test_the_gradient_of_the_probed_elements_is_added(self):
        x, dy = torch.randn(2, 3, 6, 6) * 100, torch.randn(2, 3, 6, 6)
        probe = (slice(None), slice(None), slice(1, None, 3), slice(1, None, 3))
        leaf, step, y, probed = learned(x, 0.5, 100, Grid(8), probe)
        assert torch.equal(probed, x[probe])
        (y * dy).sum().backward(retain_graph=True)
        plain, plain_scale = leaf.grad.clone(), step.grad.clone()
        leaf.grad = step.grad = None
        dp = torch.randn_like(probed)
        torch.autograd.backward([y, probed], [dy, dp])
        plain[probe] += dp
        assert torch.equal(leaf.grad, plain)
        assert torch.equal(step.grad, plain_scale)

    def test_the_probed_elements_alone_have_a_gradient_too(self):
        x = torch.randn(4, 5)
        leaf, step, _, probed = learned(x, 0.5, 100, Grid(8), (slice(None), slice(0, 2)))
        probed.sum().backward()
        assert torch.equal(leaf.grad, torch.tensor([1.0, 1, 0, 0, 0]).expand(4, 5))
        assert step.grad is None

    @pytest.mark.parametrize("end", [float("inf"), -float("inf")])
    def test_an_infinite_input_counts_as_clipped(self, end):
        x = torch.tensor([[1.0, end, -2.0, 700.0]])
        leaf, step, y, _ = learned(x, 0.5, 100, Grid(8), ())
        y.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        wanted = core.fake_quantize_gradients([[1.0, 2, 3, 4]], x.numpy(), 0.5, 100, Grid(8))
        equal(leaf.grad, wanted[0])
        assert step.grad.item() == pytest.approx(float(wanted[1]))


weights = st.tuples(
    hnp.arrays(
        F32,
        hnp.array_shapes(min_dims=2, max_dims=5, min_side=1, max_side=4),
        elements=st.floats(-float(F32(1.7e38)), float(F32(1.7e38)), width=32),
    ),
    st.integers(0, 1),
    grids(symmetric=True),
)


class TestWeights:
    @given(weights)
    def test_the_scale_is_the_core_s(self, drawn):
        weight, axis, grid = drawn
        extreme = core.channel_maximum(weight, axis)
        wanted, _ = core.scale_zero_point(-extreme, extreme, grid)
        found = weight_scale(torch.from_numpy(weight), grid, axis)
        assert found.dtype == torch.float32
        equal(found, wanted)

    def test_a_channel_of_zeros_and_a_tiny_one_have_usable_scales(self):
        weight = torch.tensor([[0.0, -0.0], [1e-45, 0.0]])
        assert weight_scale(weight, SYMMETRIC, 0).tolist() == [1.0, SMALLEST_SCALE]

    @given(weights)
    def test_values_are_the_core_s(self, drawn):
        weight, axis, grid = drawn
        scale = weight_scale(torch.from_numpy(weight), grid, axis)
        found = fake_quantize_weight(torch.from_numpy(weight), scale, None, grid, axis)
        equal(found, core.fake_quantize(weight, scale.numpy(), np.zeros(len(scale), np.int32), grid, axis=axis))

    @pytest.mark.parametrize("axis", [0, 1])
    @pytest.mark.parametrize("folded", [False, True])
    @given(seed=st.integers(0, 2**32 - 1))
    def test_gradients_are_the_core_s(self, axis, folded, seed):
        rng = np.random.default_rng(seed)
        weight, dy = rng.normal(size=(2, 4, 3, 2, 2)).astype(F32)[:, :, :, 0]
        channels = weight.shape[axis]
        scale = rng.uniform(0.005, 0.02, channels).astype(F32)
        weight.flat[:2] = 100.0, 0.001  # one is clipped, one is not, whatever the others are
        folding = rng.choice([-1.0, 1.0], channels).astype(F32) * rng.uniform(0.5, 2, channels).astype(F32)
        leaf, step = torch.tensor(weight, requires_grad=True), torch.tensor(scale, requires_grad=True)
        shaped = on_weight(torch.from_numpy(folding), leaf, axis) if folded else None
        LearnedWeightScale.apply(leaf, step, shaped, SYMMETRIC, axis).backward(torch.from_numpy(dy))
        x = weight * shaped.numpy() if folded else weight
        zeros = np.zeros(channels, np.int32)
        wanted_x, _ = core.fake_quantize_gradients(dy, x, scale, zeros, SYMMETRIC, axis=axis)
        inner = dy / shaped.numpy() if folded else dy  # the folded form is divided by the factor afterwards
        _, wanted = core.fake_quantize_gradients(inner, x, scale, zeros, SYMMETRIC, axis=axis)
        equal(leaf.grad, wanted_x)
        assert 0 < (wanted_x == 0).mean() < 1
        np.testing.assert_allclose(step.grad.numpy(), wanted, rtol=1e-4, atol=1e-4)

    def test_a_retained_graph_gives_the_same_gradients_again(self):
        leaf, step = torch.randn(3, 4, requires_grad=True), torch.full((3,), 0.01, requires_grad=True)
        y = LearnedWeightScale.apply(leaf, step, torch.full((3, 1), 2.0), SYMMETRIC, 0)
        first = torch.autograd.grad(y.square().sum(), (leaf, step), retain_graph=True)
        second = torch.autograd.grad(y.square().sum(), (leaf, step))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))

    @given(st.integers(0, 2**32 - 1))
    def test_the_folded_form_is_what_is_on_the_grid(self, seed):
        rng = np.random.default_rng(seed)
        weight, factor = rng.normal(size=(4, 3)).astype(F32), rng.normal(size=(4, 1)).astype(F32)
        folding, folded = torch.from_numpy(factor), weight * factor
        scale = weight_scale(torch.from_numpy(folded), SYMMETRIC, 0)
        found = fake_quantize_weight(torch.from_numpy(weight), scale, folding, SYMMETRIC, 0)
        wanted = core.fake_quantize(folded, scale.numpy(), np.zeros(4, np.int32), SYMMETRIC, axis=0)
        np.testing.assert_allclose(found.numpy() * factor, wanted, rtol=3e-7)


LAYERS = {
    "convolution": lambda: nn.Conv2d(3, 4, 2),
    "grouped convolution": lambda: nn.Conv2d(4, 6, 2, groups=2),
    "depthwise convolution": lambda: nn.Conv1d(4, 4, 3, groups=4),
    "linear": lambda: nn.Linear(5, 4),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 2),
    "grouped transposed": lambda: nn.ConvTranspose2d(4, 6, 2, groups=2),
    "depthwise transposed": lambda: nn.ConvTranspose1d(4, 4, 3, groups=4),
    "three-dimensional grouped transposed": lambda: nn.ConvTranspose3d(6, 9, 2, groups=3),
}


class TestFolding:
    @pytest.mark.parametrize("affine", [False, True])
    @pytest.mark.parametrize("name", LAYERS)
    def test_the_factor_on_the_weight_is_the_core_s(self, name, affine):
        layer = LAYERS[name]()
        kind = kind_of(layer)
        channels = getattr(layer, "out_channels", 4)
        norm = nn.BatchNorm2d(channels, eps=1e-3, affine=affine)
        for part in (norm.weight, norm.running_mean) if affine else (norm.running_mean,):
            nn.init.normal_(part)
        nn.init.uniform_(norm.running_var, 0.01, 3)
        parent = nn.Sequential(layer, norm)
        quantize_in_place(layer, LayerPlan("0", "", STRATEGIES["Quant_INT8-8"]), kind, (parent, "1"))
        gamma, beta = (norm.weight.detach().numpy(), norm.bias.detach().numpy()) if affine else (None, None)
        numbers = BatchNorm(gamma, beta, norm.running_mean.numpy(), norm.running_var.numpy(), norm.eps)
        factor = norm_factor(layer)
        equal(factor, numbers.factor)
        weight = layer.weight.detach()
        wanted, _ = core.fold_batch_norm(weight.numpy(), None, numbers, axis=kind.weight_axis)
        equal(weight * on_weight(factor, weight, kind.weight_axis), wanted)


def layer_quantizer(layer, zero=100, scale=0.05):
    quantizer = LayerQuantizer(LayerPlan("layer", "", STRATEGIES["Quant_INT8-8"]), kind_of(layer), layer.weight)
    quantizer.input_scale.fill_(scale)
    quantizer.input_zero_point.fill_(zero)
    return quantizer


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class TestInputsOfLayers:
    @pytest.mark.parametrize("gradient", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_any_floating_type_is_kept(self, dtype, gradient):
        quantizer = layer_quantizer(nn.Conv2d(3, 4, 3))
        x = (torch.randn(2, 3, 5, 5) * 10).to(dtype).requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            found = quantizer.quantize_input(x)
        assert found.dtype == dtype
        grid = STRATEGIES["Quant_INT8-8"].activation
        wanted = core.fake_quantize(x.detach().float().numpy(), F32(0.05), 100, grid)
        assert torch.equal(found.detach(), torch.from_numpy(wanted).to(dtype))
        if gradient:
            found.sum().backward()
            assert x.grad.dtype == dtype
            ones = np.ones(x.shape, F32)
            inside, _ = core.fake_quantize_gradients(ones, x.detach().float().numpy(), F32(0.05), 100, grid)
            equal(x.grad.float(), inside)
            assert quantizer.input_gain.grad.dtype == torch.float32

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", [(2, 3, 5, 4), (3, 5, 4), (0, 3, 5, 4)])
    @pytest.mark.parametrize("gradient", [False, True])
    def test_any_layout_and_unbatched_inputs(self, shape, layout, gradient):
        quantizer = layer_quantizer(nn.Conv2d(3, 4, 3))
        x = laid_out(np.random.default_rng(0).normal(size=shape).astype(F32), layout)
        with torch.set_grad_enabled(gradient):
            found = quantizer.quantize_input(x)
        equal(found, core.fake_quantize(x.numpy(), F32(0.05), 100, Grid(8)))

    @pytest.mark.parametrize("gain", [-0.5, 0.0, 0.5])
    @pytest.mark.parametrize("size", [1e-4, 1e4])
    def test_the_gain_s_gradient_is_the_core_s_whatever_its_size(self, gain, size):
        quantizer = layer_quantizer(nn.Linear(6, 2))
        quantizer.input_gain.data.fill_(gain)
        grid = STRATEGIES["Quant_INT8-8"].activation
        x, dy = torch.randn(4, 6) * 10, torch.randn(4, 6) * size
        quantizer.quantize_input(x).backward(dy)
        scale = core.learned_scale(0.05, gain)
        _, wanted = core.fake_quantize_gradients(dy.numpy(), x.numpy(), scale, 100, grid)
        wanted = core.gain_gradient(wanted, 0.05, gain)
        assert float(quantizer.input_gain.grad) == pytest.approx(float(wanted), rel=1e-3)

    @given(data(st.floats(-100, 100, width=32), max_dims=2))
    def test_linear_inputs_of_one_and_two_dimensions(self, array):
        found = layer_quantizer(nn.Linear(6, 2)).quantize_input(torch.from_numpy(array))
        equal(found, core.fake_quantize(array, F32(0.05), 100, Grid(8)))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_weights_keep_their_type(self, dtype):
        layer = nn.Linear(6, 2).to(dtype)
        weight = layer.weight
        found = layer_quantizer(layer).eval().quantize_weight(weight, None)
        grid = STRATEGIES["Quant_INT8-8"].weight
        single = weight.detach().float().numpy()
        extreme = core.channel_maximum(single, 0)
        scale, zeros = core.scale_zero_point(-extreme, extreme, grid)
        assert found.dtype == dtype
        assert torch.equal(found, torch.from_numpy(core.fake_quantize(single, scale, zeros, grid, axis=0)).to(dtype))
