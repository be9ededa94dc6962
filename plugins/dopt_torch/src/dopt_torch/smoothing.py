"""Smoothing: evening out the channels of activations before they are calibrated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from dopt_api.errors import CalibrationError, ModelError, closest
from dopt_api.quantizer import smoothing_factors
from dopt_torch.layer_kinds import on_weight, samples_first
from dopt_torch.optimize import root_of
from dopt_torch.quantized_layer import QuantizedLayer, norm_factor, original_class, quantized_layers
from dopt_torch.running import evaluation, run, taking_over
from dopt_torch.statistics import collective_device

__all__ = ["smooth"]


def smooth(
    model: nn.Module, batches: Iterable[Any], *, strength: float = 0.75, layers: Collection[str] | None = None
) -> list[str]:
    """Let outliers in the inputs of linear layers go over to their weights; the model is changed in place.

    For transformers, where a few channels of an activation have values a hundred times those of the others. The
    channels of a layer's input are multiplied by powers of two, and its weight is divided by the same
    (:func:`dopt_api.quantizer.smoothing_factors`): in float, nothing changes. Layers that read one tensor one after the
    other get the same factors; the exported graph has one multiplication more for each tensor that is smoothed.

    Call it before calibration: what was calibrated is forgotten. The factors are in the quantized model's state dict;
    the float weights there stay the user's own. Under ``torch.distributed`` every rank calls it, with its own batches.

    Args:
        model: What ``optimize_model`` returned, wrapped or not. Its modes are restored.
        batches: Inputs as the model takes them: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
            Some tens of samples are enough. Any iterable; passed over once, in float.
        strength: 0 to 1: how much of the outliers goes over to the weights.
        layers: Names of the layers to smooth, linear or convolutions without groups; by default all linear ones.

    Returns:
        The names of the layers whose inputs are smoothed now, in execution order.

    Raises:
        ModelError: The model is not a quantized one, or ``layers`` has a name of none that can be smoothed.
        CalibrationError: There are no batches, or a layer's input or weight has NaN or infinity.
        ValueError: The strength is not between 0 and 1.

    Example:
        Between ``optimize_model`` and the calibration::

            quant_model = optimize_model(model, "config.json")
            smooth(quant_model, sentences[:4])
            set_calibrate_state(quant_model, True)
    """
    smoothing_factors([], [], strength)  # one that is none is refused before anything is run
    root = root_of(model)
    by_name = {layer.dopt_quantizer.plan.name: layer for layer in quantized_layers(root)}
    ordered = {name: by_name[name] for name in root.__dict__["dopt_plan"].quantized if name in by_name}
    chosen = _chosen(ordered, layers)
    watch = _Watch()
    forwards: dict[nn.Module, Callable[..., Any]] = {
        layer: partial(watch.run, layer, name if name in chosen else None) for name, layer in ordered.items()
    }
    with torch.no_grad(), evaluation(model), taking_over(forwards):
        for batch in batches:
            run(model, batch)
            watch.batches += 1
    watch.forget_latest()
    if not watch.batches:
        raise CalibrationError("There are no batches", expected="one or more inputs of the model")
    _greatest_over_ranks([watch.inputs[name] for name in chosen if name in watch.inputs])
    found = {}
    for group in watch.groups():
        found.update(dict.fromkeys(group, _factors(group, ordered, watch, strength)))
    for name, factors in found.items():
        ordered[name].dopt_quantizer.smooth(factors)
    return [name for name in ordered if name in found and bool((found[name] != 1.0).any())]


def _chosen(ordered: Mapping[str, QuantizedLayer], layers: Collection[str] | None) -> set[str]:
    """Return the names of the layers to smooth.

    Raises:
        ModelError: A name that was asked for is that of no layer that can be smoothed.
    """
    able = {
        name: layer.dopt_quantizer.kind.function == "linear"
        for name, layer in ordered.items()
        if getattr(layer, "groups", 1) == 1
    }
    if layers is None:
        return {name for name, linear in able.items() if linear}
    for name in layers:
        if name not in able:
            raise ModelError(
                f"The layer {name!r} has groups: its input cannot be smoothed"
                if name in ordered
                else f"No quantized layer is called {name!r}",
                where="layers",
                expected="names of quantized layers, linear or convolutions without groups",
                fix=closest(name, able) or "Take the names from the strategy file.",
            )
    return set(layers)


class _Watch:
    """Looks at the inputs of layers while the network runs in float.

    Attributes:
        inputs: For each layer by name, the greatest magnitudes of its input's channels, float32 ``[C]``.
        batches: How many were run.
    """

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.batches = 0
        self._leader: dict[str, str] = {}
        self.forget_latest()

    def forget_latest(self) -> None:
        """Let go of the last input that was seen."""
        self._latest: tuple[Any, str, Tensor] = (None, "", torch.empty(0))

    def run(self, layer: QuantizedLayer, name: str | None, *args: Any, **kwargs: Any) -> Any:
        """Take the place of a layer's forward: run it in float, and look at its input if it has a name."""
        if name is not None:
            self._see(layer, name, args[0] if args else next(iter(kwargs.values())))
        return original_class(layer).forward(layer, *args, **kwargs)

    def _see(self, layer: QuantizedLayer, name: str, x: Tensor) -> None:
        latest, leader, greatest = self._latest
        if latest is x:  # as query, key and value read one tensor
            self._leader[self._first(name)] = self._first(leader)
        elif x.numel():
            kind = layer.dopt_quantizer.kind
            greatest = samples_first(x, kind).float().abs().movedim(kind.input_axis, 0).flatten(1).amax(1)
            self._latest = (x, name, greatest)
        else:
            return
        self.inputs[name] = torch.maximum(self.inputs.get(name, greatest), greatest)

    def _first(self, name: str) -> str:
        while self._leader.setdefault(name, name) != name:
            name = self._leader[name]
        return name

    def groups(self) -> list[list[str]]:
        """Return the layers that were reached, those together that read one tensor."""
        groups: dict[str, list[str]] = {}
        for name in self.inputs:
            groups.setdefault(self._first(name), []).append(name)
        return list(groups.values())


