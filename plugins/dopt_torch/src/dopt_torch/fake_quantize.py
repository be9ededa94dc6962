"""Fake quantization on tensors, with the gradients of learned step sizes.

The arithmetic is that of :mod:`dopt_api.quantizer.affine` to the bit: true division by the scale, rounding half to
even, and clipping to the grid less the zero point, which spares adding and subtracting it. On a CPU, these four
vectorized passes, done in place on blocks that stay in the cache, are several times faster than torch's fused kernel,
which is scalar there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dopt_api.quantizer import SMALLEST_SCALE, Grid
from dopt_torch.blocks import blocks, dense
from dopt_torch.layer_kinds import on_weight

__all__ = [
    "LearnedScale",
    "LearnedWeightScale",
    "fake_quantize",
    "fake_quantize_weight",
    "gain_of",
    "learned_scale",
    "weight_range",
    "weight_scale",
]


_LARGEST = float(np.finfo(np.float32).max)


def learned_scale(scale: Tensor, gain: Tensor) -> Tensor:
    """Return :func:`dopt_api.quantizer.learned_scale`, to the bit, differentiable in ``gain``."""
    smaller = 1 / (1 - gain.clamp_max(0.0))
    return (scale * torch.where(gain < 0, smaller, 1 + gain)).clamp_min(SMALLEST_SCALE)


def gain_of(ratio: Tensor) -> Tensor:
    """Return the gain that makes :func:`learned_scale` multiply a scale by a positive ``ratio``."""
    return torch.where(ratio >= 1, ratio - 1, 1 - 1 / ratio)


def fake_quantize(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Return ``clip(rint(x / scale), low, high) * scale``, float32 of the shape of ``x``, without a gradient.

    Args:
        x: Float32 data.
        scale: Positive float32, ``[]`` or of a shape that broadcasts.
        low: ``qmin - zero_point``.
        high: ``qmax - zero_point``.
    """
    x = dense(x)
    y = torch.empty_like(x)
    for x_, y_ in blocks(x, y):
        torch.div(x_, scale, out=y_).round_().clamp_(low, high).mul_(scale)
    return y


def weight_scale(weight: Tensor, grid: Grid, axis: int) -> Tensor:
    """Return the scales ``[C]`` of a weight from the extremes of its channels, as the core computes them."""
    others = [i for i in range(weight.dim()) if i != axis]
    extreme = weight.detach().abs().amax(dim=others).double()
    scale = (2 * extreme / (grid.qmax - grid.qmin)).float().clamp_min(SMALLEST_SCALE)
    return torch.where(extreme == 0, torch.ones_like(scale), scale)


def weight_range(weight: Tensor, grid: Grid, axis: int) -> tuple[Tensor, Tensor | None]:
    """Return the scales ``[C]`` of a weight, and the zero points of an asymmetric grid, as the core computes them."""
    if grid.symmetric:
        return weight_scale(weight, grid, axis), None
    others = [i for i in range(weight.dim()) if i != axis]
    low = weight.detach().amin(dim=others).double().clamp_max(0.0)
    width = weight.detach().amax(dim=others).double().clamp_min(0.0) - low
    scale = (width / (grid.qmax - grid.qmin)).float().clamp_min(SMALLEST_SCALE)
    scale = torch.where(width == 0, torch.ones_like(scale), scale)
    return scale, (grid.qmin - low / scale.double()).round().clamp(grid.qmin, grid.qmax).float()


