"""Cross-layer equalization: giving the channels between two layers one size, where nothing but ReLU lies between."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from dopt_api.errors import CalibrationError
from dopt_api.quantizer import smoothing_factors
from dopt_torch.find_layers import Structure
from dopt_torch.layer_kinds import per_channel
from dopt_torch.optimize import root_of
from dopt_torch.quantized_layer import QuantizedLayer, norm_factor, norm_of

__all__ = ["equalize"]

SWEEPS = 20
"""How often the pairs are gone through at most; chains settle in few."""


@torch.no_grad()
def equalize(model: nn.Module) -> list[tuple[str, str]]:
    """Balance the weights of neighbouring layers, channel by channel, without data; the model is changed in place.

    Where one layer alone feeds another, through its folded batch normalization, ReLU, pooling or dropout, a channel can
    be made smaller in the first layer and as much greater in the second. Each channel is made to have the same greatest
    weight in both (Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction",
    equation 11), by powers of two, so that the float network computes the same to the bit. Channels of an activation
    become of more even size by it, which one scale for all of them serves better. ReLU6 and other functions that bend
    elsewhere than at 0 end a pair; see :func:`dopt_torch.smoothing.smooth` for these.

    Call it before calibration: what was calibrated of these layers is forgotten. Weights, biases and the factors of
    batch normalizations change, in the quantized model and its checkpoint; the export takes them from there.

    Args:
        model: What ``optimize_model`` returned, wrapped or not.

    Returns:
        The names of the pairs of layers that were balanced, in execution order.

    Raises:
        ModelError: The model is not a quantized one.
        CalibrationError: A weight has NaN or infinity; nothing is changed then.

    Example:
        Between ``optimize_model`` and the calibration::

            quant_model = optimize_model(model, "config.json")
            equalize(quant_model)
            set_calibrate_state(quant_model, True)
    """
    root = root_of(model)
    structure: Structure = root.__dict__["dopt_plan"].model_layers.structure
    owners = Counter(id(parameter) for module in root.modules() for parameter in module._parameters.values())
    pairs = [
        (first, second)
        for first, second in ((root.get_submodule(one), root.get_submodule(other)) for one, other in structure.pairs)
        if isinstance(first, QuantizedLayer) and isinstance(second, QuantizedLayer) and _fit(first, second, owners)
    ]
    for layer in {layer for pair in pairs for layer in pair}:
        if not torch.isfinite(_weight(layer)).all():
            name = layer.dopt_quantizer.plan.name
            raise CalibrationError(
                f"The weight of layer {name!r} has NaN or infinity", where=f"layer {name!r}", expected="finite numbers"
            )
    changed: list[tuple[QuantizedLayer, QuantizedLayer]] = []
    for _ in range(SWEEPS):
        moved = [pair for pair in pairs if _balance(*pair)]
        changed += [pair for pair in moved if pair not in changed]
        if not moved:
            break
    for layer in {layer for pair in changed for layer in pair}:
        layer.dopt_quantizer.forget()
        layer.dopt_quantizer.input_gain.zero_()
        layer.dopt_quantizer.weight_gain.zero_()
        if layer.dopt_output is not None:
            layer.dopt_output.forget()
            layer.dopt_output.gain.zero_()
    return [
        (first.dopt_quantizer.plan.name, second.dopt_quantizer.plan.name)
        for first, second in pairs
        if (first, second) in changed
    ]


def _fit(first: QuantizedLayer, second: QuantizedLayer, owners: Counter[int]) -> bool:
    """Return whether the channels between two layers are each one index of both weights, which nobody shares."""
    norm: Any = norm_of(first)
    if norm is not None and norm.weight is None:
        return False
    tensors = [*first._parameters.values(), *second._parameters.values()]
    tensors += [] if norm is None else [*norm._parameters.values()]
    if any(tensor is not None and owners[id(tensor)] > 1 for tensor in tensors):
        return False
    for layer in (first, second):
        if layer.dopt_quantizer.kind.weight_axis == 1 and getattr(layer, "groups", 1) > 1:
            return False  # transposed in groups: an output channel is no index of the weight
    alike = first.dopt_quantizer.kind.input_axis == second.dopt_quantizer.kind.input_axis
    return alike and len(_rows(first)) == len(_columns(second))


def _weight(layer: QuantizedLayer) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]  # a quantized layer has a weight
    return weight.detach()


def _rows(layer: QuantizedLayer) -> Tensor:
    """Return a layer's folded weight by output channels, ``[C, ...]``."""
    rows = _weight(layer).float().movedim(layer.dopt_quantizer.kind.weight_axis, 0).flatten(1)
    factor = norm_factor(layer)
    return rows if factor is None else rows * factor[:, None]


def _columns(layer: QuantizedLayer) -> Tensor:
    """Return a layer's folded weight by input channels, ``[C, ...]``; of none if its groups have several each."""
    weight, kind, groups = _weight(layer).float(), layer.dopt_quantizer.kind, getattr(layer, "groups", 1)
    factor = norm_factor(layer)
    if factor is not None:
        weight = weight * per_channel(factor, weight, kind.weight_axis)
    if groups == 1:
        return weight.movedim(kind.weight_input_axis, 0).flatten(1)
    return weight.flatten(1) if groups == len(weight) else weight[:0].flatten(1)


def _balance(first: Any, second: Any) -> bool:
    """Balance a pair; return whether there was anything to do."""
    made, taken = (part.abs().amax(1).cpu().numpy() for part in (_rows(first), _columns(second)))
    factors = torch.from_numpy(smoothing_factors(made, taken, 0.5)).to(_weight(first).device)
    if bool((factors == 1.0).all()):
        return False
    norm: Any = norm_of(first)
    kinds = first.dopt_quantizer.kind, second.dopt_quantizer.kind
    scaled = [norm.weight, norm.bias] if norm is not None else [first.bias]
    for vector in scaled:
        if vector is not None:
            vector.mul_(factors.to(vector))
    if norm is None:
        first.weight.mul_(per_channel(factors, first.weight, kinds[0].weight_axis).to(first.weight))
    by_input = getattr(second, "groups", 1) == 1
    axis = kinds[1].weight_input_axis if by_input else kinds[1].weight_axis
    second.weight.div_(per_channel(factors, second.weight, axis).to(second.weight))
    return True
