"""The quantized layer: the float layer's own arithmetic on a fake-quantized input and weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from dopt_api.quantizer import BatchNorm as Folding
from dopt_api.types import Plan
from dopt_numpy.network import Array, BatchNorm, Layer, Network, Parameter, Pullback, Weighted
from dopt_numpy.quantizer import LayerQuantizer

__all__ = ["QuantizedLayer", "QuantizedNetwork", "folding_of"]

_PREFIX = "dopt_quantizer."


class QuantizedLayer(Layer):
    """A float layer with a quantizer.

    Its parameters keep the names that they have in the float layer, so that a float checkpoint fits.

    Attributes:
        layer: The float layer.
        norm: The batch normalization that is folded in, or ``None``; it stands behind the layer and runs there.
        quantizer: Scales and statistics.
    """

    def __init__(self, layer: Weighted, norm: BatchNorm | None, quantizer: LayerQuantizer) -> None:
        self.layer, self.norm, self.quantizer = layer, norm, quantizer

    def forward(self, x: Array, training: bool = False) -> tuple[Array, Pullback]:
        """Run the layer observed, quantized, or, before there is a scale, as it is."""
        quantizer, weight = self.quantizer, self.layer.weight
        if quantizer.calibrating:
            quantizer.statistics.update(x)
            return self.layer.forward(x, training)
        if not quantizer.prepare(x, training):
            return self.layer.forward(x, training)
        factor = None if self.norm is None else folding_of(self.norm).factor
        quantized, back_to_input = quantizer.quantize_input(x, training)
        in_use, back_to_weight = quantizer.quantize_weight(weight.value, factor)
        y, back = self.layer.forward_with(quantized, in_use)

        def pullback(dy: Array) -> Array:
            dx, dweight = back(dy)
            weight.accumulate(back_to_weight(dweight))
            return back_to_input(dx)

        return y, pullback

    def own_parameters(self) -> Mapping[str, Parameter]:
        """Return those of the layer and the gains."""
        gains = {_PREFIX + name: parameter for name, parameter in self.quantizer.parameters().items()}
        return {**self.layer.own_parameters(), **gains}

    def own_state(self) -> dict[str, NDArray[Any]]:
        """Return the layer's state and, behind a prefix, the quantizer's."""
        return {
            **self.layer.own_state(),
            **{_PREFIX + name: array for name, array in self.quantizer.state().items()},
        }

    def load_own_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Overwrite both."""
        self.layer.load_own_state(state)
        inner = {name[len(_PREFIX) :]: array for name, array in state.items() if name.startswith(_PREFIX)}
        self.quantizer.load_state(inner)


class QuantizedNetwork(Network):
    """A network with quantized layers.

    Attributes:
        plan: The strategy file that it was made with.
    """

    def __init__(self, network: Network, plan: Plan) -> None:
        super().__init__(network.layers)
        self.plan = plan

    @property
    def quantized_layers(self) -> dict[str, QuantizedLayer]:
        """The quantized layers by path, in execution order."""
        return {path: layer for path, layer in self.named_layers() if isinstance(layer, QuantizedLayer)}

    @property
    def calibrating(self) -> bool:
        """Whether forward passes collect statistics."""
        return any(layer.quantizer.calibrating for layer in self.quantized_layers.values())

    def forward(self, x: Array, training: bool = False) -> tuple[Array, Pullback]:
        """Run the layers; a calibration pass is one of inference, so that no running statistics move."""
        return super().forward(x, training and not self.calibrating)

    def load_state(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Load a state of this network or of the float one; what that has nothing for stays as it is.

        Raises:
            ValueError: A name is missing or unknown, or an array has another shape.
        """
        given = dict(state)
        for path, layer in self.quantized_layers.items():
            prefix = f"{path}.{_PREFIX}"
            if not any(name.startswith(prefix) for name in state):
                given.update({prefix + name: array for name, array in layer.quantizer.state().items()})
        super().load_state(given)


def folding_of(norm: BatchNorm) -> Folding:
    """Return the core's description of a batch normalization in inference."""
    return Folding(norm.gamma.value, norm.beta.value, norm.mean, norm.variance, norm.epsilon)
