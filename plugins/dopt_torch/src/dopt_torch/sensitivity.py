"""What the quantization of each layer alone does to the output, for several strategies, from one sweep over data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dopt_api import facade
from dopt_api.errors import CalibrationError, ModelError, never_calibrated
from dopt_api.quantizer import activation_parameters
from dopt_api.search import Choice
from dopt_api.strategy import FLOAT, INTEGER_STRATEGIES, Strategy, get_strategy
from dopt_torch.fake_quantize import fake_quantize
from dopt_torch.find_layers import tensors_of
from dopt_torch.optimize import root_of
from dopt_torch.post_training import calibrate
from dopt_torch.quantized_layer import QuantizedLayer, norm_factor, original_class, quantized_layers, shadowed
from dopt_torch.running import evaluation, run, taking_over

__all__ = ["Cost", "measure_sensitivity", "sensitivity_of"]

Cost = Literal["size", "bit_operations"]

FLOAT_BITS = 32


def measure_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    strategies: Sequence[str] = INTEGER_STRATEGIES,
    *,
    cost: Cost = "size",
    seed: int = 0,
) -> list[Choice]:
    r"""Return the damage that each strategy does to each layer of a calibrated model, as choices for a search.

    The damage of a layer is the relative squared error :math:`\lVert J \delta \rVert^2 / \lVert y \rVert^2` of the
    model's outputs ``y`` that its own error :math:`\delta` causes, to first order (:math:`J` is the derivative of the
    outputs by the layer's output): 0.01 is 20 dB. It is estimated as the mean of :math:`(v^T J \delta)^2` over normally
    distributed ``v``, one for each sample, which backpropagation gives for all layers at once (the Gauss-Newton form of
    the Fisher-weighted errors in Li et al. 2021, "BRECQ"). So one pass forward and one backward serve all layers and
    strategies; each strategy adds one evaluation of each layer. Layers left float have no damage.

    Args:
        model: What ``optimize_model`` returned, calibrated; unchanged. Its modes and random state are restored.
        batches: Inputs as the model takes them: a tensor, a tuple of arguments, or a dictionary of keyword arguments.
        strategies: Names of the strategies to compare, besides ``float``. A layer that cannot have one of them, such as
            groups that do not divide its weights, has no choice of it.
        cost: What a choice takes of a budget: ``"size"``, the bits of the layer's weights; ``"bit_operations"``, its
            multiplications in one sample times the bits of both factors.
        seed: Of the random directions.

    Returns:
        For each layer, in execution order, one choice for each strategy and one for ``float``.

    Raises:
        ModelError: The model is not a quantized one, or an output is not differentiable.
        CalibrationError: A layer was never calibrated, or there are no batches.
        ExtensionError: A strategy is broken.
        KeyError: There is no such strategy.
    """
    root = root_of(model)
    candidates = [get_strategy(name) for name in strategies]
    infos = {info.name: info for info in root.__dict__["dopt_plan"].model_layers.layers}
    taps = []
    for layer in quantized_layers(root):
        info = infos[layer.dopt_quantizer.plan.name]
        taps.append(_Tap(layer, [one for one in candidates if not info.unfit(one)]))
    energy, samples, generator = 0.0, 0, torch.Generator().manual_seed(seed)
    forwards: dict[nn.Module, Callable[..., Any]] = {tap.layer: tap.run for tap in taps}
    with evaluation(model), _without_gradients(model.parameters()), taking_over(forwards):
        for batch in batches:
            outputs = _outputs(model, batch)
            for tap in taps:
                tap.samples = outputs[0].shape[0]
            directions = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
            torch.autograd.backward(outputs, directions)
            energy += sum(float(output.detach().double().square().sum()) for output in outputs)
            samples += outputs[0].shape[0]
    if not samples:
        raise CalibrationError("There are no batches", expected="one or more inputs of the model")
    return [choice for tap in taps for choice in tap.choices(energy, samples, cost)]


def sensitivity_of(
    model: nn.Module,
    config_file: Path,
    batches: Iterable[Any],
    strategies: Sequence[str],
    *,
    cost: Cost,
    output_names: Sequence[str],
) -> list[Choice]:
    """Quantize and calibrate a float model and measure it: what ``dopt tune`` calls.

    Args:
        model: The float model; unchanged.
        config_file: The strategy file; layers that it leaves float are not looked at.
        batches: See :func:`measure_sensitivity`, as ``strategies`` and ``cost``. They are held in memory.
        strategies: What is compared.
        cost: What is counted.
        output_names: Not looked at: damage is measured at all outputs.
    """
    del output_names
    data = list(batches)
    quantized = facade.optimize(model, config_file, backend="torch")
    calibrate(quantized, data)
    return measure_sensitivity(quantized, data, strategies, cost=cost)


class _Tap:
    """Runs one layer in float and, when the gradient comes back, weighs the errors of the strategies by it."""

    def __init__(self, layer: QuantizedLayer, candidates: Sequence[Strategy]) -> None:
        self.layer, self.quantizer, self.candidates = layer, layer.dopt_quantizer, candidates
        self.forward = original_class(layer).forward
        self.damage = [0.0] * len(candidates)
        self.products = self.samples = 0
        if not self.quantizer.statistics.seen:
            raise never_calibrated([self.quantizer.plan.name])
        statistics, plan = self.quantizer.statistics.to_core(), self.quantizer.plan
        self.inputs = [
            None
            if strategy.activation is None
            else activation_parameters(statistics, strategy.activation, layer=plan.name, method=plan.range_method)
            for strategy in candidates
        ]

    def run(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer in float, with a gradient."""
        y: Tensor = self.forward(self.layer, *args, **kwargs)
        if not y.requires_grad:
            y = y.detach().requires_grad_()
        passed: Tensor = _Backward.apply(y, lambda gradient: self.weigh(gradient, args, kwargs))
        return passed

    @torch.no_grad()
    def weigh(self, gradient: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Add the squared effect of each strategy's error along the gradient."""
        (x, *others), exact = (args or tuple(kwargs.values())), self.forward(self.layer, *args, **kwargs)
        weight: Any = self.layer.weight
        transposed = self.quantizer.kind.weight_axis == 1
        self.products += (x if transposed else exact).numel() // weight.shape[0] * weight.numel()
        for number, (strategy, parameters) in enumerate(zip(self.candidates, self.inputs, strict=True)):
            given = self.quantizer.smooth_input(x.float())
            if strategy.activation is not None and parameters is not None:
                scale, zero_point = parameters
                ends = (end - zero_point for end in (strategy.activation.qmin, strategy.activation.qmax))
                given = fake_quantize(given, torch.tensor(scale, device=x.device), *ends)
            quantized = self.quantizer.nearest_weight(weight, norm_factor(self.layer), strategy.weight)
            with shadowed(self.layer, weight=quantized):
                found = self.forward(self.layer, given.to(x.dtype), *others)
            effects = gradient.double() * (found - exact).double()
            alone = effects.shape[0] == self.samples  # samples do not mix: their effects are squared one by one
            self.damage[number] += float((effects.flatten(1).sum(1) if alone else effects.sum()).square().sum())

    def choices(self, energy: float, samples: int, cost: Cost) -> Iterator[Choice]:
        """Yield what was found, the strategies in their order and ``float`` last."""
        name, weight = self.quantizer.plan.name, self.layer.weight.numel()  # type: ignore[operator]  # a quantized layer has a weight
        per_sample = self.products / samples
        for strategy, damage in zip(self.candidates, self.damage, strict=True):
            bits = strategy.weight.bits
            factor = FLOAT_BITS if strategy.activation is None else strategy.activation.bits
            taken = bits * weight if cost == "size" else bits * factor * per_sample
            yield Choice(name, strategy.name, damage / energy if energy else 0.0, taken)
        yield Choice(name, FLOAT, 0.0, FLOAT_BITS * weight if cost == "size" else FLOAT_BITS**2 * per_sample)


class _Backward(torch.autograd.Function):
    """The identity, whose gradient is shown to a function as it passes."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, show: Any) -> Tensor:
        ctx.show = show
        return y.clone()  # what follows may work in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.show(gradient)
        return gradient, None


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """Run the model with gradients and return its floating outputs, samples first."""
    with torch.inference_mode(False), torch.enable_grad():
        found = [tensor for tensor in tensors_of(run(model, batch)) if tensor.is_floating_point()]
    found = [tensor for tensor in found if tensor.requires_grad and tensor.dim()]
    if not found:
        raise ModelError(
            "No output of the model depends on a quantized layer in a way that can be differentiated",
            expected="tensors (in tuples, lists or dictionaries) with a gradient",
            fix="Remove 'no_grad' and 'detach' from the model's forward, or return plain tensors.",
        )
    return found


@contextmanager
def _without_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let parameters have no gradients for the time of the block."""
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    for parameter, _ in before:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
