"""The state of one quantized layer: scales, zero point, statistics; and what is done with them.

Every number comes from :mod:`dopt_api.quantizer`; this module keeps them and passes gradients on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dopt_api.errors import NumbersError
from dopt_api.quantizer import (
    Statistics,
    activation_parameters,
    channel_maximum,
    fake_quantize,
    fake_quantize_gradients,
    gain_gradient,
    lattice,
    learned_scale,
    scale_zero_point,
)
from dopt_api.types import LayerPlan
from dopt_numpy.layer_kinds import WEIGHT_AXIS
from dopt_numpy.network import Array, Parameter, Pullback

__all__ = ["Folded", "LayerQuantizer", "Probe"]

_log = logging.getLogger("dopt")


@dataclass(eq=False)
class Probe:
    """The elements of a layer's input at which the quantization loss looks.

    Attributes:
        values: What they were in the last training pass, float32.
        gradient: What the quantization loss adds to their gradient; the pass's pullback takes it from here.
    """

    values: Array
    gradient: Array | None = None


@dataclass(frozen=True, eq=False)
class Folded:
    """A weight as the quantizer sees it.

    Attributes:
        weight: The folded weight, float32.
        factor: What folding multiplies the weight by, broadcastable to it; never 0.
        base: The scales that the folded weight's extremes give, ``[C]``.
        scale: The scales in use, ``[C]``: the base with the learned gains.
    """

    weight: Array
    factor: Array
    base: NDArray[np.float32]
    scale: NDArray[np.float32]


class LayerQuantizer:
    """What a quantized layer knows besides its weight and bias.

    Attributes:
        plan: The layer's strategy and range method.
        input_scale: Float32 ``[]``, as calibrated.
        input_zero_point: Int32 ``[]``.
        ready: uint8 ``[]``, 1 when the two are decided.
        input_gain: Float32 ``[]``, learned; see :func:`dopt_api.quantizer.learned_scale`.
        weight_gain: Float32, one for each scale of the weight, likewise.
        statistics: What calibration has seen.
        calibrating: Whether forward passes collect statistics.
        probe: What the last training pass left for the quantization loss.
    """

    def __init__(self, plan: LayerPlan, weight: Array) -> None:
        self.plan = plan
        self.axis = WEIGHT_AXIS if plan.strategy.weight.per_channel else None
        self.input_gain = Parameter(np.zeros((), np.float32))
        self.weight_gain = Parameter(np.zeros(channel_maximum(weight, self.axis).shape, np.float32))
        self.input_scale = np.ones((), np.float32)
        self.input_zero_point = np.zeros((), np.int32)
        self.ready = np.zeros((), np.uint8)
        self.statistics = Statistics()
        self.calibrating = False
        self.probe: Probe | None = None
        self._warned = False

    # ---- deciding the scales

    @property
    def weight_only(self) -> bool:
        """Whether the strategy leaves the input float; then there is nothing to calibrate."""
        return self.plan.strategy.activation is None

    def is_ready(self) -> bool:
        """Whether the input's scale is decided; a pending calibration (as from a checkpoint) is concluded."""
        seen = bool(self.statistics.samples + self.statistics.non_finite)
        if not self.ready and not self.calibrating and seen:
            self.conclude()
        return self.weight_only or bool(self.ready)

    def start_calibration(self) -> None:
        """Forget earlier statistics and collect from now on."""
        self.statistics, self.probe = Statistics(), None
        self.ready[...] = 0
        self.calibrating, self._warned = True, False

    def conclude(self) -> None:
        """Let the core turn the statistics into scale and zero point.

        Raises:
            CalibrationError: There were no data, or NaN or infinity among them.
        """
        plan = self.plan
        if self.weight_only:
            return
        scale, zero_point = activation_parameters(
            self.statistics, plan.input_grid, layer=plan.name, method=plan.range_method
        )
        self.input_scale[...], self.input_zero_point[...], self.ready[...] = scale, zero_point, 1
        self.input_gain.value[...] = 0

    def prepare(self, x: Array, training: bool) -> bool:
        """Make sure that the scale is decided, from this very batch in training; say whether it is."""
        if self.is_ready():
            return True
        if training and len(x):
            self.statistics.update(x)
            self.conclude()
        elif not self._warned:
            self._warned = True
            _log.warning(
                "Layer %r has no input range yet and runs in float: calibrate it (set_calibrate_state) or train it.",
                self.plan.name,
            )
        return bool(self.ready)

    # ---- quantizing

    @property
    def learned_input_scale(self) -> NDArray[np.float32]:
        """The scale in use, ``[]``."""
        return learned_scale(self.input_scale, self.input_gain.value)

    def quantize_input(self, x: Array, training: bool) -> tuple[Array, Pullback]:
        """Return the fake-quantized input, float32, and the function that carries gradients back."""
        if self.weight_only:
            return x, lambda dy: dy
        grid, scale, zero_point = self.plan.input_grid, self.learned_input_scale, self.input_zero_point.copy()
        index = lattice(x.shape, 1)
        probe = self.probe = Probe(x[index].copy()) if training else None
        with self._named():
            quantized = fake_quantize(x, scale, zero_point, grid)

        def pullback(dy: Array) -> Array:
            dx, dscale = fake_quantize_gradients(dy, x, scale, zero_point, grid)
            self.input_gain.accumulate(gain_gradient(dscale, self.input_scale, self.input_gain.value))
            if probe is not None and probe.gradient is not None:
                dx[index] += probe.gradient
            return dx

        return quantized, pullback

    def fold(self, weight: Array, factor: NDArray[np.float32] | None) -> Folded:
        """Return the weight as the quantizer sees it.

        Args:
            weight: The layer's weight, output channels on axis 0.
            factor: The factor of the batch normalization that follows, ``[C]``, or ``None``. A factor of 0 counts as
                1: such a channel is multiplied by 0 later, whatever its weights are.
        """
        ones = np.ones(len(weight), np.float32)
        factor = ones if factor is None else np.where(factor == 0, ones, factor)
        on_weight = factor.reshape(-1, *(1,) * (weight.ndim - 1))
        folded = weight.astype(np.float32) * on_weight
        extreme = channel_maximum(folded, self.axis)
        with self._named():
            base, _ = scale_zero_point(-extreme, extreme, self.plan.strategy.weight)
        return Folded(folded, on_weight, base, learned_scale(base, self.weight_gain.value))

    def quantize_weight(
        self, weight: Array, factor: NDArray[np.float32] | None
    ) -> tuple[Array, Callable[[Array], Array]]:
        """Return the fake-quantized weight and the function that carries gradients back.

        The folded weight is what is quantized; the result is divided by the factor, since the normalization runs
        after the layer.
        """
        grid, folded = self.plan.strategy.weight, self.fold(weight, factor)
        with self._named():
            quantized = fake_quantize(folded.weight, folded.scale, 0, grid, axis=self.axis)

        def pullback(dy: Array) -> Array:
            zero_point = np.zeros(folded.scale.shape, np.int32)
            upstream = dy / folded.factor
            dfolded, dscale = fake_quantize_gradients(
                upstream, folded.weight, folded.scale, zero_point, grid, axis=self.axis
            )
            self.weight_gain.accumulate(gain_gradient(dscale, folded.base, self.weight_gain.value))
            return dfolded * folded.factor

        return quantized / folded.factor, pullback

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Put the layer's name into errors about its numbers."""
        try:
            yield
        except NumbersError as error:
            name = self.plan.name
            raise NumbersError(
                f"Layer {name!r}: {error.what}", where=f"layer {name!r}", expected=error.expected, fix=error.fix
            ) from error

    # ---- being kept

    def parameters(self) -> Mapping[str, Parameter]:
        """Return what is learned."""
        return {"input_gain": self.input_gain, "weight_gain": self.weight_gain}

    def state(self) -> dict[str, NDArray[Any]]:
        """Return what a checkpoint holds: gains, scale, zero point and statistics."""
        return {
            "input_gain": self.input_gain.value,
            "weight_gain": self.weight_gain.value,
            "input_scale": self.input_scale,
            "input_zero_point": self.input_zero_point,
            "ready": self.ready,
            **{f"statistics.{name}": part for name, part in self.statistics.arrays().items()},
        }

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Overwrite all of it by :meth:`state` of another quantizer.

        Raises:
            CalibrationError: The statistics are malformed.
        """
        self.statistics = Statistics.from_arrays(
            {name: state[f"statistics.{name}"] for name in self.statistics.arrays()}
        )
        for name in ("input_scale", "input_zero_point", "ready"):
            getattr(self, name)[...] = state[name]
        for name, parameter in self.parameters().items():
            parameter.value[...] = state[name]
        self.probe = None