class LearnedScale(torch.autograd.Function):
    """Fake quantization of an activation whose scale is learned; see :mod:`dopt_api.quantizer.training`.

    Besides the result it returns the probed elements of the input, a small copy that the quantization loss reads
    after the forward pass; its gradient is added to the input's.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, probe: tuple[slice, ...]
    ) -> tuple[Tensor, Tensor]:
        """Quantize ``x`` (float32) and copy ``x[probe]``."""
        x = dense(x)
        y = fake_quantize(x, scale, low, high)
        ctx.save_for_backward(x, scale, y)
        ctx.low, ctx.high, ctx.probe = low, high, probe
        ctx.set_materialize_grads(False)
        return y, x[probe].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dprobed: Tensor | None) -> tuple[Tensor | None, ...]:
        """Pass gradients on where the integer stays on the grid; sum the scale's as two dot products."""
        x, scale, y = ctx.saved_tensors
        dx = dscale = None
        if dy is not None:
            # dy . (r - m v) = (dy . y - (m dy) . x) / scale, since y = r scale and x = v scale
            dx = torch.empty_like(x)
            dy = dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
            sums = []
            for x_, y_, dy_, dx_ in blocks(x, y, dy, dx):
                torch.div(x_, scale, out=dx_)
                _where_inside(dy_, dx_, ctx.low, ctx.high)
                finite = x_.clamp(-_LARGEST, _LARGEST)  # an infinite x is outside, and inf * 0 would be NaN
                sums.append(torch.dot(dy_, y_) - torch.dot(dx_, finite))
            dscale = torch.stack(sums).sum() / scale
        if dprobed is not None:
            dx = torch.zeros_like(x) if dx is None else dx
            dx[ctx.probe] += dprobed
        return dx, dscale, None, None, None


class LearnedWeightScale(torch.autograd.Function):
    """Fake quantization of a weight, per channel, in the space in which batch normalization is folded in."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        folding: Tensor | None,
        grid: Grid,
        axis: int,
        zero_point: Tensor | None = None,
    ) -> Tensor:
        """Return ``fake_quantize(weight * folding) / folding``; see :func:`fake_quantize_weight`."""
        ctx.save_for_backward(weight, scale, folding, zero_point)
        ctx.grid, ctx.axis = grid, axis
        return fake_quantize_weight(weight, scale, folding, grid, axis, zero_point)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Pass gradients on where the integer stays on the grid; sum the scale's over each channel."""
        weight, scale, folding, zero_point = ctx.saved_tensors
        axis = ctx.axis
        low, high = _ends(ctx.grid, zero_point, weight, axis)
        v = (weight if folding is None else weight * folding) / on_weight(scale, weight, axis)
        inside = (v >= low - 0.5) & (v <= high + 0.5)
        dx = torch.where(inside, dy, torch.zeros_like(dy))
        slope = v.round().clamp_(low, high).mul_(dy).sub_(v.mul_(dx))
        if folding is not None:
            slope /= folding
        others = [i for i in range(weight.dim()) if i != axis]
        return dx, slope.sum(others), None, None, None, None


def fake_quantize_weight(
    weight: Tensor, scale: Tensor, folding: Tensor | None, grid: Grid, axis: int, zero_point: Tensor | None = None
) -> Tensor:
    """Return the weight whose folded form is on the grid.

    Args:
        weight: Float32.
        scale: ``[C]``, the scales of the folded weight.
        folding: What folding multiplies the weight by, not 0, of a shape that broadcasts; or ``None``.
        grid: The integer grid.
        axis: The axis of the weight with the ``C`` channels.
        zero_point: ``[C]``, float32, or ``None`` for 0.
    """
    step = on_weight(scale, weight, axis)
    v = torch.div(weight if folding is None else weight * folding, step)
    low, high = _ends(grid, zero_point, weight, axis)
    return v.round_().clamp_(low, high).mul_(step if folding is None else step / folding)


def _ends(grid: Grid, zero_point: Tensor | None, weight: Tensor, axis: int) -> tuple[Any, Any]:
    """Return the ends of the grid, less the zero point."""
    if zero_point is None:
        return grid.qmin, grid.qmax
    shift = on_weight(zero_point, weight, axis)
    return grid.qmin - shift, grid.qmax - shift


def _where_inside(dy: Tensor, v: Tensor, low: int, high: int) -> None:
    """Overwrite ``v`` by ``dy`` where ``low - 0.5 <= v <= high + 0.5``, else by 0."""
    below = float(np.nextafter(np.float32(low - 0.5), np.float32(-np.inf)))
    above = float(np.nextafter(np.float32(high + 0.5), np.float32(np.inf)))
    torch.ops.aten.hardtanh_backward(dy, v, below, above, grad_input=v)
