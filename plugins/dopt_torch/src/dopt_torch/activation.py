"""The state of one activation, a layer's input or output: scale, zero point, statistics; and what is done with it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dopt_api.quantizer import activation_parameters, lattice
from dopt_api.types import LayerPlan
from dopt_torch.fake_quantize import LearnedScale, fake_quantize, learned_scale
from dopt_torch.layer_kinds import LayerKind, samples_first
from dopt_torch.statistics import DeviceStatistics, merge_over_ranks

__all__ = ["ActivationQuantizer", "OutputQuantizer", "relative_error"]

_log = logging.getLogger("dopt")


class ActivationQuantizer(nn.Module):
    """The state of one activation of a quantized layer.

    Scales are parameters, so that optimizers and ``DistributedDataParallel`` see them; statistics are neither
    parameters nor buffers, so that no wrapper overwrites one rank's with another's, but they stand in the state dict.
    Everything keeps its dtype when the model is cast.

    Attributes:
        role: ``input`` or ``output``: the names of scale (float32 ``[]``, as calibrated), zero point (int32 ``[]``)
            and learned gain (float32 ``[]``; see :func:`dopt_api.quantizer.learned_scale`) begin with it.
        plan: The layer's strategy and range method.
        kind: The kind of layer.
        ready: uint8 ``[]``, 1 when scale and zero point are decided.
        statistics: What calibration has seen.
        calibrating: Whether forward passes collect statistics.
        probed: The probed elements of the last training pass.
    """

    ready: Tensor

    def __init__(self, role: str, plan: LayerPlan, kind: LayerKind, device: torch.device) -> None:
        super().__init__()
        self.role, self.plan, self.kind = role, plan, kind
        self.register_parameter(f"{role}_gain", nn.Parameter(torch.zeros((), device=device)))
        self.register_buffer(f"{role}_scale", torch.ones((), device=device))
        self.register_buffer(f"{role}_zero_point", torch.zeros((), dtype=torch.int32, device=device))
        self.register_buffer("ready", torch.zeros((), dtype=torch.uint8, device=device))
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

    @property
    def scale(self) -> Tensor:
        """The scale as calibrated, float32 ``[]``."""
        return getattr(self, f"{self.role}_scale")  # type: ignore[no-any-return]  # a buffer

    @property
    def gain(self) -> nn.Parameter:
        """The learned gain, float32 ``[]``."""
        return getattr(self, f"{self.role}_gain")  # type: ignore[no-any-return]  # a parameter

    @property
    def zero_point(self) -> Tensor:
        """The zero point, int32 ``[]``."""
        return getattr(self, f"{self.role}_zero_point")  # type: ignore[no-any-return]  # a buffer

    # ---- deciding the scale

    @property
    def learning(self) -> bool:
        """Whether a forward pass now is one of training: then scales are initialised and follow."""
        return self.training and torch.is_grad_enabled()

    def is_ready(self) -> bool:
        """Whether the scale is decided; a pending calibration (as from a checkpoint) is concluded."""
        if not self._on_host("ready") and not self.calibrating and self.statistics.seen:
            self.conclude()
        return bool(self._on_host("ready"))

    def start_calibration(self) -> None:
        """Forget earlier statistics and collect from now on."""
        self.forget()
        self.calibrating = True

    def forget(self) -> None:
        """Forget what was calibrated."""
        self.statistics = DeviceStatistics.empty(self.scale.device)
        self.ready.zero_()
        self.probed = None
        self._warned = False

    def conclude(self) -> None:
        """Let the core turn the statistics into scale and zero point.

        Raises:
            CalibrationError: There were no data, or NaN or infinity among them.
        """
        scale, zero_point = activation_parameters(
            self.statistics.to_core(),
            self.plan.input_grid,
            layer=self.plan.name,
            method=self.plan.range_method,
            role=self.role,
        )
        with torch.no_grad():
            self.scale.fill_(float(scale))
            self.gain.zero_()
            self.zero_point.fill_(zero_point)
            self.ready.fill_(1)

    def observe(self, x: Tensor) -> None:
        """Take a batch into the statistics."""
        with torch.no_grad():
            self.statistics.update(samples_first(self.seen_as(x.detach()), self.kind), self.kind.input_axis)

    def seen_as(self, x: Tensor) -> Tensor:
        """Return the tensor whose range is looked for, from the one that comes."""
        return x

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
                "Layer %r has no %s range yet and runs in float: calibrate it (set_calibrate_state) or train it.",
                self.plan.name,
                self.role,
            )
        return False

    # ---- quantizing

    def quantize(self, x: Tensor) -> Tensor:
        """Return the fake-quantized tensor, float32 of the shape of ``x``."""
        low, high = self._bounds()
        scale = self.learned_activation_scale()
        data = self.seen_as(x.float())
        if not (torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)):
            self.probed = None
            return fake_quantize(data, scale, low, high)
        batch = samples_first(data, self.kind)
        probe = lattice(tuple(batch.shape), self.kind.input_axis)
        result, probed = LearnedScale.apply(batch, scale, low, high, probe)
        self.probed = probed if self.training else None
        return result.view(x.shape)  # type: ignore[no-any-return]  # autograd functions are untyped

    def _bounds(self) -> tuple[int, int]:
        """Return the ends of the grid, less its zero point."""
        grid, zero_point = self.plan.input_grid, self._on_host(f"{self.role}_zero_point")
        return grid.qmin - zero_point, grid.qmax - zero_point

    def learned_activation_scale(self) -> Tensor:
        """Return the scale in use, ``[]``, differentiable in the gain."""
        return learned_scale(self.scale, self.gain)

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

    def _apply(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> ActivationQuantizer:
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
        super()._load_from_state_dict(
            {key: value for key, value in own.items() if not key.startswith(inner)}, prefix, *args
        )
        loaded = DeviceStatistics(parts).to_core()
        self.statistics = DeviceStatistics.from_core(loaded, self.scale.device)
        self.probed = None


class OutputQuantizer(ActivationQuantizer):
    """The state of a layer's output, where it is recorded.

    Attributes:
        within: The ends of the rectifier that alone reads the output, or ``None``: then what is recorded and
            quantized is what the rectifier makes of it, which the rectifier itself leaves as it is.
        pending: How many outputs of the layer have not come yet: a batch normalization is between.
    """

    def __init__(
        self, plan: LayerPlan, kind: LayerKind, device: torch.device, within: tuple[float, float] | None
    ) -> None:
        super().__init__("output", plan, kind, device)
        self.within, self.pending = within, 0

    def seen_as(self, x: Tensor) -> Tensor:
        """Return what the rectifier makes of the output."""
        return x if self.within is None else x.clamp(*self.within)

    def take(self, y: Tensor) -> Tensor:
        """Observe or quantize an output, whichever is on; return what takes its place."""
        if self.calibrating:
            self.observe(y)
            return y
        return self.quantize(y).to(y.dtype) if self.prepare(y) else y


def relative_error(x: Tensor, step: Tensor, low: Any, high: Any) -> Tensor:
    r"""Return :math:`\sum (\hat x - x)^2 / \sum x^2` with the integers held fixed, so that it has a gradient."""
    integers = (x / step).detach().round().clamp_(low, high)
    energy = x.square().sum()
    error = (integers * step - x).square().sum()
    return error / torch.where(energy == 0, torch.ones_like(energy), energy)
