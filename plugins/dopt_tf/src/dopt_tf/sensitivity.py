"""What the quantization of each layer alone does to the output, for several strategies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dopt_api.errors import ConfigError, never_calibrated
from dopt_api.quantizer import (
    Statistics,
    activation_parameters,
    extremes,
    fake_quantize,
    scale_zero_point,
)
from dopt_api.search import Choice
from dopt_api.strategy import FLOAT, INTEGER_STRATEGIES, Strategy, get_strategy
from dopt_tf.find_layers import Layer
from dopt_tf.layer_kinds import channelwise_shape
from dopt_tf.post_training import calibrate, quantized_session
from dopt_tf.running import Array, Feed, Runner, given
from dopt_tf.statistics import DeviceStatistics

__all__ = ["measure_sensitivity", "sensitivity_of"]

FLOAT_BITS = 32

Cost = Literal["size", "bit_operations"]


def measure_sensitivity(
    sess: Any,
    outputs: Any,
    feeds: Iterable[Feed],
    strategies: Sequence[str] = INTEGER_STRATEGIES,
    *,
    cost: Cost = "size",
) -> list[Choice]:
    r"""Return the damage that each strategy does to each layer of a calibrated graph, as choices for a search.

    The damage of a layer is the relative squared error :math:`\lVert \hat y - y \rVert^2 / \lVert y \rVert^2` of the
    outputs with that layer quantized and all others float: 0.01 is 20 dB. It is measured by running the graph from the
    layer on, with what the strategy makes of its input and its weight in their places: about half a forward pass for
    each layer and strategy. Nothing is added to the graph and no variable changes.

    Args:
        sess: The session whose graph was quantized, calibrated.
        outputs: Tensors that the damage is measured at, such as the logits: one, or several.
        feeds: What ``sess.run`` is fed with for inference, one for each batch; the two flags need not be there.
        strategies: Names of the strategies to compare, besides ``float``. A layer that cannot have one of them has no
            choice of it.
        cost: What a choice takes of a budget: ``"size"``, the bits of the layer's weights; ``"bit_operations"``, its
            multiplications in one sample times the bits of both factors.

    Returns:
        For each quantized layer, in the order of the graph, one choice for each strategy and one for ``float``.

    Raises:
        ModelError: The graph is not a quantized one.
        CalibrationError: A layer was never calibrated, or there are no feeds.
        ExtensionError: A strategy is broken.
        KeyError: There is no such strategy.
    """
    runner, data = Runner(sess), given(feeds)
    fetched = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    candidates = [get_strategy(name) for name in strategies]
    taps = [_Tap(runner, name, candidates) for name in runner.quantization.sites]
    energy = 0.0
    for feed in data:
        exact = runner.run(fetched, feed, quantizing=False)
        energy += _energy(exact)
        for tap in taps:
            tap.weigh(fetched, feed, exact)
    return [choice for tap in taps for choice in tap.choices(energy, cost)]


def sensitivity_of(
    sess: Any,
    config_file: Path,
    feeds: Iterable[Feed],
    strategies: Sequence[str],
    *,
    cost: Cost,
    output_names: Sequence[str],
) -> list[Choice]:
    """Quantize and calibrate a session's graph and measure it: what ``dopt tune`` calls.

    Args:
        sess: A session of the float graph with the weights loaded; its graph is rewritten.
        config_file: The strategy file; layers that it leaves float are not looked at.
        feeds: See :func:`measure_sensitivity`, as ``strategies`` and ``cost``. They are held in memory.
        strategies: What is compared.
        cost: What is counted.
        output_names: The tensors that the damage is measured at, or their operations.

    Raises:
        ConfigError: There are no output names, or the graph has no such tensor.
    """
    data = list(feeds)
    with quantized_session(sess, config_file) as fresh:
        try:
            outputs = [
                fresh.graph.get_tensor_by_name(f"{name}:0" if ":" not in name else name) for name in output_names
            ]
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"The graph has no such output: {error}", where="output_names", fix="Give the names of its outputs."
            ) from error
        if not outputs:
            raise ConfigError(
                "It is not said where the damage is measured",
                where="output_names",
                expected="the names of the graph's outputs, such as 'logits'",
                fix="dopt tune ... --output-name logits",
            )
        calibrate(fresh, data)
        return measure_sensitivity(fresh, outputs, data, strategies, cost=cost)


class _Tap:
    """Puts what strategies make of a layer's input and weight in their places."""

    def __init__(self, runner: Runner, name: str, candidates: Sequence[Strategy]) -> None:
        quantization = runner.quantization
        self.runner, self.site = runner, quantization.sites[name]
        self.layer: Layer = quantization.structure.layers[name]
        self.op = runner.graph.get_operation_by_name(name)
        plan, quantizer = self.site.quantizer.plan, self.site.quantizer
        self.name = plan.name
        fit = [one for one in candidates if not one.unfit(weight_only=True, row=0)]
        statistics: Statistics = DeviceStatistics.to_core(runner.session.run(quantizer.statistics.parts))
        needs_range = any(one.activation is not None for one in fit)
        if needs_range and not int(statistics.samples) + int(statistics.non_finite):
            raise never_calibrated([plan.name])
        self.candidates = fit
        self.inputs = [
            None
            if one.activation is None
            else activation_parameters(statistics, one.activation, layer=plan.name, method=plan.range_method)
            for one in fit
        ]
        self.damage = [0.0] * len(fit)
        self.products = self.samples = self.weights = 0

    def weigh(self, fetched: list[Any], feed: Feed, exact: list[Array]) -> None:
        """Add the squared error that each strategy brings to the outputs."""
        x, weight, made = self.runner.run(
            [self.site.given, self.site.weight, self.op.outputs[0]], feed, quantizing=False
        )
        self._count(x, weight, made)
        for number, (strategy, parameters) in enumerate(zip(self.candidates, self.inputs, strict=True)):
            places = {self.op.inputs[self.layer.layout.weight]: self._quantized(weight, strategy)}
            if strategy.activation is not None and parameters is not None:
                quantized = fake_quantize(x.astype(np.float32), *parameters, strategy.activation)
                places[self.op.inputs[self.layer.layout.input]] = quantized.astype(x.dtype)
            elif self.op.inputs[self.layer.layout.input] is not self.site.given:
                places[self.op.inputs[self.layer.layout.input]] = x
            found = self.runner.run(fetched, {**feed, **places}, quantizing=False)
            self.damage[number] += _energy([one - other for one, other in zip(found, exact, strict=True)])

    def _quantized(self, weight: Array, strategy: Strategy) -> Array:
        layout, grid = self.layer.layout, strategy.weight
        data = np.reshape(weight.astype(np.float32), channelwise_shape(weight.shape, layout))
        factor = self.runner.norm_factor(self.layer) if self.runner.has_variable_norm(self.layer) else None
        shape = [-1 if axis == layout.weight_axis else 1 for axis in range(data.ndim)]
        on = np.float32(1.0) if factor is None else factor.reshape(shape)
        axis = layout.weight_axis if grid.per_channel else None
        scale, zero_point = scale_zero_point(*extremes(data * on, axis), grid)
        found: Array = fake_quantize(data * on, scale, zero_point, grid, axis=axis) / on
        return np.reshape(found, weight.shape).astype(weight.dtype)

    def _count(self, x: Array, weight: Array, made: Array) -> None:
        transposed = self.op.type.endswith(("BackpropInput", "BackpropInputV2"))
        channels = channelwise_shape(weight.shape, self.layer.layout)
        if transposed:
            per_weight = x.size // x.shape[self.layer.layout.input_axis]
        else:
            per_weight = made.size // channels[self.layer.layout.weight_axis]
        self.products += per_weight * weight.size
        self.samples += x.shape[-1] if self.layer.layout.samples_last else x.shape[0]
        self.weights = weight.size

    def choices(self, energy: float, cost: Cost) -> list[Choice]:
        """Return what was found, the strategies in their order and ``float`` last."""
        per_sample = self.products / max(self.samples, 1)
        found = []
        for strategy, damage in zip(self.candidates, self.damage, strict=True):
            bits = strategy.weight.bits
            other = FLOAT_BITS if strategy.activation is None else strategy.activation.bits
            taken = bits * self.weights if cost == "size" else bits * other * per_sample
            found.append(Choice(self.name, strategy.name, damage / energy if energy else 0.0, taken))
        whole = FLOAT_BITS * self.weights if cost == "size" else FLOAT_BITS**2 * per_sample
        return [*found, Choice(self.name, FLOAT, 0.0, whole)]


def _energy(arrays: Iterable[Array]) -> float:
    return float(sum(np.square(np.asarray(array, np.float64)).sum() for array in arrays))
