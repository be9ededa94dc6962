"""From a float network to a quantized one, and its calibration mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator

from dopt_api.errors import CalibrationError, ModelError, most_of
from dopt_api.types import Plan
from dopt_numpy.find_layers import Structure, refuse_quantized
from dopt_numpy.network import BatchNorm, Chain, Layer, Network, Weighted
from dopt_numpy.quantized_layer import QuantizedLayer, QuantizedNetwork
from dopt_numpy.quantizer import LayerQuantizer

__all__ = ["optimize", "require_quantized", "set_calibrate_state"]


def optimize(model: Network, plan: Plan) -> QuantizedNetwork:
    """Return a copy of ``model`` in which the layers of ``plan`` are quantized; ``model`` itself is unchanged.

    Raises:
        ModelError: The network is quantized already, or cannot be copied.
    """
    refuse_quantized(model)
    structure: Structure = plan.model_layers.structure
    try:
        copied = copy.deepcopy(model)
    except Exception as error:  # whatever a user's layer raises on being copied
        raise ModelError(
            f"The model cannot be copied: {type(error).__name__}: {error}", expected="layers that copy.deepcopy copies"
        ) from error
    inside, substitutes = dict(copied.named_layers()), {}
    for name, layer_plan in plan.quantized.items():
        path = structure.paths[name]
        layer, norm = inside[path], inside.get(structure.norms.get(path, ""))
        if not isinstance(layer, Weighted) or not isinstance(norm, BatchNorm | None):
            raise ModelError(f"Layer {name!r} is not the one for which the strategy file was checked", where=path)
        quantizer = LayerQuantizer(layer_plan, layer.weight.value)
        substitutes[id(layer)] = QuantizedLayer(layer, norm, quantizer)
    for chain in _chains(copied):
        chain.layers = {name: substitutes.get(id(layer), layer) for name, layer in chain.layers.items()}
    return QuantizedNetwork(copied, plan)


def set_calibrate_state(model: Network, calibration_mode: bool) -> None:
    """Switch calibration on or off.

    Raises:
        ModelError: The network is not a quantized one.
        CalibrationError: On switching off: layers saw no data, or NaN or infinity; the others are calibrated.
    """
    network = require_quantized(model)
    if calibration_mode == network.calibrating:
        return
    quantizers = [layer.quantizer for layer in network.quantized_layers.values()]
    if calibration_mode:
        for quantizer in quantizers:
            quantizer.start_calibration()
        return
    failures = []
    for quantizer in quantizers:
        quantizer.calibrating = False
        try:
            quantizer.conclude()
        except CalibrationError as error:  # each layer fails or not by itself
            failures.append(error)
    if failures:
        raise most_of(failures)


def require_quantized(model: Network) -> QuantizedNetwork:
    """Return the network if it is a quantized one.

    Raises:
        ModelError: It is not.
    """
    if isinstance(model, QuantizedNetwork):
        return model
    raise ModelError(
        f"This {type(model).__name__} is not a quantized model",
        expected="what optimize returned",
        fix="Call optimize first and use the model that it returns.",
    )


def _chains(layer: Layer) -> Iterator[Chain]:
    """Yield every chain, the outermost first."""
    if isinstance(layer, Chain):
        yield layer
    for child in layer.children().values():
        yield from _chains(child)
