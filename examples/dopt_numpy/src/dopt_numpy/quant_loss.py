"""The quantization loss, with its gradients."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dopt_api.quantizer import Grid, fake_quantize, gain_gradient, relative_squared_error
from dopt_numpy.network import Network
from dopt_numpy.optimize import require_quantized
from dopt_numpy.quantized_layer import QuantizedLayer, QuantizedNetwork, folding_of
from dopt_numpy.quantizer import Folded

__all__ = ["QuantLoss", "error_gradients", "get_quant_loss"]


class QuantLoss:
    """The mean over the quantized layers of the relative squared errors of weight and probed input.

    Attributes:
        value: The loss.

    Example:
        In a training step, between the network's pass and its pullback::

            logits, pullback = model.forward(x, training=True)
            value, gradient = cross_entropy(logits, labels)
            get_quant_loss(model).backward(0.1)
            pullback(gradient)
            optimizer.step()
    """

    def __init__(self, network: QuantizedNetwork) -> None:
        self._layers = list(network.quantized_layers.values())
        self.value = sum(map(_error, self._layers)) / max(len(self._layers), 1)

    def __float__(self) -> float:
        return float(self.value)

    def backward(self, weight: float = 1.0) -> None:
        """Add the gradients of ``weight`` times the loss, integers held fixed.

        Those of weights and gains are added at once; those of the inputs reach the layers before when the training
        pass's pullback runs, which therefore comes after.
        """
        for layer in self._layers:
            _add_gradients(layer, weight / len(self._layers))


def get_quant_loss(model: Network) -> QuantLoss:
    """Return the quantization loss; 0 when every layer is float.

    Raises:
        ModelError: The network is not a quantized one.
    """
    return QuantLoss(require_quantized(model))


def error_gradients(
    x: ArrayLike, scale: ArrayLike, zero_point: ArrayLike, grid: Grid, *, axis: int | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    r"""Return the gradients of :func:`dopt_api.quantizer.relative_squared_error`, integers held fixed.

    With :math:`\hat x = r s`, :math:`S = \sum x^2` and :math:`E = \sum (\hat x - x)^2 / S`,

    .. math:: \partial E / \partial x = -2 (\hat x - x + E x) / S, \qquad
              \partial E / \partial s = 2 \sum (\hat x - x) r / S

    Args:
        x: The data, any shape.
        scale: ``[]``, or ``[C]`` with ``axis``.
        zero_point: Integers of the same shape.
        grid: The integer grid.
        axis: The channel axis, or ``None``.

    Returns:
        Gradient of ``x``, of its shape, and of the scale, of its shape; both float64.
    """
    data = np.asarray(x, np.float64)
    energy = float((data**2).sum()) or 1.0
    value = relative_squared_error(x, scale, zero_point, grid, axis=axis)
    nearest = fake_quantize(x, scale, zero_point, grid, axis=axis).astype(np.float64)
    error = nearest - data
    others = None if axis is None else tuple(i for i in range(data.ndim) if i != axis)
    dscale = 2 * (error * nearest).sum(axis=others) / np.asarray(scale, np.float64) / energy
    return -2 * (error + value * data) / energy, np.asarray(dscale)


def _folded(layer: QuantizedLayer) -> Folded:
    return layer.quantizer.fold(layer.layer.weight.value, None if layer.norm is None else folding_of(layer.norm).factor)


def _error(layer: QuantizedLayer) -> float:
    quantizer, folded = layer.quantizer, _folded(layer)
    strategy, probe = quantizer.plan.strategy, quantizer.probe
    error = relative_squared_error(folded.weight, folded.scale, 0, strategy.weight, axis=quantizer.axis)
    if probe is not None:
        scale, zero_point = quantizer.learned_input_scale, quantizer.input_zero_point
        error += relative_squared_error(probe.values, scale, zero_point, quantizer.plan.input_grid)
    return error


def _add_gradients(layer: QuantizedLayer, share: float) -> None:
    quantizer, folded = layer.quantizer, _folded(layer)
    strategy, probe = quantizer.plan.strategy, quantizer.probe
    dfolded, dscale = error_gradients(folded.weight, folded.scale, 0, strategy.weight, axis=quantizer.axis)
    layer.layer.weight.accumulate(share * dfolded * folded.factor)
    quantizer.weight_gain.accumulate(share * gain_gradient(dscale, folded.base, quantizer.weight_gain.value))
    if probe is not None:
        scale, zero_point = quantizer.learned_input_scale, quantizer.input_zero_point
        dx, dscale = error_gradients(probe.values, scale, zero_point, quantizer.plan.input_grid)
        probe.gradient = (share * dx + (0.0 if probe.gradient is None else probe.gradient)).astype(np.float32)
        quantizer.input_gain.accumulate(
            share * gain_gradient(dscale, quantizer.input_scale, quantizer.input_gain.value)
        )