def _factors(group: list[str], ordered: Mapping[str, QuantizedLayer], watch: _Watch, strength: float) -> Tensor:
    """Return the factors of layers that read one tensor, ``[C]``."""
    inputs = torch.stack([watch.inputs[name] for name in group]).amax(0)
    weights = torch.stack([_greatest_weights(ordered[name]).to(inputs) for name in group]).amax(0)
    try:
        factors = smoothing_factors(inputs.cpu().numpy(), weights.cpu().numpy(), strength)
    except ValueError as error:
        raise CalibrationError(
            f"The input or the weight of {' or '.join(map(repr, group))} has NaN or infinity",
            where=f"layer {group[0]!r}",
            expected="finite numbers",
            fix="Look for bad values in the batches, and for overflow in the model.",
        ) from error
    return torch.from_numpy(factors)


def _greatest_weights(layer: QuantizedLayer) -> Tensor:
    """Return the greatest magnitudes of the weights of each input channel, folded, ``[C]``."""
    weight: Any = layer.weight
    kind, factor = layer.dopt_quantizer.kind, norm_factor(layer)
    folded = weight.detach().float()
    if factor is not None:
        folded = folded * on_weight(factor, folded, kind.weight_axis)
    greatest: Tensor = folded.abs().movedim(kind.weight_input_axis, 0).flatten(1).amax(1)
    return greatest


def _greatest_over_ranks(tensors: list[Tensor]) -> None:
    """Replace each rank's tensors by the greatest of all ranks, in place; every rank must have as many."""
    device = collective_device()
    if device is None or not tensors:
        return
    together = torch.cat([tensor.flatten() for tensor in tensors]).to(device)
    distributed.all_reduce(together, op=distributed.ReduceOp.MAX)
    for tensor, values in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))
