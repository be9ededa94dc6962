"""The state of one quantized layer: scales, zero point, statistics; and what is done with them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dopt_api.quantizer import Grid, activation_parameters, lattice
from dopt_api.types import LayerPlan
from dopt_torch.fake_quantize import (
    LearnedScale,
    LearnedWeightScale,
    fake_quantize,
    fake_quantize_weight,
    learned_scale,
    weight_range,
)
from dopt_torch.layer_kinds import LayerKind, on_weight, per_channel, samples_first
from dopt_torch.statistics import DeviceStatistics, merge_over_ranks

__all__ = ["LayerQuantizer"]

_log = logging.getLogger("dopt")


class LayerQuantizer(nn.Module):
    """What a quantized layer knows besides its weight and bias.

    Scales are parameters, so that optimizers and ``DistributedDataParallel`` see them; statistics are neither
    parameters nor buffers, so that no wrapper overwrites one rank's with another's, but they stand in the state dict.
    Everything keeps its dtype when the model is cast.

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
        super().__init__()
        self.plan, self.kind = plan, kind
        device, channels = weight.device, weight.shape[kind.weight_axis]
        self._smoothable = ((), (weight.shape[kind.weight_input_axis],))
        self.input_gain = nn.Parameter(torch.zeros((), device=device), requires_grad=not self.weight_only)
        group = plan.strategy.weight.group
        scales = channels if group is None else weight.numel() // group
        self.weight_gain = nn.Parameter(torch.zeros(scales, device=device))
        self.register_buffer("input_scale", torch.ones((), device=device))
        self.register_buffer("input_zero_point", torch.zeros((), dtype=torch.int32, device=device))
        self.register_buffer("ready", torch.zeros((), dtype=torch.uint8, device=device))
        self.register_buffer("smoothing", torch.ones((), device=device))
        self.statistics = DeviceStatistics.empty(device)
        self.calibrating = False
        self.probed: Tensor | None = None
        self._warned = False
        self._host: dict[str, tuple[object, int]] = {}

    def extra_repr(self) -> str:
        """Show strategy and state."""
        ready = not self.ready.is_meta and bool(self.ready)
        state = "calibrating" if self.calibrating else "ready" if ready else "not calibrated"
        return f"{self.plan.name!r}, {self.plan.strategy.name}, {state}"

    # ---- deciding the scales

    @property
    def weight_only(self) -> bool:
        """Whether the strategy leaves the input float; then there is nothing to calibrate."""
        return self.plan.strategy.activation is None

    @property
    def learning(self) -> bool:
        """Whether a forward pass now is one of training: then scales are initialised and follow."""
        return self.training and torch.is_grad_enabled()

    def is_ready(self) -> bool:
        """Whether the input's scale is decided; a pending calibration (as from a checkpoint) is concluded."""
        if self.weight_only:
            return True
        if not self._on_host("ready") and not self.calibrating and self.statistics.seen:
            self.conclude()
        return bool(self._on_host("ready"))

    def start_calibration(self) -> None:
        """Forget earlier statistics and collect from now on."""
        self.forget()
        self.calibrating = True

    def forget(self) -> None:
        """Forget what was calibrated."""
        self.statistics = DeviceStatistics.empty(self.input_scale.device)
        self.ready.zero_()
        self.probed = None
        self._warned = False

    def conclude(self) -> None:
        """Let the core turn the statistics into scale and zero point.

        Raises:
            CalibrationError: There were no data, or NaN or infinity among them.
        """
        if self.weight_only:
            return
        scale, zero_point = activation_parameters(
            self.statistics.to_core(),
            self.plan.input_grid,
            layer=self.plan.name,
            method=self.plan.range_method,
        )
        with torch.no_grad():
            self.input_scale.fill_(float(scale))
            self.input_gain.zero_()
            self.input_zero_point.fill_(zero_point)
            self.ready.fill_(1)

    def observe(self, x: Tensor) -> None:
        """Take a batch of inputs into the statistics."""
        if self.weight_only:
            return
        with torch.no_grad():
            self.statistics.update(samples_first(self.smooth_input(x.detach()), self.kind), self.kind.input_axis)

    def prepare(self, x: Tensor) -> bool:
        """Make sure that the scale is decided, from this very batch in training; say whether it is."""
        if self.is_ready():
            return True
        if self.learning:
            self.statistics = DeviceStatistics.empty(x.device)
            self.observe(x)
            merge_over_ranks([self.statistics])
            if not self.statistics.seen:
                return False  # an empty batch says nothing
            self.conclude()
            return True
        if not self._warned:
            self._warned = True
            _log.warning(
                "Layer %r has no input range yet and runs in float: calibrate it (set_calibrate_state) or train it.",
                self.plan.name,
            )
        return False

    # ---- quantizing

    def quantize_input(self, x: Tensor) -> Tensor:
        """Return the fake-quantized input, smoothed, of the dtype of ``x``; just smoothed where it stays float."""
        if self.weight_only:
            return self.smooth_input(x.float()).to(x.dtype) if self.smoothing.dim() else x
        low, high = self._bounds()
        scale = self.learned_input_scale()
        data = self.smooth_input(x.float())
        if not (torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)):
            self.probed = None
            return fake_quantize(data, scale, low, high).to(x.dtype)
        batch = samples_first(data, self.kind)
        probe = lattice(tuple(batch.shape), self.kind.input_axis)
        result, probed = LearnedScale.apply(batch, scale, low, high, probe)
        self.probed = probed if self.training else None
        return result.view(x.shape).to(x.dtype)  # type: ignore[no-any-return]  # autograd functions are untyped

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
        return _relative_error(folded, step, grid.qmin - shift, grid.qmax - shift)

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
        return _relative_error(self.probed, self.learned_input_scale(), *self._bounds())

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

    def _bounds(self) -> tuple[int, int]:
        """Return the ends of the input's grid, less its zero point."""
        grid, zero_point = self.plan.input_grid, self._on_host("input_zero_point")
        return grid.qmin - zero_point, grid.qmax - zero_point

    def learned_input_scale(self) -> Tensor:
        """Return the scale in use, ``[]``, differentiable in the gain."""
        return learned_scale(self.input_scale, self.input_gain)

    def learned_weight_scale(self, folded: Tensor) -> Tensor:
        """Return the scales in use of the folded weight, ``[C]``, differentiable in the gains."""
        derived, _ = weight_range(folded, self.plan.strategy.weight, self.kind.weight_axis)
        return learned_scale(derived, self.weight_gain)

    # ---- being a module

    def _on_host(self, name: str) -> int:
        """Return the value of a one-element buffer; the device is asked only when the buffer has been written."""
        buffer: Tensor = self._buffers[name]  # type: ignore[assignment]  # these buffers are never None
        if buffer.is_inference():
            return int(buffer)  # writes to it are not counted
        stamp = (id(buffer), buffer._version)
        found = self._host.get(name)
        if found is None or found[0] != stamp:
            found = self._host[name] = (stamp, int(buffer))
        return found[1]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the probed inputs, which belong to one pass and cannot be copied, and what is cached."""
        return {**self.__dict__, "probed": None, "_host": {}}

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> LayerQuantizer:
        """Move, but never cast."""

        def move(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, *args, **kwargs)
        self.statistics.map(move)
        self._host.clear()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, part in self.statistics.parts.items():
            destination[f"{prefix}statistics.{name}"] = part

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load what is there; a float checkpoint has nothing for a quantizer, and that is no error."""
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        if not own:
            return
        inner = f"{prefix}statistics."
        parts = {key[len(inner) :]: value for key, value in own.items() if key.startswith(inner)}
        smoothing = own.get(f"{prefix}smoothing", self.smoothing)
        if tuple(smoothing.shape) in self._smoothable:
            self.smoothing = self.smoothing.new_ones(smoothing.shape)
        else:  # torch 1.11 takes the first of several for one
            errors: list[str] = args[-1]
            errors.append(f"{prefix}smoothing has the shape {list(smoothing.shape)}, not one of {self._smoothable}")
            return
        super()._load_from_state_dict(
            {key: value for key, value in own.items() if not key.startswith(inner)}, prefix, *args
        )
        loaded = DeviceStatistics(parts).to_core()
        self.statistics = DeviceStatistics.from_core(loaded, self.input_scale.device)
        self.probed = None


def _one_for_zero(factor: Tensor) -> Tensor:
    """Return the factor with 1 for 0: such a channel is multiplied by 0 later, whatever its weights are."""
    return torch.where(factor == 0, torch.ones_like(factor), factor)


def _relative_error(x: Tensor, step: Tensor, low: Any, high: Any) -> Tensor:
    r"""Return :math:`\sum (\hat x - x)^2 / \sum x^2` with the integers held fixed, so that it has a gradient."""
    integers = (x / step).detach().round().clamp_(low, high)
    energy = x.square().sum()
    error = (integers * step - x).square().sum()
    return error / torch.where(energy == 0, torch.ones_like(energy), energy)
