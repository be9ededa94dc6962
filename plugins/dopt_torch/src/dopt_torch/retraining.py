"""Building blocks of retraining, for the user's own loop: norms, distillation, scales with their own rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from dopt_api.errors import CalibrationError
from dopt_api.quantizer.rounding import best_scale
from dopt_torch.fake_quantize import gain_of, weight_scale
from dopt_torch.layer_kinds import on_weight
from dopt_torch.optimize import root_of
from dopt_torch.quantized_layer import norm_factor, quantized_layers
from dopt_torch.running import evaluation, run

__all__ = ["distillation_loss", "fit_weight_scales", "freeze_norms", "parameter_groups", "reestimate_norms"]


def freeze_norms(model: nn.Module) -> RemovableHandle:
    """Let batch normalization use its running statistics in training too, and change them no more.

    Retraining ends with frozen statistics: the weights are quantized folded with these, and what moves between two
    steps is noise to them (Jacob et al. 2018, section 3.2; they freeze after the first part of training). Call it
    before training or after some epochs.

    Args:
        model: The quantized model, wrapped or not, or any module.

    Returns:
        A handle, whose ``remove()`` lets the statistics move again from the next ``model.train()`` on.
    """
    return model.register_forward_pre_hook(_still)


@torch.no_grad()
def reestimate_norms(model: nn.Module, batches: Iterable[Any]) -> list[str]:
    """Replace the running statistics of batch normalizations by those of the data in the quantized model.

    Weights that jump between two integers shift the means of their outputs from step to step, and running statistics
    lag behind them; statistics of the final weights are better (Nagel et al. 2022, "Overcoming oscillations in
    quantization-aware training", section 5.1). Call it after retraining, before the export. The statistics of a batch
    count alike, whatever its size; the weights are quantized with the statistics as they were until all have been seen.

    Args:
        model: The quantized model, wrapped or not, or any module. Modes are restored.
        batches: Inputs as the model takes them: a tensor, a tuple of arguments, or a dictionary of keyword arguments.

    Returns:
        The names of the normalizations that have new statistics.

    Raises:
        CalibrationError: There are no batches; nothing is changed then.
    """
    norms = {name: module for name, module in model.named_modules() if _has_statistics(module)}
    sums = {name: _Moments() for name in norms}
    handles = [norm.register_forward_pre_hook(sums[name].see) for name, norm in norms.items()]
    count = 0
    try:
        with evaluation(model), _batch_statistics(norms.values()):
            for batch in batches:
                run(model, batch)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    if not count:
        raise CalibrationError("There are no batches", expected="one or more inputs of the model")
    seen = [name for name, moments in sums.items() if moments.count]
    for name in seen:
        norm: Any = norms[name]
        norm.running_mean.copy_(sums[name].mean / sums[name].count)
        norm.running_var.copy_(sums[name].variance / sums[name].count)
    return seen


class _Moments:
    """Sums of the means and variances of what a batch normalization is given, over batches."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.variance = torch.zeros((), dtype=torch.float64)

    def see(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Take in a batch ``[N, C, ...]``."""
        x = args[0].double()
        over = [axis for axis in range(x.dim()) if axis != 1]
        if x.numel() // x.shape[1] < 2:  # a single value has no variance
            return
        self.count += 1
        self.mean = self.mean.to(x.device) + x.mean(over)
        self.variance = self.variance.to(x.device) + x.var(over, unbiased=True)


@contextmanager
def _batch_statistics(norms: Iterable[Any]) -> Iterator[None]:
    """Let normalizations use each batch's own statistics, as in training, and keep their running ones as they are."""
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm, _, _ in before:
        norm.training, norm.momentum = True, 0.0
    try:
        yield
    finally:
        for norm, momentum, tracked in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(tracked)


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def distillation_loss(outputs: Tensor, float_outputs: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Return how far the classes of a quantized model are from the float model's, a differentiable scalar.

    :math:`T^2 \, KL(softmax(f / T) \| softmax(q / T))`, the mean over all but the last dimension (Hinton et al. 2015,
    "Distilling the knowledge in a neural network"). It needs no labels.

    Args:
        outputs: Logits of the quantized model, ``[..., classes]``.
        float_outputs: Logits of the float model on the same inputs; no gradient goes there.
        temperature: Positive; higher ones weigh the unlikely classes more.

    Raises:
        ValueError: The temperature is not positive.

    Example:
        >>> float(distillation_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.0]])))
        0.0
    """
    if not temperature > 0:
        raise ValueError(f"The temperature is {temperature!r}; a positive number was expected, such as 1.0 or 4.0")
    found = functional.log_softmax(outputs.flatten(0, -2) / temperature, -1)
    wanted = functional.log_softmax(float_outputs.detach().flatten(0, -2) / temperature, -1)
    return functional.kl_div(found, wanted, reduction="batchmean", log_target=True) * temperature**2


def parameter_groups(
    model: nn.Module, lr: float, *, scale_lr: float | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Return two parameter groups for an optimizer: the network's own parameters, and the scales without weight decay.

    Scales are learned as relative changes (see :func:`dopt_api.quantizer.learned_scale`), all of one size, whatever the
    layer; weight decay would draw them back to where calibration put them.

    Args:
        model: The quantized model, wrapped or not.
        lr: Learning rate of the network's parameters.
        scale_lr: That of the scales; by default ``lr``.
        options: Of the first group, such as ``weight_decay``.

    Example:
        An optimizer that decays weights alone::

            optimizer = torch.optim.SGD(parameter_groups(quant_model, 1e-3, weight_decay=1e-4), momentum=0.9)
    """
    gains = [
        gain
        for layer in quantized_layers(model)
        for gain in (layer.dopt_quantizer.input_gain, layer.dopt_quantizer.weight_gain)
    ]
    gains += [layer.dopt_output.gain for layer in quantized_layers(model) if layer.dopt_output is not None]
    ours = {id(gain) for gain in gains}
    others = [parameter for parameter in model.parameters() if id(parameter) not in ours]
    return [
        {"params": others, "lr": lr, **options},
        {"params": gains, "lr": lr if scale_lr is None else scale_lr, "weight_decay": 0.0},
    ]


