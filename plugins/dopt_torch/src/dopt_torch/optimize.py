"""From a float model to a quantized one, and its calibration mode."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dopt_api.errors import CalibrationError, ModelError, most_of
from dopt_api.types import Plan
from dopt_torch.find_layers import Structure, refuse_wrapped
from dopt_torch.layer_kinds import kind_of
from dopt_torch.quantized_layer import activations, norm_factor, quantize_in_place, quantized_layers
from dopt_torch.statistics import merge_over_ranks

__all__ = ["get_quant_loss", "optimize", "root_of", "set_calibrate_state"]


def optimize(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of ``model`` in which the layers of ``plan`` are quantized; ``model`` itself is unchanged.

    Args:
        model: The float model, of any floating type, on any device, in any mode.
        plan: The checked strategy file.

    Raises:
        ModelError: The model is wrapped or already quantized, or cannot be copied.
    """
    refuse_wrapped(model)
    with torch.inference_mode(False):  # what is made in inference mode cannot be calibrated or trained outside of it
        return _quantized_copy(model, plan)


def _quantized_copy(model: nn.Module, plan: Plan) -> nn.Module:
    structure: Structure = plan.model_layers.structure
    try:
        quantized = copy.deepcopy(model)
    except Exception as error:  # whatever a user's module raises on being copied
        raise ModelError(
            f"The model cannot be copied: {type(error).__name__}: {error}",
            expected="a model that copy.deepcopy copies",
            fix="Remove tensors that are results of computations (weight_norm, caches) from the model's attributes.",
        ) from error
    for name, layer_plan in plan.quantized.items():
        path = structure.paths[name]
        layer = quantized.get_submodule(path)
        kind = kind_of(layer)
        if kind is None:
            raise ModelError(f"Layer {name!r} changed its class while the model was copied", where=path)
        if layer_plan.output and path in structure.computes_more:
            raise ModelError(
                f"The output of layer {name!r} cannot be recorded: its forward does more after its own function",
                where=path,
                expected="a layer that returns what it computes",
                fix="Remove 'output' from this layer in the strategy file.",
            )
        norm = _place(quantized, structure.norms.get(path))
        quantize_in_place(layer, layer_plan, kind, norm, structure.rectifiers.get(path))
    _avoid_fused_inference(quantized)
    quantized.__dict__["dopt_plan"] = plan
    return quantized


def set_calibrate_state(model: nn.Module, calibration_mode: bool) -> None:
    """Switch calibration on or off; under ``torch.distributed``, every rank must switch it off together.

    While it is on, each forward pass of the model runs in evaluation mode, whatever modes its modules have, so that
    batch normalization and dropout behave as deployed and no running statistics change.

    Args:
        model: The quantized model, wrapped (DDP) or not.
        calibration_mode: On or off.

    Raises:
        ModelError: The model is not a quantized one.
        CalibrationError: On switching off: layers saw no data, or NaN or infinity; the others are calibrated.
    """
    root = root_of(model)
    if calibration_mode == ("dopt_hooks" in root.__dict__):
        return
    quantizers = activations(root)
    if calibration_mode:
        hooks = (root.register_forward_pre_hook(_enter_evaluation), root.register_forward_hook(_leave_evaluation))
        root.__dict__["dopt_hooks"] = hooks
        for quantizer in quantizers:
            quantizer.start_calibration()
        return
    for hook in root.__dict__.pop("dopt_hooks"):
        hook.remove()
    _leave_evaluation(root)  # a pass that failed half way has not
    for quantizer in quantizers:
        quantizer.calibrating = False
    merge_over_ranks(quantizer.statistics for quantizer in quantizers)
    failures: list[CalibrationError] = []
    for quantizer in quantizers:
        try:
            quantizer.conclude()
        except CalibrationError as error:  # noqa: PERF203  # each layer fails or not by itself
            failures.append(error)
    if failures:
        raise most_of(failures)


def get_quant_loss(model: nn.Module) -> Tensor:
    """Return the quantization loss, a differentiable scalar on the model's device; 0 when every layer is float.

    It is the mean over the quantized layers of the relative squared error of the weight plus, after a training pass,
    that of the probed elements of the input; see :mod:`dopt_api.quantizer.training`.

    Args:
        model: The quantized model, wrapped (DDP) or not.

    Raises:
        ModelError: The model is not a quantized one.
    """
    root = root_of(model)
    errors = []
    for layer in quantized_layers(root):
        weight = layer.dopt_quantizer.weight_error(layer._parameters["weight"], norm_factor(layer))  # type: ignore[arg-type]  # a quantized layer has a weight
        given = layer.dopt_quantizer.input_error()
        errors.append(weight if given is None else weight + given)
    if errors:
        return torch.stack(errors).mean()
    first = next(root.parameters(), torch.zeros(()))
    return torch.zeros((), device=first.device)


def _enter_evaluation(root: nn.Module, *_: object) -> None:
    """Put every module in evaluation mode and remember its own mode."""
    root.__dict__.setdefault("dopt_modes", {name: module.training for name, module in root.named_modules()})
    for module in root.modules():
        module.training = False


def _leave_evaluation(root: nn.Module, *_: object) -> None:
    """Give the modules their own modes back."""
    modes: dict[str, bool] = root.__dict__.pop("dopt_modes", {})
    for name, module in root.named_modules():
        module.training = modes.get(name, module.training)


def root_of(model: nn.Module) -> nn.Module:
    """Return the module that :func:`optimize` returned, which may stand inside wrappers."""
    for module in model.modules():
        if "dopt_plan" in module.__dict__:
            return module
    raise ModelError(
        f"This {type(model).__name__} is not a quantized model",
        expected="what optimize_model returned, or a wrapper of it",
        fix="Call optimize_model first and use the model that it returns.",
    )


def _place(model: nn.Module, path: str | None) -> tuple[nn.Module, str] | None:
    if path is None:
        return None
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def _avoid_fused_inference(model: nn.Module) -> None:
    """Keep transformer layers from their fused inference path, which reads weights and never calls the layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and quantized_layers(module):
            module.__dict__["activation_relu_or_gelu"] = 0
        if isinstance(module, nn.TransformerEncoder) and quantized_layers(module):
            module.__dict__["use_nested_tensor"] = False
            module.__dict__["enable_nested_tensor"] = False
