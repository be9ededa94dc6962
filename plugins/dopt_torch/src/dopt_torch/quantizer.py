"""The state of one quantized layer: scales, zero point, statistics; and what is done with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dopt_api.quantizer import Grid
from dopt_api.types import LayerPlan
from dopt_torch.activation import ActivationQuantizer, relative_error
from dopt_torch.fake_quantize import (
    LearnedWeightScale,
    fake_quantize_weight,
    learned_scale,
    weight_range,
)
from dopt_torch.layer_kinds import LayerKind, on_weight, per_channel, samples_first

__all__ = ["LayerQuantizer"]


class LayerQuantizer(ActivationQuantizer):
    """What a quantized layer knows besides its weight and bias: all about its input, and the gains of its weight.

    Attributes:
        plan: The layer's strategy and range method.
        kind: The kind of layer.
        input_scale: Float32 ``[]``, as calibrated.
        input_zero_point: Int32 ``[]``.
        ready: uint8 ``[]``, 1 when ``input_scale`` and ``input_zero_point`` are decided.
        input_gain: Float32 ``[]``, learned; see :func:`dopt_api.quantizer.learned_scale`.
        weight_gain: Float32 ``[C]``, likewise, on the scales that the weight's extremes give: one for each channel, or
            for each group of weights, those of a channel one after the other.
        smoothing: Float32 ``[C]``: what the channels of the input are multiplied by, and those of the weight divided,
            before they are quantized; powers of two. ``[]`` where there is no smoothing.
        statistics: What calibration has seen.
        calibrating: Whether forward passes collect statistics.
    """

    input_scale: Tensor
    input_zero_point: Tensor
    ready: Tensor
    smoothing: Tensor

    def __init__(self, plan: LayerPlan, kind: LayerKind, weight: Tensor) -> None:
        device, channels = weight.device, weight.shape[kind.weight_axis]
        super().__init__("input", plan, kind, device)
        self._smoothable = ((), (weight.shape[kind.weight_input_axis],))
        self.input_gain.requires_grad_(not self.weight_only)
        group = plan.strategy.weight.group
        scales = channels if group is None else weight.numel() // group
        self.weight_gain = nn.Parameter(torch.zeros(scales, device=device))
        self.register_buffer("smoothing", torch.ones((), device=device))

    # ---- deciding the scales

    @property
    def weight_only(self) -> bool:
        """Whether the strategy leaves the input float; then there is nothing to calibrate."""
        return self.plan.strategy.activation is None

    def is_ready(self) -> bool:
        """Whether the input's scale is decided; a pending calibration (as from a checkpoint) is concluded."""
        return self.weight_only or super().is_ready()

    def conclude(self) -> None:
        """Let the core turn the statistics into scale and zero point, unless the input stays float.

        Raises:
            CalibrationError: There were no data, or NaN or infinity among them.
        """
        if not self.weight_only:
            super().conclude()

    def observe(self, x: Tensor) -> None:
        """Take a batch of inputs into the statistics."""
        if not self.weight_only:
            super().observe(x)

    def seen_as(self, x: Tensor) -> Tensor:
        """Return the input as it is quantized: smoothed."""
        return self.smooth_input(x)

    # ---- quantizing

    def quantize_input(self, x: Tensor) -> Tensor:
        """Return the fake-quantized input, smoothed, of the dtype of ``x``; just smoothed where it stays float."""
        if self.weight_only:
            return self.smooth_input(x.float()).to(x.dtype) if self.smoothing.dim() else x
        return self.quantize(x).to(x.dtype)

    def quantize_weight(self, weight: Tensor, factor: Tensor | None) -> Tensor:
        """Return the fake-quantized weight, smoothed, of its own dtype.

        Args:
            weight: The layer's weight.
            factor: The factor of the batch normalization that follows, ``[C]``, or ``None``. The folded weight is
                what is quantized; the result is divided by the factor, since the normalization runs after the layer.
        """
        grid, axis = self.plan.strategy.weight, self.kind.weight_axis
        data, folding, derived, zero_point = self._arranged(weight, factor, grid)
        scale = learned_scale(derived, self.weight_gain)
        if torch.is_grad_enabled() and (weight.requires_grad or scale.requires_grad):
            result: Tensor = LearnedWeightScale.apply(data, scale, folding, grid, axis, zero_point)
        else:
            result = fake_quantize_weight(data, scale, folding, grid, axis, zero_point)
        return result.view(weight.shape).to(weight.dtype)

    def nearest_weight(self, weight: Tensor, factor: Tensor | None, grid: Grid) -> Tensor:
        """Return what :meth:`quantize_weight` would with another grid, and with nothing learned."""
        data, folding, scale, zero_point = self._arranged(weight, factor, grid)
        result = fake_quantize_weight(data, scale, folding, grid, self.kind.weight_axis, zero_point)
        return result.view(weight.shape).to(weight.dtype)

    def weight_error(self, weight: Tensor, factor: Tensor | None) -> Tensor:
        """Return the relative squared error of the folded weight, differentiable."""
        grid, axis = self.plan.strategy.weight, self.kind.weight_axis
        data, folding, derived, zero_point = self._arranged(weight, factor, grid)
        folded = data if folding is None else data * folding
        step = on_weight(learned_scale(derived, self.weight_gain), folded, axis)
        shift: Any = 0 if zero_point is None else on_weight(zero_point, folded, axis)
        return relative_error(folded, step, grid.qmin - shift, grid.qmax - shift)

    def _arranged(
        self, weight: Tensor, factor: Tensor | None, grid: Grid
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Return the smoothed weight, what folding multiplies it by, and scales and zero points from its extremes.

        Where weights are grouped, each group is a row.
        """
        axis = self.kind.weight_axis
        data = self.smooth_weight(weight.float())
        folding = None if factor is None else on_weight(_one_for_zero(factor), weight, axis)
        if grid.group is not None:
            folding = None if folding is None else folding.expand_as(data).reshape(-1, grid.group)
            data = data.reshape(-1, grid.group)
        scale, zero_point = weight_range(data if folding is None else data * folding, grid, axis)
        return data, folding, scale, zero_point

    def input_error(self) -> Tensor | None:
        """Return the relative squared error of the probed inputs of the last training pass, or ``None``."""
        if self.probed is None:
            return None
        return relative_error(self.probed, self.learned_input_scale(), *self._bounds())

    def smooth_input(self, x: Tensor) -> Tensor:
        """Return the input with its channels multiplied by the smoothing factors."""
        if not self.smoothing.dim():
            return x
        batch = samples_first(x, self.kind)
        return (batch * per_channel(self.smoothing, batch, self.kind.input_axis)).view(x.shape)

    def smooth(self, factors: Tensor) -> None:
        """Take over smoothing factors ``[C]``, and forget what was calibrated and learned without them."""
        some = bool((factors != 1.0).any())
        self.smoothing = factors.to(self.input_scale) if some else self.input_scale.new_ones(())
        self.forget()
        with torch.no_grad():
            self.input_gain.zero_()
            self.weight_gain.zero_()

    def smooth_weight(self, weight: Tensor) -> Tensor:
        """Return the weight with its input channels divided by the smoothing factors."""
        if not self.smoothing.dim():
            return weight
        return weight / per_channel(self.smoothing, weight, self.kind.weight_input_axis)

    def learned_input_scale(self) -> Tensor:
        """Return the scale in use, ``[]``, differentiable in the gain."""
        return self.learned_activation_scale()

    def learned_weight_scale(self, folded: Tensor) -> Tensor:
        """Return the scales in use of the folded weight, ``[C]``, differentiable in the gains."""
        derived, _ = weight_range(folded, self.plan.strategy.weight, self.kind.weight_axis)
        return learned_scale(derived, self.weight_gain)

    # ---- being a module

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load what is there, with smoothing factors or without."""
        if not any(key.startswith(prefix) for key in state_dict):
            return
        smoothing = state_dict.get(f"{prefix}smoothing", self.smoothing)
        if tuple(smoothing.shape) in self._smoothable:
            self.smoothing = self.smoothing.new_ones(smoothing.shape)
        else:  # torch 1.11 takes the first of several for one
            errors: list[str] = args[-1]
            errors.append(f"{prefix}smoothing has the shape {list(smoothing.shape)}, not one of {self._smoothable}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


def _one_for_zero(factor: Tensor) -> Tensor:
    """Return the factor with 1 for 0: such a channel is multiplied by 0 later, whatever its weights are."""
    return torch.where(factor == 0, torch.ones_like(factor), factor)