@torch.no_grad()
def fit_weight_scales(model: nn.Module) -> None:
    """Begin retraining with the weight scales of least squared error, in place of those that clip nothing.

    Asymmetric weights keep theirs.

    With 8 bits there is little between them; with 4, scales from the extremes spend most of the grid on few weights,
    and learned step sizes start far from where they end (initialisation matters: Bhalgat et al. 2020, "LSQ+").

    Args:
        model: The quantized model, wrapped or not; changed in place.

    Raises:
        ModelError: The model is not a quantized one.
    """
    for layer in quantized_layers(root_of(model)):
        quantizer = layer.dopt_quantizer
        weight: Any = layer._parameters["weight"]
        grid, axis, factor = quantizer.plan.strategy.weight, quantizer.kind.weight_axis, norm_factor(layer)
        if not grid.symmetric:
            continue
        folded = quantizer.smooth_weight(weight.float())
        if factor is not None:
            folded = folded * on_weight(torch.where(factor == 0, torch.ones_like(factor), factor), weight, axis)
        if grid.group is not None:
            folded = folded.reshape(-1, grid.group)
        extremes = weight_scale(folded, grid, axis).double().cpu()
        rows = folded.double().cpu().movedim(axis, 0).reshape(1, len(extremes), -1).numpy()
        best = torch.from_numpy(best_scale(rows, extremes[None].numpy(), None, grid)[0])
        quantizer.weight_gain.copy_(gain_of(best / extremes).to(quantizer.weight_gain))


def _still(model: nn.Module, *_: object) -> None:
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.training = False
